"""The logical volumes of this host as the agent sees them: the helper's calls, and what they need.

The agent itself opens no volume: it reads what shall be on one from a file it
may read, and the helper writes that. Which volumes are made of what is decided
in `agent.backends.lvm`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from oslo_privsep.comm import PrivsepTimeout

from agent.cancellation import Cancellation
from agent.errors import BackendError, InsufficientFreeSpace
from agent.sparse import data_extents
from privsep import lvm

NEW = lvm.NEW
OLD = lvm.OLD

SECTOR = 512
_BLANK_STEP = 256 << 20
"""Bytes between two looks at the cancellation; one to three seconds of a slow disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """One of ours, as LVM told it."""

    size: int
    grew_from: int | None
    """Where it has not been blanked yet since it grew; None if it is whole."""
    thin: bool
    in_use: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """How the volume group stood at one time. Sizes are bytes."""

    extent: int
    """What all volumes consist of."""
    free: int
    """For volumes, or in the thin pool for their data."""
    zeroing: bool
    """Whether new blocks of the pool read as zeros."""
    volumes: dict[str, Volume]
    others: frozenset[str]
    """Names of volumes that are not ours."""


def survey() -> Survey:
    """Raises: BackendError."""
    with reporting("asking LVM"):
        extent, free, zeroing, rows, others = lvm.survey()
    return Survey(
        extent=extent,
        free=free,
        zeroing=bool(zeroing),
        volumes={
            name: Volume(size=size, grew_from=grew_from, thin=thin, in_use=used)
            for name, size, grew_from, thin, used in rows
        },
        others=frozenset(others),
    )


def fill(
    name: str,
    source: int,
    size: int,
    *,
    zeroed: bool,
    encrypted: bool,
    cancellation: Cancellation,
) -> None:
    """Make the `size` bytes of volume `<name>+new` those of file `source`, and zeros after its end.

    Args:
        source: a descriptor, open for reading.
        zeroed: whether the volume reads as zeros already.
        encrypted: write through its mapping.

    Raises:
        RuntimeError, OSError …: as the helper's functions do; see `reporting`.
        BootwrightError: the reason of the cancellation.
    """
    reached = 0

    def skip_to(end: int) -> None:
        if not zeroed:
            blank(name + NEW, reached, end, encrypted=encrypted, cancellation=cancellation)

    for start, end in data_extents(source, 0, os.fstat(source).st_size):
        begin = start - start % SECTOR  # the blocks of file systems are larger, of most
        skip_to(begin)
        for offset in range(begin, end, lvm.STEP):
            cancellation.check()
            data = os.pread(source, min(lvm.STEP, end - offset), offset)
            # The end of a raw image may lie within a sector.
            lvm.write(name, offset, data + bytes(-len(data) % SECTOR), encrypted)
        reached = end + -end % SECTOR
    skip_to(size)


def blank(
    name: str,
    begin: int,
    end: int,
    *,
    encrypted: bool = False,
    noise: bool = False,
    cancellation: Cancellation,
) -> None:
    """Overwrite the bytes from `begin` to `end` of a volume; raises as `fill`."""
    for offset in range(begin, end, _BLANK_STEP):
        cancellation.check()
        lvm.blank(name, offset, min(_BLANK_STEP, end - offset), noise, encrypted)


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Turn what the helper says into errors for a job, which begin with `what`.

    Raises:
        InsufficientFreeSpace: in the volume group or the thin pool.
        BackendError
    """
    try:
        yield
    except PrivsepTimeout as e:
        raise BackendError(
            f"{what}: the privileged helper did not answer in time",
            "look whether a command of LVM hangs, and why",
        ) from e
    except ConnectionError as e:
        raise BackendError(f"{what}: {e}", "let the unit start it: docs/operations.md, LVM") from e
    except (RuntimeError, OSError, ValueError) as e:
        if "insufficient free space" in str(e) or "enough free" in str(e):
            raise InsufficientFreeSpace(
                f"{what}: {e}", "free space in the volume group, or add a physical volume"
            ) from e
        raise BackendError(f"{what}: {e}") from e
