"""Pins an operator has put on bases: they keep it, for a while or until taken off.

    .pins/<base name>.json      one file for each; hosts that share the cache share them

Jobs pin bases too, for as long as they run; those pins are `agent.usage`'s.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from agent.files import fsync_directory, write_durably


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorPin:
    since: float
    until: float | None
    """Seconds since the epoch; None for ever."""


_PIN = TypeAdapter(OperatorPin)


class OperatorPins:
    """May be shared by any number of threads."""

    def __init__(self, directory: Path) -> None:
        """`directory` is `_base/.pins`; it is made if need be."""
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    def put(self, base_name: str, *, seconds: float | None) -> OperatorPin:
        """Pin a base for so long, or for ever; replaces what pin there was."""
        now = time.time()
        pin = OperatorPin(since=now, until=None if seconds is None else now + seconds)
        write_durably(self._path(base_name), _PIN.dump_json(pin))
        return pin

    def remove(self, base_name: str) -> None:
        """Done already is fine."""
        path = self._path(base_name)
        if path.exists():
            path.unlink(missing_ok=True)
            fsync_directory(self._directory)

    def get(self, base_name: str) -> OperatorPin | None:
        """Return the pin, None if there is none or it has expired.

        One that cannot be read holds for ever: somebody wanted the base kept.
        """
        try:
            pin = _PIN.validate_json(self._path(base_name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            return OperatorPin(since=0.0, until=None)
        return pin if pin.until is None or pin.until > time.time() else None

    def _path(self, base_name: str) -> Path:
        return self._directory / f"{base_name}.json"
