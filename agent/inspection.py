"""What the bytes of an image really are, judged while they stream past.

Nothing of QEMU may open an image before this has let it pass: the content must
be what the image source says it is, complete in itself, and promise no absurd
size. The first bytes tell the format; what must be read behind them of VMDK
and VHDX is left to oslo.utils' format inspectors, with rules of ours on top
(`disk_headers`).

Two of oslo's inspectors are not used. Its GPT one, because a partitioned disk
is raw content to us and QEMU is always told so, and its rules would refuse
disks that boot everywhere: hybrid MBRs, a GPT with the legacy boot flag, file
systems without partitions. Its qcow2 one, because it refuses extended L2
entries and looks at little else; `qcow2.parse_header` looks at more.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oslo_utils.imageutils import format_inspector

from agent import disk_headers, qcow2
from agent.errors import ImageUnacceptable

MAX_VIRTUAL_SIZE = qcow2.MAX_VIRTUAL_SIZE
"""Bytes; a header that promises more is hostile or damaged."""

# All that tells one format from another lies in here, and all of the headers
# of qcow2, VHD and VDI. VHDX's region table comes last and ends with it.
HEAD = 256 << 10
# oslo's VHDX inspector looks for what a table points to one call after it has
# seen the table, so one call must never bring both.
_SLICE = 64 << 10
_TAIL = 512

_PLAIN = ("raw", "ami", "aki", "ari", "gpt")
_CLAIMS = (*_PLAIN, "qcow2", "vhd", "vhdx", "vmdk", "vdi", "iso")
# ovf: many a plain disk was once uploaded under that name.
_CONTAINERS = ("bare", "ovf", "ami", "aki", "ari")
_QEMU_NAMES = {"vhd": "vpc"}  # Glance's name: QEMU's

_MAGICS = (
    (0, qcow2.MAGIC, "qcow2"),
    (0, disk_headers.VHD_MAGIC, "vhd"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"QED\x00", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0x8001, b"CD001", "iso"),
    (0x8001, b"NSR02", "iso"),
    (0x8001, b"NSR03", "iso"),
)
_DMG_TRAILER = b"koly"

_CONVERT = "make it a self-contained image, with 'qemu-img convert -O qcow2', and upload that"
_UPLOAD = "upload its data again"


class _VHDXInspector(format_inspector.VHDXInspector):
    """Also looks for the file parameters."""

    def post_process(self) -> None:
        super().post_process()
        if not self.has_region("vds") or self.has_region("parameters"):
            return
        metadata = self.region("metadata")
        offset = disk_headers.vhdx_items(bytes(metadata.data)).parameters
        self.new_region("parameters", format_inspector.CaptureRegion(metadata.offset + offset, 8))


class _VMDKInspector(format_inspector.VMDKInspector):
    """Leaves it to `disk_headers` which subformats are allowed; oslo's knows two."""

    def region_complete(self, region_name: str) -> None:
        super().region_complete(region_name)
        if self.desc_text is not None and self.vmdktype != "formatnotfound":
            self.vmdktype = "monolithicsparse"


