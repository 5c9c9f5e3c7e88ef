"""What the helper does to console logs: let the agent read those that are root's.

virtlogd writes what a guest says on its serial port. When a log has grown to
virtlogd's `max_size` it is renamed, and the next one is root's, readable by
nobody else. That one gets an entry in its access control list, for the user of
the helper, to read.
"""

import os
import re
import stat
import struct
from typing import Final

from oslo_config import cfg

from privsep import OPEN_DIRECTORY, base_owner

_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LOG: Final = re.compile(r"console\.log(\.[0-9]{1,3})?")
_ACL: Final = "system.posix_acl_access"


@base_owner.entrypoint
def reveal(instance: str) -> None:
    """Let the helper's own user read the console logs of an instance that belong to root.

    `instance` is its uuid; the directory comes from the helper's own configuration.

    Raises:
        TypeError: `instance` is no string.
        ValueError: `instance` is not a uuid as we write them.
        FileNotFoundError: there is no such instance.
        NotADirectoryError: what bears its name is a symbolic link or no directory.
        PermissionError: the helper runs without `CAP_FOWNER`.
        OSError: the filesystem's own error; it may have no access control lists.
        ConnectionError: there is no helper.
        oslo_privsep.comm.PrivsepTimeout: the helper did not answer in time.
    """
    if not _UUID.fullmatch(instance):
        raise ValueError(f"not the uuid of an instance: {instance!r}")
    instances = os.open(cfg.CONF.instances_path, OPEN_DIRECTORY)
    try:
        directory = os.open(
            instance, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=instances
        )
    finally:
        os.close(instances)
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - of a descriptor
            if _LOG.fullmatch(name):
                _reveal(name, directory)
    finally:
        os.close(directory)


def _reveal(name: str, directory: int) -> None:
    # Held open, so that it is the same file that is looked at and changed.
    file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        status = os.fstat(file)
        # A file with another name elsewhere may be anything, such as /etc/shadow where
        # fs.protected_hardlinks is off. virtlogd's have this one name and no rights for others.
        if (
            stat.S_ISREG(status.st_mode)
            and status.st_uid == 0
            and status.st_nlink == 1
            and stat.S_IMODE(status.st_mode) == stat.S_IRUSR | stat.S_IWUSR
        ):
            os.setxattr(f"/proc/self/fd/{file}", _ACL, _readable_by(os.geteuid()))
    finally:
        os.close(file)


def _readable_by(user: int) -> bytes:
    """The list that gives read to one user beside the owner, as acl(5) and the kernel have it."""
    nobody = 0xFFFFFFFF
    entries = (
        (0x01, 6, nobody),  # the owner: rw
        (0x02, 4, user),
        (0x04, 0, nobody),  # the group
        (0x10, 4, nobody),  # what users and groups may have at most
        (0x20, 0, nobody),  # others
    )
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
