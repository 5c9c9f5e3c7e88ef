"""Compressed clusters of qcow2 images: a few threads that decode them.

Knows nothing of where they come from or go to.
"""

import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

# Inflates about twice as fast as the zlib that comes with Python.
from zlib_ng import zlib_ng

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_THREADS = 2
_WINDOWS_AHEAD = 3
# Bytes to be decoded at a time. A hand-over between threads costs some 50 us,
# a cluster of 64 KiB 100 to 400.
_JOB = 256 << 10
# 8 MiB, what zstd uses up to its level 19. qemu-img writes 2 MiB.
_ZSTD_WINDOW_LOG = 23


class Packed(NamedTuple):
    """Compressed data of one guest cluster, offsets in bytes."""

    data: memoryview
    begin: int
    end: int
    """In the file; what the table says, which is up to a sector too far."""
    guest: int
    following: int
    """Where it should end: where the next begins, if that is known, or else `end`."""


class Unpacker:
    """Decodes clusters of one image; `submit` and `settle` are for one thread."""

    def __init__(
        self,
        compression: str,
        cluster: int,
        put: Callable[[int, bytes], None],
        keep: Callable[[int, bytes, int], None],
    ) -> None:
        """`put` and `keep` are called in other threads; the latter as `submit` says."""
        self._unpack = _UNPACK[compression]
        self._cluster = cluster
        self._put = put
        self._keep = keep
        self._pool = ThreadPoolExecutor(_THREADS, "qcow2-unpack")
        self._windows: deque[list[Future[None]]] = deque()

    def submit(self, packed: list[Packed], window: bytes = b"", base: int = 0) -> None:
        """Have `packed` decoded and put; wait only while there is much to do already.

        What lies between a cluster's real end and `following` may be another
        cluster that nobody knows of yet. Where a `window` is given, `keep` is
        called for the file's cluster with such a place, with the window and its
        offset `base`.

        Raises:
            ValueError: what was submitted earlier does not make a cluster.
            OSError: `put` or `keep` failed.
        """
        step = max(1, _JOB // self._cluster)
        self._windows.append(
            [
                self._pool.submit(self._run, packed[at : at + step], window, base)
                for at in range(0, len(packed), step)
            ]
        )
        while len(self._windows) > _WINDOWS_AHEAD:
            self._await_window()

    def settle(self) -> None:
        """Return when all that was submitted is put; raises as `submit`."""
        while self._windows:
            self._await_window()

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _await_window(self) -> None:
        for job in self._windows.popleft():
            job.result()

    def _run(self, packed: list[Packed], window: bytes, base: int) -> None:
        for data, begin, end, guest, following in packed:
            try:
                decoded, used = self._unpack(data, self._cluster)
            except ValueError as e:
                raise ValueError(
                    f"the compressed data of guest offset {guest:#x}, at {begin:#x}, is not a "
                    f"cluster of {self._cluster} bytes: {e}"
                ) from e
            self._put(guest, decoded)
            if window and begin + used < following:
                self._keep((end - 1) // self._cluster, window, base)


def unpacked(compression: str, data: bytes, cluster: int) -> bytes:
    """Return the cluster of so many bytes that `data` begins with.

    Raises:
        ValueError
    """
    return _UNPACK[compression](memoryview(data), cluster)[0]


def _inflate(data: memoryview, cluster: int) -> tuple[bytes, int]:
    """Return a cluster of raw deflate, and how many bytes of `data` it took.

    Raises:
        ValueError
    """
    stream = zlib_ng.decompressobj(wbits=-12)
    try:
        # One byte more than a good one has: then it comes to its end by itself.
        decoded = stream.decompress(data, cluster + 1)
    except zlib_ng.error as e:  # type: ignore[misc]  # its stub takes the class for an instance
        raise ValueError(str(e)) from e
    return _exact(decoded, cluster), len(data) - len(stream.unused_data)


def _unzstd(data: memoryview, cluster: int) -> tuple[bytes, int]:
    """As `_inflate`, of one zstd frame."""
    stream = zstd.ZstdDecompressor(
        options={int(zstd.DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG}
    )
    try:
        decoded = stream.decompress(data, cluster + 1)
    except zstd.ZstdError as e:
        raise ValueError(str(e)) from e
    if not stream.eof:
        raise ValueError("the frame does not end where it should")
    return _exact(decoded, cluster), len(data) - len(stream.unused_data)


def _exact(decoded: bytes, cluster: int) -> bytes:
    if len(decoded) != cluster:
        raise ValueError(f"it has {'more' if len(decoded) > cluster else len(decoded)} bytes")
    return decoded


_UNPACK: Mapping[str, Callable[[memoryview, int], tuple[bytes, int]]] = {
    "zlib": _inflate,
    "zstd": _unzstd,
}
