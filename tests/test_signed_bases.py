"""A base that is there already, for somebody who demands a signature."""

from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import ImageSourceUnavailable, ImageUnacceptable
from agent.image import Image
from agent.manifest import base_name
from tests.cache_kit import IMAGE_ID, Source, source
from tests.signed_hosts import DATA, Hosts, hosts, qcow2_of, signer, signers
from tests.signing import Signer

__all__ = ["hosts", "signer", "signers", "source"]


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
