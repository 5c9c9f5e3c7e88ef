"""The host itself: user, unit, programs, kernel, clock."""

import ctypes
import grp
import os
import pwd
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent import confinement, process, scrub
from agent.checks import error, ok, warning
from agent.checks.filesystem import MADE_BY_UNIT
from agent.job import GuestFormat
from agent.process import ProgramFailed
from agent.settings import Settings
from agent.views import Finding

UNIT: Final = "bootwright.service"

_CAP_FOWNER: Final = 3
_FIRST_PROCESS: Final = Path("/proc/1/status")
_KVM: Final = Path("/dev/kvm")
_CPUINFO: Final = Path("/proc/cpuinfo")
_KSM: Final = Path("/sys/kernel/mm/ksm/run")

_FORMATTERS: Final = {
    GuestFormat.EXT4: "mkfs.ext4",
    GuestFormat.XFS: "mkfs.xfs",
    GuestFormat.VFAT: "mkfs.vfat",
}

# adjtimex(2): struct timex is smaller, and `modes` 0 at its beginning changes nothing.
_TIMEX_BYTES: Final = 512
_TIME_ERROR: Final = 5


def groups(_: Settings) -> Iterator[Finding]:
    """The groups that let the agent reach what libvirt owns."""
    name = "groups"
    mine = {_group_name(gid) for gid in (*os.getgroups(), os.getegid())}
    if os.geteuid() == 0:
        yield warning(
            name, "looked at as root, who may do everything", "the agent does not run as root"
        )
        return
    if "libvirt" not in mine:
        yield error(
            name,
            f"{_user_name()} is not in group libvirt, whose members may use libvirt's socket",
            f"usermod -aG libvirt {_user_name()}, and restart the agent",
        )
        return
    # Debian's and Ubuntu's name, and everybody else's.
    if not mine & {"libvirt-qemu", "qemu"}:
        yield warning(
            name,
            f"{_user_name()} is not in the group qemu runs in, so it cannot read the bases that "
            "libvirt has given to qemu",
            f"usermod -aG libvirt-qemu {_user_name()} (Fedora, SUSE: qemu), and restart the agent",
        )
        return
    yield ok(name, ", ".join(sorted(mine)))


def _user_name() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def unit(settings: Settings) -> Iterator[Finding]:
    """What systemd lets the agent do."""
    if not Path("/run/systemd/system").is_dir():
        yield warning(
            "unit",
            "systemd does not run here, so whatever starts the agent has to give it CAP_FOWNER",
            "see AmbientCapabilities= in etc/bootwright.service, and setpriv(1)",
        )
        return
    try:
        shown = process.run(
            [
                *("systemctl", "show", UNIT, "--property"),
                "LoadState,ActiveState,User,AmbientCapabilities,ProtectSystem,ReadWritePaths",
            ],
            timeout_s=10,
        )
    except ProgramFailed as e:
        hint = (
            "it tells users by D-Bus: install dbus, or ask as root: bootwright doctor --user root"
        )
        yield warning("unit", f"systemd does not tell: {e}", hint)
        return
    yield from judge_unit(shown.stdout.decode(errors="replace"), settings)


def judge_unit(shown: str, settings: Settings) -> Iterator[Finding]:
    """Judge what `systemctl show` said."""
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    if values.get("LoadState") != "loaded":
        yield warning(
            "unit",
            f"{UNIT} is {values.get('LoadState', 'unknown')}",
            "install etc/bootwright.service, see docs/operations.md",
        )
        return
    if "cap_fowner" not in values.get("AmbientCapabilities", ""):
        yield warning(
            "unit",
            f"{UNIT} gives no CAP_FOWNER to the helper, so the last use of bases that libvirt "
            "has taken over is not recorded",
            "AmbientCapabilities=CAP_FOWNER, as in etc/bootwright.service",
        )
    given = values.get("AmbientCapabilities", "")
    if settings.volumes and not ("cap_sys_admin" in given and "cap_dac_override" in given):
        yield error(
            "unit",
            f"{UNIT} gives no CAP_SYS_ADMIN and CAP_DAC_OVERRIDE to the helper for logical "
            "volumes, so the agent does not start",
            "install etc/bootwright-lvm.conf as a drop-in, see docs/operations.md; or unset "
            "images_volume_group in [libvirt]",
        )
    if values.get("ProtectSystem") == "strict":
        more = values.get("ReadWritePaths", "").split()
        writable = [*MADE_BY_UNIT, *(Path(path.lstrip("-+")) for path in more)]
        for path in _written_to(settings):
            if not any(path.is_relative_to(there) for there in writable):
                yield error(
                    "unit",
                    f"{UNIT} does not let the agent write to {path}",
                    f"systemctl edit bootwright, and there [Service] ReadWritePaths={path}",
                )
    state = values.get("ActiveState", "")
    if state == "active":
        yield ok("unit", f"{UNIT} is active")
    else:
        yield warning(
            "unit",
            f"{UNIT} is {state}",
            "systemctl start bootwright; journalctl -u bootwright says why it ended",
        )


