"""A tiny real guest, built from Debian packages: what the tests boot to see that booting works.

It prints what it sees on its first serial port, each line starting with `CONSOLE_PREFIX`: its
kernel, a hash of its own files, its root device and disks with exact sizes, how often it booted
from this disk, the config drive, and `ready`. Then it stays up and powers off at the press of the
ACPI power button, or at once with `POWEROFF_WORD` on its kernel command line. What runs inside
is in `guest_ramdisk_init.sh` and `guest_init.sh`.

Nothing is installed on the host and nothing is mounted: the kernel package is only unpacked. Works
without root. Needs apt, dpkg and what `bindep.txt` lists under `test`.

The files of a `Guest` are shared by every test: copy them or register them as images. A domain
started on them directly would write to them, and libvirt would give them to its qemu user.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONSOLE_PREFIX: Final = "BOOTWRIGHT "
POWEROFF_WORD: Final = "bootwright.poweroff"
ROOT_LABEL: Final = "bootwright"
_CDROM_LABEL: Final = "BOOTWRIGHT_CD"

# `quiet`, for an emulated serial port is slow and only our own lines are wanted on it.
COMMAND_LINE: Final = f"root=LABEL={ROOT_LABEL} console=ttyS0 quiet"

# What a guest may meet: virtio on PCI, virtio-scsi, and the IDE disks of the `pc` machine; a config
# drive as ISO 9660 or FAT; the power button. ext4 is built into Debian's cloud kernel, and AHCI is
# not in it at all, so a SATA disk on `q35` is invisible to this guest.
_MODULES: Final = (
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "sr_mod",
    "ata_piix",
    "isofs",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
    "button",
    "evdev",
)

_BUSYBOX: Final = Path("/bin/busybox")
_RAMDISK_INIT: Final = Path(__file__).with_name("guest_ramdisk_init.sh")
_RESIZE2FS: Final = Path("/sbin/resize2fs")
_ROOT_INIT: Final = Path(__file__).with_name("guest_init.sh")
_ISOLINUX: Final = Path("/usr/lib/ISOLINUX/isolinux.bin")
_LDLINUX: Final = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
_SYSLINUX_MBR: Final = Path("/usr/lib/syslinux/mbr/mbr.bin")

_MIB: Final = 1024 * 1024
_SECTOR: Final = 512
_ROOT_MIB: Final = 16
_PAYLOAD_BYTES: Final = _MIB
_BOOT_PARTITION_OFFSET: Final = _MIB

_ENVIRONMENT: Final = {
    **os.environ,
    "LC_ALL": "C.UTF-8",
    # Debian keeps the tools that make file systems where an ordinary user's PATH does not look.
    "PATH": os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin",
    # Our partitions do not line up with the tracks of a disk from 1990, and mtools would object.
    "MTOOLS_SKIP_CHECK": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Guest:
    """The files of one built guest.

    Attributes:
        kernel: a bzImage.
        ramdisk: a gzipped cpio archive.
        root: bare ext4 without a partition table, raw; boots with kernel and ramdisk.
        disk: whole disk, raw: MBR, a FAT partition with syslinux, the same ext4; boots from BIOS.
        disk_qcow2: `disk` as compressed qcow2.
        content_sha256: what the guest says on its `content` line.
        kernel_version: what the guest says on its `guest` line.
    """

    kernel: Path
    ramdisk: Path
    root: Path
    disk: Path
    disk_qcow2: Path
    content_sha256: str
    kernel_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Another root for a guest's kernel and ramdisk; see `variant`."""

    root: Path
    content_sha256: str


def build(cache_dir: Path) -> Guest:
    """The guest for this recipe and the newest Debian cloud kernel, built unless it is there.

    It lives in a directory of `cache_dir` named after everything it is made from, is built aside
    and renamed, so an interrupted build leaves nothing that is used later, and two builders at a
    time do not disturb each other. Takes about 1 s when there is nothing to build.

    Raises:
        LookupError: apt knows no cloud kernel; run `apt-get update`.
        subprocess.CalledProcessError: a tool failed; what it said is on standard error.
        FileNotFoundError: a tool or a file of a needed package is missing.
    """
    version = _newest_kernel_version()
    home = cache_dir / _recipe_hash(version)
    if not home.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        package = _kernel_package(cache_dir, version)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".building-") as name:
            aside = Path(name) / "guest"
            aside.mkdir()
            _build_into(aside, package, version, Path(name))
            try:
                aside.rename(home)
            except OSError:
                if not home.exists():
                    raise  # otherwise another builder was faster, with the same result
    manifest = json.loads((home / "manifest.json").read_text())
    return Guest(
        kernel=home / "kernel",
        ramdisk=home / "ramdisk",
        root=home / "root.raw",
        disk=home / "disk.raw",
        disk_qcow2=home / "disk.qcow2",
        content_sha256=manifest["content_sha256"],
        kernel_version=manifest["kernel_version"],
    )


