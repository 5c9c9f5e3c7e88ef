"""Has Glance copy an image into its store in Ceph, where disks can be cloned of it.

Nova's `images_rbd_glance_store_name`. Glance does the work, of which its record of the
image tells; whoever cannot have a copy fetches the image as if nobody had asked.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from agent.cancellation import Cancellation
from agent.errors import ImageError
from agent.glance_errors import Declined
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
        is_cached: Callable[[str], bool],
        interval_s: float,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_cached(image_id)` tells whether there is a base that a disk can be made of at once.

        `interval_s`: between two looks whether it is done, for no longer than `limit_s`.
        """
        self._source = source
        self._store = store
        self._is_cached = is_cached
        self._interval_s = interval_s
        self._limit_s = limit_s
        self._clock = clock

    def bring(self, image: Image, cancellation: Cancellation) -> Image | None:
        """Return the record of the image once it is in the store too.

        None if it does not get there, of which the log says why, or if nobody has to wait for
        it: the image is in the cache. Half of the time that is left for the job is spent here
        at most, so that the image can still be fetched.

        Raises:
            BootwrightError: the reason of the cancellation. Glance's work goes on.
        """
        if self._is_cached(image.id):
            LOG.info("image %s is in the cache, so Glance is not asked to copy it", image.id)
            return None
        try:
            return self._bring(image, cancellation)
        except ImageError as e:
            self._warn(image, e.message)
            return None

    def _bring(self, image: Image, cancellation: Cancellation) -> Image | None:
        LOG.info("asking Glance to copy image %s to its store %s", image.id, self._store)
        remaining = cancellation.remaining()
        limit_s = self._limit_s if remaining is None else min(self._limit_s, remaining / 2)
        end = self._clock() + limit_s
        declined: Declined | None = None
        try:
            self._source.copy(image.id, self._store)
        except Declined as e:
            # Also if somebody else, such as another host, was first.
            declined = e
        # What it notes of an earlier try stays there until it begins, a moment after its answer.
        failure_counts = False
        while True:
            copies = self._source.copies(image.id)
            if self._store in copies.finished and self._store not in copies.running:
                return copies.image
            if self._store not in copies.running:
                if declined is not None:
                    raise declined
                if self._store in copies.failed and failure_counts:
                    self._warn(image, "it has failed, see Glance's log")
                    return None
            failure_counts = True
            left_s = end - self._clock()
            if left_s <= 0:
                self._warn(image, f"it is not done after {limit_s:.0f} s")
                return None
            cancellation.wait(min(self._interval_s, left_s))

    def _warn(self, image: Image, why: str) -> None:
        LOG.warning(
            "no copy of image %s in Glance's store %s, so it is fetched: %s",
            image.id,
            self._store,
            why,
        )
