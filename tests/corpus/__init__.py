"""Images to be afraid of, and odd ones to be kind to; each with its verdict.

`CASES` are images as bytes: references to the outside, bytes that are not what
their record says, absurd sizes, damaged tables, cut-off files, and sources
that do not send what they promise. `names` has what is wrong with names.
The numbers group the variants of one idea.

Numbers that are missing are not about bytes or names: 57 and 59 are answers
of an HTTP server (tests/test_transfer.py, tests/test_glance.py), and 61 to 64
are what guests write to their disks (tests/test_guest_written.py).
"""

from tests.corpus import other_formats, plain_disks, qcow2_images, transport, vmdk_images
from tests.corpus.case import By, Case, Sample

__all__ = ["CASES", "By", "Case", "Sample"]

CASES = tuple(
    sorted(
        (
            *qcow2_images.cases(),
            *vmdk_images.cases(),
            *other_formats.cases(),
            *plain_disks.cases(),
            *transport.cases(),
        ),
        key=lambda case: case.number,
    )
)
