"""The images that a root disk is made of, as a job's first run has found them.

What a job says of them leaves room: kernel and ramdisk are the root image's own
if it names none, and the image's properties may change. What was found once is
kept in `instance.json`, and counts for each further run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from agent.image import Image
from agent.job import ImageRef
from agent.report import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    root: str
    """Its id, as the others'."""
    kernel: str | None = None
    ramdisk: str | None = None
    command_line: str | None = None
    """The kernel's; None if neither the job nor the image gives one."""
    trusted_certificates: tuple[str, ...] = ()
    """As in the job."""

    @classmethod
    def of(cls, wanted: ImageRef, images: Mapping[Role, Image]) -> Self:
        """Return what `wanted` has become of, given its images."""
        kernel, ramdisk = images.get(Role.KERNEL), images.get(Role.RAMDISK)
        root = images[Role.ROOT]
        return cls(
            root=root.id,
            kernel=None if kernel is None else kernel.id,
            ramdisk=None if ramdisk is None else ramdisk.id,
            command_line=wanted.os_command_line or root.properties.get("os_command_line"),
            trusted_certificates=wanted.trusted_certificates,
        )
