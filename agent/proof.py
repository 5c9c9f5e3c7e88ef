"""The signature of an image, as values: what is claimed, what is demanded, what was proven.

No cryptography here (`agent.signatures`), and no certificates
(`agent.certificates`).
"""

from dataclasses import dataclass
from typing import Final

from agent.errors import ImageUnacceptable
from agent.image import Image

HASH_METHODS: Final = {f"SHA-{bits}": f"sha{bits}" for bits in (224, 256, 384, 512)}
"""Those that an image may be signed with, and hashlib's names of them."""

_PROPERTIES: Final = (
    "img_signature",
    "img_signature_hash_method",
    "img_signature_key_type",
    "img_signature_certificate_uuid",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the properties of an image say of its signature."""

    signature: str
    """Base64."""
    hash_method: str
    """One of `HASH_METHODS`."""
    key_type: str
    """`RSA-PSS`, `DSA` or `ECC_` with the name of a curve."""
    certificate: str
    """Its id, by which the key manager has it."""

    @property
    def algorithm(self) -> str:
        """hashlib's name of the hash that was signed."""
        return HASH_METHODS[self.hash_method]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """That a signature was found right, kept in the manifest of what was signed.

    It stays when the certificate expires later: what it proved is that the
    bytes were right when they came.
    """

    claim: Claim
    digest: str
    """`algorithm:hex` of the bytes that were signed: those the image source sent."""
    fingerprint: str
    """SHA-256 of the certificate, for people."""
    trusted: tuple[str, ...] | None
    """What the certificate was validated against; None if it was not."""
    proven_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """That nothing be had of an image whose signature is not proven."""

    trusted: frozenset[str] | None
    """Ids of the certificates one of which must have issued the image's, directly or not; None
    takes whatever certificate the key manager has."""

    def is_met(self, claim: Claim | None, proof: Proof | None) -> bool:
        """Return whether nothing more has to be shown of an image that claims `claim`."""
        if proof is None or proof.claim != claim:
            return False
        return self.trusted is None or (
            proof.trusted is not None and self.trusted.issuperset(proof.trusted)
        )


def claimed(image: Image) -> Claim:
    """Return the claim of an image.

    Raises:
        ImageUnacceptable: it is not signed, or not in a way that could be verified.
    """
    values = {name: image.properties.get(name, "") for name in _PROPERTIES}
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ImageUnacceptable(
            f"image {image.id} has to be signed, and its properties {', '.join(missing)} are "
            "missing",
            "sign it and set the properties, or use an image that is signed",
        )
    claim = Claim(
        signature="".join(values["img_signature"].split()),
        hash_method=values["img_signature_hash_method"],
        key_type=values["img_signature_key_type"],
        certificate=values["img_signature_certificate_uuid"],
    )
    if claim.hash_method not in HASH_METHODS:
        raise ImageUnacceptable(
            f"image {image.id} is signed with the hash {claim.hash_method!r:.40}, which is none of "
            f"{', '.join(HASH_METHODS)}",
            "sign it with one of them, and set img_signature_hash_method to that",
        )
    return claim
