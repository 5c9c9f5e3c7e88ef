"""Images cut off, and sources that send something else than they promise."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.corpus.case import CONTENT, MIB, Answer, By, Case, Sample, converted, honest_answer

_FORMATS: Final = (
    ("qcow2", "qcow2", ""),
    ("vmdk", "vmdk", "subformat=monolithicSparse"),
    ("vmdk", "vmdk", "subformat=streamOptimized"),
    ("vhd", "vpc", ""),
    ("vhdx", "vhdx", "block_size=1M"),
    ("vdi", "vdi", ""),
)
# Of these the first bytes, or the last, tell how much there should be; of the
# others the tables do, when all has come.
_TELLING: Final = ("vhd", "vdi")
# What stands at their end may be padding behind the disk's last byte.
_PADDED: Final = ("qcow2", "vmdk", "vhdx")


def cases() -> Iterator[Case]:
    yield from _truncated_on_the_way()
    yield from _truncated_before_upload()
    yield from _broken_promises()


def _cut(part: float) -> Answer:
    """A source that never sends more than that part of the image."""

    def answer(data: bytes, offset: int) -> Iterator[bytes]:
        yield data[offset : int(len(data) * part)]

    return answer


def _truncated_on_the_way() -> Iterator[Case]:
    for claim, qemu_format, options in _FORMATS:
        variant = f"{claim} {options}".strip()
        for name, part in (("header", 0.00003), ("half", 0.5), ("last byte", 1 - 1e-7)):

            def make(
                work: Path,
                qemu_format: str = qemu_format,
                options: str = options,
                part: float = part,
            ) -> Sample:
                return Sample(data=converted(work, qemu_format, options), answers=(_cut(part),))

            yield Case(
                number=53,
                name=f"{variant} cut at the {name} on the way",
                disk_format=claim,
                make=make,
                refused="ended the transfer after byte",
                by=By.CACHE,
            )


def _truncated_before_upload() -> Iterator[Case]:
    """Length and hash of the record are those of what is left."""
    for claim, qemu_format, options in _FORMATS:
        variant = f"{claim} {options}".strip()
        for name, part in (
            ("60 bytes", 0.00002),
            ("2 %", 0.02),
            ("half", 0.5),
            ("90 %", 0.9),
            ("all but the last byte", 1 - 1e-7),
        ):
            if part > 0.9 and claim in _PADDED:
                continue

            def make(
                work: Path,
                qemu_format: str = qemu_format,
                options: str = options,
                part: float = part,
            ) -> Sample:
                data = converted(work, qemu_format, options)
                return Sample(data=data[: int(len(data) * part)])

            yield Case(
                number=53,
                name=f"{variant} of which {name} were uploaded",
                disk_format=claim,
                make=make,
                refused="cut short|beyond the|not (with)?into? the file|bytes are raw",
                by=By.INSPECTION if claim in _TELLING or part < 0.01 else By.CACHE,
            )


def _broken_promises() -> Iterator[Case]:
    def longer(data: bytes, offset: int) -> Iterator[bytes]:
        yield from honest_answer(data, offset)
        yield b"more"

    def endless(data: bytes, offset: int) -> Iterator[bytes]:
        yield from honest_answer(data, offset)
        yield from itertools.repeat(bytes(MIB))

    def changed(data: bytes, offset: int) -> Iterator[bytes]:
        yield from honest_answer(bytes(byte ^ 0xFF for byte in data), offset)

    def case(
        number: int,
        name: str,
        make: Callable[[], Sample],
        refused: str | None,
        *,
        hash_known: bool = True,
        size_known: bool = True,
    ) -> Case:
        return Case(
            number=number,
            name=name,
            disk_format="raw",
            make=lambda _: make(),
            refused=refused,
            by=By.CACHE,
            hash_known=hash_known,
            size_known=size_known,
        )

    too_long = f"more than the {len(CONTENT)} bytes|longer|{len(CONTENT)}"
    promised = "promised is"
    sha512 = hashlib.sha512(CONTENT).hexdigest()
    yield case(54, "longer", lambda: Sample(data=CONTENT, answers=(longer,)), too_long)
    yield case(
        54, "shorter", lambda: Sample(data=CONTENT, size=len(CONTENT) + 1), f"{len(CONTENT) + 1}"
    )
    wrong = ("sha512", "0" * 128)
    yield case(55, "wrong hash", lambda: Sample(data=CONTENT, digest=wrong), promised)
    yield case(
        55,
        "right hash, wrong size",
        lambda: Sample(data=CONTENT, size=len(CONTENT) - 1, digest=("sha512", sha512)),
        f"{len(CONTENT) - 1}",
    )
    md5 = ("md5", hashlib.md5(CONTENT, usedforsecurity=False).hexdigest())
    yield case(55, "md5 only", lambda: Sample(data=CONTENT, digest=md5), None)
    yield case(55, "no hash", lambda: Sample(data=CONTENT), "has no hash", hash_known=False)
    yield case(
        56,
        "changed between two requests",
        lambda: Sample(data=CONTENT, answers=(_cut(0.5), changed)),
        promised,
    )
    yield case(
        56,
        "changed for one request only",
        lambda: Sample(data=CONTENT, answers=(_cut(0.5), changed, honest_answer)),
        None,
    )
    yield case(
        58,
        "cut, of unknown length",
        lambda: Sample(data=CONTENT, answers=(_cut(0.5),)),
        promised,
        size_known=False,
    )
    yield case(60, "endless", lambda: Sample(data=CONTENT, answers=(endless,)), too_long)
    yield Case(
        number=60,
        name="endless, of unknown length",
        disk_format="raw",
        make=lambda _: Sample(data=CONTENT, answers=(endless,)),
        refused=f"the flavor's disk only {64 * MIB}",
        by=By.CACHE,
        max_virtual_size=64 * MIB,
        size_known=False,
    )
    yield Case(
        number=60,
        name="endless qcow2 of unknown length",
        disk_format="qcow2",
        make=lambda work: Sample(data=converted(work, "qcow2"), answers=(endless,)),
        refused="goes on after .* bytes, more than any image of",
        by=By.CACHE,
        size_known=False,
    )
