"""Builds one instance: from the images a job names to a running domain.

Each step looks before it acts, so that a job that a crash interrupted runs
again from the start and passes quickly over what is done:

    resolve      the images' records, from the source or the cache
    claim        the instance's name and uuid
    acquire      one base per image, pinned by the job
    touch        the bases' last use, through the privileged helper
    plan, write  `instance.json`: from now on the bases are in use
    prepare      the disks; an existing one is kept
    define       the domain; the same again changes nothing
    start        unless it runs
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from agent import config_drive, domain_xml, ephemeral
from agent.backends import by_type
from agent.base import GIB, Base, check_fits
from agent.cancellation import Cancellation
from agent.disk import Disk
from agent.domain_xml import DomainSpec
from agent.errors import AgentStopping, BootwrightError, FlavorDiskSmallerThanMinDisk, InvalidJob
from agent.hardware import Hardware, assign_devices, assign_macs
from agent.hypervisor import Hypervisor
from agent.image import Image, require_active
from agent.image_cache import ImageCache
from agent.instances import InstanceRecord, Instances
from agent.job import (
    Action,
    Flavor,
    GuestFormat,
    ImageRef,
    ImagesType,
    Instance,
    JobRequest,
    Network,
    OnFailure,
)
from agent.recorder import Recorder
from agent.report import (
    ChainLink,
    DiskReport,
    DomainReport,
    ImageReport,
    InstanceReport,
    Progress,
    Role,
    Status,
    TaskState,
)

LOG = logging.getLogger(__name__)

MIB = 1 << 20
SECTOR = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What the configuration says where a job says nothing."""

    virt_type: str
    images_type: ImagesType
    ephemeral_format: GuestFormat
    cache_mode: str
    discard: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a build works with; the same for all of them."""

    image_cache: ImageCache
    instances: Instances
    hypervisor: Hypervisor
    touch: Callable[[str], None]
    """Refreshes a base's last use; never fails."""
    defaults: Defaults


