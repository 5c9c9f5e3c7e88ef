"""The images that qemu-img makes: which of them the tests of several modules look at."""

import os
import shutil

import pytest

needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None and not os.environ.get("CI"), reason="needs qemu-img"
)

VARIANTS = (
    ("qcow2", ""),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed"),
    ("vhdx", ""),
    ("vhdx", "block_size=1M"),
    ("vhdx", "subformat=fixed,block_size=1M"),
    ("vhdx", "subformat=fixed,block_size=8M"),
)
"""Formats, each with the options that change how it is laid out."""
