"""Verifies the signatures of images, as Nova's `verify_glance_signatures` does.

What is signed is the hash of an image's bytes as the image source sends them.
So they are hashed while they pass, like for the hash of the image source, and
a signature is verified of the digest. The rules are those of Nova and Glance,
which have them from cursive: RSA-PSS with the longest salt, DSA or ECDSA; a
certificate is validated by cursive itself.
"""

import base64
import binascii
import logging
import time
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cursive.certificate_utils import CertificateVerificationContext
from cursive.exception import SignatureVerificationError

from agent import transfer
from agent.cancellation import Cancellation
from agent.certificates import Certificates
from agent.errors import ImageUnacceptable
from agent.image import Image
from agent.proof import Claim, Demand, Proof, claimed
from agent.transfer import RetryPolicy

LOG = logging.getLogger(__name__)

# castellan has no time-out for Barbican.
_KEY_MANAGER_LIMIT_S: Final = 60.0

_HASHES: Final[dict[str, type[hashes.HashAlgorithm]]] = {
    "sha224": hashes.SHA224,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}


class Signatures:
    """Knows whose signatures count; may be shared by any number of threads."""

    def __init__(
        self,
        certificates: Certificates,
        *,
        verify: bool,
        validate: bool,
        trusted: Sequence[str],
        policy: RetryPolicy,
    ) -> None:
        """`verify`: whether all images have to be signed.

        `validate`: whether `trusted` has to have issued the certificates they
        are signed with. A job that names certificates it trusts asks for both.
        """
        self._certificates = certificates
        self._verify = verify
        self._validate = validate
        self._trusted = frozenset(trusted)
        self._policy = policy

    def demand(self, trusted: Sequence[str]) -> Demand | None:
        """Return what has to be proven for a job that names the certificates it trusts, if any."""
        if trusted:
            return Demand(trusted=frozenset(trusted))
        if not self._verify:
            return None
        return Demand(trusted=self._trusted if self._validate else None)

    def check(self, image: Image, demand: Demand, cancellation: Cancellation) -> "Check":
        """Return what the image's bytes have to pass; before any is asked for.

        Raises:
            ImageUnacceptable: it is not signed, or not with a certificate that counts.
            ImageSourceUnavailable: the key manager is away, and remained so.
            BootwrightError: what the cancellation was given.
        """
        claim = claimed(image)

        def get(certificate_id: str) -> x509.Certificate:
            return transfer.persistently(
                lambda: self._certificates.get(certificate_id),
                f"certificate {certificate_id} of image {image.id}",
                self._policy,
                cancellation,
                limit_s=_KEY_MANAGER_LIMIT_S,
            )

        certificate = get(claim.certificate)
        if demand.trusted is not None:
            issuers = []
            for certificate_id in sorted(demand.trusted):
                try:
                    issuers.append((certificate_id, get(certificate_id)))
                except ImageUnacceptable as e:
                    LOG.warning("a trusted certificate is passed over: %s", e)
            _validate(image, claim, certificate, issuers)
        return Check(image, claim, certificate, demand)


class Check:
    """Of one image's signature; nothing but the digest is missing."""

    def __init__(
        self, image: Image, claim: Claim, certificate: x509.Certificate, demand: Demand
    ) -> None:
        """Raises: ImageUnacceptable: no digest could ever pass."""
        self.algorithm = claim.algorithm
        """hashlib's name of the hash that was signed."""
        self._image = image
        self._claim = claim
        self._certificate = certificate
        self._trusted = None if demand.trusted is None else tuple(sorted(demand.trusted))
        self._signature = _decoded(image, claim)
        self._key = certificate.public_key()
        if not _fits(self._key, claim.key_type):
            raise ImageUnacceptable(
                f"image {image.id} is signed with a key of type {claim.key_type!r:.40}, which "
                f"certificate {claim.certificate} has not, or nobody knows",
                "correct the image's property img_signature_key_type, or "
                "img_signature_certificate_uuid",
            )

    def prove(self, digest: str) -> Proof:
        """Return the proof for an image whose bytes have that hex digest.

        Raises:
            ImageUnacceptable: it is another digest that was signed, or by another key.
        """
        try:
            self._verify(bytes.fromhex(digest))
        except InvalidSignature as e:
            raise ImageUnacceptable(
                f"the signature of image {self._image.id} is wrong: it is not one of the bytes of "
                f"the image ({self._claim.hash_method} {digest:.16}…) by the key of certificate "
                f"{self._claim.certificate}",
                "find out who changed the image or its properties; sign what is right anew",
            ) from e
        return Proof(
            claim=self._claim,
            digest=f"{self.algorithm}:{digest}",
            fingerprint=self._certificate.fingerprint(hashes.SHA256()).hex(),
            trusted=self._trusted,
            proven_at=time.time(),
        )

    def _verify(self, digest: bytes) -> None:
        hash_ = _HASHES[self.algorithm]()
        match self._key:
            case rsa.RSAPublicKey():
                pss = padding.PSS(padding.MGF1(hash_), padding.PSS.MAX_LENGTH)
                try:
                    self._key.verify(self._signature, digest, pss, Prehashed(hash_))
                except ValueError as e:  # the key is too short for such a hash
                    raise InvalidSignature from e
            case dsa.DSAPublicKey():
                self._key.verify(self._signature, digest, Prehashed(hash_))
            case ec.EllipticCurvePublicKey():
                self._key.verify(self._signature, digest, ec.ECDSA(Prehashed(hash_)))
            case _:
                raise AssertionError("the key fits one of the known types")


def _fits(key: object, key_type: str) -> bool:
    match key:
        case rsa.RSAPublicKey():
            return key_type == "RSA-PSS"
        case dsa.DSAPublicKey():
            return key_type == "DSA"
        case ec.EllipticCurvePublicKey():
            return key_type == f"ECC_{key.curve.name.upper()}"
        case _:
            return False


def _decoded(image: Image, claim: Claim) -> bytes:
    try:
        return base64.b64decode(claim.signature, validate=True)
    except binascii.Error as e:
        raise ImageUnacceptable(
            f"the property img_signature of image {image.id} is not Base64: {e}",
            "set it to the signature in Base64",
        ) from e


def _validate(
    image: Image,
    claim: Claim,
    certificate: x509.Certificate,
    issuers: Sequence[tuple[str, x509.Certificate]],
) -> None:
    context = CertificateVerificationContext(
        issuers,
        enforce_valid_dates=True,
        enforce_signing_extensions=True,
        enforce_path_length=True,
    )
    try:
        context.update(certificate)
        context.verify()
    except (SignatureVerificationError, ValueError, TypeError) as e:
        raise ImageUnacceptable(
            f"image {image.id} is signed with certificate {claim.certificate}, which is not "
            f"trusted: {e}",
            "add the certificate that issued it to those trusted (trusted_certificates of the "
            "job, or default_trusted_certificate_ids in [glance]), or sign the image with one "
            "that is trusted",
        ) from e