class Build:
    """One run of one boot or prepare job; used once, by one thread."""

    def __init__(
        self, host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation
    ) -> None:
        if request.instance is None or request.flavor is None or request.image is None:
            raise AssertionError("the job's schema guarantees all three")
        self._host = host
        self._request = request
        self._instance: Instance = request.instance
        self._flavor: Flavor = request.flavor
        self._image: ImageRef = request.image
        self._recorder = recorder
        self._cancellation = cancellation
        self._job_id = recorder.report.id
        self._uuid = str(self._instance.uuid)
        self._name = str(self._instance.name)
        # Whether libvirt may know the instance by now, from this run or an
        # earlier one, which has got no further than its record if at all.
        self._may_have_domain = self._defines and host.instances.get(self._uuid) is not None

    def run(self) -> None:
        """Build the instance and record the result.

        Raises:
            BootwrightError: it failed; with `on_failure: cleanup` all that the
                job made is gone again. When the agent is stopping all of it
                stays for the restart.
        """
        instances = self._host.instances
        self._recorder.note(instance=InstanceReport(uuid=self._uuid, name=self._name))
        self._recorder.phase(TaskState.IMAGE_RESOLVING)
        try:
            instances.claim(uuid=self._uuid, name=self._name, job_id=self._job_id)
            try:
                self._run()
            except AgentStopping:
                raise
            except Exception:
                if self._request.on_failure is OnFailure.CLEANUP:
                    self._undo()
                raise
        finally:
            self._host.image_cache.unpin(self._job_id)
            instances.release(self._job_id)

    def _run(self) -> None:
        # Not before `run`: what an earlier run made is to be undone then.
        self._cancellation.check()
        if self._defines and not self._known():
            # Before a long fetch rather than after it.
            self._host.hypervisor.require_free(uuid=self._uuid, name=self._name)
        images = self._resolve()
        bases = {role: self._acquire(role, image) for role, image in images.items()}
        root = bases[Role.ROOT]
        self._recorder.note(
            image=ImageReport(id=root.image.id, digest=root.digest, source=root.origin)
        )
        self._recorder.phase(TaskState.BLOCK_DEVICE_MAPPING)
        hardware = Hardware.wanted_by(root.image.properties)
        networks = assign_macs(self._networks(), self._uuid)
        record = self._record(bases, hardware, networks)
        self._recorder.note(disks=tuple(map(disk_report, record.disks)))
        self._prepare(record, bases, networks)
        xml = self._domain_xml(record, root, hardware, networks)
        self._spawn(xml)

    @property
    def _defines(self) -> bool:
        return self._request.action is Action.BOOT and self._request.libvirt.define

    # Images

    def _resolve(self) -> dict[Role, Image]:
        """Return the images of kernel, ramdisk and root, in the order they are fetched."""
        cache = self._host.image_cache
        root = cache.resolve(self._image.id, self._cancellation)
        require_active(root)
        self._check_flavor(root)
        images = {}
        for role, image_id in (
            (Role.KERNEL, self._image.kernel_id or root.kernel_id),
            (Role.RAMDISK, self._image.ramdisk_id or root.ramdisk_id),
        ):
            if image_id is not None:
                images[role] = cache.resolve(image_id, self._cancellation)
                require_active(images[role])
        if Role.RAMDISK in images and Role.KERNEL not in images:
            raise InvalidJob(
                f"image {root.id} comes with a ramdisk but without a kernel",
                "give image.kernel_id, or set the property kernel_id of the image",
            )
        return {**images, Role.ROOT: root}

    def _check_flavor(self, image: Image) -> None:
        flavor = self._flavor
        if flavor.disk and image.min_disk > flavor.disk:
            raise FlavorDiskSmallerThanMinDisk(
                f"image {image.id} asks for a disk of {image.min_disk} GiB (min_disk), the "
                f"flavor has {flavor.disk} GiB",
                f"use a flavor with disk: {image.min_disk} or more",
            )
        if image.min_ram > flavor.ram:
            raise InvalidJob(
                f"image {image.id} asks for {image.min_ram} MiB of memory (min_ram), the flavor "
                f"has {flavor.ram} MiB",
                f"use a flavor with ram: {image.min_ram} or more",
            )
        if image.virtual_size is not None:
            check_fits(image, image.virtual_size, self._root_limit)

    @property
    def _root_limit(self) -> int | None:
        return self._flavor.disk * GIB or None

    def _acquire(self, role: Role, image: Image) -> Base:
        def show(progress: Progress) -> None:
            self._recorder.progress(progress.model_copy(update={"role": role}))

        base = self._host.image_cache.acquire(
            image,
            pin=self._job_id,
            max_virtual_size=self._root_limit if role is Role.ROOT else None,
            cancellation=self._cancellation,
            on_progress=show,
        )
        self._recorder.count(received=base.received, resumed=base.resumed)
        self._host.touch(base.name)
        return base

    # Disks

    def _record(
        self, bases: Mapping[Role, Base], hardware: Hardware, networks: Sequence[Network]
    ) -> InstanceRecord:
        """Return what the instance has, from its record or planned now and made durable.

        A record that is there already was written by this very job before the
        agent was restarted. It counts, whatever the configuration says today.
        """
        known = self._known()
        if known is not None:
            return known
        root = bases[Role.ROOT]
        record = InstanceRecord(
            uuid=self._uuid,
            name=self._name,
            job_id=self._job_id,
            created_at=time.time(),
            image_id=root.image.id,
            image_digest=root.digest,
            images_type=self._images_type,
            metadata=self._instance.metadata,
            disks=assign_devices(self._plan(bases, networks), hardware),
        )
        self._host.instances.write(record)
        return record

    def _known(self) -> InstanceRecord | None:
        return self._host.instances.get(self._uuid)

    def _plan(self, bases: Mapping[Role, Base], networks: Sequence[Network]) -> list[Disk]:
        """Return every disk of the instance; what it will be, not yet made."""
        directory = self._host.instances.directory_of(self._uuid)
        backend = by_type(self._images_type)
        flat = by_type(ImagesType.RAW)
        disks = [
            flat.plan(directory, role, role.value, bases[role], bases[role].virtual_size)
            for role in (Role.KERNEL, Role.RAMDISK)
            if role in bases
        ]
        root = bases[Role.ROOT]
        # A raw image may end anywhere; a disk ends with a sector.
        size = self._root_limit or -(-root.virtual_size // SECTOR) * SECTOR
        disk = backend.plan(directory, Role.ROOT, "disk", root, size)
        disks.append(replace(disk, device="cdrom") if root.image.disk_format == "iso" else disk)
        disks += [
            flat.plan(directory, Role.EPHEMERAL, f"disk.eph{number}", None, wanted.size * GIB)
            for number, wanted in enumerate(self._flavor.ephemeral)
        ]
        if self._flavor.swap:
            swap = self._flavor.swap * MIB
            disks.append(flat.plan(directory, Role.SWAP, "disk.swap", None, swap))
        if self._has_config_drive:
            size = len(self._config_drive(networks))
            drive = flat.plan(directory, Role.CONFIG_DRIVE, "disk.config", None, size)
            disks.append(replace(drive, read_only=True))
        return disks

    @property
    def _images_type(self) -> ImagesType:
        return self._request.images_type or self._host.defaults.images_type

    @property
    def _has_config_drive(self) -> bool:
        return self._instance.config_drive or self._instance.user_data is not None

    def _config_drive(self, networks: Sequence[Network]) -> bytes:
        return config_drive.image(
            config_drive.content(
                instance_uuid=self._uuid,
                name=self._name,
                metadata=self._instance.metadata,
                user_data=self._instance.user_data,
                networks=networks,
            )
        )

    def _prepare(
        self, record: InstanceRecord, bases: Mapping[Role, Base], networks: Sequence[Network]
    ) -> None:
        """Make the disks that are not there yet. Each appears whole, or not at all."""
        flat = by_type(ImagesType.RAW)
        for disk in record.disks:
            self._cancellation.check()
            match disk.role:
                case Role.KERNEL | Role.RAMDISK:
                    flat.prepare(disk, bases[disk.role], self._cancellation)
                case Role.ROOT:
                    backend = by_type(record.images_type)
                    backend.prepare(disk, bases[disk.role], self._cancellation)
                case Role.EPHEMERAL:
                    self._format(disk)
                case Role.SWAP:
                    ephemeral.create_swap(
                        disk, instance_uuid=self._uuid, cancellation=self._cancellation
                    )
                case Role.CONFIG_DRIVE:
                    config_drive.create(disk.path, self._config_drive(networks))

    def _format(self, disk: Disk) -> None:
        number = int(disk.path.name.removeprefix("disk.eph"))
        ephemeral.create(
            disk,
            guest_format=self._flavor.ephemeral[number].guest_format
            or self._host.defaults.ephemeral_format,
            label=f"ephemeral{number}",
            instance_uuid=self._uuid,
            cancellation=self._cancellation,
        )

    # The domain

    def _networks(self) -> Sequence[Network]:
        if self._request.networks is not None:
            return self._request.networks
        # What most people mean who say nothing, where it exists.
        if self._defines and self._host.hypervisor.has_active_network("default"):
            return (Network(network="default"),)
        return ()

    def _domain_xml(
        self, record: InstanceRecord, root: Base, hardware: Hardware, networks: Sequence[Network]
    ) -> str:
        paths = {disk.role: disk.path for disk in record.disks}
        spec = DomainSpec(
            uuid=self._uuid,
            name=self._name,
            job_id=self._job_id,
            image_id=root.image.id,
            image_digest=root.digest,
            virt_type=self._host.defaults.virt_type,
            vcpus=self._flavor.vcpus,
            ram_mib=self._flavor.ram,
            disks=record.disks,
            kernel=paths.get(Role.KERNEL),
            ramdisk=paths.get(Role.RAMDISK),
            command_line=self._image.os_command_line
            or root.image.properties.get("os_command_line"),
            networks=tuple(networks),
            console_log=self._host.instances.console_of(self._uuid),
            hardware=hardware,
            cache_mode=self._host.defaults.cache_mode,
            discard=self._host.defaults.discard,
        )
        template = self._request.libvirt.domain_xml
        return (
            domain_xml.build(spec) if template is None else domain_xml.fill_template(template, spec)
        )

    def _spawn(self, xml: str) -> None:
        """Define and start what the job wants defined and started; record the result."""
        hypervisor = self._host.hypervisor
        if not self._defines:
            self._recorder.note(domain_xml=xml)
            self._recorder.finish(Status.DONE, "the disks are ready")
            return
        self._recorder.phase(TaskState.SPAWNING)
        self._host.instances.create_console(self._uuid)
        self._may_have_domain = True
        hypervisor.define(xml)
        self._cancellation.check()
        if self._request.libvirt.start:
            hypervisor.start(self._uuid)
        state = hypervisor.state(self._uuid) or "unknown"
        self._recorder.note(domain=DomainReport(uuid=self._uuid, state=state))
        if self._request.libvirt.start:
            self._recorder.finish(Status.ACTIVE, f"the domain is {state}")
        else:
            self._recorder.finish(Status.DONE, "the domain is defined")

    def _undo(self) -> None:
        """Remove the instance if this job made it: domain, disks, record; never raises.

        If the domain cannot be removed the files stay too: a domain without its
        disks is worse than an instance that can be deleted later.
        """
        made = self._known()
        if made is None or made.job_id != self._job_id:
            return
        try:
            if self._may_have_domain:
                remove_instance(self._host, made)
            else:
                self._host.instances.remove(self._uuid)
        except BootwrightError as e:
            LOG.error(
                "what is left of instance %s could not be removed: %s; remove it with "
                "'bootwright instance delete %s'",
                self._uuid,
                e,
                self._uuid,
            )


def remove_instance(host: Host, record: InstanceRecord) -> None:
    """Destroy and undefine the domain, then remove the disks; done already is fine.

    A domain of that uuid which somebody else has defined is left alone.

    Raises:
        HypervisorError: libvirt is away or refuses; the disks are all there.
        BackendError: a file cannot be removed.
    """
    mark = host.hypervisor.metadata(record.uuid, domain_xml.NAMESPACE)
    if mark is not None and domain_xml.job_of(mark) == record.job_id:
        host.hypervisor.destroy(record.uuid)
        host.hypervisor.undefine(record.uuid)
    elif host.hypervisor.state(record.uuid) is not None:
        LOG.warning(
            "libvirt has a domain %s that job %s of instance %s did not define; it is left alone",
            record.uuid,
            record.job_id,
            record.name,
        )
    host.instances.remove(record.uuid)


def disk_report(disk: Disk) -> DiskReport:
    """Return a disk in the words of the contract."""
    return DiskReport(
        role=disk.role,
        device_name=disk.device_name,
        path=str(disk.path),
        format=disk.format,
        virtual_size=disk.virtual_size,
        backing_chain=tuple(
            ChainLink(path=str(link.path), format=link.format) for link in disk.backing_chain
        ),
    )
