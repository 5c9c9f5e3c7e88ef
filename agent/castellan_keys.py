"""The keys of instances in Barbican, or in whatever castellan finds in [key_manager].

The key manager makes the keys and keeps them; here is kept, in one file per
instance, which key is whose.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from castellan import key_manager
from castellan.common.exception import ManagedObjectNotFoundError
from castellan.common.utils import credential_factory
from oslo_config import cfg

from agent.errors import BackendError
from agent.files import fsync_directory, write_durably
from agent.instance_keys import check_uuid

# What is caught of castellan is `Exception`: each of its backends raises errors of its own
# libraries (requests, keystoneauth, barbicanclient, hvac …), and promises no others.
_ALGORITHM = "AES"


class KeyManager(Protocol):
    """The few calls of castellan's in use; `context` is a credential of its own."""

    def create_key(self, context: object, algorithm: str, length: int, *, name: str) -> str: ...

    def get(self, context: object, managed_object_id: str) -> Any: ...

    def delete(self, context: object, managed_object_id: str) -> None: ...


Connect = Callable[[], tuple[KeyManager, object]]
"""Returns a key manager and the credential to use it with."""


def connect() -> tuple[KeyManager, object]:
    """Do what [key_manager] says. Raises: Exception: whatever castellan does."""
    # Its types say more than its backends keep to.
    return cast("KeyManager", key_manager.API(cfg.CONF)), credential_factory(cfg.CONF)


class CastellanKeys:
    """See `InstanceKeys`."""

    def __init__(self, directory: Path, *, bits: int, connect: Connect = connect) -> None:
        """`directory` is where the ids of the keys are kept; it is made when it is needed."""
        self._directory = directory
        self._bits = bits
        self._connect = connect

    def make(self, instance_uuid: str) -> bytes:
        path = self._path(instance_uuid)
        if not path.exists():
            manager, context = self._reach("making", instance_uuid)
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                key_id = manager.create_key(
                    context, _ALGORITHM, self._bits, name=f"bootwright {instance_uuid}"
                )
                # A crash before this leaves a key in the key manager that nobody uses.
                write_durably(path, key_id.encode(), mode=0o600)
            except Exception as e:
                raise _error("making", instance_uuid, e) from e
        return self.get(instance_uuid)

    def get(self, instance_uuid: str) -> bytes:
        path = self._path(instance_uuid)
        manager, context = self._reach("getting", instance_uuid)
        try:
            key = bytes(manager.get(context, path.read_text(encoding="ascii")).get_encoded())
        except Exception as e:
            raise _error("getting", instance_uuid, e) from e
        if len(key) * 8 != self._bits:
            raise BackendError(
                f"the key of instance {instance_uuid} has {len(key) * 8} bits, key_size asks for "
                f"{self._bits}",
                "set key_size in [ephemeral_storage_encryption] as it was",
            )
        return key

    def remove(self, instance_uuid: str) -> None:
        path = self._path(instance_uuid)
        if not path.exists():
            return
        manager, context = self._reach("removing", instance_uuid)
        try:
            manager.delete(context, path.read_text(encoding="ascii"))
        except ManagedObjectNotFoundError:
            pass  # done already, by an earlier attempt that came no further
        except Exception as e:
            raise _error("removing", instance_uuid, e) from e
        path.unlink(missing_ok=True)
        fsync_directory(self._directory)

    def _reach(self, what: str, instance_uuid: str) -> tuple[KeyManager, object]:
        try:
            return self._connect()
        except Exception as e:
            raise _error(what, instance_uuid, e) from e

    def _path(self, instance_uuid: str) -> Path:
        return self._directory / check_uuid(instance_uuid)


def _error(what: str, instance_uuid: str, cause: Exception) -> BackendError:
    return BackendError(
        f"{what} the key of instance {instance_uuid}: {cause}",
        "look at the key manager, and at [key_manager] and the section of its backend",
    )
