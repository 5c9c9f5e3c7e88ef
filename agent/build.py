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

A run whose domain runs already records that, and does nothing else.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from agent import domain_xml
from agent.acquisition import Acquisition
from agent.base import GIB, Base, check_fits
from agent.cancellation import Cancellation
from agent.change import is_running
from agent.devices import assign_devices, assign_macs
from agent.disk import Home
from agent.domain_spec import Size, own_kernel, spec_of
from agent.errors import (
    AgentStopping,
    BootwrightError,
    FlavorDiskSmallerThanMinDisk,
    HypervisorError,
    InvalidJob,
)
from agent.files import Together, reporting
from agent.hardware import Hardware
from agent.host import Host
from agent.hypervisor import DEFAULT_NETWORK
from agent.image import Image
from agent.image_hardware import on_host, warn_of_unknown
from agent.instances import InstanceRecord
from agent.job import (
    Action,
    Flavor,
    ImageRef,
    ImagesType,
    Instance,
    JobRequest,
    Network,
    OnFailure,
)
from agent.layout import Layout
from agent.origin import Origin
from agent.recorder import EndNotRecorded, Recorder
from agent.removal import remove_disks, remove_instance
from agent.report import (
    DomainReport,
    InstanceReport,
    Role,
    Status,
    TaskState,
)

LOG = logging.getLogger(__name__)

