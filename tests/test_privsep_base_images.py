"""What the privileged function does and what it refuses, without any privilege.

That the same holds in a real helper is seen in test_privileges.py.
"""

import importlib
import os
import pkgutil
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oslo_config import cfg
from oslo_privsep.capabilities import Capabilities
from oslo_privsep.priv_context import PrivContext

import privsep
from privsep import base_images

NAME = "0d5e6b61602d758984b3bf038267614d6016eb2a"

# The whole elevated surface. Whoever lets it grow writes it down here first.
CONTEXTS = {
    "privsep.base_owner": ["CAP_FOWNER"],
    # Only where images_volume_group is set in [libvirt].
    "privsep.volumes": ["CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SYS_ADMIN"],
}
ENTRYPOINTS = {
    "privsep.base_images.touch": "privsep.base_owner",
    "privsep.consoles.reveal": "privsep.base_owner",
    "privsep.lvm.blank": "privsep.volumes",
    "privsep.lvm.create": "privsep.volumes",
    "privsep.lvm.finish": "privsep.volumes",
    "privsep.lvm.grow": "privsep.volumes",
    "privsep.lvm.lock": "privsep.volumes",
    "privsep.lvm.remove": "privsep.volumes",
    "privsep.lvm.retire": "privsep.volumes",
    "privsep.lvm.settle": "privsep.volumes",
    "privsep.lvm.snapshot": "privsep.volumes",
    "privsep.lvm.survey": "privsep.volumes",
    "privsep.lvm.unlock": "privsep.volumes",
    "privsep.lvm.write": "privsep.volumes",
}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The image cache as the helper sees it; calls run in this process."""
    directory = tmp_path / "_base"
    directory.mkdir()
    cfg.CONF.set_override("instances_path", os.fspath(tmp_path))
    privsep.base_owner.set_client_mode(False)
    yield directory
    privsep.base_owner.set_client_mode(True)
    cfg.CONF.clear_override("instances_path")


def make_base(path: Path) -> Path:
    path.write_bytes(b"base")
    os.utime(path, (1, 1))
    return path


def test_touch_sets_both_times_to_now(cache: Path) -> None:
    base = make_base(cache / NAME)
    other = make_base(cache / NAME.replace("0", "1"))
    before = time.time()
    base_images.touch(NAME)
    assert before - 1 <= base.stat().st_mtime <= time.time() + 1
    assert before - 1 <= base.stat().st_atime <= time.time() + 1
    assert other.stat().st_mtime == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        f"/{NAME}",
        f"./{NAME}",
        f"../_base/{NAME}",
        f"{NAME}/",
        f"{NAME}\n",
        f"{NAME}\0",
        f"\0{NAME[1:]}",
        NAME[:-1],
        f"{NAME}0",
        NAME.upper(),
        f"{NAME}.json",
        f"g{NAME[1:]}",
        f"\u0660{NAME[1:]}",  # a digit, but not one of ours
    ],
)
def test_touch_refuses_what_is_no_name_of_a_base(cache: Path, name: str) -> None:
    base = make_base(cache / NAME)
    with pytest.raises(ValueError, match="40 lowercase hex digits"):
        base_images.touch(name)
    assert base.stat().st_mtime == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(alphabet=st.sampled_from("0aAf/.\0\n" + "é"), min_size=38, max_size=42))
def test_touch_refuses_every_other_name(cache: Path, name: str) -> None:
    expected = FileNotFoundError if re.fullmatch("[0-9a-f]{40}", name) else ValueError
    with pytest.raises(expected):
        base_images.touch(name)


@pytest.mark.parametrize("name", [None, 40, NAME.encode(), (NAME,), {NAME: NAME}])
def test_touch_refuses_what_is_no_string(cache: Path, name: str) -> None:
    make_base(cache / NAME)
    with pytest.raises(TypeError):
        base_images.touch(name)


def test_touch_refuses_a_missing_base(cache: Path) -> None:
    with pytest.raises(FileNotFoundError):
        base_images.touch(NAME)
    assert list(cache.iterdir()) == []


def test_touch_refuses_a_symbolic_link(cache: Path, tmp_path: Path) -> None:
    target = make_base(tmp_path / "target")
    link = cache / NAME
    link.symlink_to(target)
    os.utime(link, (1, 1), follow_symlinks=False)
    with pytest.raises(PermissionError, match="not a regular file"):
        base_images.touch(NAME)
    assert target.stat().st_mtime == 1
    assert link.lstat().st_mtime == 1


def test_touch_refuses_a_directory(cache: Path) -> None:
    (cache / NAME).mkdir()
    os.utime(cache / NAME, (1, 1))
    with pytest.raises(PermissionError, match="not a regular file"):
        base_images.touch(NAME)
    assert (cache / NAME).stat().st_mtime == 1


def test_touch_refuses_a_fifo_without_waiting_for_its_writer(cache: Path) -> None:
    os.mkfifo(cache / NAME)
    with pytest.raises(PermissionError, match="not a regular file"):
        base_images.touch(NAME)


def test_touch_refuses_a_cache_that_is_a_symbolic_link(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    base = make_base(elsewhere / NAME)
    cache.rmdir()
    cache.symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError):
        base_images.touch(NAME)
    assert base.stat().st_mtime == 1


def test_touch_refuses_an_instances_path_that_is_a_symbolic_link(
    cache: Path, tmp_path: Path
) -> None:
    base = make_base(cache / NAME)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    cfg.CONF.set_override("instances_path", os.fspath(link))
    with pytest.raises(NotADirectoryError):
        base_images.touch(NAME)
    assert base.stat().st_mtime == 1


@pytest.mark.parametrize(
    ("option", "group", "value"),
    [
        ("instances_path", None, "instances"),
        ("instances_path", None, ""),
        ("subdirectory_name", "image_cache", ""),
        ("subdirectory_name", "image_cache", ".."),
        ("subdirectory_name", "image_cache", "a/b"),
        ("subdirectory_name", "image_cache", "/etc"),
    ],
)
def test_configuration_cannot_name_another_place(
    option: str, group: str | None, value: str
) -> None:
    with pytest.raises(ValueError, match="doesn't match"):
        cfg.CONF.set_override(option, value, group=group)


def test_nothing_is_called_without_a_helper() -> None:
    assert privsep.base_owner.channel is None
    with pytest.raises(ConnectionError, match="helper is not running"):
        base_images.touch(NAME)


def test_elevated_surface_is_what_this_file_says() -> None:
    contexts: dict[str, list[str]] = {}
    entrypoints: dict[str, str | None] = {}
    modules = ["privsep"]
    modules += [info.name for info in pkgutil.walk_packages(privsep.__path__, "privsep.")]
    for module in modules:
        for name, value in vars(importlib.import_module(module)).items():
            context = getattr(value, "privsep_entrypoint", None)
            if context is not None:
                entrypoints[f"{module}.{name}"] = context.pypath
            if isinstance(value, PrivContext):
                held = [Capabilities(bit).name for bit in value.conf.capabilities]
                contexts[str(value.pypath)] = held
    assert contexts == CONTEXTS
    assert entrypoints == ENTRYPOINTS
