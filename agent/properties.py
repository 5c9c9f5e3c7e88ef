"""An image's properties, read one by one: which value each may have, and which are read at all.

Nova knows some hundred of them. What a guest can do without is told in the log
if nobody here reads it; what would be something else without it is refused.
"""

import enum
from collections.abc import Mapping
from typing import Final, TypeVar

from agent.errors import ImageUnacceptable

_KNOWN: Final = frozenset(
    {
        "hw_disk_bus", "hw_cdrom_bus", "hw_machine_type", "hw_firmware_type",
        "hw_firmware_stateless", "hw_scsi_model", "hw_vif_model", "hw_vif_multiqueue_enabled",
        "hw_video_model", "hw_video_ram", "hw_pointer_model", "hw_input_bus", "hw_tpm_model",
        "hw_tpm_version", "hw_watchdog_action", "hw_qemu_guest_agent", "hw_boot_menu",
        "hw_serial_port_count", "hw_time_hpet", "hw_pmu", "hw_mem_page_size", "hw_cpu_sockets",
        "hw_cpu_cores", "hw_cpu_threads", "hw_cpu_max_sockets", "hw_cpu_max_cores",
        "hw_cpu_max_threads",
        # Of the image of a rescue, see `agent.devices`.
        "hw_rescue_bus", "hw_rescue_device",
    }
)  # fmt: skip

_NO: Final = ("", "0", "f", "false", "off", "n", "no")
_YES: Final = ("1", "t", "true", "on", "y", "yes")

_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    # Another processor than this one's, or another hypervisor, would not run the image.
    "hw_architecture": ("x86_64", "i686"),
    "architecture": ("x86_64", "i686"),
    "hw_emulation_architecture": ("x86_64", "i686"),
    "hw_vm_mode": ("hvm",),
    "vm_mode": ("hvm",),
    "img_hv_type": ("kvm", "qemu"),
    "hypervisor_type": ("kvm", "qemu"),
    # Whoever asks for it trusts nobody without it. What encrypts disks here is the host's
    # configuration, and none of it is the LUKS that an image can ask for.
    "hw_mem_encryption": _NO,
    "hw_ephemeral_encryption": _NO,
    # What every domain of ours has.
    "hw_rng_model": ("virtio",),
}
"""Properties of which we can provide these values alone."""


def require_possible(properties: Mapping[str, str]) -> None:
    """Raises: ImageUnacceptable: a property has a value that no domain of ours fulfils."""
    for key, possible in _ONLY.items():
        text = properties.get(key)
        if text and text.lower() not in possible:
            known = ", ".join(value for value in possible if value)
            raise refused(key, text, f"possible here is {known}")


def unknown(properties: Mapping[str, str]) -> list[str]:
    """Return the `hw_*` properties that nothing here reads: the guest does without them."""
    return sorted(
        name
        for name in properties
        if name.startswith("hw_") and name not in _KNOWN and name not in _ONLY
    )


Choice = TypeVar("Choice", bound=enum.StrEnum)


def choice(properties: Mapping[str, str], key: str, values: type[Choice]) -> Choice | None:
    """Return the value of a property; None if it is not set.

    Raises:
        ImageUnacceptable: it is none of `values`.
    """
    text = properties.get(key)
    if not text:
        return None
    try:
        return values(text.lower())
    except ValueError:
        raise refused(key, text, f"known are {', '.join(values)}") from None


def refused(key: str, value: str, reason: str) -> ImageUnacceptable:
    """Return the error for a property that cannot be honoured."""
    return ImageUnacceptable(
        f"the image property {key} is {str(value)!r:.80}: {reason}",
        f"set {key} to a value this host can provide, or remove it from the image",
    )


def flag(properties: Mapping[str, str], key: str) -> bool:
    """Return a property that is true or false; false if it is not set.

    Raises:
        ImageUnacceptable: it is neither.
    """
    text = properties.get(key, "").lower()
    if text in _NO:
        return False
    if text in _YES:
        return True
    raise refused(key, text, "it is either true or false")


def count(properties: Mapping[str, str], key: str, *, most: int) -> int | None:
    """Return a property that is a number; None if it is not set.

    Raises:
        ImageUnacceptable: it is none from 1 to `most`.
    """
    text = properties.get(key)
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise refused(key, text, f"it is a number from 1 to {most}")
    return int(text)
