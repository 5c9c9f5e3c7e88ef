"""Python's librados and librbd: where they are, and whether they are there.

They are no packages of PyPI. They are Debian's python3-rados and python3-rbd, and
are loaded from where these lie, nothing else with them.
"""

import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Protocol

_DEBIAN: Final = "/usr/lib/python3/dist-packages"
_PACKAGES: Final = {"rados": "python3-rados", "rbd": "python3-rbd"}


class Image(Protocol):
    """The calls in use of `rbd.Image`."""

    def close(self) -> None: ...
    def size(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def write(self, data: bytes, offset: int) -> int: ...
    def flush(self) -> None: ...
    def metadata_get(self, key: str) -> str: ...
    def metadata_set(self, key: str, value: str) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Bindings:
    """The two modules; they have no types."""

    rados: Any
    rbd: Any


def load() -> Bindings:
    """Raises: ImportError: see `available`."""
    return Bindings(rados=_module("rados"), rbd=_module("rbd"))


def available() -> str | None:
    """Return the package that is missing to speak to Ceph; None if none is."""
    for name, package in _PACKAGES.items():
        try:
            _module(name)
        except ImportError:
            return package
    return None


def _module(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name) or importlib.machinery.PathFinder.find_spec(
        name, [_DEBIAN]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no module {name}", name=name)
    module = importlib.util.module_from_spec(spec)
    # Before it runs: rbd imports rados by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # as the import machinery itself does: no half module is found again
        del sys.modules[name]
        raise
    return module
