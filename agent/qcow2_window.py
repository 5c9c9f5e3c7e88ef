"""What can still be had of an image that passes by once.

The newest bytes are in memory; of older ones those that were kept are in the
spill, a file as long as the image with each byte at its offset. Knows nothing
of clusters or tables.
"""

from agent.sparse import SparseFile


class Window:
    """Of one image; for one thread, but for `keep_of`."""

    def __init__(self, spill: SparseFile) -> None:
        """`close` closes the spill."""
        self._spill = spill
        self.offset = 0
        """The bytes that have come."""
        self.base = 0
        """Where the first byte is that is in memory."""
        self.data = b""
        """The bytes from `base` on, between `open` and `move`."""
        self._tail = bytearray()

    def add(self, piece: bytes) -> None:
        """Take the next bytes, which are not yet needed."""
        self.offset += len(piece)
        self._tail += piece

    def open(self, piece: bytes) -> None:
        """Take the next bytes, and have all that are in memory in `data`."""
        self.offset += len(piece)
        self.data = b"".join((self._tail, piece)) if self._tail else piece

    def move(self, base: int) -> None:
        """Let go of what is in memory before `base`."""
        self._tail = bytearray(memoryview(self.data)[base - self.base :])
        self.data, self.base = b"", base

    def read(self, begin: int, end: int) -> bytes:
        """Return bytes that are in memory, or were kept."""
        before = self.kept(begin, min(end, self.base)) if begin < self.base else b""
        inside = self.data[max(begin - self.base, 0) : max(end - self.base, 0)]
        return before + inside if before else inside

    def keep(self, begin: int, end: int) -> None:
        """Put bytes that are in memory into the spill."""
        if begin < end:
            self.keep_of(self.data, self.base, begin, end)

    def keep_of(self, data: bytes, base: int, begin: int, end: int) -> None:
        """The same with what was in memory at another time; any thread may."""
        self._spill.write(data, begin - base, end - base, begin)

    def kept(self, begin: int, end: int) -> bytes:
        """Return bytes that were kept."""
        return self._spill.read(begin, end)

    def save(self) -> None:
        """Put into the spill what `restore` needs."""
        self._spill.write(bytes(self._tail), 0, len(self._tail), self.base)

    def restore(self, base: int, offset: int, size: int) -> None:
        """Become what was saved when so many bytes had come, those from `base` on in memory.

        `size`: of the image.

        Raises:
            ValueError: it does not fit the spill.
        """
        self._spill.truncate(offset)
        self._spill.truncate(size)
        self.base, self.offset = base, offset
        self._tail = bytearray(self.kept(base, offset))

    def close(self) -> None:
        """Let go of the spill, without flushing; may be called again."""
        self._spill.close()
