"""`make demo`: one tiny real guest, booted through the agent before your eyes, and deleted again.

Run as root by the interpreter of the virtualenv that Bootwright is installed in. It is a tour and
a proof in one: what the guest says on its serial console has to be what was put into its image.
What the demo starts, a libvirtd and an agent of its own, ends with it; the libvirt of the host is
not used. The cached guest and the user `bootwright` stay; if something fails, the logs do as well.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

from functional.harness import console, guest
from functional.harness.agent import Agent
from functional.harness.guest import Guest
from functional.harness.libvirtd import PrivateLibvirtd

CACHE: Final = Path(os.environ.get("BOOTWRIGHT_CACHE", "/var/cache/bootwright-dev"))
"""Where the guest is kept for the next run."""

NAME: Final = "demo-1"
FLAVOR: Final = "1x192x1"
DISK_BYTES: Final = 1 << 30
"""What the guest has to find: the one GiB of the flavor, though its image has a few MiB."""

# Under emulation, and with others on the same processors, a boot takes its time.
BOOT_LIMIT_S: Final = 300.0


class DemoFailed(Exception):
    """Something is not as it should be; the message is the sentence to end with."""


def main() -> int:
    """Run the demo; return the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    if os.getuid() != 0:
        return _fail("run it as root: it starts libvirtd and becomes the user bootwright")
    # The service user and QEMU's have to get in, and a socket's path has to be short.
    work = Path(tempfile.mkdtemp(prefix="bootwright-demo-", dir="/var/tmp"))
    work.chmod(0o755)
    try:
        _demonstrate(work)
    except KeyboardInterrupt:
        return _fail(f"interrupted; everything is stopped, the logs are in {work}")
    except subprocess.CalledProcessError as e:
        return _fail(f"{e.cmd[0]} failed with status {e.returncode}; the logs are in {work}")
    except Exception as e:  # noqa: BLE001 - whatever it is, it has to end in one line
        # The harness puts the end of a log below its sentence.
        sentence, _, log = str(e).partition("\n")
        print(log, file=sys.stderr)
        return _fail(f"{sentence.rstrip(':')}; everything is stopped, the logs are in {work}")
    shutil.rmtree(work)
    seconds = time.monotonic() - began
    _say(f"\nmake demo: the guest booted, proved it, and is deleted again ({seconds:.0f} s)")
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(sentence: str) -> int:
    print(f"make demo: failed: {sentence}", file=sys.stderr)
    return 1


def _demonstrate(work: Path) -> None:
    _say("# A guest from Debian's cloud kernel and busybox; built once")
    files = guest.build(CACHE / "guest")
    _say(f"kernel {files.kernel_version}, root {files.root.stat().st_size >> 20} MiB")
    with ExitStack() as stack:
        _say("\n# A libvirtd of its own, and the agent as user bootwright")
        libvirtd = stack.enter_context(PrivateLibvirtd(work / "libvirt", cache=CACHE / "libvirt"))
        agent = Agent(
            work / "agent",
            {
                "libvirt": {"connection_uri": libvirtd.uri, "virt_type": "qemu"},
                "images": {"source": "directory", "directory": work / "agent/images"},
            },
        )
        stack.callback(agent.close)
        agent.start()
        alias = shlex.quote(shlex.join(agent.command()))
        _say(f"$ alias bootwright={alias}  # (while the demo runs)")
        _run(agent, "status")
        _say("\n# Register the images; the root image says which kernel and ramdisk it boots with")
        image_id = _register(agent, files)
        _say("\n# Boot")
        _run(agent, "boot", "--image", image_id, "--flavor", FLAVOR, "--name", NAME, "--wait")
        _say("\n# What the guest says on its serial console")
        _prove(_read_console(agent), files)
        _say("\n# Delete")
        _run(agent, "instance", "delete", NAME)
        if libvirtd.domains() or list(agent.instances.glob("*/instance.json")):
            raise DemoFailed("the instance was deleted and something of it is left")


def _register(agent: Agent, files: Guest) -> str:
    """Register kernel, ramdisk and root; return the id of the root image."""
    kernel = _run(agent, "image", "add", files.kernel, "--disk-format", "aki", "--name", "kernel")
    ramdisk = _run(
        agent, "image", "add", files.ramdisk, "--disk-format", "ari", "--name", "ramdisk"
    )
    properties = {
        "kernel_id": kernel.strip(),
        "ramdisk_id": ramdisk.strip(),
        "os_command_line": guest.COMMAND_LINE,
    }
    options = [word for item in properties.items() for word in ("--property", "=".join(item))]
    root = _run(
        agent, "image", "add", files.root, "--disk-format", "raw", "--name", "root", *options
    )
    return root.strip()


def _read_console(agent: Agent) -> str:
    """Return the console of the guest that is ready."""
    read = ("instance", "console", NAME)
    _say(f"$ bootwright {shlex.join(read)}")
    deadline = time.monotonic() + BOOT_LIMIT_S
    while console.parse(text := agent.run(*read).stdout) is None:
        if time.monotonic() > deadline:
            raise DemoFailed(f"the guest is not ready after {BOOT_LIMIT_S:g} s: {text[-500:]!r}")
        # Each look is a process, and the guest needs the processors more.
        time.sleep(0.5)
    return text


def _prove(text: str, files: Guest) -> None:
    """Show what the guest said, and compare it with what was put into its images."""
    for line in text.splitlines():
        if guest.CONSOLE_PREFIX in line:
            _say(line)
    seen = console.parse(text)
    if seen is None:
        raise DemoFailed("the guest is not ready")
    facts = {
        "kernel": (seen.kernel, files.kernel_version),
        "sha256 of the contents of its root": (seen.content_sha256, files.content_sha256),
        "bytes of its root disk": (seen.disks.get(seen.root_device), DISK_BYTES),
    }
    _say("")
    for what, (said, expected) in facts.items():
        if said != expected:
            raise DemoFailed(f"{what}: the guest says {said}, expected is {expected}")
        _say(f"{what}: {said}, as expected")


def _run(agent: Agent, *arguments: str | Path) -> str:
    """Run `bootwright …` as a person would, and return what it printed.

    Standard error is left to it: that is where the live line goes on a terminal.
    """
    _say(f"$ bootwright {shlex.join(str(word) for word in arguments)}")
    done = subprocess.run(
        agent.command(*arguments), stdout=subprocess.PIPE, text=True, check=False, timeout=600
    )
    _say(done.stdout.rstrip("\n"))
    if done.returncode != 0:
        raise DemoFailed(f"bootwright {arguments[0]} ended with status {done.returncode}")
    return done.stdout


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
