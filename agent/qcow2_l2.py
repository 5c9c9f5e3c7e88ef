"""The L2 tables of a qcow2 image that passes by: where they are, and which have come.

They are kept in the window's spill as they pass, and can be read from then on.
"""

from array import array
from collections import deque
from collections.abc import Iterator

from agent.qcow2_tables import Claims, Extent, Geometry, read_l1, read_l2
from agent.qcow2_window import Window


class L2Tables:
    """Of one image; for one thread."""

    def __init__(self, geometry: Geometry, window: Window) -> None:
        self._geometry = geometry
        self._window = window
        self._offsets: array[int] = array("Q")
        self._order: array[int] = array("L")
        """Those that are there, in the order of the file."""
        self._passed = 0
        self.known = False
        """Whether the L1 table has been read."""
        self.waiting: deque[int] = deque()
        """Those that have passed and that nobody has read yet."""

    @property
    def coming(self) -> bool:
        """Whether there are some yet that may point anywhere."""
        return not self.known or self._passed < len(self._order) or bool(self.waiting)

    @property
    def ahead(self) -> "array[int]":
        """Those that have yet to pass."""
        return self._order[self._passed :]

    def line_up(self, claims: Claims) -> None:
        """Read the L1 table, all of which has been kept, and claim what it points to.

        Raises:
            ValueError: it breaks a rule.
        """
        data = self._window.kept(*self._geometry.l1)
        offsets = self._offsets = read_l1(data, self._geometry, claims)
        self.known = True
        there = (index for index, offset in enumerate(offsets) if offset)
        self._order = array("L", sorted(there, key=offsets.__getitem__))

    def passing(self, begin: int, end: int) -> Iterator[int]:
        """Yield those that come to pass below `end`; what is from `begin` on is kept first."""
        while self._passed < len(self._order):
            index = self._order[self._passed]
            offset = self._offsets[index]
            stop = offset + self._geometry.cluster
            if stop > end:
                return
            if offset >= begin:
                self._window.keep(offset, stop)
            self._passed += 1
            yield index

    def read(self, index: int) -> tuple[list[Extent], list[Extent]]:
        """Return the extents of one that has passed, see `read_l2`.

        Raises:
            ValueError: it breaks a rule.
        """
        begin = self._offsets[index]
        data = self._window.kept(begin, begin + self._geometry.cluster)
        return read_l2(data, index, self._geometry)