def _written_to(settings: Settings) -> list[Path]:
    keys = [] if settings.encryption is None else [settings.encryption.key_directory]
    return [settings.instances_path, settings.state_path, settings.api.socket.parent, *keys]


def capabilities(_: Settings) -> Iterator[Finding]:
    """Whether the helper can be given its one capability at all."""
    status = dict(line.partition(":")[::2] for line in _FIRST_PROCESS.read_text().splitlines())
    if int(status["CapBnd"], 16) >> _CAP_FOWNER & 1:
        yield ok("capabilities", "CAP_FOWNER can be had")
    else:
        yield warning(
            "capabilities",
            "nobody can have CAP_FOWNER here, so the last use of bases that libvirt has taken "
            "over is not recorded, and they are kept longer than needed",
            "allow the container CAP_FOWNER",
        )


def programs(settings: Settings) -> Iterator[Finding]:
    """The programs that jobs start."""
    try:
        done = process.run(["qemu-img", "--version"], timeout_s=10)
        version = done.stdout.decode(errors="replace").splitlines()[0]
        yield ok("qemu-img", version)
    except ProgramFailed as e:
        yield error("qemu-img", str(e), "install it: images that are not raw need it")
    for guest_format, program in _FORMATTERS.items():
        if shutil.which(program, path=process.PATH) is None:
            default = guest_format is settings.default_ephemeral_format
            yield (error if default else warning)(
                program,
                f"{program} is not installed, so there are no ephemeral disks with {guest_format}",
                f"install {process.debian_package(program)}",
            )
    needed = [
        ("mkswap", "there are no swap disks"),
        ("prlimit", "qemu-img and others cannot be limited, and are not started"),
    ]
    if settings.volumes is not None:
        needed.append(("lvm", "there are no disks on logical volumes"))
    if settings.encryption is not None:
        needed.append(("cryptsetup", "disks cannot be encrypted, and none are made"))
    for program, purpose in needed:
        if shutil.which(program, path=process.PATH) is None:
            yield error(
                program,
                f"{program} is not installed, so {purpose}",
                f"install {process.debian_package(program)}",
            )


def kernel(_: Settings) -> Iterator[Finding]:
    """What the kernel adds to safety and manners."""
    abi = confinement.landlock_abi()
    if abi:
        yield ok("confinement", f"Landlock, version {abi}")
    else:
        yield warning(
            "confinement",
            "the kernel has no Landlock, so qemu-img can reach all files the agent can",
            "boot a kernel from 5.13 on with landlock among its lsm=",
        )
    if scrub.pressure() is not None:
        yield ok("pressure", "the kernel tells how busy the disks are")
    else:
        yield warning(
            "pressure",
            "the kernel does not tell how busy the disks are (PSI), so the scrub gives way to "
            "guests by its I/O priority only",
            "boot with psi=1, on a kernel with CONFIG_PSI",
        )
    ksm = _KSM.read_text().strip() if _KSM.exists() else "0"
    yield ok("ksm", "guests' equal pages are merged" if ksm == "1" else "off")


def virtualization(settings: Settings) -> Iterator[Finding]:
    """Whether guests run on the processor; looked at from outside, for nobody opens /dev/kvm."""
    flags = set()
    for line in _CPUINFO.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    able = bool(flags & {"vmx", "svm"}) or os.uname().machine != "x86_64"
    if settings.libvirt.virt_type == "kvm":
        if _KVM.exists():
            yield ok("kvm", str(_KVM))
        elif able:
            yield error("kvm", f"there is no {_KVM}", "modprobe kvm_intel or kvm_amd")
        else:
            yield error(
                "kvm",
                f"there is no {_KVM}, and the processor shows no virtualization",
                "enable it in the firmware (or nested, in the hypervisor below), or set virt_type "
                "= qemu in [libvirt]",
            )
    elif able and _KVM.exists():
        yield warning(
            "kvm",
            "guests are emulated, which is slow, and this host could run them with KVM",
            "set virt_type = kvm in [libvirt]",
        )
    else:
        yield ok("kvm", "not used: virt_type = qemu")


def clock(_: Settings) -> Iterator[Finding]:
    """Whether somebody keeps the clock right: tokens, last use and pins are about time."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state < 0:
        yield warning("clock", f"adjtimex: {os.strerror(ctypes.get_errno())}", "see timedatectl")
    elif state == _TIME_ERROR:
        yield warning(
            "clock",
            "the kernel's clock is not synchronized",
            "run chrony or systemd-timesyncd; without it last use, pins and tokens may be wrong",
        )
    else:
        # modes, offset, freq, maxerror: a padded int and three longs.
        _, _, _, most_us = struct.unpack_from("@illl", timex)
        yield ok("clock", f"synchronized, at most {most_us / 1e6:.3f} s off")