def variant(directory: Path, *, seed: str, extra_mib: int = 0) -> Variant:
    """A root with other content, for the kernel and ramdisk of any `Guest`.

    Args:
        directory: where `root-<seed>.raw` is written; must exist.
        seed: decides the payload, and so `content_sha256`.
        extra_mib: MiB of incompressible padding, to make the image take its time on the way. The
            guest does not hash it, which would take long without KVM; only `root` is bigger.
    """
    root = directory / f"root-{seed}.raw"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".variant-") as name:
        tree = Path(name)
        _make_root_tree(tree, seed)
        content = content_sha256(tree)
        if extra_mib:
            padding = hashlib.shake_256(b"padding " + seed.encode())
            (tree / "padding").write_bytes(padding.digest(extra_mib * _MIB))
        # ext4 keeps about 1.6 % for inodes (256 bytes for every 16 KiB) and a little for bitmaps.
        _make_ext4(tree, root, _ROOT_MIB + extra_mib + extra_mib // 30)
    return Variant(root=root, content_sha256=content)


def cdrom(guest: Guest, directory: Path) -> Variant:
    """A CD-ROM that boots with isolinux and is the root itself, read-only; `cdrom.iso`."""
    iso = directory / "cdrom.iso"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".cdrom-") as name:
        tree = Path(name)
        _make_root_tree(tree, seed="cdrom")
        (tree / "isolinux").mkdir()
        for file in (guest.kernel, guest.ramdisk, _ISOLINUX, _LDLINUX):
            shutil.copyfile(file, tree / "isolinux" / file.name)
        command_line = f"root=LABEL={_CDROM_LABEL} rootfstype=iso9660 console=ttyS0 quiet"
        (tree / "isolinux" / "isolinux.cfg").write_text(
            "DEFAULT guest\nLABEL guest\n"
            f"LINUX /isolinux/kernel\nINITRD /isolinux/ramdisk\nAPPEND {command_line}\n"
        )
        boot = ["-b", f"isolinux/{_ISOLINUX.name}", "-c", "isolinux/catalog", "-no-emul-boot"]
        boot += ["-boot-load-size", "4", "-boot-info-table"]
        options = ["-quiet", "-R", "-V", _CDROM_LABEL]
        _run("xorriso", "-as", "mkisofs", *options, *boot, "-o", iso, tree)
        return Variant(root=iso, content_sha256=content_sha256(tree))


def content_sha256(tree: Path) -> str:
    """The hash that `guest_init.sh` computes over its own files."""
    files = (
        path
        for top in ("bin", "sbin", "etc", "payload")
        for path in (tree / top).rglob("*")
        if path.is_file()
    )
    lines = sorted((str(path.relative_to(tree)), path) for path in files)
    listing = "".join(f"{_file_sha256(path)}  {name}\n" for name, path in lines)
    return hashlib.sha256(listing.encode()).hexdigest()


def _newest_kernel_version() -> str:
    listing = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    found = re.search(r"Depends: linux-image-(\S+-cloud-amd64)$", listing, re.MULTILINE)
    if found is None:
        raise LookupError("apt knows no linux-image-cloud-amd64: run apt-get update")
    return found[1]


def _recipe_hash(kernel_version: str) -> str:
    recipe = hashlib.sha256(kernel_version.encode())
    for source in (Path(__file__), _RAMDISK_INIT, _ROOT_INIT, _BUSYBOX, _RESIZE2FS):
        recipe.update(source.read_bytes())
    return recipe.hexdigest()[:16]


def _kernel_package(cache_dir: Path, kernel_version: str) -> Path:
    """The .deb with the kernel, kept in `cache_dir` so that a new recipe need not fetch it."""
    pattern = f"linux-image-{kernel_version}_*.deb"
    for package in cache_dir.glob(pattern):
        return package
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetching-") as name:
        # As root, apt would drop to a user who may not write here, and complain that it cannot.
        _run(
            "apt-get",
            "-qq",
            "-o",
            "APT::Sandbox::User=root",
            "download",
            f"linux-image-{kernel_version}",
            cwd=Path(name),
            timeout=600,
        )
        (package,) = Path(name).glob(pattern)
        return package.rename(cache_dir / package.name)


def _build_into(home: Path, package: Path, kernel_version: str, work: Path) -> None:
    unpacked = work / "kernel-package"
    _run("dpkg-deb", "-x", package, unpacked)
    shutil.copyfile(unpacked / "boot" / f"vmlinuz-{kernel_version}", home / "kernel")
    _make_ramdisk(unpacked, kernel_version, home / "ramdisk", work / "ramdisk")
    tree = work / "root"
    tree.mkdir()
    _make_root_tree(tree, seed="bootwright")
    _make_ext4(tree, home / "root.raw", _ROOT_MIB)
    _make_disk(home)
    manifest = {"content_sha256": content_sha256(tree), "kernel_version": kernel_version}
    (home / "manifest.json").write_text(json.dumps(manifest))


