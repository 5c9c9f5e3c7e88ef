"""Refreshes the last use of a base, through the privileged helper; never fails a boot."""

import logging
import threading

from oslo_privsep.comm import PrivsepTimeout

from privsep import base_images

LOG = logging.getLogger(__name__)


class LastUse:
    """May be shared by any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warned = False

    def refresh(self, base_name: str) -> None:
        """Set the base's times to now, or warn, once, that it cannot be done.

        A base whose last use is not known is kept longer than needed; nothing
        worse follows.
        """
        try:
            base_images.touch(base_name)
        except (OSError, ValueError, PrivsepTimeout) as e:
            with self._lock:
                level = logging.DEBUG if self._warned else logging.WARNING
                self._warned = True
            LOG.log(level, "the last use of base %s could not be refreshed: %s", base_name, e)
        else:
            with self._lock:
                self._warned = False
