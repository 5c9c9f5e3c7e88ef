"""The keys that instances' disks are encrypted with: one for each instance.

    FileKeys        a file per instance, in a directory that only the agent can read
    CastellanKeys   in Barbican or another key manager (`agent.castellan_keys`)

A key is made before the first disk that needs it, and goes with the last one:
after that nobody can read what the disk's blocks still hold.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Final, Protocol

from agent.errors import BackendError
from agent.files import fsync_directory, write_durably

_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class InstanceKeys(Protocol):
    """May be shared by any number of threads, each with an instance of its own."""

    def make(self, instance_uuid: str) -> bytes:
        """Return the key of an instance, made and durable if there was none.

        Raises:
            BackendError: the key cannot be made or read.
        """
        ...

    def get(self, instance_uuid: str) -> bytes:
        """Return the key of an instance.

        Raises:
            BackendError: there is none, or it cannot be read.
        """
        ...

    def remove(self, instance_uuid: str) -> None:
        """Destroy the key of an instance; one that is not there is no error.

        Raises:
            BackendError: it could not be destroyed.
        """
        ...


class FileKeys:
    """See `InstanceKeys`. Whoever reads the file reads the disk: it is worth what keeps it."""

    def __init__(self, directory: Path, *, bits: int) -> None:
        """`directory` is made, for the agent alone, when the first key is."""
        self._directory = directory
        self._bytes = bits // 8

    def make(self, instance_uuid: str) -> bytes:
        path = self._path(instance_uuid)
        try:
            if not path.exists():
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_durably(path, secrets.token_bytes(self._bytes), mode=0o600)
        except OSError as e:
            raise BackendError(f"writing the key {path}: {e.strerror}") from e
        return self.get(instance_uuid)

    def get(self, instance_uuid: str) -> bytes:
        path = self._path(instance_uuid)
        try:
            key = path.read_bytes()
        except OSError as e:
            raise BackendError(
                f"reading the key {path}: {e.strerror}",
                "the instance's disks cannot be read without it; restore it from a backup",
            ) from e
        if len(key) != self._bytes:
            raise BackendError(
                f"the key {path} has {len(key)} bytes, key_size asks for {self._bytes}",
                "restore it, or set key_size in [ephemeral_storage_encryption] as it was",
            )
        return key

    def remove(self, instance_uuid: str) -> None:
        path = self._path(instance_uuid)
        try:
            # The blocks it is on may still hold it, so what they hold goes first.
            with path.open("r+b") as file:
                file.write(bytes(self._bytes))
                os.fsync(file.fileno())
            path.unlink()
            fsync_directory(self._directory)
        except FileNotFoundError:
            return
        except OSError as e:
            raise BackendError(f"removing the key {path}: {e.strerror}") from e

    def _path(self, instance_uuid: str) -> Path:
        return self._directory / check_uuid(instance_uuid)


def check_uuid(instance_uuid: str) -> str:
    """Return it. Raises: BackendError: it is no uuid, and so not the name of a file of ours."""
    if not _UUID.fullmatch(instance_uuid):
        raise BackendError(f"{instance_uuid!r} is not the uuid of an instance")
    return instance_uuid
