"""One contract for all that keeps the keys of encrypted disks."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from castellan.common.exception import ManagedObjectNotFoundError
from castellan.tests.unit.key_manager.mock_key_manager import MockKeyManager

from agent.castellan_keys import CastellanKeys, KeyManager
from agent.errors import BackendError
from agent.instance_keys import FileKeys, InstanceKeys

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
OTHER = "1b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
CONTEXT = object()

Make = Callable[[int], InstanceKeys]


@pytest.fixture
def manager() -> KeyManager:
    """castellan's own, which keeps all in memory and obeys the interface of the others."""
    return cast("KeyManager", MockKeyManager())  # type: ignore[no-untyped-call]


@pytest.fixture(params=["file", "castellan"])
def make(request: pytest.FixtureRequest, tmp_path: Path, manager: KeyManager) -> Make:
    """Keys as they are found by an agent that has just started."""
    directory = tmp_path / "keys"
    if request.param == "file":
        return lambda bits: FileKeys(directory, bits=bits)
    return lambda bits: CastellanKeys(directory, bits=bits, connect=lambda: (manager, CONTEXT))


def test_key_has_its_size_and_stays_the_same(make: Make) -> None:
    key = make(256).make(UUID)
    assert len(key) == 32
    assert make(256).make(UUID) == key
    assert make(256).get(UUID) == key


def test_each_instance_has_a_key_of_its_own(make: Make) -> None:
    keys = make(256)
    assert keys.make(UUID) != keys.make(OTHER)
    keys.remove(UUID)
    assert len(keys.get(OTHER)) == 32


def test_key_that_was_removed_is_gone_and_removing_it_again_is_no_error(make: Make) -> None:
    keys = make(256)
    first = keys.make(UUID)
    keys.remove(UUID)
    keys.remove(UUID)
    with pytest.raises(BackendError, match="key"):
        keys.get(UUID)
    assert keys.make(UUID) != first


def test_key_of_another_size_is_refused(make: Make) -> None:
    make(256).make(UUID)
    with pytest.raises(BackendError, match="key_size"):
        make(128).get(UUID)


def test_nobody_else_may_look(make: Make, tmp_path: Path) -> None:
    make(256).make(UUID)
    directory = tmp_path / "keys"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / UUID).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("uuid", ["", "..", "../x", f"{UUID}/..", UUID.upper()])
def test_what_is_no_uuid_names_no_file(make: Make, uuid: str) -> None:
    for call in (make(256).make, make(256).get, make(256).remove):
        with pytest.raises(BackendError, match="not the uuid"):
            call(uuid)


def test_file_of_a_key_manager_holds_no_key(tmp_path: Path, manager: KeyManager) -> None:
    keys = CastellanKeys(tmp_path, bits=256, connect=lambda: (manager, CONTEXT))
    key = keys.make(UUID)
    held = (tmp_path / UUID).read_bytes()
    assert key not in held
    assert key.hex().encode() not in held
    assert manager.get(CONTEXT, held.decode()).get_encoded() == key


def test_key_goes_from_the_key_manager_too(tmp_path: Path, manager: KeyManager) -> None:
    keys = CastellanKeys(tmp_path, bits=256, connect=lambda: (manager, CONTEXT))
    keys.make(UUID)
    key_id = (tmp_path / UUID).read_text()
    keys.remove(UUID)
    with pytest.raises(ManagedObjectNotFoundError):
        manager.get(CONTEXT, key_id)


def test_key_that_is_gone_from_the_key_manager_already_is_removed(
    tmp_path: Path, manager: KeyManager
) -> None:
    keys = CastellanKeys(tmp_path, bits=256, connect=lambda: (manager, CONTEXT))
    keys.make(UUID)
    manager.delete(CONTEXT, (tmp_path / UUID).read_text())
    keys.remove(UUID)
    assert list(tmp_path.iterdir()) == []


def test_key_manager_that_is_away_is_said_so(tmp_path: Path) -> None:
    def connect() -> tuple[KeyManager, object]:
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(BackendError, match=f"making the key of instance {UUID}: nobody there"):
        CastellanKeys(tmp_path, bits=256, connect=connect).make(UUID)
    assert list(tmp_path.iterdir()) == []
