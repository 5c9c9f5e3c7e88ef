"""A kernel with device-mapper, as a process: User-Mode Linux, for what the host's own may not do.

It sees this machine's files, read-only and with what is written held in memory, and only the
directories it is given are really written to. It has disks of its own, which are files here, and
no network. Its kernel and modules are those of Debian's package user-mode-linux.

A kernel takes two seconds of processor time to boot. All in it runs on one processor, and system
calls and page faults are dear: what spawns many programs takes several times as long as outside.
"""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KERNEL: Final = "linux.uml"
DISK: Final = Path("/dev/ubda")
"""Inside, the first of the disks; then ubdb and so on."""

# $1 the directory of the run, which is all that reaches the host; the rest is written there too.
# Not chroot but pivot_root: libvirt's setns(2) has to find this as the root of the namespace.
_INIT: Final = """\
#!/bin/sh
modules=/usr/lib/uml/modules/$(uname -r)
mount -t tmpfs -o mode=755 rw /mnt
mkdir /mnt/upper /mnt/work /mnt/root
insmod $modules/kernel/fs/overlayfs/overlay.ko
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
mkdir -p mnt/old
pivot_root . mnt/old
cd /
mount --move /mnt/old/dev /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 run /run
umount -l /mnt/old
mkdir -p /dev/pts /dev/shm /run/lock/lvm /run/lvm /run/udev /lib/modules
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sfn /proc/self/fd /dev/fd
ln -sfn $modules /lib/modules/$(uname -r)
chmod 666 /dev/null /dev/zero /dev/random /dev/urandom
ip link set lo up
@mounts@
# LVM knows no disks of that name.
printf 'devices { types = [ "ubd", 16 ] }\\n' >>/etc/lvm/lvmlocal.conf
# And it locks itself into memory, page by page, each of which costs a fault.
printf 'activation { reserved_stack = 0 reserved_memory = 0 mlock_filter = [ "/" ] }\\n' \\
    >>/etc/lvm/lvmlocal.conf
printf 'backup { backup = 0 archive = 0 }\\n' >>/etc/lvm/lvmlocal.conf
modprobe -a @modules@
@devices@
cd @directory@
env -i @environment@ @command@ </dev/null >@run@/stdout 2>@run@/stderr
echo $? >@run@/status
sync
echo o >/proc/sysrq-trigger
sleep 60
"""

# Who makes the device nodes of volumes. udev runs some programs for each of them, and without it
# a command of LVM takes a third of the time.
_UDEV: Final = """\
/lib/systemd/systemd-udevd --daemon --resolve-names=never >/dev/null 2>&1
udevadm trigger --subsystem-match=block --action=add
udevadm settle"""
_NO_UDEV: Final = """\
printf 'activation { udev_sync = 0 udev_rules = 0 }\\n' >>/etc/lvm/lvmlocal.conf"""

_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_MODULES: Final = ("dm-mod", "dm-thin-pool", "dm-snapshot", "dm-crypt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    status: int
    stdout: str
    stderr: str


class KernelFailed(Exception):
    """It did not come to the end of the command; says what was on its console."""


def run(
    argv: Sequence[str | Path],
    *,
    writable: Sequence[Path] = (),
    disks: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    directory: Path = Path("/"),
    udev: bool = False,
    memory_mib: int = 768,
    timeout_s: float = 300.0,
) -> Completed:
    """Boot, run one command as root, power off; return what it said.

    Args:
        writable: directories of this machine that are written to.
        disks: files that are the disks; sparse ones will do.
        environment: nothing else of it is passed on, but PATH is set.
        directory: where the command runs.
        udev: make device nodes as a real host does; else LVM makes them itself, which only root
            can let it do.

    Raises:
        KernelFailed: or it took longer than `timeout_s`.
    """
    # Memory of the kernel is a file, and no other place is as fast.
    with tempfile.TemporaryDirectory(prefix="bootwright-uml-") as name:
        work = Path(name)
        variables = {"PATH": _PATH, "LC_ALL": "C.UTF-8", **(environment or {})}
        texts = {
            "mounts": "\n".join(map(_mount, [work, *writable])),
            "modules": " ".join(_MODULES),
            "devices": _UDEV if udev else _NO_UDEV,
            "directory": shlex.quote(os.fspath(directory)),
            "environment": shlex.join(f"{key}={value}" for key, value in variables.items()),
            "command": shlex.join(str(word) for word in argv),
            "run": os.fspath(work),
        }
        script = _INIT
        for key, text in texts.items():
            script = script.replace(f"@{key}@", text)
        init = work / "init"
        init.write_text(script)
        init.chmod(0o755)
        console = _boot(work, init, disks, memory_mib, timeout_s)
        try:
            return Completed(
                status=int((work / "status").read_text()),
                stdout=(work / "stdout").read_text(errors="replace"),
                stderr=(work / "stderr").read_text(errors="replace"),
            )
        except (FileNotFoundError, ValueError) as e:
            said = [path.read_text(errors="replace") for path in work.glob("std*")]
            raise KernelFailed(f"{console[-3000:]}\n{''.join(said)[-6000:]}") from e


def _boot(work: Path, init: Path, disks: Sequence[Path], memory_mib: int, timeout_s: float) -> str:
    """Run the kernel to its end; return what was on its console."""
    process = subprocess.Popen(
        [
            *(KERNEL, f"umid={work.name}", f"uml_dir={work}", f"mem={memory_mib}M"),
            *(f"ubd{number}={disk}" for number, disk in enumerate(disks)),
            *("rootfstype=hostfs", "rootflags=/", "ro", f"init={init}"),
            *("con=null", "con0=null,fd:1", "quiet", "panic=-1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": _PATH, "TMPDIR": "/dev/shm"},
        start_new_session=True,  # all its processes are in there, and go with it
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as e:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        if isinstance(e, subprocess.TimeoutExpired):
            output += f"\nkilled after {timeout_s:g} s".encode()
        else:
            raise
    return output.decode(errors="replace")


def _mount(path: Path) -> str:
    place = shlex.quote(os.fspath(path))
    return f"mkdir -p {place}; mount -t hostfs none {place} -o {place}"
