"""How an instance goes: its domain first, then its disks, then the record of it."""

import logging

from agent import domain_facts, domain_xml
from agent.backends import HeldElsewhere
from agent.cancellation import Cancellation
from agent.change import is_running
from agent.disk import Home
from agent.errors import InvalidJob
from agent.host import Host
from agent.instances import InstanceRecord

LOG = logging.getLogger(__name__)


def remove_instance(
    host: Host, record: InstanceRecord, cancellation: Cancellation, *, undoing: bool = False
) -> None:
    """Destroy and undefine the domain, then remove the disks; done already is fine.

    A domain of that uuid which somebody else has defined is left alone. For `undoing` see
    `remove_disks`.

    Raises:
        InvalidJob: such a domain runs on the disks; they are all there.
        HypervisorError: libvirt is away or refuses; the disks are all there.
        BackendError: a file cannot be removed.
    """
    mark = host.hypervisor.metadata(record.uuid, domain_xml.NAMESPACE)
    if mark is not None and domain_xml.job_of(mark) == record.job_id:
        host.hypervisor.destroy(record.uuid)
        host.hypervisor.undefine(record.uuid)
    elif (state := host.hypervisor.state(record.uuid)) is not None:
        if is_running(state):
            _require_unused(host, record)
        LOG.warning(
            "libvirt has a domain %s that job %s of instance %s did not define; it is left alone",
            record.uuid,
            record.job_id,
            record.name,
        )
    remove_disks(host, record, cancellation, undoing=undoing)


def _require_unused(host: Host, record: InstanceRecord) -> None:
    found = domain_facts.sources_of(host.hypervisor.xml(record.uuid, live=True))
    for disk in record.disks:
        if str(disk.path) in found:
            raise InvalidJob(
                f"domain {record.uuid} runs on {disk.path}, and job {record.job_id} of instance "
                f"{record.name} did not define it",
                f"end it first: virsh destroy {record.uuid}",
            )


def remove_disks(
    host: Host, record: InstanceRecord, cancellation: Cancellation, *, undoing: bool = False
) -> None:
    """Remove the disks, then the record that tells of them; done already is fine.

    `undoing`: the run that has begun the instance gives it up. What bears another host's mark
    was in its way, so it stays, and the record goes all the same. In a later run it may be
    a disk of the earlier one, from before `host_id` was changed.

    Raises:
        HeldElsewhere: unless `undoing`; the record stays, and so does what follows that disk.
        BackendError: a disk cannot be removed.
        InvalidJob: the configuration has lost the backend of a disk.
    """
    home = Home(uuid=record.uuid, directory=host.instances.directory_of(record.uuid))
    for disk in record.every_disk:
        try:
            host.backends[disk.backend].remove(disk, home, cancellation)
        except HeldElsewhere as e:
            if not undoing:
                raise
            LOG.error(
                "undoing instance %s: %s; no record tells of it from here on: if no host has an "
                "instance %s, remove it: rbd rm %s",
                record.name,
                e.message,
                record.uuid,
                disk.path,
            )
    host.instances.remove(record.uuid)
