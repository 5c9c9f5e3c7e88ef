"""A directory of this host as an image source: for hosts without Glance.

    <image id>.json     the record, written last: an image exists if it does
    <image id>.data     its bytes

Like Glance it never changes the bytes under an id. What stands in the
directory without a record is left over from something interrupted and is not
an image: whoever takes one out removes the record first. Whoever may write to
the directory is trusted; whoever chose an id is not, so an id never leads out
of it, not by a symbolic link either.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import secrets
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from agent.errors import (
    ImageCorrupt,
    ImageError,
    ImageNotAuthorized,
    ImageNotFound,
    ImageSourceUnavailable,
    InvalidJob,
)
from agent.files import no_space, write_durably
from agent.image import Image
from agent.job import ImageId
from agent.job import image_id as canonical_image_id

_LOG = logging.getLogger(__name__)

# The kernel formats have a container format of the same name; the rest are
# disks and have none.
_KERNEL_FORMATS = ("ami", "aki", "ari")
DISK_FORMATS = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi", "iso", *_KERNEL_FORMATS)

_EMPTY_SHA512 = hashlib.sha512().hexdigest()
_PIECE = 1 << 20
_RECORD_LIMIT = 1 << 20
"""Bytes; a record has a few hundred."""


def _known_format(disk_format: str) -> str:
    if disk_format not in DISK_FORMATS:
        raise ValueError(f"must be one of {', '.join(DISK_FORMATS)}")
    return disk_format


class _Record(BaseModel):
    """`<image id>.json`; the names are those of Glance's API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    id: ImageId
    name: Annotated[str, StringConstraints(max_length=255)]
    status: Literal["active"] = "active"
    disk_format: Annotated[str, AfterValidator(_known_format)]
    container_format: str
    size: int = Field(default=0, ge=0)
    min_disk: int = Field(default=0, ge=0)
    min_ram: int = Field(default=0, ge=0)
    os_hash_algo: Literal["sha512"] = "sha512"
    os_hash_value: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")] = _EMPTY_SHA512
    properties: Mapping[str, str] = Field(default_factory=dict)


