"""Signatures demanded of twins and partials, and by one of several that wait for a fetch."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.base import Base
from agent.errors import ImageCorrupt, ImageSourceUnavailable, ImageUnacceptable
from tests.cache_kit import IMAGE_ID, MIB, CacheKit, Source, random_bytes, source
from tests.signed_hosts import DATA, Hosts, hosts, in_cache, qcow2_of, signer, signers
from tests.signing import Signer

__all__ = ["hosts", "signer", "signers", "source"]


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