_INSPECTORS: Mapping[str, type[format_inspector.FileInspector]] = {
    "vmdk": _VMDKInspector,
    "vhdx": _VHDXInspector,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """An image that may be used."""

    format: str
    """QEMU's name: raw, qcow2, vmdk, vpc, vhdx, vdi; or iso, whose bytes are raw."""
    virtual_size: int
    """Bytes. Of vpc an upper bound, as QEMU may go by the disk's old geometry.

    Of raw and iso the length, which need not be a multiple of 512.
    """


class Inspection:
    """Of one image; fed with all its bytes in order. For one thread."""

    def __init__(
        self,
        image_id: str,
        disk_format: str,
        *,
        container_format: str = "bare",
        size: int | None = None,
        vmdk_types: Sequence[str],
    ) -> None:
        """Begin; `size` is the image's length in bytes where the image source knows it.

        `vmdk_types`: names of the subformats that a VMDK may be of.

        Raises:
            ImageUnacceptable: no image of these formats can be used.
        """
        self._image_id = image_id
        self._claim = disk_format
        self._size = size
        self._vmdk_types = vmdk_types
        self._length = 0
        self._head = bytearray()
        self._tail = b""
        self._content: str | None = None
        self._inspector: format_inspector.FileInspector | None = None
        self._virtual_size: int | None = None
        if disk_format not in _CLAIMS:
            raise self._unacceptable(
                f"its disk_format {disk_format} is not supported",
                f"convert it to one of {', '.join(_CLAIMS)}",
            )
        if container_format not in _CONTAINERS:
            raise self._unacceptable(
                f"its container_format {container_format} is not supported",
                "take the disk out of its container and upload it as bare",
            )

    @property
    def virtual_size(self) -> int | None:
        """Bytes the guest would see, once the header (or for raw, the length) is known."""
        return self._virtual_size

    @property
    def settled(self) -> bool:
        """What follows is only counted, but for the last 512 bytes."""
        return self._content is not None and self._inspector is None

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes, however many.

        Raises:
            ImageUnacceptable: as soon as it is certain.
        """
        self._length += len(chunk)
        if len(chunk) >= _TAIL:
            self._tail = bytes(chunk[-_TAIL:])
        else:
            self._tail = (self._tail + chunk)[-_TAIL:]
        if self._content is None:
            room = HEAD - len(self._head)
            self._head += chunk[:room]
            # A small image has to be judged by its last byte, not after it: its
            # size is to be known before anything is made of it.
            if len(self._head) < HEAD and self._length != self._size:
                return
            self._content = self._decided()
            chunk = chunk[room:]
        self._read_on(chunk)

    def pass_over(self, count: int) -> None:
        """Count bytes that were looked at in an earlier run; only of what is settled."""
        if not self.settled:
            raise AssertionError("what has not been looked at cannot be passed over")
        self._length += count
        self._tail = b""

    def finish(self) -> Verdict:
        """Return the verdict after the last byte.

        Raises:
            ImageUnacceptable
        """
        if self._length == 0:
            raise self._unacceptable("it is empty", _UPLOAD)
        self._size = self._length
        content = self._content or self._decided()
        if self._inspector is not None:
            self._inspector.finish()
            self._judge(self._inspector)
        if self._inspector is not None:
            raise self._unacceptable(
                f"it is cut short: its {content} header points beyond its {self._length} bytes",
                _UPLOAD,
            )
        if content == "vhd" and not self._tail.startswith(disk_headers.VHD_MAGIC):
            raise self._unacceptable(
                "it is cut short: its vhd header needs a footer in its last 512 bytes", _UPLOAD
            )
        if content == "raw":
            content = self._by_tail()
        # Again, now that the length is certain.
        if content in ("raw", "iso"):
            self._promise(self._length)
        elif content in ("qcow2", "vdi"):
            self._read_header(content)
        if self._virtual_size is None:
            raise self._unacceptable(f"its {content} header names no size", _UPLOAD)
        return Verdict(format=_QEMU_NAMES.get(content, content), virtual_size=self._virtual_size)

    def _decided(self) -> str:
        """Return what the head says the content is, if that is what was claimed."""
        head = bytes(self._head)
        found = _formats(head)
        if len(found) > 1:
            raise self._unacceptable(
                f"its bytes are several formats at once: {', '.join(sorted(found))}", _CONVERT
            )
        content = found.pop() if found else "raw"
        plausible = self._claim == content
        if content == "raw":
            # A fixed VHD has its mark at the end: see _by_tail.
            plausible = self._claim in (*_PLAIN, "vhd")
            if self._claim == "gpt" and head[510:512] != b"\x55\xaa":
                plausible = False
        if not plausible:
            raise self._contradiction(content)
        match content:
            case "qcow2" | "vhd" | "vdi":
                self._read_header(content)
            case "vmdk" | "vhdx":
                self._inspector = _INSPECTORS[content]()
            case _:
                if self._size is not None and self._claim != "vhd":
                    self._promise(self._size)
        self._read_on(head)
        return content

    def _read_header(self, content: str) -> None:
        head = bytes(self._head)
        try:
            match content:
                case "qcow2":
                    size = qcow2.parse_header(head, self._size).virtual_size
                case "vhd":
                    size = disk_headers.vhd_size(head, kind=3)
                case _:
                    size = disk_headers.vdi_size(head, self._size)
        except ValueError as e:
            raise self._unacceptable(str(e), _CONVERT) from e
        self._promise(size)

    def _read_on(self, data: bytes | memoryview) -> None:
        """Feed oslo's inspector until it has seen all it wants."""
        for begin in range(0, len(data), _SLICE):
            if self._inspector is None:
                return
            try:
                self._inspector.eat_chunk(bytes(data[begin : begin + _SLICE]))
            except Exception as e:  # it may stumble over hostile bytes in any way
                raise self._unacceptable(
                    f"its {self._inspector} structure cannot be read: {e}", _CONVERT
                ) from e
            self._judge(self._inspector)

    def _judge(self, inspector: format_inspector.FileInspector) -> None:
        """Apply the rules as far as the inspector has come; let go of it when it is done."""
        try:
            if isinstance(inspector, format_inspector.VMDKInspector):
                disk_headers.check_vmdk_header(bytes(self._head[:64]), self._size)
                if inspector.desc_text is not None:
                    # Oslo ends where the header says, QEMU where the text does.
                    for text in (inspector.desc_text, disk_headers.vmdk_descriptor(self._head)):
                        disk_headers.check_vmdk_descriptor(text, self._vmdk_types)
            elif inspector.has_region("parameters") and inspector.region("parameters").complete:
                disk_headers.check_vhdx_parameters(bytes(inspector.region("parameters").data))
            size = inspector.virtual_size
            if inspector.complete:
                inspector.safety_check()
        except format_inspector.SafetyCheckFailed as e:
            rules = "; ".join(f"{name}: {why}" for name, why in e.failures.items())
            raise self._unacceptable(f"it breaks the rule {rules}", _CONVERT) from e
        except (ValueError, struct.error, format_inspector.ImageFormatError) as e:
            raise self._unacceptable(str(e), _CONVERT) from e
        if size:
            self._promise(size)
        if inspector.complete:
            self._inspector = None

    def _by_tail(self) -> str:
        """Return what the last bytes make of content whose first bytes say nothing."""
        if self._tail.startswith(_DMG_TRAILER):
            raise self._contradiction("dmg")
        if self._claim != "vhd":
            return "raw"
        if not self._tail.startswith(disk_headers.VHD_MAGIC):
            raise self._contradiction("raw")
        try:
            disk_headers.vhd_size(self._tail, kind=2)
        except ValueError as e:
            raise self._unacceptable(str(e), _CONVERT) from e
        self._promise(self._length - _TAIL)
        return "vhd"

    def _promise(self, size: int) -> None:
        if not 0 < size <= MAX_VIRTUAL_SIZE:
            raise self._unacceptable(
                f"its virtual size is {size} bytes, not 1 to {MAX_VIRTUAL_SIZE}", _CONVERT
            )
        self._virtual_size = size

    def _contradiction(self, content: str) -> ImageUnacceptable:
        if content in _CLAIMS:
            hint = f"register it with disk_format {content}, if that is what it is meant to be"
        else:
            hint = f"{content} is not supported: convert it to qcow2 or raw"
        return self._unacceptable(
            f"it is registered with disk_format {self._claim}, but its bytes are {content} "
            f"(they begin with {bytes(self._head[:8]).hex(' ')})",
            hint,
        )

    def _unacceptable(self, what: str, hint: str) -> ImageUnacceptable:
        return ImageUnacceptable(f"image {self._image_id}: {what}", hint)


def refuse_nested(image_id: str, head: bytes) -> None:
    """Look whether a disk, by its first `HEAD` bytes, is yet another image.

    One that begins with, say, a qcow2 header would be taken for one by
    whatever guesses formats later on. An ISO is fine: QEMU never opens it so.

    Raises:
        ImageUnacceptable
    """
    found = _formats(head) - {"iso"}
    if found:
        raise ImageUnacceptable(
            f"image {image_id}: its virtual disk itself holds an image of format "
            f"{' and '.join(sorted(found))}",
            "upload the inner image as it is",
        )


def _formats(head: bytes) -> set[str]:
    found = {name for offset, magic, name in _MAGICS if head.startswith(magic, offset)}
    # A VMDK can also be a text that names other files; it has no magic. The
    # whole head in one call, because oslo judges by what the first one brings.
    vmdk = format_inspector.VMDKInspector()
    try:
        vmdk.eat_chunk(head)
        if vmdk.format_match:
            found.add("vmdk")
    except Exception:  # noqa: BLE001, S110 - not a text in ASCII, so no descriptor either
        pass
    return found
