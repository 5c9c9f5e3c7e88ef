"""Keys, certificates and signed images, made for a test; nothing of it is the agent's."""

import base64
import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, assert_never

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa
from cryptography.x509.oid import NameOID

from agent.errors import ImageSourceUnavailable, ImageUnacceptable
from agent.image import Image
from agent.signatures import Signatures
from agent.transfer import RetryPolicy

PrivateKey = rsa.RSAPrivateKey | dsa.DSAPrivateKey | ec.EllipticCurvePrivateKey

HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA-224": hashes.SHA224(),
    "SHA-256": hashes.SHA256(),
    "SHA-384": hashes.SHA384(),
    "SHA-512": hashes.SHA512(),
}


def new_key(key_type: str = "ECC_SECP384R1") -> PrivateKey:
    match key_type:
        case "RSA-PSS":
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "DSA":
            return dsa.generate_private_key(key_size=2048)
        case "ECC_SECP384R1":
            return ec.generate_private_key(ec.SECP384R1())
        case "ECC_SECP521R1":
            return ec.generate_private_key(ec.SECP521R1())
        case _:
            raise AssertionError(key_type)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signs images, or certificates; `certificate_id` is what the certificate is known by."""

    key_type: str
    key: PrivateKey
    certificate: x509.Certificate
    certificate_id: str

    @classmethod
    def make(
        cls,
        name: str = "signer",
        *,
        key_type: str = "ECC_SECP384R1",
        issuer: "Signer | None" = None,
        is_ca: bool = False,
        expired: bool = False,
    ) -> Self:
        """Make a key and its certificate, by `issuer`, or by itself."""
        key = new_key(key_type)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        days = dt.timedelta(days=1)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * days)
            .not_valid_after(now - days if expired else now + days)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=is_ca,
                    crl_sign=is_ca,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(key if issuer is None else issuer.key, hashes.SHA256())
        )
        return cls(
            key_type=key_type,
            key=key,
            certificate=certificate,
            certificate_id=str(uuid.uuid4()),
        )

    def properties(self, data: bytes, *, hash_method: str = "SHA-256") -> dict[str, str]:
        """Return the properties of an image of those bytes that is signed by us."""
        hash_ = HASHES[hash_method]
        match self.key:
            case rsa.RSAPrivateKey():
                pss = padding.PSS(padding.MGF1(hash_), padding.PSS.MAX_LENGTH)
                signature = self.key.sign(data, pss, hash_)
            case dsa.DSAPrivateKey():
                signature = self.key.sign(data, hash_)
            case ec.EllipticCurvePrivateKey():
                signature = self.key.sign(data, ec.ECDSA(hash_))
            case _:
                assert_never(self.key)
        return {
            "img_signature": base64.b64encode(signature).decode(),
            "img_signature_hash_method": hash_method,
            "img_signature_key_type": self.key_type,
            "img_signature_certificate_uuid": self.certificate_id,
        }

    def signed(self, image: Image, data: bytes, *, hash_method: str = "SHA-256") -> Image:
        """Return the record of an image with the signature of `data` among its properties."""
        return replace(image, properties=self.properties(data, hash_method=hash_method))


class Certificates:
    """Certificates in memory that can be away, and count how often they are asked for."""

    def __init__(self, *signers: Signer) -> None:
        self.known = {signer.certificate_id: signer.certificate for signer in signers}
        self.available = True
        self.asked = 0

    def get(self, certificate_id: str) -> x509.Certificate:
        self.asked += 1
        if not self.available:
            raise ImageSourceUnavailable("the key manager is away")
        try:
            return self.known[certificate_id]
        except KeyError:
            raise ImageUnacceptable(f"no certificate {certificate_id}") from None


def signatures(
    certificates: Certificates,
    *,
    verify: bool = False,
    validate: bool = False,
    trusted: Sequence[str] = (),
) -> Signatures:
    return Signatures(
        certificates,
        verify=verify,
        validate=validate,
        trusted=trusted,
        policy=RetryPolicy(num_retries=1, initial_s=0.01, max_s=0.01),
    )