class DirectorySource:
    """An image source (agent/transfer.py) that threads and processes may share."""

    name = "directory"

    def __init__(self, directory: Path) -> None:
        """`directory` is made by the first `add`."""
        self._directory = directory

    def get(self, image_id: str) -> Image:
        """Return the record of an image.

        Raises:
            ImageNotFound: the directory has none.
            ImageNotAuthorized: the file system does not let us read it.
            ImageCorrupt: its record cannot be understood.
            ImageSourceUnavailable: the file system fails.
        """
        image_id = self._existing_id(image_id)
        path = self._record_path(image_id)
        with self._reading(image_id), _regular_file(path) as file:
            text = file.read(_RECORD_LIMIT)
        try:
            record = _Record.model_validate_json(text)
        except ValidationError as e:
            fields = ", ".join(".".join(map(str, error["loc"])) for error in e.errors())
            raise ImageCorrupt(
                f"{path} is not the record of an image (wrong: {fields or 'the whole'})",
                "add the image again under another id",
            ) from e
        if record.id != image_id:
            raise ImageCorrupt(f"{path} is the record of image {record.id}")
        return _image(record)

    def open(self, image: Image, offset: int, end: int | None = None) -> "DirectoryBody":  # noqa: ARG002
        """Ask for the bytes from `offset` on; they come up to the image's end in any case.

        Raises:
            ImageNotFound: the image has been removed meanwhile.
            ImageNotAuthorized: the file system does not let us read it.
            ImageCorrupt: the file has another size than the record.
            ImageSourceUnavailable: the file system fails.
        """
        image_id = self._existing_id(image.id)
        path = self._data_path(image_id)
        with self._reading(image_id), contextlib.ExitStack() as undo:
            file = undo.enter_context(_regular_file(path))
            size = os.fstat(file.fileno()).st_size
            if size != image.size:
                raise ImageCorrupt(
                    f"{path} has {size} bytes, its record says {image.size}",
                    "something has changed the file: add the image again under another id",
                )
            file.seek(offset)
            undo.pop_all()
            return DirectoryBody(file, offset, path)

    def list(self) -> tuple[Image, ...]:
        """Return all images in the order of their ids; what cannot be read is logged."""
        images = []
        for path in sorted(self._directory.glob("*.json")):
            if path.name.startswith("."):
                continue
            try:
                images.append(self.get(path.stem))
            except ImageNotFound:
                continue
            except ImageError as e:
                _LOG.warning("an image is left out of the list: %s", e)
        return tuple(images)

    def add(
        self,
        chunks: Iterable[bytes],
        *,
        disk_format: str,
        name: str,
        properties: Mapping[str, str] | None = None,
        image_id: str | None = None,
    ) -> Image:
        """Take in a new image.

        Raises:
            InvalidJob: the id is taken or none, the format unknown, the name too long.
            InsufficientFreeSpace: nothing of the image is left.
        """
        try:
            draft = _Record(
                id=str(uuid.uuid4()) if image_id is None else image_id,
                name=name,
                disk_format=disk_format,
                container_format=disk_format if disk_format in _KERNEL_FORMATS else "bare",
                properties=properties or {},
            )
        except ValidationError as e:
            raise _invalid(e) from e
        self._refuse_taken(draft.id)
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        with self._staged(draft.id) as (staged, fd):
            size, digest = self._write(fd, chunks)
            record = draft.model_copy(update={"size": size, "os_hash_value": digest})
            with self._exclusively():
                self._refuse_taken(record.id)
                # Without a record the data is nobody's: it takes the place of
                # what a crash at this point may have left before.
                staged.rename(self._data_path(record.id))
                write_durably(
                    self._record_path(record.id), record.model_dump_json(indent=2).encode() + b"\n"
                )
        return _image(record)

    def sweep(self) -> None:
        """Remove what an `add` that was killed has left; one that is running is let be."""
        for path in self._directory.glob(".*.staged"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _write(self, fd: int, chunks: Iterable[bytes]) -> tuple[int, str]:
        size = 0
        digest = hashlib.sha512()
        with os.fdopen(os.dup(fd), "wb", buffering=_PIECE) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(fd)
        return size, digest.hexdigest()

    @contextlib.contextmanager
    def _staged(self, image_id: str) -> Iterator[tuple[Path, int]]:
        """A new file beside the data's place, removed if it is still there at the end."""
        path = self._directory / f".{image_id}.{secrets.token_hex(8)}.staged"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # The sign for `sweep` that it has an owner.
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.fchmod(fd, 0o640)
            yield path, fd
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            status = os.statvfs(self._directory)
            raise no_space(
                self._data_path(image_id),
                os.fstat(fd).st_size + _PIECE,
                status.f_bavail * status.f_frsize,
                "adding the image as",
            ) from e
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """No other `add` changes names meanwhile; the kernel ends it with us."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _reading(self, image_id: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise _translated(e, f"image {image_id} in {self._directory}") from e

    def _refuse_taken(self, image_id: str) -> None:
        if os.path.lexists(self._record_path(image_id)):
            raise InvalidJob(
                f"there is an image {image_id} in {self._directory}",
                "the bytes under an id never change: leave the id out, or choose another",
            )

    def _existing_id(self, image_id: str) -> str:
        try:
            return canonical_image_id(image_id)
        except ValueError as e:
            raise ImageNotFound(f"{image_id!r:.80} cannot be the id of an image: it {e}") from e

    def _record_path(self, image_id: str) -> Path:
        return self._directory / f"{image_id}.json"

    def _data_path(self, image_id: str) -> Path:
        return self._directory / f"{image_id}.data"


class DirectoryBody:
    """The bytes of one file; see `agent.transfer.Body`."""

    def __init__(self, file: io.FileIO, offset: int, path: Path) -> None:
        self.offset = offset
        self._file = file
        self._path = path
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._read():
            yield piece

    def _read(self) -> bytes:
        # The lock keeps the descriptor's number from becoming another file's
        # between two threads; a read of a file is short enough to wait for.
        with self._reading:
            if self._file.closed:
                raise ImageSourceUnavailable(f"{self._path}: the transfer was given up")
            try:
                return self._file.read(_PIECE)
            except OSError as e:
                raise _translated(e, os.fspath(self._path)) from e

    def close(self) -> None:
        with self._reading:
            self._file.close()


def _invalid(error: ValidationError) -> InvalidJob:
    detail = error.errors(include_url=False)[0]
    where = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return InvalidJob(f"the new image's {where} {message} (it is {detail['input']!r:.80})")


def _image(record: _Record) -> Image:
    return Image(
        id=record.id,
        name=record.name,
        source=DirectorySource.name,
        status=record.status,
        disk_format=record.disk_format,
        container_format=record.container_format,
        size=record.size,
        min_disk=record.min_disk,
        min_ram=record.min_ram,
        digest=(record.os_hash_algo, record.os_hash_value),
        properties=record.properties,
    )


def _regular_file(path: Path) -> io.FileIO:
    """Open `path` unbuffered if it is a regular file itself.

    Raises:
        OSError: ELOOP for a symbolic link and anything else that is no file.
    """
    # O_NONBLOCK, or a FIFO would keep us waiting for its writer.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, "not a regular file", os.fspath(path))
    return io.FileIO(fd)


def _translated(error: OSError, what: str) -> ImageError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ImageNotFound(
                f"{what}: there is no such image", "'bootwright image add' puts one there"
            )
        case errno.ELOOP | errno.EISDIR:
            return ImageCorrupt(
                f"{what}: its file is a link or no file at all", "put a regular file there"
            )
        case errno.EACCES | errno.EPERM:
            return ImageNotAuthorized(
                f"{what}: {error.strerror}", "let the agent's user read the directory and its files"
            )
        case _:
            return ImageSourceUnavailable(
                f"{what}: {error.strerror}", "check the file system and the kernel's log"
            )
