"""Images to be afraid of, and odd ones to be kind to; each with its verdict.

`CASES` are images as bytes: references to the outside, bytes that are not what
their record says, absurd sizes, damaged tables, cut-off files, and sources
that do not send what they promise. `names` has what is wrong with names.
The numbers group the variants of one idea.

`VERDICTS` says of every number what has been decided, and `ELSEWHERE` where
those are that are not about the bytes of an image: answers of an HTTP server,
what guests write to their disks, and names.
"""

from typing import Final

from tests.corpus import other_formats, plain_disks, qcow2_images, transport, vmdk_images
from tests.corpus.case import By, Case, Sample

__all__ = ["CASES", "ELSEWHERE", "VERDICTS", "By", "Case", "Sample"]

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

ACCEPTED: Final = {True}
REFUSED: Final = {False}
EITHER: Final = {True, False}

VERDICTS: Final = {
    **dict.fromkeys(range(1, 6), REFUSED),
    6: ACCEPTED,  # a backing format of nothing is nothing
    **dict.fromkeys(range(7, 26), REFUSED),
    26: ACCEPTED,
    27: REFUSED,
    **dict.fromkeys(range(28, 31), ACCEPTED),
    **dict.fromkeys(range(31, 36), REFUSED),  # luks: there is nobody who has the key
    36: ACCEPTED,
    **dict.fromkeys(range(37, 42), REFUSED),
    42: EITHER,  # up to the flavor's size, and one sector beyond
    43: EITHER,  # dirty is what a crash leaves, and harmless
    **dict.fromkeys((44, 45), REFUSED),
    46: EITHER,  # unknown extensions are to be ignored
    **dict.fromkeys((47, 48, 49), REFUSED),
    50: ACCEPTED,  # a guest without a boot sector, and nothing worse
    51: REFUSED,
    52: EITHER,  # raw may be of any length but 0
    **dict.fromkeys((53, 54), REFUSED),
    55: EITHER,  # md5 alone is a hash
    56: EITHER,  # what was wrong once is fetched once more
    **dict.fromkeys((58, 60), REFUSED),
}
"""Whether the cases of a number are accepted."""

ELSEWHERE: Final = {
    55: ("test_glance.py::test_digest_is_the_best_that_can_be_checked",),
    57: (
        "test_transfer.py::test_source_without_ranges_sends_the_beginning_again",
        "test_transfer.py::test_range_from_the_wrong_byte_is_not_believed",
        "test_transfer.py::test_range_that_begins_too_early_is_used",
        "test_transfer.py::test_image_of_another_size_is_corrupt_at_the_first_range",
        "test_glance.py::test_answer_in_place_of_bytes",
    ),
    58: (
        "test_transfer.py::test_unknown_size_is_resumed_too",
        "test_transfer.py::test_every_fault_in_one_transfer",
    ),
    59: (
        "test_glance.py::test_redirect_to_another_host_or_away_from_http_is_not_followed",
        "test_glance.py::test_redirect_to_http_is_followed_and_a_circle_is_not",
    ),
    60: (
        "test_transfer.py::test_source_that_only_trickles_is_given_up",
        "test_transfer.py::test_trickle_of_bytes_that_are_there_already_is_given_up_too",
        "test_transfer.py::test_stalled_read_ends_at_the_deadline_and_says_what_it_waited_for",
    ),
    61: ("test_guest_written.py::test_a_header_written_by_a_guest_is_only_content",),
    62: ("test_guest_written.py::test_a_header_written_by_a_guest_is_only_content",),
    63: ("test_guest_written.py::test_a_header_written_by_a_guest_is_only_content",),
    64: (
        "test_guest_written.py::test_a_link_at_the_disks_place_is_not_followed",
        "test_guest_written.py::test_a_link_where_the_cache_writes_is_not_followed",
        "test_locks.py::test_a_link_in_the_place_of_the_lock_is_refused",
    ),
    65: ("test_names.py::test_a_hostile_image_id_is_refused_at_the_door",),
    66: ("test_names.py::test_no_image_gets_the_base_of_another",),
    67: ("test_names.py::test_a_hostile_flavor_is_refused_at_the_door",),
}
"""Tests of what is no image, below tests/."""
