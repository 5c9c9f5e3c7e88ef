"""Makes an instance larger: its root disk, and from its next start on processors and memory.

A disk under a running guest is grown by QEMU, which tells the guest; at rest by
its backend. File systems are the guest's own business. Nothing ever shrinks.
"""

from dataclasses import replace

from agent import domain_changes
from agent.base import GIB
from agent.cancellation import Cancellation
from agent.change import Change, is_running
from agent.disk import Disk, DiskType
from agent.domain_spec import Size
from agent.errors import InvalidJob
from agent.hardware import topology_wanted_by
from agent.host import Host
from agent.instances import InstanceRecord
from agent.job import Flavor, JobRequest
from agent.layout import MIB
from agent.properties import flag
from agent.recorder import Recorder
from agent.report import Role, Status, TaskState


def resize(host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
    """Do a resize job, and record the result.

    Raises:
        InvalidJob: the flavor is smaller, or the instance is being changed otherwise.
        ImageUnacceptable: the image cannot bear as many processors.
        BackendError, HypervisorError: the disk is as it was.
        BootwrightError: the reason of the cancellation.
    """
    if request.flavor is None:
        raise AssertionError("the job's schema guarantees the flavor")
    change = Change(host, request, recorder, cancellation)
    recorder.phase(TaskState.RESIZING, lasts=True)
    with change.held() as held:
        record = held
        change.require_settled(record)
        state = change.state(record)
        if state is not None:
            change.require_own_disks(record)
        # What it cannot be is told before the disk has grown for it.
        size = _size(record, request.flavor)
        _require_same_blanks(record, request.flavor)
        disk = _grown(change, record, request.flavor, running=is_running(state))
        if disk != record.root:
            others = (disk if each.role is disk.role else each for each in record.disks)
            record = change.save(replace(record, disks=tuple(others)))
        limited = record.iotune
        if request.flavor.extra_specs is not None:
            record = replace(record, iotune=request.flavor.iotune)
        if state is not None:
            xml = host.hypervisor.xml(change.uuid)
            xml = domain_changes.changed(host, record, xml, size=size, limited=limited)
            host.hypervisor.define(xml)
            change.note_domain()
        # Last, for until then it is what says which limits in the domain are ours.
        if record.iotune != limited:
            change.save(record)
    later = "; processors and memory change at its next start" if is_running(state) else ""
    recorder.finish(Status.DONE, f"the root disk has {disk.virtual_size} bytes{later}")


def _size(record: InstanceRecord, flavor: Flavor) -> Size:
    """Raises: ImageUnacceptable: the image cannot bear as many processors."""
    size = Size(vcpus=flavor.vcpus, ram_mib=flavor.ram)
    if record.own_domain:
        return size
    topology = topology_wanted_by(record.image_properties)
    return replace(
        size,
        topology=None if topology is None else topology.fit(flavor.vcpus),
        queues=flag(record.image_properties, "hw_vif_multiqueue_enabled"),
    )


def _require_same_blanks(record: InstanceRecord, flavor: Flavor) -> None:
    """Raises: InvalidJob: the flavor has other ephemeral disks, or another swap, than there are."""
    for role, wanted in (
        (Role.EPHEMERAL, [each.size * GIB for each in flavor.ephemeral]),
        (Role.SWAP, [flavor.swap * MIB] if flavor.swap else []),
    ):
        found = [disk.virtual_size for disk in record.disks if disk.role is role]
        # Some backends round up, none by as much as that.
        same = len(found) == len(wanted) and all(
            0 <= has - wants < GIB for has, wants in zip(found, wanted, strict=True)
        )
        if wanted and not same:
            raise InvalidJob(
                f"instance {record.name} has {role} disks of {found} bytes, the flavor {wanted}, "
                "and a resize changes the root disk alone",
                f"leave flavor.{role} out: they stay as they are",
            )


def _grown(change: Change, record: InstanceRecord, flavor: Flavor, *, running: bool) -> Disk:
    root = record.root
    hypervisor = change.host.hypervisor
    if running and not root.read_only:  # a drive may be empty, or have another medium
        # Somebody may have grown it with other tools, and QEMU would cut it.
        size = hypervisor.disk_size(change.uuid, str(root.device_name))
        root = replace(root, virtual_size=max(size, root.virtual_size))
    wanted = flavor.disk * GIB or root.virtual_size
    if wanted < root.virtual_size:
        raise InvalidJob(
            f"the root disk of instance {record.name} has {root.virtual_size} bytes and would "
            f"shrink to {wanted}",
            f"disks only grow: use a flavor with disk: {-(-root.virtual_size // GIB)} or more, "
            "or 0 to leave it as it is",
        )
    if wanted == root.virtual_size:
        return root
    if root.read_only:
        raise InvalidJob(
            f"the root of instance {record.name} is a CD-ROM, which cannot grow",
            "use a flavor with disk: 0",
        )
    if running and root.format == "ploop":
        raise InvalidJob(
            f"QEMU cannot grow the ploop image of instance {record.name} while it runs",
            "shut the instance down and resize it then",
        )
    change.cancellation.check()
    backend = change.host.backends[root.backend]
    if not running:
        return backend.grow(root, wanted)
    # A file or an image in a cluster is grown by QEMU itself, a device under it is not.
    grown = backend.grow(root, wanted) if root.type is DiskType.BLOCK else root
    hypervisor.resize_disk(change.uuid, str(root.device_name), wanted)
    return replace(grown, virtual_size=wanted)
