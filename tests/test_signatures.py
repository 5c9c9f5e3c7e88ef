"""Signatures of images: which count, and that nobody gets an image without what was demanded."""

import base64
import hashlib
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cursive.signature_utils import HASH_METHODS, SignatureKeyType

from agent.base import Base
from agent.cancellation import Cancellation
from agent.errors import ImageCorrupt, ImageSourceUnavailable, ImageUnacceptable
from agent.image import Image
from agent.manifest import base_name
from agent.proof import Demand
from tests.cache_kit import IMAGE_ID, MIB, CacheKit, Source, random_bytes, source
from tests.signing import HASHES, Certificates, Signer, signatures

__all__ = ["source"]

ANY = Demand(trusted=None)
DATA = random_bytes(2)

KEY_TYPES = ("RSA-PSS", "DSA", "ECC_SECP384R1", "ECC_SECP521R1")


@pytest.fixture(scope="module")
def signers() -> dict[str, Signer]:
    return {key_type: Signer.make(key_type, key_type=key_type) for key_type in KEY_TYPES}


@pytest.fixture(scope="module")
def signer(signers: dict[str, Signer]) -> Signer:
    return signers["ECC_SECP384R1"]


class Hosts:
    """One cache, seen by agents that are configured in different ways."""

    def __init__(self, directory: Path, source: Source, certificates: Certificates) -> None:
        self.directory = directory
        self.source = source
        self.certificates = certificates

    def lax(self) -> CacheKit:
        """Demands nothing."""
        return self._kit(verify=False)

    def strict(self, *, require_hash: bool = True) -> CacheKit:
        return self._kit(verify=True, require_hash=require_hash)

    def trusting(self, *trusted: str) -> CacheKit:
        return CacheKit(
            directory=self.directory,
            source=self.source,
            signatures=signatures(self.certificates, verify=True, validate=True, trusted=trusted),
        )

    def _kit(self, *, verify: bool, require_hash: bool = True) -> CacheKit:
        return CacheKit(
            directory=self.directory,
            source=self.source,
            signatures=signatures(self.certificates, verify=verify),
            require_hash=require_hash,
        )


@pytest.fixture
def hosts(tmp_path: Path, source: Source, signer: Signer) -> Hosts:
    return Hosts(tmp_path / "instances", source, Certificates(signer))


def in_cache(kit: CacheKit) -> list[str]:
    """Every file of the cache that bears a base's name or is on its way to one."""
    return sorted(
        str(path.relative_to(kit.store.directory))
        for path in kit.store.directory.rglob("*")
        if path.is_file() and path.parent.name not in (".locks", ".hosts", ".pins")
    )


def qcow2_of(raw: bytes, work: Path) -> bytes:
    (work / "raw").write_bytes(raw)
    command: list[str | Path] = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        work / "raw",
        work / "qcow2",
    ]
    subprocess.run(command, check=True)
    return (work / "qcow2").read_bytes()


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


# A base that is there already


