"""Rebuild: an instance gets a new root disk, kernel and ramdisk, of an image that may be another.

It keeps its name, uuid, addresses and domain, the size of its root disk, and its
ephemeral and swap disks. What its root held is lost; the new image is in the
cache before any of that goes.

Each step is in `instance.json` before it is taken, so a rebuild that a crash
interrupts goes on, and one that fails can be done again:

    replaced    the old disks, until they are gone
    disks       the new ones, made when nothing is left to be replaced
"""

from collections.abc import Mapping
from dataclasses import replace

from agent import domain_changes
from agent.acquisition import Acquisition
from agent.base import Base
from agent.cancellation import Cancellation
from agent.change import Change, is_running
from agent.domain_changes import Kernel
from agent.errors import InvalidJob
from agent.hardware import Hardware
from agent.host import Host
from agent.instances import InstanceRecord, Rebuild
from agent.job import ImagesType, JobRequest
from agent.recorder import Recorder
from agent.report import ImageReport, Role, Status, TaskState

_REPLACED = (Role.KERNEL, Role.RAMDISK, Role.ROOT)


def rebuild(
    host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation
) -> None:
    """Do a rebuild job, and record the result.

    Raises:
        InvalidJob: the instance is being rescued, or the image wants another machine.
        FlavorDiskSmallerThanImage: the root disk cannot hold the image.
        BootwrightError: it failed. Before the first disk went the instance is as it was,
            afterwards it can only be rebuilt again.
    """
    change = Change(host, request, recorder, cancellation)
    acquisition = Acquisition(host, recorder, cancellation)
    with change.held() as record:
        if record.rescue is not None:
            change.require_settled(record)
        try:
            _rebuild(change, record, acquisition)
        finally:
            acquisition.release()
        state = change.note_domain() if change.state(record) is not None else None
    recorder.finish(
        Status.ACTIVE if is_running(state) else Status.DONE, "the instance has its new root disk"
    )


def _rebuild(change: Change, record: InstanceRecord, acquisition: Acquisition) -> None:
    host, recorder = change.host, change.recorder
    if change.request.image is None:
        raise AssertionError("the job's schema guarantees the image")
    if record.rebuilt_by == change.job_id:
        return  # an earlier run of this very job came to its end but for the last word
    change.cancellation.check()
    recorder.phase(TaskState.IMAGE_RESOLVING)
    state = change.state(record)
    images = acquisition.resolve(change.request.image)
    _require_same_hardware(record, images[Role.ROOT].properties)
    bases = acquisition.acquire(
        images, images_type=record.root.backend, max_virtual_size=record.root.virtual_size
    )
    root = bases[Role.ROOT]
    recorder.note(image=ImageReport(id=root.image.id, digest=root.digest, source=root.origin))
    recorder.phase(TaskState.REBUILDING)
    if record.rebuild is None or record.rebuild.job_id != change.job_id:
        # The last chance: from here on the old disk goes, whatever anybody wishes.
        change.cancellation.check()
        record = _planned(change, record, bases, running=is_running(state))
    if record.rebuild is None:
        raise AssertionError("it has just been written")
    if record.rebuild.replaced:
        host.hypervisor.destroy(change.uuid)
        # Its memory knows the old disk, and would be written to the new one.
        host.hypervisor.discard_saved_state(change.uuid)
        for disk in record.rebuild.replaced:
            host.backends[disk.backend].remove(disk, change.home)
        record = change.save(replace(record, rebuild=replace(record.rebuild, replaced=())))
    for disk in record.disks:
        if disk.role in _REPLACED:
            host.backends[disk.backend].prepare(disk, bases[disk.role], change.cancellation)
    if state is not None:
        xml = host.hypervisor.xml(change.uuid)
        kernel = _kernel(change, record, root, xml)
        host.hypervisor.define(domain_changes.changed(host, record, xml, kernel=kernel))
        if record.rebuild is not None and record.rebuild.was_running:
            host.hypervisor.start(change.uuid)
    change.save(replace(record, rebuild=None, rebuilt_by=change.job_id))


def _require_same_hardware(record: InstanceRecord, properties: Mapping[str, str]) -> None:
    has, wants = Hardware.wanted_by(record.image_properties), Hardware.wanted_by(properties)
    if (has.machine, has.firmware, has.disk_bus) == (wants.machine, wants.firmware, wants.disk_bus):
        return
    raise InvalidJob(
        f"the image wants machine {wants.machine}, firmware {wants.firmware} and disks on "
        f"{wants.disk_bus}; instance {record.name} has {has.machine}, {has.firmware} and "
        f"{has.disk_bus}",
        "delete the instance and boot it anew, or take an image with the same properties",
    )


def _planned(
    change: Change, record: InstanceRecord, bases: Mapping[Role, Base], *, running: bool
) -> InstanceRecord:
    """Write down what goes and what comes; from here on there is no way back."""
    backends, home, old = change.host.backends, change.home, record.root
    flat = backends[ImagesType.RAW]
    boot_files = [
        flat.plan(home, role, role.value, bases[role], bases[role].virtual_size)
        for role in (Role.KERNEL, Role.RAMDISK)
        if role in bases
    ]
    root = backends[old.backend].plan(home, Role.ROOT, "disk", bases[Role.ROOT], old.virtual_size)
    root = replace(
        root,
        device=old.device,
        bus=old.bus,
        device_name=old.device_name,
        serial=old.serial,
        boot_index=old.boot_index,
        read_only=old.read_only,
    )
    replaced = tuple(disk for disk in record.disks if disk.role in _REPLACED)
    kept = tuple(disk for disk in record.disks if disk.role not in _REPLACED)
    # Of one that failed half way some may be left, and whether it ran is in its record.
    before = record.rebuild
    image = bases[Role.ROOT].image
    return change.save(
        replace(
            record,
            image_id=image.id,
            image_digest=bases[Role.ROOT].digest,
            image_properties=dict(image.properties),
            disks=(*boot_files, root, *kept),
            rebuild=Rebuild(
                job_id=change.job_id,
                replaced=(*replaced, *(() if before is None else before.replaced)),
                was_running=running if before is None else before.was_running,
            ),
        )
    )


def _kernel(change: Change, record: InstanceRecord, root: Base, xml: str) -> Kernel | None:
    """Return what the domain boots with now; None if it keeps a kernel of its owner's own."""
    paths = {disk.role: disk.path for disk in record.disks}
    present = domain_changes.kernel_of(xml)
    if Role.KERNEL not in paths and (present is None or present.parent != change.home.directory):
        return None
    given = None if change.request.image is None else change.request.image.os_command_line
    return Kernel(
        kernel=paths.get(Role.KERNEL),
        ramdisk=paths.get(Role.RAMDISK),
        command_line=given or root.image.properties.get("os_command_line"),
    )
