"""An image as the image source describes it. A value; no bytes, no network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.errors import ImageNotActive


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """The record of one image; sizes are bytes.

    `digest` is the first of Glance's hashes we can check: `(algorithm, hex)`,
    where the algorithm is a name of `hashlib`. None if the source has none.
    """

    id: str
    name: str
    source: str
    """Where it came from: `glance` or `directory`."""
    status: str
    disk_format: str
    container_format: str = "bare"
    size: int | None = None
    virtual_size: int | None = None
    min_disk: int = 0
    """GiB."""
    min_ram: int = 0
    """MiB."""
    digest: tuple[str, str] | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    locations: tuple[str, ...] = ()
    """Where its bytes lie in a Ceph cluster, `rbd://…`; others may hold passwords."""

    @property
    def kernel_id(self) -> str | None:
        return self.properties.get("kernel_id") or None

    @property
    def ramdisk_id(self) -> str | None:
        return self.properties.get("ramdisk_id") or None


_INACTIVE = {
    "queued": "nothing has been uploaded to it yet: upload its data, or use another image",
    "saving": "its upload is still going on: try again when it is done",
    "importing": "its import is still going on: try again when it is done",
    "uploading": "its import is still going on: try again when it is done",
    "deactivated": "an administrator has withdrawn it: have it reactivated, or use another image",
    "killed": "its upload failed: upload it anew under another id",
    "deleted": "it is gone: use another image",
    "pending_delete": "it is being deleted: use another image",
}


def require_active(image: Image) -> None:
    """Return if the image's bytes may be read.

    Raises:
        ImageNotActive: with the status it has, and what can be done about it.
    """
    if image.status != "active":
        raise ImageNotActive(
            f"image {image.id} ({image.name}) is not active: {image.source} says it is "
            f"{image.status!r}",
            _INACTIVE.get(image.status, "only an active image has bytes to read"),
        )
