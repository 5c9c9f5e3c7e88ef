"""The way back from a rebuild: the domain as it was, and none of the new disks.

What does not come back is what the firmware and the TPM of the old domain had kept, once
libvirt has forgotten that domain; `loss` tells of it.
"""

import logging
from dataclasses import replace

from agent import domain_facts
from agent.cancellation import Cancellation
from agent.change import Change
from agent.disk import Disk
from agent.errors import AgentStopping, BootwrightError
from agent.instances import InstanceRecord, Rebuild
from agent.report import Role

LOG = logging.getLogger(__name__)

REPLACED = (Role.KERNEL, Role.RAMDISK, Role.ROOT)
"""Whose disks a rebuild replaces; all others stay."""


def undo(change: Change, cancellation: Cancellation) -> bool:
    """Bring back what was, unless the new disks are the instance's already.

    Returns:
        False if the instance is left half rebuilt.

    Raises:
        AgentStopping: that goes on after the restart. Nothing else.
    """
    record = change.host.instances.get(change.uuid)
    if record is None or record.rebuild is None:
        return True
    try:
        reverted(change, record, record.rebuild, cancellation)
    except AgentStopping:
        raise
    except BootwrightError as e:
        LOG.error(
            "instance %s is left half rebuilt: %s; 'bootwright instance rebuild %s' begins by "
            "bringing back what was",
            change.uuid,
            e,
            change.uuid,
        )
        return False
    return True


def reverted(
    change: Change, record: InstanceRecord, plan: Rebuild, cancellation: Cancellation
) -> InstanceRecord:
    """Bring back what was; done already is fine.

    Raises:
        HypervisorError: libvirt is away or refuses; the new disks are all there.
        BackendError: one of them cannot be removed.
    """
    hypervisor = change.host.hypervisor
    if plan.domain_xml is not None:
        if change.runs_on(plan.root):
            hypervisor.destroy(change.uuid)
        if _is_defined_on(change, plan.root):
            # Its memory, if a host that went down has kept it, knows the new disk.
            hypervisor.discard_saved_state(change.uuid)
            if plan.forgotten:
                # What its firmware and TPM may have kept is of no use to the old one.
                hypervisor.undefine(change.uuid)
        hypervisor.define(plan.domain_xml)
        if plan.anew:
            hypervisor.set_starts_with_host(change.uuid, wanted=plan.starts_with_host)
        if plan.was_running:
            hypervisor.start(change.uuid)
    for disk in plan.disks:
        if disk.role in REPLACED:
            change.host.backends[disk.backend].remove(disk, change.home, cancellation)
    return change.save(replace(record, rebuild=None))


def loss(change: Change) -> str | None:
    """Return what an error has to say of firmware and TPM, which no undoing brings back."""
    record = change.host.instances.get(change.uuid)
    plan = None if record is None else record.rebuild
    if (
        plan is None
        or not plan.anew
        or plan.domain_xml is None
        or not domain_facts.keeps_state(plan.domain_xml)
    ):
        return None
    gone = "is gone" if plan.forgotten else "may be gone"
    return (
        f"what the instance's firmware and TPM had kept {gone}, and what is sealed with that TPM "
        "then asks for its recovery key"
    )


def _is_defined_on(change: Change, root: Disk) -> bool:
    """Whether what would start has that root disk."""
    hypervisor = change.host.hypervisor
    return hypervisor.state(change.uuid) is not None and (
        str(root.path) in domain_facts.sources_of(hypervisor.xml(change.uuid))
    )
