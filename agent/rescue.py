"""Rescue: an instance boots another image for a while, with its own disks attached.

Its disks keep their names and their order; the rescue disk comes last, and first
in the order of boot. What was there before is kept in `instance.json`, and comes
back when the rescue ends or fails.
"""

import logging
from dataclasses import replace

from agent import domain_changes, domain_facts
from agent.acquisition import Acquisition
from agent.base import Base
from agent.cancellation import Cancellation
from agent.change import Change, is_running
from agent.devices import free_device_name, rescue_bus, serial
from agent.disk import Disk
from agent.domain_spec import Kernel
from agent.domain_xml import usual_command_line
from agent.errors import AgentStopping, BootwrightError, InvalidJob
from agent.host import Host
from agent.image import Image
from agent.instances import InstanceRecord, Rescue
from agent.job import ImageRef, ImagesType, JobRequest, OnFailure
from agent.layout import SECTOR
from agent.origin import Origin
from agent.recorder import Recorder
from agent.report import Role, Status, TaskState

LOG = logging.getLogger(__name__)

_ROLES = {
    Role.KERNEL: Role.RESCUE_KERNEL,
    Role.RAMDISK: Role.RESCUE_RAMDISK,
    Role.ROOT: Role.RESCUE,
}


def rescue(host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
    """Do a rescue job, and record the result.

    Raises:
        InvalidJob: the instance has no domain, or is being changed otherwise.
        BootwrightError: it failed; with `on_failure: cleanup` all is as before.
    """
    change = Change(host, request, recorder, cancellation)
    with change.held() as record:
        if record.rescue is None or record.rescue.job_id != change.job_id:
            change.require_settled(record)
        change.require_domain(record)
        _require_no_saved_state(change, record)
        if not _has_begun(change, record):
            acquisition = Acquisition(host, recorder, cancellation)
            try:
                _begin(change, record, acquisition)
            except AgentStopping:
                raise
            except Exception:
                if request.on_failure is OnFailure.CLEANUP:
                    _undo(change, cancellation.undoing())
                raise
            finally:
                acquisition.release()
        change.note_domain()
    recorder.finish(Status.ACTIVE, "the domain runs the rescue image")


def _require_no_saved_state(change: Change, record: InstanceRecord) -> None:
    if change.host.hypervisor.has_saved_state(change.uuid):
        raise InvalidJob(
            f"instance {record.name} is suspended to disk, and a start would only wake it",
            "start it, or give its memory up with 'virsh managedsave-remove'",
        )


def _has_begun(change: Change, record: InstanceRecord) -> bool:
    """Whether an earlier run of this job has done it all: nothing that has changed since undoes it.

    Somebody's wish to cancel it does.
    """
    ours = record.rescue is not None and record.rescue.job_id == change.job_id
    return ours and not change.cancellation.cancelled and _runs_rescue(change, record)


def unrescue(
    host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation
) -> None:
    """Do an unrescue job, and record the result.

    Raises:
        InvalidJob: the instance is not being rescued, or runs on other disks than its own.
        BackendError, HypervisorError: it still is; doing it again goes on.
    """
    change = Change(host, request, recorder, cancellation)
    recorder.phase(TaskState.UNRESCUING, lasts=True)
    with change.held() as record:
        # An earlier run of this very job may have come to its end but for the last word.
        if record.rescue is None and record.unrescued_by != change.job_id:
            raise InvalidJob(
                f"instance {record.name} is not being rescued",
                f"bootwright instance rescue {record.name} begins that",
            )
        if record.rescue is not None and change.state(record) is not None:
            change.require_own_disks(record)
        _end(change, cancellation)
        state = change.note_domain()
    recorder.finish(
        Status.ACTIVE if is_running(state) else Status.DONE, f"the domain is {state}, as it was"
    )


def _begin(change: Change, record: InstanceRecord, acquisition: Acquisition) -> None:
    host, recorder = change.host, change.recorder
    recorder.phase(TaskState.IMAGE_RESOLVING)
    images, origin = _images(change.request, record, acquisition)
    if record.rescue is None:
        # Before a long fetch rather than after it.
        change.require_own_disks(record)
        _place(record, images[Role.ROOT], host.hypervisor.xml(change.uuid))
    bases = acquisition.acquire(images, images_type=record.images_type, max_virtual_size=None)
    recorder.phase(TaskState.RESCUING)
    if record.rescue is None:
        change.require_own_disks(record)
        xml = host.hypervisor.xml(change.uuid)
        record = change.save(
            replace(
                record,
                disks=(*record.disks, *_planned(change, record, bases, xml)),
                rescue=Rescue(
                    job_id=change.job_id,
                    origin=origin,
                    domain_xml=xml,
                    was_running=is_running(host.hypervisor.state(change.uuid)),
                ),
            )
        )
    by_role = {disk.role: disk for disk in record.disks}
    for role, base in bases.items():
        disk = by_role[_ROLES[role]]
        host.backends[disk.backend].prepare(disk, base, change.cancellation)
    change.cancellation.check()
    disk = by_role[Role.RESCUE]
    if not _runs_rescue(change, record):
        kernel = _kernel(by_role, origin, host.defaults.virt_type)
        xml = domain_changes.changed(
            host, record, _original(record), kernel=kernel, boots_from=disk
        )
        _require_no_saved_state(change, record)  # a fetch may have taken its time
        # What runs is not touched by that; only what libvirt has accepted takes its place.
        host.hypervisor.define(xml)
        host.hypervisor.destroy(change.uuid)
        host.hypervisor.start(change.uuid)


def _images(
    request: JobRequest, record: InstanceRecord, acquisition: Acquisition
) -> tuple[dict[Role, Image], Origin]:
    """Return what to boot: the images that the first run of this very job has found, if any."""
    if record.rescue is not None and record.rescue.origin is not None:
        return acquisition.resolve_again(record.rescue.origin), record.rescue.origin
    if request.image is None and record.origin is not None:
        images = acquisition.resolve_again(record.origin)
        # A command line that the job of the boot gave is for the root disk it made.
        command_line = images[Role.ROOT].properties.get("os_command_line")
        return images, replace(record.origin, command_line=command_line)
    wanted = request.image or ImageRef(id=record.image_id)
    images = acquisition.resolve(wanted)
    return images, Origin.of(wanted, images)


def _undo(change: Change, cancellation: Cancellation) -> None:
    """Bring back what was.

    Raises:
        AgentStopping: that goes on after the restart. Nothing else.
    """
    try:
        _end(change, cancellation)
    except AgentStopping:
        raise
    except BootwrightError as e:
        LOG.error(
            "instance %s is left half rescued: %s; 'bootwright instance unrescue %s' goes on",
            change.uuid,
            e,
            change.uuid,
        )


def _original(record: InstanceRecord) -> str:
    if record.rescue is None:
        raise AssertionError("only what is being rescued has an original")
    return record.rescue.domain_xml


def _planned(
    change: Change, record: InstanceRecord, bases: dict[Role, Base], xml: str
) -> list[Disk]:
    backends, home = change.host.backends, change.home
    flat = backends[ImagesType.RAW]
    disks = [
        flat.plan(home, _ROLES[role], f"{role}.rescue", bases[role], bases[role].virtual_size)
        for role in (Role.KERNEL, Role.RAMDISK)
        if role in bases
    ]
    root = bases[Role.ROOT]
    size = -(-root.virtual_size // SECTOR) * SECTOR
    disk = backends[record.images_type].plan(home, Role.RESCUE, "disk.rescue", root, size)
    bus, device, name = _place(record, root.image, xml)
    disks.append(
        replace(disk, bus=bus, device=device, device_name=name, serial=serial(disk.role, home.uuid))
    )
    return disks


def _place(record: InstanceRecord, image: Image, xml: str) -> tuple[str, str, str]:
    """Return bus, device and name of the rescue disk in the domain.

    Raises:
        ImageUnacceptable: the image asks for what cannot be provided, or there is no place left.
    """
    machine = domain_facts.machine_of(xml)
    bus, device = rescue_bus(image.properties, str(record.root.bus), machine)
    return bus, device, free_device_name(bus, domain_facts.devices_of(xml))


def _kernel(by_role: dict[Role, Disk], origin: Origin, virt_type: str) -> Kernel:
    kernel, ramdisk = by_role.get(Role.RESCUE_KERNEL), by_role.get(Role.RESCUE_RAMDISK)
    usual = usual_command_line(by_role[Role.RESCUE], virt_type)
    return Kernel(
        kernel=None if kernel is None else kernel.path,
        ramdisk=None if ramdisk is None else ramdisk.path,
        command_line=origin.command_line or usual,
    )


def _runs_rescue(change: Change, record: InstanceRecord) -> bool:
    """Whether what runs right now has the rescue disk, so that an earlier run has got so far."""
    return change.runs_on(next(disk for disk in record.disks if disk.role is Role.RESCUE))


def _is_defined_for_rescue(change: Change, record: InstanceRecord) -> bool:
    hypervisor = change.host.hypervisor
    if hypervisor.state(change.uuid) is None:
        return False
    sources = domain_facts.sources_of(hypervisor.xml(change.uuid))
    return any(str(disk.path) in sources for disk in record.disks if disk.role is Role.RESCUE)


def _end(change: Change, cancellation: Cancellation) -> None:
    """Bring back what was; done already is fine."""
    host = change.host
    record = host.instances.get(change.uuid)
    if record is None or record.rescue is None:
        return
    if _runs_rescue(change, record):
        host.hypervisor.destroy(change.uuid)
    if _is_defined_for_rescue(change, record):
        # As a host that goes down may leave it: the start would wake the rescue.
        host.hypervisor.discard_saved_state(change.uuid)
    host.hypervisor.define(record.rescue.domain_xml)
    if record.rescue.was_running:
        host.hypervisor.start(change.uuid)
    for disk in record.disks:
        if disk.role.of_rescue:
            host.backends[disk.backend].remove(disk, change.home, cancellation)
    disks = tuple(disk for disk in record.disks if not disk.role.of_rescue)
    change.save(replace(record, disks=disks, rescue=None, unrescued_by=change.job_id))
