"""Names that would like to be paths, options, or somebody else's."""

from typing import Any, Final

IMAGE_IDS: Final = {
    # 65: what the record's id may not be
    "slash": "a/b",
    "path": "/etc/passwd",
    "parent": "..",
    "parents": "../../etc/passwd",
    "hidden": ".partial",
    "NUL": "a\0b",
    "line": "a\nb",
    "trailing line": "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0\n",
    "option": "--output=json",
    "protocol": "nbd:localhost:10809",
    "json": 'json:{"driver":"file"}',
    "4 KiB": "a" * 4096,
    "homoglyph": "fd0cb2f1-8375-44c9-b1f4-3\u04351f4c4a8ef0",  # a Cyrillic e
    "full width": "\uff41bc",
    "nothing": "",
    "space": "a b",
}

FOREIGN_IDS: Final = (
    # 66: what other files in an image directory of Nova's are called
    "swap_1",
    "ephemeral_1_abcdefg",
    "0d5e6b61602d758984b3bf038267614d6016eb2a_10",
    "0d5e6b61602d758984b3bf038267614d6016eb2a",
    "0d5e6b61602d758984b3bf038267614d6016eb2a.json",
)

FLAVORS: Final[dict[str, dict[str, Any]]] = {
    # 67: sizes and formats of the disks that are made here
    "format with a command": {"ephemeral": [{"size": 1, "guest_format": "ext4; rm -rf /"}]},
    "format with an option": {"ephemeral": [{"size": 1, "guest_format": "-F"}]},
    "format with a path": {"ephemeral": [{"size": 1, "guest_format": "../mkfs"}]},
    "ephemeral of 0": {"ephemeral": [{"size": 0}]},
    "ephemeral of -1": {"ephemeral": [{"size": -1}]},
    "ephemeral of 2^62": {"ephemeral": [{"size": 1 << 62}]},
    "swap of -1": {"swap": -1},
    "swap of 2^62": {"swap": 1 << 62},
    "disk of -1": {"disk": -1},
    "limit of 2^62": {"extra_specs": {"quota:disk_read_iops_sec": 1 << 62}},
}
