"""Rebuild: an instance gets a new root disk, kernel and ramdisk, of an image that may be another.

It keeps its name, uuid and addresses, the size of its root disk, and its
ephemeral and swap disks. What its root held is lost, but not before its domain
has started on the new one:

    planned     `instance.json` has what comes beside what is
    prepared    the new disks, under names of their own; the guest still runs
    accepted    the new domain, by libvirt; the guest still runs
    switched    powered off, and started on the new disks if it ran
    recorded    what was new is the instance now: no way back from here
    removed     the old disks

Until it is recorded a rebuild that fails leaves the instance as it was; one that
a crash interrupts goes on in either case.

There is one thing that does not come back. libvirt has one place for what the
firmware and the TPM of a domain keep, so what does not fit the new hardware has to
go before the new domain starts. If that fails the old domain begins with none of
it, and the job's error says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from agent import domain_changes, domain_facts
from agent.acquisition import Acquisition
from agent.base import GIB, Base
from agent.cancellation import Cancellation
from agent.change import Change, is_running
from agent.devices import reassign_devices
from agent.disk import Disk
from agent.domain_remade import remade
from agent.domain_spec import NO_KERNEL, Kernel, own_kernel
from agent.errors import (
    AgentStopping,
    BackendError,
    BootwrightError,
    FlavorDiskSmallerThanImage,
    FlavorDiskSmallerThanMinDisk,
    ImageUnacceptable,
    InvalidJob,
)
from agent.hardware import Hardware
from agent.host import Host
from agent.image import Image
from agent.image_hardware import on_host, warn_of_unknown
from agent.instances import InstanceRecord, Rebuild
from agent.job import ImagesType, JobRequest, OnFailure
from agent.origin import Origin
from agent.recorder import Recorder
from agent.report import Role, Status, TaskState
from agent.reversion import REPLACED, loss, reverted, undo


def rebuild(
    host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation
) -> None:
    """Do a rebuild job, and record the result.

    Raises:
        InvalidJob: the instance is being rescued, or the image does not go with its domain.
        FlavorDiskSmallerThanImage: the root disk cannot hold the image.
        BackendError: the old disks are in the way; if so it is said that the new one is in place.
        BootwrightError: it failed; with `on_failure: cleanup` all is as before, but for what
            the error says of firmware and TPM.
    """
    change = Change(host, request, recorder, cancellation)
    with change.held() as held:
        record = held
        if record.rescue is not None:
            change.require_settled(record)
        # An earlier run of this very job may have got so far.
        if record.rebuilt_by != change.job_id:
            acquisition = Acquisition(host, recorder, cancellation)
            try:
                record = _rebuild(change, record, acquisition)
            except AgentStopping:
                raise
            except Exception as e:
                lost = loss(change)
                undone = request.on_failure is OnFailure.CLEANUP and undo(
                    change, cancellation.undoing()
                )
                if lost is not None and isinstance(e, BootwrightError):
                    raise e.and_also(
                        f"{lost}; its disks are as they were" if undone else lost
                    ) from e
                raise
            finally:
                acquisition.release()
        # It is what the instance is now, whatever anybody wishes.
        _remove_replaced(change, record, cancellation.undoing())
        state = change.note_domain() if change.state(record) is not None else None
    recorder.finish(
        Status.ACTIVE if is_running(state) else Status.DONE, "the instance has its new root disk"
    )


def _rebuild(change: Change, record: InstanceRecord, acquisition: Acquisition) -> InstanceRecord:
    """Return the instance with its new disks; it still has the old ones too."""
    host, recorder, wanted = change.host, change.recorder, change.request.image
    if wanted is None:
        raise AssertionError("the job's schema guarantees the image")
    change.cancellation.check()
    recorder.phase(TaskState.IMAGE_RESOLVING)
    record = _settled(change, record)
    change.state(record)  # for what it says of a domain that is not ours
    plan = record.rebuild
    images = acquisition.resolve(wanted) if plan is None else acquisition.resolve_again(plan.origin)
    if plan is None:
        _require_possible(change, record, images[Role.ROOT])
    try:
        bases = acquisition.acquire(
            images, images_type=record.root.backend, max_virtual_size=record.root.virtual_size
        )
    except FlavorDiskSmallerThanImage as e:
        raise FlavorDiskSmallerThanImage(e.message, _how_to_have(record, "DISK_GIB")) from e
    recorder.phase(TaskState.REBUILDING)
    if plan is None:
        plan = _planned(change, record, bases, Origin.of(wanted, images))
        record = change.save(replace(record, rebuild=plan))
    for disk in plan.disks:
        if disk.role in REPLACED:
            host.backends[disk.backend].prepare(disk, bases[disk.role], change.cancellation)
    new = _rebuilt(record, plan)
    _switch(change, record, new, plan)
    return change.save(
        replace(
            new,
            rebuilt_by=change.job_id,
            replaced=tuple(disk for disk in record.disks if disk.role in REPLACED),
        )
    )


# What it will be


def _require_possible(change: Change, record: InstanceRecord, image: Image) -> None:
    """Raises: ImageUnacceptable, InvalidJob, FlavorDiskSmallerThanMinDisk: before a long fetch."""
    size = record.root.virtual_size
    if image.min_disk * GIB > size:
        raise FlavorDiskSmallerThanMinDisk(
            f"image {image.id} asks for a disk of {image.min_disk} GiB (min_disk), the root disk "
            f"of instance {record.name} has {size} bytes",
            _how_to_have(record, f"{image.min_disk}"),
        )
    has_config_drive = any(disk.role is Role.CONFIG_DRIVE for disk in record.disks)
    if image.properties.get("img_config_drive") == "mandatory" and not has_config_drive:
        raise InvalidJob(
            f"image {image.id} wants a config drive, and instance {record.name} has none",
            "delete the instance and boot it anew",
        )
    warn_of_unknown(image)
    hardware = on_host(image.properties, change.host.hypervisor)
    if change.state(record) is None:
        return
    change.require_own_disks(record)
    present = domain_facts.size_of(change.host.hypervisor.xml(change.uuid))
    if hardware.topology is not None:
        hardware.topology.fit(present.vcpus)
    if image.min_ram > present.ram_mib:
        raise InvalidJob(
            f"image {image.id} asks for {image.min_ram} MiB of memory (min_ram), instance "
            f"{record.name} has {present.ram_mib} MiB",
            f"resize it first: bootwright instance resize {record.name} "
            f"--flavor {present.vcpus}x{image.min_ram}x0",
        )
    if not record.own_domain:
        return
    iso, has_cdrom = image.disk_format == "iso", record.root.device == "cdrom"
    if iso is not has_cdrom or _had(change, record, image.properties, hardware) != hardware:
        raise InvalidJob(
            f"image {image.id} asks for other hardware than that of instance {record.name}, whose "
            "domain is its owner's own",
            "delete the instance and boot it anew, or take an image with the same properties",
        )


def _how_to_have(record: InstanceRecord, gib: str) -> str:
    """Return a hint: how the instance comes to a root disk of so many GiB."""
    if record.root.read_only:
        return (
            "a CD-ROM cannot grow: delete the instance and boot it anew with a flavor with "
            f"disk: {gib} or more"
        )
    return f"resize it first: bootwright instance resize {record.name} --flavor VCPUSxRAM_MIBx{gib}"


def _planned(
    change: Change, record: InstanceRecord, bases: Mapping[Role, Base], origin: Origin
) -> Rebuild:
    backends, home, old = change.host.backends, change.home, record.root
    flat = backends[ImagesType.RAW]
    taken = {disk.path for disk in record.disks}

    def boot_file(role: Role, base: Base) -> Disk:
        return _beside(
            taken, role.value, lambda name: flat.plan(home, role, name, base, base.virtual_size)
        )

    base = bases[Role.ROOT]
    root = _beside(
        taken,
        "disk",
        lambda name: backends[old.backend].plan(home, Role.ROOT, name, base, old.virtual_size),
    )
    device = "cdrom" if base.image.disk_format == "iso" else "disk"
    disks = (
        *(boot_file(role, bases[role]) for role in (Role.KERNEL, Role.RAMDISK) if role in bases),
        replace(root, device=device),
        *(disk for disk in record.disks if disk.role not in REPLACED),
    )
    hypervisor = change.host.hypervisor
    hardware = on_host(base.image.properties, hypervisor)
    state = change.state(record)
    if state is not None:
        change.require_own_disks(record)
    return Rebuild(
        job_id=change.job_id,
        origin=origin,
        image_digest=base.digest,
        image_properties=dict(base.image.properties),
        disks=reassign_devices(disks, hardware, change.uuid),
        domain_xml=None if state is None else hypervisor.xml(change.uuid),
        was_running=is_running(state),
    )


def _beside(taken: set[Path], name: str, plan: Callable[[str], Disk]) -> Disk:
    """Return the disk of that name, or of another if there is one already."""
    disk = plan(name)
    return disk if disk.path not in taken else plan(f"{name}.rebuilt")


def _rebuilt(record: InstanceRecord, plan: Rebuild) -> InstanceRecord:
    return replace(
        record,
        image_id=plan.origin.root,
        image_digest=plan.image_digest,
        image_properties=plan.image_properties,
        origin=plan.origin,
        disks=plan.disks,
        rebuild=None,
    )


# Its domain


def _switch(change: Change, old: InstanceRecord, new: InstanceRecord, plan: Rebuild) -> None:
    """Have the domain run on the new disks if it ran, or be ready to."""
    hypervisor, before = change.host.hypervisor, plan.domain_xml
    if before is None or change.runs_on(new.root):
        return
    hardware = on_host(new.image_properties, hypervisor)
    had = _had(change, old, new.image_properties, hardware)
    xml = _domain(change, old, new, before, hardware, same=had == hardware)
    # What runs is not touched by that; only what libvirt has accepted takes its place.
    hypervisor.define(xml)
    change.cancellation.check()
    hypervisor.destroy(change.uuid)
    # Its memory knows the old disk, and would be written to the new one.
    hypervisor.discard_saved_state(change.uuid)
    if not plan.anew and (had is None or had.nonvolatile != hardware.nonvolatile):
        kept = hypervisor.starts_with_host(change.uuid)
        plan = replace(plan, anew=True, starts_with_host=kept)
        change.save(replace(old, rebuild=plan))
    if plan.anew:
        # With the old domain goes what its firmware and its TPM have kept. Each step is a
        # call of its own: none follows one that was given up.
        hypervisor.define(before)
        hypervisor.undefine(change.uuid)
        # Not before: until then it is the old domain's, and no undoing may take that.
        plan = replace(plan, forgotten=True)
        change.save(replace(old, rebuild=plan))
        hypervisor.define(xml)
        hypervisor.set_starts_with_host(change.uuid, wanted=plan.starts_with_host)
    if plan.was_running:
        hypervisor.start(change.uuid)


def _domain(
    change: Change,
    old: InstanceRecord,
    new: InstanceRecord,
    xml: str,
    hardware: Hardware,
    *,
    same: bool,
) -> str:
    kernel = _kernel(change, new, xml)
    if same and _places(old) == _places(new):
        return domain_changes.changed(change.host, new, xml, kernel=kernel)
    names = frozenset(disk.device_name for disk in old.disks if disk.device_name is not None)
    return remade(
        change.host, new, xml, hardware=hardware, kernel=kernel or NO_KERNEL, replaced=names
    )


def _places(record: InstanceRecord) -> list[tuple[str, str | None, str | None, bool]]:
    return [(disk.device, disk.bus, disk.device_name, disk.read_only) for disk in _attached(record)]


def _attached(record: InstanceRecord) -> list[Disk]:
    return [disk for disk in record.disks if disk.device_name is not None]


def _had(
    change: Change, record: InstanceRecord, properties: Mapping[str, str], hardware: Hardware
) -> Hardware | None:
    """Return the hardware that the instance was made with; None if it is not to be had any more.

    `properties`: of an image that asks for `hardware`.
    """
    if dict(properties) == record.image_properties:
        return hardware
    try:
        return on_host(record.image_properties, change.host.hypervisor)
    except ImageUnacceptable:
        return None


def _kernel(change: Change, record: InstanceRecord, xml: str) -> Kernel | None:
    """Return what the domain boots with now; None if it keeps a kernel of its owner's own."""
    own, present = own_kernel(record), domain_facts.kernel_of(xml)
    if own.kernel is None and (present is None or present.parent != change.home.directory):
        return None
    return own


# Its end


def _remove_replaced(
    change: Change, record: InstanceRecord, cancellation: Cancellation
) -> InstanceRecord:
    for disk in record.replaced:
        try:
            change.host.backends[disk.backend].remove(disk, change.home, cancellation)
        except BackendError as e:
            raise BackendError(
                f"the instance has its new root disk, but the old one is still there: {e.message}",
                e.hint,
            ) from e
    return change.save(replace(record, replaced=())) if record.replaced else record


def _settled(change: Change, record: InstanceRecord) -> InstanceRecord:
    """Return the instance without what another rebuild has left of itself."""
    if record.rebuild is not None and record.rebuild.job_id != change.job_id:
        record = reverted(change, record, record.rebuild, change.cancellation)
    return _remove_replaced(change, record, change.cancellation)