# After the host's start libvirt may answer later than the agent asks.
_LIBVIRT_BACK_S: Final = 120.0
_LIBVIRT_AGAIN_S: Final = 1.0


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
        self._acquisition = Acquisition(host, recorder, cancellation)
        self._job_id = recorder.report.id
        self._uuid = str(self._instance.uuid)
        self._name = str(self._instance.name)
        self._home = Home(uuid=self._uuid, directory=host.instances.directory_of(self._uuid))
        # Whether an earlier run has worked on it: that has got no further than its record if at
        # all, or has left disks, or a domain.
        self._has_begun = host.instances.get(self._uuid) is not None
        # Whether libvirt may know the instance by now, from this run or an earlier one.
        self._may_have_domain = self._defines and self._has_begun

    def run(self) -> None:
        """Build the instance and record the result.

        Raises:
            BootwrightError: it failed; with `on_failure: cleanup` all that the
                job made is gone again. When the agent is stopping all of it
                stays for the restart.
            EndNotRecorded: it is done; all of it stays.
        """
        instances = self._host.instances
        self._recorder.note(instance=InstanceReport(uuid=self._uuid, name=self._name))
        self._recorder.phase(TaskState.IMAGE_RESOLVING)
        try:
            instances.claim(uuid=self._uuid, name=self._name, job_id=self._job_id)
            # Not within what is undone: as long as it is not known what there is, all stays.
            if self._has_run():
                return
            try:
                self._run()
            except (AgentStopping, EndNotRecorded):
                raise
            except Exception:
                if self._request.on_failure is OnFailure.CLEANUP:
                    self._undo()
                raise
        finally:
            self._acquisition.release()
            instances.release(self._job_id)

    def _run(self) -> None:
        # Not before `run`: what an earlier run made is to be undone then.
        self._cancellation.check()
        # Before a long fetch rather than after it.
        self._host.backends.require(self._images_type)
        if self._defines and not self._known():
            self._host.hypervisor.require_free(uuid=self._uuid, name=self._name)
        images = self._images()
        self._check_flavor(images[Role.ROOT])
        hardware = self._hardware(images[Role.ROOT])
        bases = self._acquisition.acquire(
            images, images_type=self._images_type, max_virtual_size=self._root_limit
        )
        self._recorder.phase(TaskState.BLOCK_DEVICE_MAPPING)
        networks = assign_macs(self._networks(), self._uuid)
        layout = self._layout(networks)
        with reporting("writing", self._home.directory), Together() as together:
            record = self._record(bases, hardware, layout, together)
            self._recorder.note(disks=tuple(disk.report() for disk in record.disks))
            layout.prepare(record.disks, bases, together, self._cancellation)
            # Meanwhile the system writes what the files have got.
            xml = self._domain_xml(record, hardware, networks)
            together.publish()
        self._spawn(xml)

    def _has_run(self) -> bool:
        """Whether an earlier run of this job has started its domain; if so, record the result.

        What has changed since, an image that is gone or a deadline that has passed, must not
        undo a guest that is at work. Somebody's wish to cancel it does.
        """
        known = self._known()
        if known is None or known.job_id != self._job_id or self._cancellation.cancelled:
            return False
        if not (self._defines and self._request.libvirt.start) or not is_running(self._own_state()):
            return False
        self._recorder.phase(TaskState.SPAWNING)
        # An agent that is dead by now may still be starting it: this waits for the end of that.
        with contextlib.suppress(HypervisorError):
            self._host.hypervisor.start(self._uuid)
        state = self._own_state()
        if not is_running(state):
            return False
        self._recorder.note(disks=tuple(disk.report() for disk in known.disks))
        self._started(state)
        return True

    def _own_state(self) -> str | None:
        """Return the state of the domain that this job has defined, None if there is none.

        Raises:
            HypervisorError: libvirt does not come back, as it does some time after the host.
            BootwrightError: the reason of the cancellation.
        """
        hypervisor, until = self._host.hypervisor, time.monotonic() + _LIBVIRT_BACK_S
        while True:
            try:
                mark = hypervisor.metadata(self._uuid, domain_xml.NAMESPACE)
                if mark is None or domain_xml.job_of(mark) != self._job_id:
                    return None
                return hypervisor.state(self._uuid)
            except HypervisorError as e:
                if time.monotonic() > until:
                    raise
                LOG.warning("whether instance %s runs is not known yet: %s", self._uuid, e)
            self._cancellation.wait(_LIBVIRT_AGAIN_S)

    @property
    def _defines(self) -> bool:
        return self._request.action is Action.BOOT and self._request.libvirt.define

    def _images(self) -> dict[Role, Image]:
        """Return the images, as an earlier run of this very job has found them, if there was one.

        The source may have other properties for them by now than those of the disks.
        """
        known = self._known()
        if known is None or known.origin is None:
            return self._acquisition.resolve(self._image)
        images = self._acquisition.resolve_again(known.origin)
        return {
            **images,
            Role.ROOT: replace(images[Role.ROOT], properties=known.image_properties),
        }

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

    # Disks

    def _record(
        self,
        bases: Mapping[Role, Base],
        hardware: Hardware,
        layout: Layout,
        together: Together,
    ) -> InstanceRecord:
        """Return what the instance has: from its record, or planned now and written down.

        A record that is there already was written by this very job before the
        agent was restarted. It counts, whatever the configuration says today.
        """
        record = self._known()
        if record is None:
            record = self._planned(bases, hardware, layout)
            self._host.instances.add(record, together)
        else:
            self._host.instances.settle(self._uuid)
        return record

    def _planned(
        self, bases: Mapping[Role, Base], hardware: Hardware, layout: Layout
    ) -> InstanceRecord:
        root = bases[Role.ROOT]
        return InstanceRecord(
            uuid=self._uuid,
            name=self._name,
            job_id=self._job_id,
            created_at=time.time(),
            image_id=root.image.id,
            image_digest=root.digest,
            image_properties=dict(root.image.properties),
            origin=Origin.of(self._image, {role: base.image for role, base in bases.items()}),
            own_domain=self._request.libvirt.domain_xml is not None,
            images_type=self._images_type,
            metadata=self._instance.metadata,
            iotune=self._flavor.iotune,
            disks=assign_devices(layout.plan(bases, self._images_type), hardware, self._uuid),
        )

    def _hardware(self, image: Image) -> Hardware:
        warn_of_unknown(image)
        hardware = on_host(image.properties, self._host.hypervisor)
        if hardware.topology is not None:
            hardware.topology.fit(self._flavor.vcpus)
        return hardware

    def _known(self) -> InstanceRecord | None:
        return self._host.instances.get(self._uuid)

    def _layout(self, networks: Sequence[Network]) -> Layout:
        return Layout(
            self._host.backends,
            self._home,
            instance=self._instance,
            flavor=self._flavor,
            networks=networks if networks or self._wants_no_card else None,
            formats=self._host.defaults.formats,
        )

    @property
    def _images_type(self) -> ImagesType:
        return self._request.images_type or self._host.defaults.images_type

    # The domain

    def _networks(self) -> Sequence[Network]:
        if self._request.networks is not None:
            return self._request.networks
        template = self._request.libvirt.domain_xml
        if template is not None and domain_xml.has_interface(template):
            return ()
        # What most people mean who say nothing, where it exists.
        if not self._defines:
            return ()
        if self._host.hypervisor.has_active_network(DEFAULT_NETWORK):
            return (Network(network=DEFAULT_NETWORK),)
        LOG.info(
            "instance %s gets no network card: its job has no networks, and libvirt's network %s "
            "is not active",
            self._uuid,
            DEFAULT_NETWORK,
        )
        return ()

    @property
    def _wants_no_card(self) -> bool:
        template = self._request.libvirt.domain_xml
        brought = template is not None and domain_xml.has_interface(template)
        return self._request.networks == () and not brought

    def _domain_xml(
        self, record: InstanceRecord, hardware: Hardware, networks: Sequence[Network]
    ) -> str:
        spec = spec_of(
            self._host,
            record,
            size=Size(vcpus=self._flavor.vcpus, ram_mib=self._flavor.ram),
            kernel=own_kernel(record),
            hardware=hardware,
            networks=networks,
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
            self._finish(Status.DONE, "the disks are ready")
            return
        self._recorder.phase(TaskState.SPAWNING)
        self._host.instances.create_console(self._uuid)
        self._may_have_domain = True
        hypervisor.define(xml)
        self._cancellation.check()
        if self._request.libvirt.start:
            hypervisor.start(self._uuid)
            self._started(hypervisor.state(self._uuid))
        else:
            self._note_domain(hypervisor.state(self._uuid))
            self._finish(Status.DONE, "the domain is defined")

    def _started(self, state: str | None) -> None:
        self._note_domain(state)
        self._finish(Status.ACTIVE, f"the domain is {state or 'unknown'}")

    def _note_domain(self, state: str | None) -> None:
        self._recorder.note(domain=DomainReport(uuid=self._uuid, state=state or "unknown"))

    def _finish(self, status: Status, message: str) -> None:
        try:
            self._recorder.finish(status, message)
        except EndNotRecorded:
            # It has been told, so no later run may undo it, whatever that meets with.
            record = self._known()
            if record is not None:
                with contextlib.suppress(BootwrightError):
                    self._host.instances.write(replace(record, told_made=True))
            raise

    def _undo(self) -> None:
        """Remove the instance if this job made it and has not told so: domain, disks, record.

        If the domain cannot be removed the files stay too: a domain without its
        disks is worse than an instance that can be deleted later. So does the record
        if an earlier run may have made what is now in the way.

        Raises:
            AgentStopping: that goes on after the restart. Nothing else.
        """
        made = self._known()
        if made is None or made.job_id != self._job_id or made.told_made:
            return
        cancellation = self._cancellation.undoing()
        try:
            if self._may_have_domain:
                remove_instance(self._host, made, cancellation, undoing=not self._has_begun)
            else:
                remove_disks(self._host, made, cancellation, undoing=not self._has_begun)
        except AgentStopping:
            raise
        except BootwrightError as e:
            LOG.error(
                "what is left of instance %s could not be removed: %s; remove it with "
                "'bootwright instance delete %s'",
                self._uuid,
                e,
                self._uuid,
            )
