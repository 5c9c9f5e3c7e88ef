"""Which signatures of images count, and whose certificates are trusted."""

import base64
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cursive.signature_utils import HASH_METHODS, SignatureKeyType

from agent.cancellation import Cancellation
from agent.errors import ImageUnacceptable
from agent.proof import Demand
from tests.cache_kit import IMAGE_ID, CacheKit, Source, source
from tests.signed_hosts import DATA, KEY_TYPES, Hosts, hosts, in_cache, signer, signers
from tests.signing import HASHES, Certificates, Signer, signatures

__all__ = ["hosts", "signer", "signers", "source"]

ANY = Demand(trusted=None)


# The signature itself


@pytest.mark.parametrize("hash_method", HASHES)
@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_what_is_signed_is_proven_and_cursive_agrees(
    signers: dict[str, Signer], source: Source, key_type: str, hash_method: str
) -> None:
    signer = signers[key_type]
    image = signer.signed(source.add(DATA), DATA, hash_method=hash_method)
    check = signatures(Certificates(signer)).check(image, ANY, Cancellation())
    oracle = SignatureKeyType.lookup(key_type).create_verifier(
        base64.b64decode(image.properties["img_signature"]),
        HASH_METHODS[hash_method],
        signer.certificate.public_key(),
    )
    oracle.update(DATA)

    proof = check.prove(hashlib.new(check.algorithm, DATA).hexdigest())

    oracle.verify()
    assert proof.digest == f"{check.algorithm}:{hashlib.new(check.algorithm, DATA).hexdigest()}"
    assert proof.fingerprint == signer.certificate.fingerprint(hashes.SHA256()).hex()
    with pytest.raises(ImageUnacceptable, match=r"signature of image .* is wrong"):
        check.prove(hashlib.new(check.algorithm, DATA + b"x").hexdigest())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"img_signature": ""}, "img_signature are missing"),
        ({"img_signature_certificate_uuid": ""}, "img_signature_certificate_uuid are missing"),
        ({"img_signature": "%%%"}, "not Base64"),
        ({"img_signature_hash_method": "MD5"}, "signed with the hash 'MD5'"),
        ({"img_signature_hash_method": "SHA-512"}, "is wrong"),
        ({"img_signature_key_type": "RSA-PSS"}, "key of type 'RSA-PSS'"),
        ({"img_signature_key_type": "ECC_SECP521R1"}, "key of type 'ECC_SECP521R1'"),
        ({"img_signature_certificate_uuid": "../../etc/passwd"}, "no certificate"),
    ],
)
def test_a_claim_that_is_wrong_in_one_point_is_refused_and_leaves_nothing(
    hosts: Hosts, source: Source, signer: Signer, changed: dict[str, str], message: str
) -> None:
    image = signer.signed(source.add(DATA), DATA)
    image = replace(image, properties={**image.properties, **changed})
    kit = hosts.strict()

    with pytest.raises(ImageUnacceptable, match=message):
        kit.acquire(image)

    assert in_cache(kit) == []


def test_an_image_without_a_signature_is_refused_before_a_byte_is_asked_for(
    hosts: Hosts, source: Source
) -> None:
    kit = hosts.strict()
    with pytest.raises(ImageUnacceptable, match="has to be signed"):
        kit.acquire(source.add(DATA))
    assert source.opened == []
    assert in_cache(kit) == []


def test_a_signature_in_lines_is_understood(hosts: Hosts, source: Source, signer: Signer) -> None:
    image = signer.signed(source.add(DATA), DATA)
    signature = image.properties["img_signature"]
    in_lines = f"{signature[:64]}\n{signature[64:]}\n"
    image = replace(image, properties={**image.properties, "img_signature": in_lines})

    assert hosts.strict().acquire(image).path.read_bytes() == DATA


# Trust


@pytest.fixture(scope="module")
def authority() -> Signer:
    return Signer.make("authority", is_ca=True)


