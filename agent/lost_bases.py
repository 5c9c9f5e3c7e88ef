"""Bases that are gone from under the overlays of instances: told, and fetched again.

Nothing of ours removes such a base; somebody did, or a disk lost it. The guest
that has it open goes on, and would not start again.
"""

import logging
from collections.abc import Callable

from agent.image import Image
from agent.instances import InstanceRecord, Instances
from agent.transfer import ImageSource

LOG = logging.getLogger(__name__)


class LostBases:
    """Used by one thread."""

    def __init__(
        self, instances: Instances, source: ImageSource, *, fetch: Callable[[Image], object]
    ) -> None:
        """`fetch` has an image brought into the cache; it does not wait for that."""
        self._instances = instances
        self._source = source
        self._fetch = fetch

    def mend(self) -> None:
        """Have every lost base fetched again that the image source still has as it was.

        Raises:
            ImageError: the source is away, or has an image no more.
        """
        for image_id, records in self._lost().items():
            names = ", ".join(record.name for record in records)
            LOG.error(
                "the base of image %s is gone from under %s, which cannot start without it; "
                "fetching it again",
                image_id,
                names,
            )
            image = self._source.get(image_id)
            digest = None if image.digest is None else ":".join(image.digest)
            if any(record.image_digest != digest for record in records):
                # Other bytes under an overlay would be another disk.
                LOG.error(
                    "image %s has another hash now than when %s was made of it, and is not "
                    "fetched: restore the base from a backup",
                    image_id,
                    names,
                )
                continue
            self._fetch(image)

    def _lost(self) -> dict[str, list[InstanceRecord]]:
        found: dict[str, list[InstanceRecord]] = {}
        for record in self._instances.all():
            if any(not link.path.exists() for link in record.root.backing_chain):
                found.setdefault(record.image_id, []).append(record)
        return found
