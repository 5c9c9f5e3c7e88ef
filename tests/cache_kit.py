"""An image cache with all its parts, over a source in memory that does what a test tells it to."""

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agent import manifest as manifests
from agent.base import Base
from agent.base_maker import BaseMaker
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.errors import ImageNotFound, ImageSourceUnavailable
from agent.image import Image
from agent.image_cache import ImageCache
from agent.instances import InstanceRecord, Instances
from agent.job import ImagesType
from agent.prune import Policy
from agent.pruner import Pruner
from agent.qemu_img import QemuImg
from agent.report import Progress, Role
from agent.signatures import Signatures
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier
from tests.corpus.case import VMDK_TYPES
from tests.signing import Certificates, signatures

MIB = 1 << 20
IMAGE_ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"
NAME = "0d5e6b61602d758984b3bf038267614d6016eb2a"
"""Of the base of the image with that id."""
DAY = 86400.0

NEVER = Policy(
    remove_unused=True,
    minimum_age_s=1e9,
    max_size=None,
    high_watermark=100,
    low_watermark=100,
)
"""Nothing goes by itself."""


class Source:
    """An image source in memory that counts, and stops where it is told to."""

    name = "memory"

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.images: dict[str, Image] = {}
        self.opened: list[tuple[str, int]] = []
        self.break_at: int | None = None
        self.available = True
        self.gate = threading.Event()
        self.gate.set()

    def add(self, data: bytes, *, image_id: str = IMAGE_ID, disk_format: str = "raw") -> Image:
        image = Image(
            id=image_id,
            name="test",
            source=self.name,
            status="active",
            disk_format=disk_format,
            size=len(data),
            digest=("sha512", hashlib.sha512(data).hexdigest()),
        )
        self.data[image_id] = data
        self.images[image_id] = image
        return image

    def get(self, image_id: str) -> Image:
        if not self.available:
            raise ImageSourceUnavailable("the source is away")
        try:
            return self.images[image_id]
        except KeyError:
            raise ImageNotFound(f"no image {image_id}") from None

    def open(self, image: Image, offset: int, end: int | None = None) -> "Body":  # noqa: ARG002
        if not self.available:
            raise ImageSourceUnavailable("the source is away")
        self.opened.append((image.id, offset))
        return Body(self, self.data[image.id], offset)


class Body:
    def __init__(self, source: Source, data: bytes, offset: int) -> None:
        self.offset = offset
        self._source = source
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        for position in range(self.offset, len(self._data), MIB):
            self._source.gate.wait(20)
            if self._source.break_at is not None and position >= self._source.break_at:
                raise ImageSourceUnavailable("the connection broke")
            yield self._data[position : position + MIB]

    def close(self) -> None:
        pass


@dataclass(kw_only=True)
class CacheKit:
    """One agent's image cache; `directory` is its `instances_path`."""

    directory: Path
    source: Source
    host_id: str = "this"
    policy: Policy = NEVER
    reserved_free_space: int = 0
    signatures: Signatures = field(default_factory=lambda: signatures(Certificates()))
    require_hash: bool = True
    verify_before_use: bool = False
    bases: Path | None = None
    """Where `_base` is, if hosts share it."""
    make_store: Callable[[Path], Store] = Store
    instances: Instances = field(init=False)
    store: Store = field(init=False)
    usage: Usage = field(init=False)
    pruner: Pruner = field(init=False)
    verifier: Verifier = field(init=False)
    space: Space = field(init=False)
    cache: ImageCache = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.instances = Instances(self.directory)
        self.store = self.make_store(self.bases or self.directory / "_base")
        self.usage = Usage(self.store, self.instances, host_id=self.host_id)
        self.pruner = Pruner(self.store, self.usage, self.policy)
        self.verifier = Verifier(self.store, self.usage)
        self.space = Space(
            self.store,
            reserved_free_space=self.reserved_free_space,
            max_size=self.policy.max_size,
            make_room=self.pruner.make_room,
        )
        policy = RetryPolicy(num_retries=1, initial_s=0.01, max_s=0.01)
        maker = BaseMaker(
            self.store,
            self.usage,
            self.space,
            self.verifier,
            source=self.source,
            signatures=self.signatures,
            converter=QemuImg(),
            policy=policy,
            require_hash=self.require_hash,
            verify_before_use=self.verify_before_use,
            vmdk_types=VMDK_TYPES,
            max_concurrent_fetches=4,
            max_connections_per_image=1,
        )
        self.cache = ImageCache(
            self.store,
            self.usage,
            maker,
            source=self.source,
            signatures=self.signatures,
            policy=policy,
        )

    def acquire(
        self,
        image: Image,
        *,
        pin: str = "job-1",
        max_virtual_size: int | None = None,
        trusted: Sequence[str] = (),
        cancellation: Cancellation | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Base:
        return self.cache.acquire(
            image,
            pin=pin,
            max_virtual_size=max_virtual_size,
            trusted=trusted,
            cancellation=cancellation or Cancellation(),
            on_progress=on_progress,
        )

    def fetch(self, image: Image) -> Base:
        """Have the image in the cache, needed by nobody."""
        base = self.acquire(image, pin="fetch")
        self.cache.unpin("fetch")
        return base

    def add_instance(self, base: Base, *, name: str = "web-1") -> InstanceRecord:
        """Write down an instance that stands on `base`; it has no domain."""
        record = InstanceRecord(
            uuid=str(uuid.uuid4()),
            name=name,
            job_id="job",
            created_at=time.time(),
            image_id=base.image.id,
            images_type=ImagesType.QCOW2,
            disks=(
                Disk(
                    role=Role.ROOT,
                    backend=ImagesType.QCOW2,
                    path=self.directory / "disk",
                    format="qcow2",
                    virtual_size=base.virtual_size,
                    base_name=base.name,
                ),
            ),
        )
        self.instances.write(record)
        return record


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def kit(tmp_path: Path, source: Source) -> CacheKit:
    return CacheKit(directory=tmp_path / "instances", source=source)


MakeKit = Callable[[], CacheKit]


@pytest.fixture
def make_kit(tmp_path: Path, source: Source) -> MakeKit:
    """Each call is a restart of the agent."""
    return lambda: CacheKit(directory=tmp_path / "instances", source=source)


def make_old(path: Path, seconds: float) -> None:
    """Let a base look unused for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def manifest_time_back(kit: CacheKit, name: str, age: float) -> None:
    """Let a base, which has just been made, be of long ago."""
    path = manifests.manifest_path(kit.store.path_of(name))
    known = manifests.read(path)
    assert known is not None
    manifests.write(path, replace(known, created_at=time.time() - age))
    make_old(kit.store.path_of(name), age)


def leftovers(kit: CacheKit) -> list[str]:
    """Everything below the cache that is no entry and not kept by design."""
    kept = (".locks", ".hosts")
    return sorted(
        str(path.relative_to(kit.store.directory))
        for path in kit.store.directory.rglob("*")
        if path.is_file()
        and path.parent.name not in kept
        and len(path.name.removesuffix(".json")) != 40
    )


def random_bytes(mib: int) -> bytes:
    return os.urandom(mib * MIB)