def trusting_kit(
    tmp_path: Path, source: Source, *signers: Signer, trusted: tuple[str, ...]
) -> CacheKit:
    return Hosts(tmp_path / "instances", source, Certificates(*signers)).trusting(*trusted)


def test_a_chain_to_a_trusted_certificate_is_enough(
    tmp_path: Path, source: Source, authority: Signer
) -> None:
    middle = Signer.make("middle", issuer=authority, is_ca=True)
    leaf = Signer.make("leaf", issuer=middle)
    trusted = (authority.certificate_id, middle.certificate_id)
    kit = trusting_kit(tmp_path, source, authority, middle, leaf, trusted=trusted)

    kit.acquire(leaf.signed(source.add(DATA), DATA))

    proof = kit.store.get(IMAGE_ID).manifest.proof
    assert proof is not None
    assert proof.trusted == tuple(sorted(trusted))


@pytest.mark.parametrize("how", ["nothing", "another", "itself", "expired", "not-a-ca", "missing"])
def test_a_certificate_nobody_trusted_has_issued_is_refused(
    tmp_path: Path, source: Source, authority: Signer, how: str
) -> None:
    another = Signer.make("another", is_ca=True)
    no_ca = Signer.make("no ca", issuer=authority)
    leaf = {
        "itself": Signer.make("self-signed"),
        "expired": Signer.make("leaf", issuer=authority, expired=True),
        "not-a-ca": Signer.make("leaf", issuer=no_ca),
    }.get(how, Signer.make("leaf", issuer=authority))
    trusted = {
        "nothing": (),
        "another": (another.certificate_id,),
        "itself": (leaf.certificate_id,),
        "not-a-ca": (authority.certificate_id, no_ca.certificate_id),
        "missing": ("4f7b3d1e-0000-4000-8000-000000000000",),
    }.get(how, (authority.certificate_id,))
    kit = trusting_kit(tmp_path, source, authority, another, no_ca, leaf, trusted=trusted)

    with pytest.raises(ImageUnacceptable, match="which is not trusted"):
        kit.acquire(leaf.signed(source.add(DATA), DATA))

    assert source.opened == []
    assert in_cache(kit) == []


def test_a_job_that_trusts_others_is_not_content_with_the_hosts_proof(
    tmp_path: Path, source: Source, authority: Signer
) -> None:
    another = Signer.make("another", is_ca=True)
    leaf = Signer.make("leaf", issuer=authority)
    kit = trusting_kit(
        tmp_path, source, authority, another, leaf, trusted=(authority.certificate_id,)
    )
    image = leaf.signed(source.add(DATA), DATA)
    kit.acquire(image)

    with pytest.raises(ImageUnacceptable, match="which is not trusted"):
        kit.acquire(image, trusted=[another.certificate_id])

    kit.acquire(image, trusted=[another.certificate_id, authority.certificate_id])
    assert len(source.opened) == 1


def test_a_certificate_that_is_trusted_no_more_ends_what_it_had_proven(
    tmp_path: Path, source: Source, authority: Signer
) -> None:
    leaf = Signer.make("leaf", issuer=authority)
    hosts = Hosts(tmp_path / "instances", source, Certificates(authority, leaf))
    image = leaf.signed(source.add(DATA), DATA)
    hosts.trusting(authority.certificate_id).acquire(image)

    with pytest.raises(ImageUnacceptable, match="which is not trusted"):
        hosts.trusting().acquire(image)


def test_a_job_can_demand_what_the_host_does_not(
    tmp_path: Path, source: Source, authority: Signer
) -> None:
    leaf = Signer.make("leaf", issuer=authority)
    kit = Hosts(tmp_path / "instances", source, Certificates(authority, leaf)).lax()

    with pytest.raises(ImageUnacceptable, match="has to be signed"):
        kit.acquire(source.add(DATA), trusted=[authority.certificate_id])
    kit.acquire(leaf.signed(source.add(DATA), DATA), trusted=[authority.certificate_id])
