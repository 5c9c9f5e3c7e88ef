"""What libvirt is told of an instance: the same for the job that makes it and those that change it.

Most of it stands in the instance's record; the rest is the host's, or the job's to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.domain_xml import DomainSpec
from agent.hardware import Hardware
from agent.host import Host
from agent.instances import InstanceRecord
from agent.job import Network
from agent.report import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What QEMU boots by itself; without a kernel the domain boots from its disks."""

    kernel: Path | None
    ramdisk: Path | None
    command_line: str | None
    """None for one that mounts the root disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    vcpus: int
    ram_mib: int
    topology: tuple[int, int, int] | None = None
    """Of a domain that changes its size: sockets, cores and threads, if the image has a say."""
    queues: bool = False
    """Of such a domain: whether network cards have as many queues as there are processors."""


NO_KERNEL: Final = Kernel(kernel=None, ramdisk=None, command_line=None)


def spec_of(
    host: Host,
    record: InstanceRecord,
    *,
    size: Size,
    kernel: Kernel,
    hardware: Hardware,
    networks: Sequence[Network] = (),
) -> DomainSpec:
    """Return all that the domain of `record` says.

    Raises:
        BackendError: how network disks are reached cannot be found out.
    """
    return DomainSpec(
        uuid=record.uuid,
        name=record.name,
        job_id=record.job_id,
        image_id=record.image_id,
        image_digest=record.image_digest,
        virt_type=host.defaults.virt_type,
        vcpus=size.vcpus,
        ram_mib=size.ram_mib,
        disks=record.disks,
        kernel=kernel.kernel,
        ramdisk=kernel.ramdisk,
        command_line=kernel.command_line,
        networks=tuple(networks),
        console_log=host.instances.console_of(record.uuid),
        hardware=hardware,
        rbd=host.backends.access(record.disks),
        cache_modes=host.defaults.cache_modes,
        discard=host.defaults.discard,
        iotune=record.iotune,
    )


def own_kernel(record: InstanceRecord) -> Kernel:
    """Return what an instance boots with, by its disks and the images they are made of."""
    paths = {disk.role: disk.path for disk in record.disks}
    return Kernel(
        kernel=paths.get(Role.KERNEL),
        ramdisk=paths.get(Role.RAMDISK),
        command_line=None if record.origin is None else record.origin.command_line,
    )
