"""One file for images with the same bytes, and one `_base` for several hosts."""

import dataclasses
import json
import multiprocessing
import multiprocessing.synchronize
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.errors import BackendError
from tests import service_user
from tests.cache_kit import NEVER, CacheKit, Source, kit, random_bytes, source

__all__ = ["kit", "source"]


# Images


def test_a_second_image_with_the_same_bytes_costs_no_download(
    kit: CacheKit, source: Source
) -> None:
    data = random_bytes(2)
    first = kit.fetch(source.add(data, image_id="first"))
    second = kit.fetch(source.add(data, image_id="second"))

    assert [image_id for image_id, _ in source.opened] == ["first"]
    assert second.path.samefile(first.path)
    assert second.image.id == "second"
    assert (second.origin, second.received) == ("cache", 0)
    assert list((kit.store.directory / ".partial").iterdir()) == []

    kit.pruner.remove("first")
    assert kit.fetch(source.images["second"]).path.read_bytes() == data
    assert len(source.opened) == 1


def test_images_with_the_same_bytes_fetched_at_once_cost_one_download(
    kit: CacheKit, source: Source
) -> None:
    data = random_bytes(2)
    images = [source.add(data, image_id=f"image-{number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        bases = list(pool.map(kit.fetch, images))
    assert len(source.opened) == 1
    assert len({base.path.stat().st_ino for base in bases}) == 1
    assert sum(base.received for base in bases) == len(data)


@pytest.mark.parametrize(
    "change",
    [
        {"disk_format": "iso"},
        {"container_format": "docker"},
        {"digest": ("md5", "0" * 32)},
        {"digest": None},
    ],
)
def test_other_claims_and_weak_hashes_share_nothing(
    kit: CacheKit, source: Source, change: dict[str, object]
) -> None:
    from agent import twin

    image = source.add(random_bytes(1), image_id="first")
    if isinstance(change.get("digest"), tuple):
        image = dataclasses.replace(image, digest=change["digest"])  # type: ignore[arg-type]
    entry_of = kit.fetch(source.images["first"])
    (entry,) = kit.store.entries()
    if "digest" in change and change["digest"] is not None:
        weak = dataclasses.replace(entry.manifest, digest="md5:" + "0" * 32)
        entry = dataclasses.replace(entry, manifest=weak)
    other = dataclasses.replace(image, id="second", **change)  # type: ignore[arg-type]
    assert entry_of.path.exists()
    assert twin.find([entry], other) is None


def test_a_base_libvirt_has_taken_over_is_shared_as_a_copy() -> None:
    """fs.protected_hardlinks refuses links to what is another user's and cannot be written."""
    service_user.require_root()
    program = Path(__file__).parent / "sharing_as_service.py"
    with service_user.directory() as directory:

        def fetch(image_id: str) -> dict[str, object]:
            result = service_user.run(program, directory / "instances", image_id)
            assert result.returncode == 0, result.stderr
            report: dict[str, object] = json.loads(result.stdout)
            return report

        first = fetch("first")
        path = Path(str(first["path"]))
        os.chown(path, 65534, service_user.account().pw_gid)
        second = fetch("second")

        assert (first["downloads"], second["downloads"]) == (1, 0)
        assert second["right"]
        assert not path.samefile(str(second["path"]))


# Hosts


def host(tmp_path: Path, source: Source, name: str) -> CacheKit:
    return CacheKit(
        directory=tmp_path / name,
        source=source,
        host_id=name,
        bases=tmp_path / "shared",
        policy=dataclasses.replace(NEVER, minimum_age_s=-1),
    )


def test_a_host_that_is_down_for_a_week_still_protects_its_bases(
    tmp_path: Path, source: Source
) -> None:
    down = host(tmp_path, source, "down")
    base = down.fetch(source.add(random_bytes(1)))
    record = down.add_instance(base)
    down.usage.settle()
    del down
    claims = tmp_path / "shared/.hosts/down.json"
    long_ago = time.time() - 7 * 86400
    os.utime(claims, (long_ago, long_ago))
    os.utime(base.path, (long_ago, long_ago))

    up = host(tmp_path, source, "up")
    (decision,) = up.pruner.gc(dry_run=False).decisions
    assert not decision.remove
    assert "host" in decision.detail
    with pytest.raises(BackendError, match="host"):
        up.pruner.remove(base.image.id)

    back = host(tmp_path, source, "down")
    back.instances.remove(record.uuid)
    back.usage.settle()
    up.pruner.gc(dry_run=False)
    assert not base.path.exists()


def test_a_claim_is_durable_before_the_base_is_handed_out(tmp_path: Path, source: Source) -> None:
    one, other = host(tmp_path, source, "one"), host(tmp_path, source, "other")
    base = one.acquire(source.add(random_bytes(1)))
    # No instance is written down yet; its host could die right now.
    with pytest.raises(BackendError, match="host"):
        other.pruner.remove(base.image.id)


def test_claims_that_cannot_be_read_keep_every_base(tmp_path: Path, source: Source) -> None:
    up = host(tmp_path, source, "up")
    base = up.fetch(source.add(random_bytes(1)))
    claims = tmp_path / "shared/.hosts/down.json"
    claims.write_text("{")
    assert [d.remove for d in up.pruner.gc(dry_run=False).decisions] == [False]
    claims.unlink()
    assert [d.remove for d in up.pruner.gc(dry_run=False).decisions] == [True]
    assert not base.path.exists()


def _fetch_in_a_process(
    tmp_path: Path, name: str, start: multiprocessing.synchronize.Barrier, data: bytes
) -> None:
    source = Source()
    image = source.add(data)
    kit = host(tmp_path, source, name)
    start.wait(20)
    base = kit.fetch(image)
    assert base.path.read_bytes() == data
    (tmp_path / f"{name}.downloads").write_text(str(len(source.opened)))


def test_two_hosts_that_want_one_image_make_one_download(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    data = random_bytes(24)
    processes = [
        spawn.Process(target=_fetch_in_a_process, args=(tmp_path, name, start, data))
        for name in ("one", "two")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    downloads = [int((tmp_path / f"{name}.downloads").read_text()) for name in ("one", "two")]
    assert sorted(downloads) == [0, 1]
    assert sorted(path.stem for path in (tmp_path / "shared/.hosts").iterdir()) == ["one", "two"]
