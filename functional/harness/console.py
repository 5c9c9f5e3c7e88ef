"""What a guest says about itself on its serial console, as a value."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from functional.harness.guest import CONSOLE_PREFIX

_FACT = re.compile(r"(\w+)=(\S*)")


class GuestSilent(Exception):
    """The guest did not get ready in time; the message holds its console."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One boot of the guest, in its own words; sizes are bytes."""

    kernel: str
    content_sha256: str
    root_device: str
    disks: dict[str, int] = field(default_factory=dict)
    """Device name to size."""
    serials: dict[str, str] = field(default_factory=dict)
    bootcount: int = 0
    filesystem: int = 0
    """Of the root, after the guest has grown it to its device."""
    config_drive: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> Seen | None:
    """Return what the guest said when it last got ready, None if it has not yet."""
    facts: dict[str, str] = {}
    disks: dict[str, int] = {}
    serials: dict[str, str] = {}
    config_drive: dict[str, str] = {}
    ready = False
    # What follows the last newline may be half a line: the guest is writing it.
    for line in text[: text.rfind("\n") + 1].splitlines():
        _, prefix, rest = line.partition(CONSOLE_PREFIX)
        if not prefix:
            continue
        kind, _, tail = rest.partition(" ")
        values = dict(_FACT.findall(rest))
        match kind:
            case "guest":
                ready = False
                disks, serials, config_drive = {}, {}, {}
                facts["kernel"] = values["kernel"]
            case "content":
                facts["content"] = values["sha256"]
            case "root":
                facts["root"] = values["device"]
            case "disk":
                name = tail.split()[0]
                disks[name] = int(values["bytes"])
                serials[name] = values["serial"]
            case "filesystem":
                facts["filesystem"] = values["bytes"]
            case "config-drive":
                config_drive = values
            case "ready":
                ready = True
            case _:
                facts |= {"bootcount": values["bootcount"]} if "bootcount" in values else {}
    if not ready:
        return None
    return Seen(
        kernel=facts["kernel"],
        content_sha256=facts["content"],
        root_device=facts["root"],
        disks=disks,
        serials=serials,
        bootcount=int(facts["bootcount"]),
        filesystem=int(facts["filesystem"]),
        config_drive=config_drive,
    )


def wait_ready(read: Callable[[], str], *, timeout_s: float = 180.0) -> Seen:
    """Return what the guest says once it is ready; `read` returns its console so far."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = read()
        seen = parse(text)
        if seen is not None:
            return seen
        if time.monotonic() > deadline:
            raise GuestSilent(f"the guest is not ready after {timeout_s:g} s:\n{text[-4000:]}")
        time.sleep(0.1)
