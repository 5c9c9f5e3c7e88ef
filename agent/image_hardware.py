"""What becomes of an image's wishes on this host."""

import logging
from collections.abc import Mapping

from agent.errors import HypervisorError
from agent.hardware import Hardware
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.properties import refused, unknown

LOG = logging.getLogger(__name__)


def on_host(properties: Mapping[str, str], hypervisor: Hypervisor) -> Hardware:
    """Return the hardware for an image of these properties; libvirt is asked only if need be.

    Raises:
        ImageUnacceptable: they ask for what this host does not have, or nobody.
        HypervisorError: libvirt cannot say, and what it is to be depends on that.
    """
    hardware = Hardware.wanted_by(properties)
    if not hardware.asks_host:
        return hardware
    try:
        offers = hypervisor.offers(hardware.machine)
    except HypervisorError:
        if hardware.depends_on_host:
            raise
        # It is asked to have a refusal early; disks can be made while libvirt is away.
        return hardware
    if not offers.machine:
        raise refused("hw_machine_type", hardware.machine, "QEMU on this host has no such machine")
    return hardware.on(uefi=offers.uefi, secure_boot=offers.secure_boot, tpm=offers.tpm)


def warn_of_unknown(image: Image) -> None:
    """Tell in the log what the guest does without, of all that the image asks for."""
    if ignored := unknown(image.properties):
        LOG.warning(
            "image %s asks for what this agent cannot give, and does without: %s",
            image.id,
            ", ".join(ignored),
        )
