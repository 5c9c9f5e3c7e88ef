"""qemu-img: what converts, copies and grows disk images for the agent.

The format of every file is given, never guessed, every run has limits, and it
reaches nothing but the files it is about: what it opens may be hostile, even
if inspection has found nothing. Whether a file may be opened at all is the
business of `inspection`.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agent import files, process
from agent.cancellation import Cancellation
from agent.confinement import Confinement
from agent.errors import BackendError, BootwrightError, ImageUnacceptable
from agent.process import Cause, ProgramFailed

_GROW_S = 300.0  # only an empty table grows, so this is for a disk that hangs
_FULL = ("no space left on device", "disk quota exceeded")
# glib and QEMU abort when memory runs out, each with words of its own.
_NO_MEMORY = ("allocate memory", "failed to allocate", "thread_create")
# Beside the data: tables, and the 128 MiB QEMU takes ahead for a ploop image, and gives back.
_BESIDE = 256 << 20
_ROUNDING = 64 << 10  # O_DIRECT writes whole sectors or pages past an odd end


class QemuImg:
    """May be shared by threads. Limits are for each run on its own."""

    def __init__(
        self,
        *,
        program: str = "qemu-img",
        cpu_s: int = 3600,
        address_space: int = 1 << 30,
        timeout_s: float = 7200.0,
    ) -> None:
        """Sizes are bytes.

        Args:
            address_space: QEMU 7.2 converts at 256 MiB whatever was tried.
            timeout_s: wall clock of a conversion.
        """
        self._program = program
        self._limits = process.Limits(cpu_s=cpu_s, address_space=address_space)
        self._timeout_s = timeout_s
        self._direct: dict[Path, bool] = {}
        self._probing = threading.Lock()

    def convert(
        self,
        source: Path,
        source_format: str,
        target: Path,
        cancellation: Cancellation,
        *,
        virtual_size: int,
    ) -> None:
        """Write the content of `source` to `target` as a sparse raw file, durably.

        `virtual_size` is what the header promised: the target may not become
        larger. On failure the target is gone.

        Raises:
            ImageUnacceptable: QEMU cannot read the source, or it needs more
                than a limit allows.
            InsufficientFreeSpace
            BackendError: qemu-img is missing, cannot be started, or took too long.
            BootwrightError: the reason of the cancellation.
        """
        limits = replace(self._limits, file_size=virtual_size + _ROUNDING)
        what = f"converting {source.name} from {source_format} to raw"
        # Past the page cache where the file system can: the base is not read
        # again soon in full, and the memory belongs to the guests.
        cache = "none" if self._supports_direct(target.parent) else "writeback"
        try:
            # Made here, because the program may write to this file and make no other.
            with files.reporting_no_space(target, virtual_size, what):
                _make_empty(target)
            process.run(
                [
                    self._program, "convert", "-t", cache, "-f", source_format,
                    "-O", "raw", "-S", "4k", source.absolute(), target.absolute(),
                ],
                timeout_s=self._timeout_s,
                cancellation=cancellation,
                limits=limits,
                confinement=Confinement(readable=(source,), writable=(target,)),
            )  # fmt: skip
            with files.reporting_no_space(target, virtual_size, what):
                files.fsync(target)
        except BaseException as e:
            target.unlink(missing_ok=True)
            if not isinstance(e, ProgramFailed):
                raise
            raise self._translated(e, what, limits, target, virtual_size) from e

    def fill(
        self,
        base: Path,
        target: Path,
        target_format: str,
        cancellation: Cancellation,
        *,
        virtual_size: int,
    ) -> None:
        """Write the content of a raw base into an image that exists and is not smaller.

        What is in the target after a failure is of no use. It is not synced.

        Args:
            virtual_size: bytes, the target's.

        Raises:
            InsufficientFreeSpace
            BackendError: qemu-img is missing, failed, or took too long.
            BootwrightError: the reason of the cancellation.
        """
        what = f"copying base {base.name} to {target}"
        limits = replace(self._limits, file_size=virtual_size + (virtual_size >> 12) + _BESIDE)
        cache = "none" if self._supports_direct(target.parent) else "writeback"
        try:
            process.run(
                [
                    self._program, "convert", "-n", "-t", cache, "-f", "raw",
                    "-O", target_format, base.absolute(), target.absolute(),
                ],
                timeout_s=self._timeout_s,
                cancellation=cancellation,
                limits=limits,
                confinement=Confinement(readable=(base,), writable=(target,)),
            )  # fmt: skip
        except ProgramFailed as e:
            error = self._translated(e, what, limits, target, virtual_size)
            if isinstance(error, ImageUnacceptable):
                raise BackendError(error.message) from e
            raise error from e

    def grow(self, path: Path, format_: str, virtual_size: int, *, backing: Sequence[Path]) -> None:
        """Make an image larger whose metadata no guest can write.

        `backing`: the files it stands on, which are opened too.

        Raises:
            BackendError: qemu-img is missing, failed, or took too long.
        """
        what = f"growing {path} to {virtual_size} bytes"
        limits = replace(self._limits, file_size=path.stat().st_size + _BESIDE)
        try:
            process.run(
                [
                    self._program, "resize", "-q", "-f", format_, "--", path.absolute(),
                    str(virtual_size),
                ],
                timeout_s=_GROW_S,
                limits=limits,
                confinement=Confinement(readable=tuple(backing), writable=(path,)),
            )  # fmt: skip
        except ProgramFailed as e:
            raise BackendError(f"{what}: {e}") from e

    def _translated(
        self, error: ProgramFailed, what: str, limits: process.Limits, path: Path, needed: int
    ) -> BootwrightError:
        if error.cause is Cause.MISSING:
            return BackendError(f"{what}: {error}", "install it and try again")
        if error.cause is Cause.START:
            return BackendError(f"{what}: {error}", "the host may be out of memory or processes")
        if error.cause is Cause.TIMEOUT:
            return BackendError(
                f"{what}: it was not done within its time limit",
                "the disk may be overloaded; try again",
            )
        if any(words in error.stderr.lower() for words in _FULL):
            return files.no_space(path, needed, files.free_bytes(path.parent), what)
        if limit := _limit_reached(error, limits):
            return ImageUnacceptable(
                f"{what}: {limit}", "an honest image needs less; convert it to raw and upload that"
            )
        return ImageUnacceptable(
            f"{what}: {error}", "the image is damaged or not what it claims to be"
        )

    def _supports_direct(self, directory: Path) -> bool:
        """Return whether O_DIRECT writes work there (not on tmpfs, some network file systems)."""
        with self._probing:
            if directory not in self._direct:
                self._direct[directory] = files.supports_direct(directory)
            return self._direct[directory]


def _limit_reached(error: ProgramFailed, limits: process.Limits) -> str | None:
    stderr = error.stderr.lower()
    if error.cause is Cause.CPU:
        return f"it used more than {limits.cpu_s} s of CPU"
    # QEMU ignores SIGXFSZ, so the kernel's answer comes to it as EFBIG.
    if error.cause is Cause.FILE_SIZE or "file too large" in stderr:
        return f"its content is larger than the {limits.file_size} bytes a file may have"
    if error.cause is Cause.OUTPUT:
        return "it has more metadata than anybody would read"
    if any(words in stderr for words in _NO_MEMORY):
        return f"it needs more than {limits.address_space} bytes of address space"
    return None


def _make_empty(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