def test_a_raw_base_fetched_without_is_proven_from_its_own_bytes(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    image = signer.signed(source.add(DATA), DATA, hash_method="SHA-256")
    hosts.lax().acquire(image)

    base = hosts.strict().acquire(image)

    assert (base.origin, source.opened) == ("cache", [(IMAGE_ID, 0)])
    proof = hosts.lax().store.get(IMAGE_ID).manifest.proof
    assert proof is not None
    assert proof.claim.certificate == signer.certificate_id


def test_the_digest_that_was_verified_at_the_fetch_is_enough_for_a_signature_of_it(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    data = qcow2_of(DATA, tmp_path)
    image = signer.signed(source.add(data, disk_format="qcow2"), data, hash_method="SHA-512")
    hosts.lax().acquire(image)

    assert hosts.strict().acquire(image).origin == "cache"


def test_a_base_that_is_not_what_was_signed_is_fetched_anew_once(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    data = qcow2_of(DATA, tmp_path)
    image = signer.signed(source.add(data, disk_format="qcow2"), data, hash_method="SHA-256")
    hosts.lax().acquire(image)

    origins = [hosts.strict().acquire(image).origin for _ in range(2)]

    assert origins == ["memory", "cache"]
    assert len(source.opened) == 2
    assert hosts.lax().acquire(image).path.read_bytes() == DATA


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize("hash_method", ["SHA-256", "SHA-512"])
def test_a_base_whose_signature_is_wrong_is_never_handed_out(
    hosts: Hosts, signer: Signer, tmp_path: Path, disk_format: str, hash_method: str
) -> None:
    source = hosts.source
    data = qcow2_of(DATA, tmp_path) if disk_format == "qcow2" else DATA
    tampered = signer.signed(
        source.add(data, disk_format=disk_format), b"as it was", hash_method=hash_method
    )
    hosts.lax().acquire(tampered)

    for _ in range(2):
        with pytest.raises(ImageUnacceptable, match=r"signature of image .* is wrong"):
            hosts.strict().acquire(tampered)
    # Who demands nothing still has it.
    assert hosts.lax().acquire(tampered).origin == "cache"
    assert hosts.lax().store.get(IMAGE_ID).manifest.proof is None


def test_a_base_is_not_proven_by_bytes_that_are_damaged(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    image = signer.signed(source.add(DATA), DATA)
    base = hosts.lax().acquire(image)
    base.path.chmod(0o600)
    with base.path.open("r+b") as file:
        file.write(b"damage")

    assert hosts.strict().acquire(image).origin == "memory"
    assert hosts.lax().acquire(image).path.read_bytes() == DATA


def test_an_image_signed_after_it_was_fetched_boots_offline_once_proven(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    hosts.lax().acquire(source.add(DATA))
    source.images[IMAGE_ID] = signer.signed(source.images[IMAGE_ID], DATA)
    hosts.strict().acquire(source.images[IMAGE_ID])

    source.available = hosts.certificates.available = False
    kit = hosts.strict()
    image = kit.cache.resolve(IMAGE_ID, Cancellation())

    assert kit.acquire(image).origin == "cache"


def test_offline_an_unproven_base_is_not_handed_out(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    data = qcow2_of(DATA, tmp_path)
    source.images[IMAGE_ID] = signer.signed(source.add(data, disk_format="qcow2"), data)
    hosts.lax().acquire(source.images[IMAGE_ID])

    source.available = False
    kit = hosts.strict()
    with pytest.raises(ImageSourceUnavailable):
        kit.acquire(kit.cache.resolve(IMAGE_ID, Cancellation()))


def test_another_signature_on_the_same_image_is_verified_again(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    image = signer.signed(source.add(DATA), DATA)
    hosts.strict().acquire(image)

    with pytest.raises(ImageUnacceptable, match="is wrong"):
        hosts.strict().acquire(signer.signed(image, b"something else"))


def test_a_key_manager_that_is_away_is_asked_again_and_is_no_refusal(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    hosts.certificates.available = False
    with pytest.raises(ImageSourceUnavailable, match="key manager is away"):
        hosts.strict().acquire(signer.signed(source.add(DATA), DATA))
    assert hosts.certificates.asked == 2


# Twins, partials, those who wait


@pytest.mark.parametrize(
    ("hash_method", "fetches"), [("SHA-256", 2), ("SHA-512", 1)], ids=["other-hash", "same-hash"]
)
def test_a_twin_needs_a_proof_of_its_own(
    hosts: Hosts, signer: Signer, tmp_path: Path, hash_method: str, fetches: int
) -> None:
    source = hosts.source
    data = qcow2_of(DATA, tmp_path)
    hosts.lax().acquire(source.add(data, disk_format="qcow2"))
    twin = source.add(data, image_id="twin", disk_format="qcow2")
    kit = hosts.strict()

    with pytest.raises(ImageUnacceptable, match="has to be signed"):
        kit.acquire(twin)
    with pytest.raises(ImageUnacceptable, match="is wrong"):
        kit.acquire(signer.signed(twin, b"something else", hash_method=hash_method))
    opened = len(source.opened)
    kit.acquire(signer.signed(twin, data, hash_method=hash_method))

    assert len(source.opened) - opened == fetches - 1
    assert kit.store.get("twin").manifest.proof is not None
    assert kit.store.get(IMAGE_ID).manifest.proof is None


def test_a_partial_begun_without_is_gone_on_with_or_begun_anew(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    disk = random_bytes(24)
    for disk_format, data in (("raw", disk), ("qcow2", qcow2_of(disk, tmp_path))):
        image_id = f"image-{disk_format}"
        image = source.add(data, image_id=image_id, disk_format=disk_format)
        image = signer.signed(image, data)
        source.break_at = 20 * MIB
        with pytest.raises(ImageSourceUnavailable):
            hosts.lax().acquire(image)
        source.break_at = None

        base = hosts.strict().acquire(image)

        # Of the qcow2 only the SHA-512 is written down.
        assert base.resumed == (20 * MIB if disk_format == "raw" else 0)
        assert base.path.read_bytes() == disk


def test_a_fetch_that_demands_two_hashes_loses_nothing_to_a_crash(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    disk = random_bytes(24)
    data = qcow2_of(disk, tmp_path)
    image = signer.signed(source.add(data, disk_format="qcow2"), data)
    source.break_at = 20 * MIB
    with pytest.raises(ImageSourceUnavailable):
        hosts.strict().acquire(image)
    source.break_at = None

    base = hosts.strict().acquire(image)

    assert (base.resumed, base.path.read_bytes()) == (20 * MIB, disk)


def test_a_wrong_signature_without_any_hash_is_fetched_twice(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    image = replace(signer.signed(source.add(DATA), b"something else"), digest=None)
    kit = hosts.strict(require_hash=False)

    with pytest.raises(ImageCorrupt, match="is wrong"):
        kit.acquire(image)

    assert len(source.opened) == 2
    assert in_cache(kit) == []


def test_without_any_hash_a_base_in_use_is_not_exchanged_for_other_bytes(
    hosts: Hosts, source: Source, signer: Signer, tmp_path: Path
) -> None:
    data = qcow2_of(DATA, tmp_path)
    image = replace(source.add(data, disk_format="qcow2"), digest=None)
    kit = hosts.strict(require_hash=False)
    lax = CacheKit(directory=hosts.directory, source=source, require_hash=False)
    base = lax.acquire(image)
    other = qcow2_of(random_bytes(2), tmp_path)
    source.data[IMAGE_ID] = other

    with pytest.raises(ImageCorrupt):
        kit.acquire(signer.signed(replace(image, size=len(other)), other))

    assert base.path.read_bytes() == DATA


def test_who_demands_more_does_not_share_the_outcome_of_who_demands_less(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    kit = hosts.lax()
    authority = Signer.make("authority", is_ca=True)
    hosts.certificates.known[authority.certificate_id] = authority.certificate
    image = signer.signed(source.add(DATA), DATA)  # not issued by the authority
    source.gate.clear()
    outcomes: dict[str, Base | Exception] = {}

    def ask(name: str, trusted: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            try:
                outcomes[name] = kit.acquire(image, pin=name, trusted=trusted)
            except ImageUnacceptable as e:
                outcomes[name] = e

        return run

    threads = [
        threading.Thread(target=ask("lax", ())),
        threading.Thread(target=ask("demanding", (authority.certificate_id,))),
    ]
    for thread in threads:
        thread.start()
    source.gate.set()
    for thread in threads:
        thread.join(20)

    assert isinstance(outcomes["lax"], Base)
    assert isinstance(outcomes["demanding"], ImageUnacceptable)


def test_a_manifest_of_an_earlier_release_is_one_without_a_proof(
    hosts: Hosts, source: Source, signer: Signer
) -> None:
    image: Image = signer.signed(source.add(DATA), DATA)
    kit = hosts.lax()
    kit.acquire(image)
    path = kit.store.path_of(base_name(IMAGE_ID)).with_suffix(".json")
    text = path.read_text()
    assert '"proof": null,' in text
    path.write_text(text.replace('"proof": null,', ""))

    assert hosts.lax().acquire(image).origin == "cache"
    assert hosts.strict().acquire(image).origin == "cache"
