"""What the helper for logical volumes refuses before it asks LVM anything.

What it does is seen in a kernel that has device-mapper: functional/inside.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_config import cfg

import privsep
from privsep import lvm, lvm_tools

DISK = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1_disk"
BASE = f"base_{'a1' * 20}"
KEY = bytes(64)


@pytest.fixture(autouse=True)
def _here() -> Iterator[None]:
    """Calls run in this process, and no tool is there for one that would come that far."""
    privsep.volumes.set_client_mode(False)
    cfg.CONF.set_override("images_volume_group", "no-such-group", group="libvirt")
    yield
    cfg.CONF.clear_override("images_volume_group", group="libvirt")
    privsep.volumes.set_client_mode(True)


CALLS: dict[str, Callable[[Any], object]] = {
    "create": lambda name: lvm.create(name, 512),
    "snapshot": lambda name: lvm.snapshot(name, BASE, 512),
    "snapshot of": lambda name: lvm.snapshot(DISK, name, 512),
    "write": lambda name: lvm.write(name, 0, bytes(512), False),
    "blank": lambda name: lvm.blank(name, 0, 512, False, False),
    "finish": lvm.finish,
    "grow": lambda name: lvm.grow(name, 512, False),
    "settle": lvm.settle,
    "retire": lvm.retire,
    "remove": lambda name: lvm.remove(f"{name}+new"),
    "unlock": lambda name: lvm.unlock(name, KEY),
    "lock": lvm.lock,
}

NAMES = [
    "",
    "..",
    "/dev/sda",
    f"/dev/vg/{DISK}",
    f"../{DISK}",
    f"other/{DISK}",
    f"{DISK}/..",
    f"{DISK}\n",
    f"{DISK}\0",
    f" {DISK}",
    f"--{DISK}",
    f"@{DISK}",
    DISK.upper(),
    DISK.removesuffix("_disk"),
    f"{DISK}+new+new",
    f"{DISK}-dmcrypt",
    f"{DISK}{'a' * 64}",
    "root",
    "pool",
    "base_",
    f"{BASE}0",
    f"{BASE}/../{DISK}",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_the_name_of_a_volume_of_ours_is_refused(call: str, name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a volume"):
        CALLS[call](name)


@given(name=st.text(max_size=80))
def test_no_text_comes_past_the_check(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a volume"):
        lvm.finish(name)


@pytest.mark.parametrize("name", [None, 7, DISK.encode(), (DISK,)])
@pytest.mark.parametrize("call", ["create", "write", "finish", "retire", "snapshot of"])
def test_what_is_no_string_is_refused(call: str, name: object) -> None:
    with pytest.raises(TypeError):
        CALLS[call](name)


@pytest.mark.parametrize("name", [BASE, f"{BASE}+new"])
def test_bases_are_neither_grown_nor_encrypted(name: str) -> None:
    for call in (CALLS["grow"], CALLS["unlock"], CALLS["settle"]):
        with pytest.raises(ValueError, match="not the name of a volume"):
            call(name)


@pytest.mark.parametrize("size", [0, -512, 511, 513])
def test_sizes_are_whole_sectors(size: int) -> None:
    with pytest.raises(ValueError, match="not the size"):
        lvm.create(DISK, size)
    with pytest.raises(ValueError, match="not the size"):
        lvm.grow(DISK, size, False)


@pytest.mark.parametrize("size", ["512", 512.0, None])
def test_sizes_are_numbers(size: object) -> None:
    with pytest.raises(TypeError):
        lvm.create(DISK, size)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (0, -512), (1, 512), (0, 511)])
def test_ranges_are_whole_sectors(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="not whole sectors"):
        lvm.blank(f"{DISK}+new", offset, length, False, False)


def test_a_write_is_limited() -> None:
    with pytest.raises(ValueError, match="too many"):
        lvm.write(DISK, 0, bytes(lvm.STEP + 512), False)


@pytest.mark.parametrize("key", [b"", bytes(63), bytes(65)])
def test_a_key_has_the_configured_size(key: bytes) -> None:
    with pytest.raises(ValueError, match="512 bits"):
        lvm.unlock(DISK, key)


def test_a_volume_that_is_whole_is_not_removed() -> None:
    with pytest.raises(PermissionError, match="is whole"):
        lvm.remove(DISK)


def test_without_a_volume_group_nothing_is_done() -> None:
    cfg.CONF.clear_override("images_volume_group", group="libvirt")
    with pytest.raises(PermissionError, match="no images_volume_group"):
        lvm.survey()


def test_nothing_is_called_without_a_helper() -> None:
    privsep.volumes.set_client_mode(True)
    with pytest.raises(ConnectionError, match="helper is not running"):
        lvm.finish(DISK)


def test_a_tool_that_is_missing_is_named_with_its_package() -> None:
    with pytest.raises(RuntimeError, match="no-such-tool is not installed"):
        lvm_tools.run("no-such-tool")


def test_a_tool_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"sh -c ended with status 3: no such thing"):
        lvm_tools.run("sh", "-c", "echo WARNING: nothing >&2; echo no such thing >&2; exit 3")
