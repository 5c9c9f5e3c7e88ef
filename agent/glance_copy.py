"""Has Glance copy an image into its store in Ceph, where disks can be cloned of it.

Nova's `images_rbd_glance_store_name`. Glance does the work, of which its record of the
image tells; whoever cannot have a copy fetches the image as if nobody had asked.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from agent.cancellation import Cancellation
from agent.errors import ImageError, ImageSourceUnavailable
from agent.glance_record import Copies
from agent.image import Image

LOG = logging.getLogger(__name__)


class Stores(Protocol):
    """What of `agent.glance.GlanceSource` is in use; see there."""

    def copy(self, image_id: str, store: str) -> None: ...
    def copies(self, image_id: str) -> Copies: ...


class GlanceCopy:
    """May be shared by any number of threads."""

    def __init__(
        self,
        source: Stores,
        *,
        store: str,
        interval_s: float,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`interval_s`: between two looks whether it is done, for no longer than `limit_s`."""
        self._source = source
        self._store = store
        self._interval_s = interval_s
        self._limit_s = limit_s
        self._clock = clock

    def bring(self, image: Image, cancellation: Cancellation) -> Image | None:
        """Return the record of the image once it is in the store too.

        None if it does not get there; the log says why.

        Raises:
            BootwrightError: the reason of the cancellation. Glance's work goes on.
        """
        try:
            return self._bring(image, cancellation)
        except ImageError as e:
            self._warn(image, e.message)
            return None

    def _bring(self, image: Image, cancellation: Cancellation) -> Image | None:
        LOG.info("asking Glance to copy image %s to its store %s", image.id, self._store)
        refused: ImageSourceUnavailable | None = None
        try:
            self._source.copy(image.id, self._store)
        except ImageSourceUnavailable as e:
            # Also if somebody else, such as another host, was first.
            refused = e
        end = self._clock() + self._limit_s
        while True:
            copies = self._source.copies(image.id)
            if self._store in copies.finished and self._store not in copies.running:
                return copies.image
            if self._store not in copies.running:
                if refused is not None:
                    raise refused
                if self._store in copies.failed:
                    self._warn(image, "it has failed, see Glance's log")
                    return None
            if self._clock() >= end:
                self._warn(image, f"it is not done after {self._limit_s:g} s")
                return None
            cancellation.wait(self._interval_s)

    def _warn(self, image: Image, why: str) -> None:
        LOG.warning(
            "no copy of image %s in Glance's store %s, so it is fetched: %s",
            image.id,
            self._store,
            why,
        )
