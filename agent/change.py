"""What the jobs that change an instance have in common: whose it is, and its domain."""

from collections.abc import Iterator
from contextlib import contextmanager

from agent import domain_facts, domain_xml
from agent.cancellation import Cancellation
from agent.disk import Disk, Home
from agent.errors import InvalidJob
from agent.host import Host
from agent.instances import InstanceRecord
from agent.job import JobRequest
from agent.recorder import Recorder
from agent.report import DomainReport, InstanceReport


class Change:
    """One run of one job on one instance; used once, by one thread.

    `agent.resize`, `agent.rescue` and `agent.rebuild` are made of it.
    """

    def __init__(
        self, host: Host, request: JobRequest, recorder: Recorder, cancellation: Cancellation
    ) -> None:
        if request.instance is None or request.instance.uuid is None:
            raise AssertionError("the uuid is filled in when a job on an instance is accepted")
        self.host = host
        self.request = request
        self.recorder = recorder
        self.cancellation = cancellation
        self.job_id = recorder.report.id
        self.uuid = request.instance.uuid
        self.home = Home(uuid=self.uuid, directory=host.instances.directory_of(self.uuid))

    @contextmanager
    def held(self) -> Iterator[InstanceRecord]:
        """Give the instance's record, and keep other jobs from it in the block.

        Raises:
            NotFound: it is gone.
            BootwrightError: the reason of the cancellation.
        """
        instances = self.host.instances
        try:
            record = instances.hold(self.uuid, self.job_id, self.cancellation)
            self.recorder.note(instance=InstanceReport(uuid=self.uuid, name=record.name))
            yield record
        finally:
            instances.release(self.job_id)

    def save(self, record: InstanceRecord) -> InstanceRecord:
        """Make a new state of the instance durable; return it."""
        self.host.instances.write(record)
        self.recorder.note(disks=tuple(disk.report() for disk in record.disks))
        return record

    def state(self, record: InstanceRecord) -> str | None:
        """Return libvirt's word for the state of the instance's domain; None if it has none.

        Raises:
            InvalidJob: somebody else has defined a domain of its uuid.
        """
        hypervisor = self.host.hypervisor
        state = hypervisor.state(self.uuid)
        if state is None:
            return None
        mark = hypervisor.metadata(self.uuid, domain_xml.NAMESPACE)
        if mark is None or domain_xml.job_of(mark) != record.job_id:
            raise InvalidJob(
                f"domain {self.uuid} is not what job {record.job_id} of instance {record.name} "
                "has defined",
                "undefine it if nobody needs it, or define the instance's own again",
            )
        return state

    def require_domain(self, record: InstanceRecord) -> str:
        """Return the state of the instance's domain.

        Raises:
            InvalidJob: it has none.
        """
        state = self.state(record)
        if state is None:
            raise InvalidJob(
                f"instance {record.name} has no domain: it was prepared, not booted, or somebody "
                "has undefined it",
                "define one on its disks, or delete the instance and boot it anew",
            )
        return state

    def require_own_disks(self, record: InstanceRecord) -> None:
        """Return if each disk of the instance that its domain has is the one the record tells of.

        But for those that no guest can write to: another medium in a drive is no loss.

        What is defined anew has those of the record. To start it without what a snapshot has
        taken since would lose that, and spoil what stands on them.

        Raises:
            InvalidJob: something else is in the place of one.
        """
        hypervisor = self.host.hypervisor
        for live in (False, True) if is_running(hypervisor.state(self.uuid)) else (False,):
            found = domain_facts.sources_by_device(hypervisor.xml(self.uuid, live=live))
            for disk in record.disks:
                source = found.get(disk.device_name or "", str(disk.path))
                if source != str(disk.path) and not disk.read_only:
                    raise InvalidJob(
                        f"disk {disk.device_name} of instance {record.name} is {source} in its "
                        f"domain, not {disk.path}: somebody has made a snapshot, or moved it",
                        # Without --shallow it would be for the base in the cache.
                        "bring it back first; after a snapshot, while the guest runs: virsh "
                        f"blockcommit {record.name} {disk.device_name} --shallow --active --pivot",
                    )

    def require_settled(self, record: InstanceRecord) -> None:
        """Raises: InvalidJob: the instance is in the middle of another change."""
        if record.rescue is not None:
            raise InvalidJob(
                f"instance {record.name} is being rescued",
                f"end that first: bootwright instance unrescue {record.name}",
            )
        if record.rebuild is not None and record.rebuild.job_id != self.job_id:
            raise InvalidJob(
                f"instance {record.name} is half rebuilt: job {record.rebuild.job_id} failed",
                f"rebuild it again: bootwright instance rebuild {record.name} --image ID",
            )

    def runs_on(self, disk: Disk) -> bool:
        """Whether what runs right now has that disk."""
        hypervisor = self.host.hypervisor
        return is_running(hypervisor.state(self.uuid)) and (
            str(disk.path) in domain_facts.sources_of(hypervisor.xml(self.uuid, live=True))
        )

    def note_domain(self) -> str:
        state = self.host.hypervisor.state(self.uuid) or "unknown"
        self.recorder.note(domain=DomainReport(uuid=self.uuid, state=state))
        return state


def is_running(state: str | None) -> bool:
    return state not in (None, "shut off", "crashed")