def _make_ramdisk(unpacked: Path, kernel_version: str, ramdisk: Path, tree: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "newroot", "modules"):
        (tree / name).mkdir(parents=True)
    _install(_BUSYBOX, tree / "bin" / "busybox")
    _install(_RAMDISK_INIT, tree / "init")
    order = []
    for module in _with_dependencies(unpacked, kernel_version):
        shutil.copyfile(module, tree / "modules" / module.name)
        order.append(module.name)
    (tree / "modules" / "order").write_text("".join(f"{name}\n" for name in order))
    members = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
        cwd=tree,
        input="\n".join(members).encode(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
    ramdisk.write_bytes(gzip.compress(archive, mtime=0))


def _with_dependencies(unpacked: Path, kernel_version: str) -> list[Path]:
    """The files of `_MODULES` and all they need, in the order in which they can be loaded."""
    _run("depmod", "-b", unpacked, kernel_version)
    directory = unpacked / "lib" / "modules" / kernel_version
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        module, _, needed = line.partition(":")
        needs[module] = needed.split()
    by_name = {Path(module).stem.replace("-", "_"): module for module in needs}

    def load(module: str) -> Iterator[str]:
        for needed in needs[module]:
            yield from load(needed)
        yield module

    wanted = (module for name in _MODULES for module in load(by_name[name]))
    return [directory / module for module in dict.fromkeys(wanted)]


def _make_root_tree(tree: Path, seed: str) -> None:
    for name in ("bin", "sbin", "etc", "payload", "dev", "proc", "sys", "var", "mnt"):
        (tree / name).mkdir()
    _install(_BUSYBOX, tree / "bin" / "busybox")
    _install(_ROOT_INIT, tree / "sbin" / "init")
    _install_with_libraries(_RESIZE2FS, tree)
    (tree / "etc" / "seed").write_text(f"{seed}\n")
    payload = hashlib.shake_256(b"payload " + seed.encode()).digest(_PAYLOAD_BYTES)
    (tree / "payload" / "blob").write_bytes(payload)


def _make_ext4(tree: Path, image: Path, size_mib: int) -> None:
    # Without a journal a guest that is destroyed while it runs still mounts, and the image is
    # smaller. The 5 % kept for root would only make small images bigger.
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", ROOT_LABEL]
    image.unlink(missing_ok=True)
    _run("mke2fs", *options, "-d", tree, image, f"{size_mib}M", timeout=600)


def _make_disk(home: Path) -> None:
    """`disk.raw` and `disk.qcow2`, from the kernel, ramdisk and root that are in `home`."""
    disk, root = home / "disk.raw", home / "root.raw"
    payload = (home / "kernel").stat().st_size + (home / "ramdisk").stat().st_size
    boot_mib = payload // _MIB + 3
    root_offset = _BOOT_PARTITION_OFFSET + boot_mib * _MIB
    sector = str(_BOOT_PARTITION_OFFSET // _SECTOR)
    with disk.open("wb") as file:
        file.truncate(root_offset + root.stat().st_size)
    table = (
        "label: dos\n"
        f"start={sector}, size={boot_mib}MiB, type=e, bootable\n"
        f"start={root_offset // _SECTOR}, type=83\n"
    )
    _run("sfdisk", "-q", disk, stdin=table)

    # mkfs.vfat wants the file to end where its partition does.
    os.truncate(disk, root_offset)
    _run("mkfs.vfat", "-F16", f"--offset={sector}", "-h", sector, disk)
    partition = f"{disk}@@{_BOOT_PARTITION_OFFSET}"
    config = f"DEFAULT guest\nLABEL guest\nLINUX /kernel\nINITRD /ramdisk\nAPPEND {COMMAND_LINE}\n"
    _run("mcopy", "-i", partition, home / "kernel", home / "ramdisk", "::/")
    _run("mcopy", "-i", partition, "-", "::/syslinux.cfg", stdin=config)
    _run("syslinux", "--offset", str(_BOOT_PARTITION_OFFSET), "--install", disk)

    with disk.open("r+b") as file:
        file.truncate(root_offset + root.stat().st_size)
        file.write(_SYSLINUX_MBR.read_bytes()[:440])
    # conv=sparse, because the empty parts of the root are most of it.
    _run(
        "dd",
        f"if={root}",
        f"of={disk}",
        "bs=1M",
        f"seek={root_offset // _MIB}",
        "conv=notrunc,sparse",
        "status=none",
    )
    _run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-c", disk, home / "disk.qcow2")


def _install(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(0o755)


def _install_with_libraries(program: Path, tree: Path) -> None:
    """A program into `sbin`, and what the dynamic loader will look for to where it does."""
    _install(program, tree / "sbin" / program.name)
    for library in re.findall(r"(/\S+) \(0x", _run("ldd", program)):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        _install(Path(library), target)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(*argv: str | Path, cwd: Path | None = None, stdin: str = "", timeout: float = 60) -> str:
    """Standard output of a tool; its standard error goes where ours goes."""
    return subprocess.run(
        argv,
        cwd=cwd,
        input=stdin,
        stdout=subprocess.PIPE,
        env=_ENVIRONMENT,
        check=True,
        text=True,
        timeout=timeout,
    ).stdout
