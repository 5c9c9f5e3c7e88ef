"""A disk as a value: what a backend gives one instance in one role.

Decided before anything is made, written to `instance.json` before the first
byte of it exists, and never learned by looking into a disk that a guest can
write.
"""

import enum
from dataclasses import dataclass
from pathlib import Path

from agent.job import ImagesType
from agent.report import ChainLink, DiskReport, Role


class DiskType(enum.StrEnum):
    """libvirt's `<disk type=…>`."""

    FILE = "file"
    BLOCK = "block"
    NETWORK = "network"


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """Where the disks of one instance belong."""

    uuid: str
    directory: Path
    """The instance's own; a backend without files names its disks after `uuid`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One file below a disk: what it stands on."""

    path: Path
    format: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RbdAccess:
    """How a hypervisor reaches the cluster that network disks are in."""

    monitors: tuple[tuple[str, int], ...]
    """Address and port of each."""
    user: str
    """Without `client.` in front."""
    secret_uuid: str
    """Of libvirt's secret that holds the user's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """`virtual_size` is bytes and exact: what the guest sees."""

    role: Role
    backend: ImagesType
    """Which backend made it, and grows and removes it, whatever the host's default is by then."""
    path: Path
    """Of the file or the block device; of a network disk, `pool/image`."""
    format: str
    """QEMU's name: raw, qcow2 …"""
    virtual_size: int
    type: DiskType = DiskType.FILE
    guest_format: str | None = None
    """The file system it is born with: ext4, iso9660 …; None if it is made of a base."""
    device: str = "disk"
    """libvirt's: disk or cdrom."""
    bus: str | None = None
    """virtio, scsi, sata …; None for kernel and ramdisk."""
    device_name: str | None = None
    """vda, sda …; None for kernel and ramdisk."""
    serial: str | None = None
    boot_index: int | None = None
    read_only: bool = False
    base_name: str | None = None
    """The base in the image cache it stands on or was copied from."""
    backing_chain: tuple[Link, ...] = ()
    native_io: bool = False
    """Whether QEMU had better ask the kernel for asynchronous input and output."""

    def report(self) -> DiskReport:
        """Return it in the words of the contract."""
        return DiskReport(
            role=self.role,
            device_name=self.device_name,
            path=str(self.path),
            format=self.format,
            virtual_size=self.virtual_size,
            backing_chain=tuple(
                ChainLink(path=str(link.path), format=link.format) for link in self.backing_chain
            ),
        )
