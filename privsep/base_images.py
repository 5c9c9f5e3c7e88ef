"""What the helper does to bases: refresh the stamp of their last use.

libvirt gives the files of a running domain, the base under an overlay
included, to the user of qemu and leaves the base with it. From then on only
`CAP_FOWNER` can set the base's times. Removing a base needs no privilege: the
directory is the agent's.
"""

import os
import re
import stat
from typing import Final

from oslo_config import cfg

from privsep import OPEN_DIRECTORY, base_owner

_BASE_NAME: Final = re.compile("[0-9a-f]{40}")


@base_owner.entrypoint
def touch(name: str) -> None:
    """Set access and modification time of base `name` to now.

    `name` is the file's name in the image cache, 40 lowercase hexadecimal
    digits; the directory comes from the helper's own configuration.

    Raises:
        TypeError: `name` is no string.
        ValueError: `name` is not the name of a base.
        FileNotFoundError: there is no such base, or no image cache.
        NotADirectoryError: the image cache is a symbolic link or no directory.
        PermissionError: what bears the name is no regular file, or the helper
            runs without `CAP_FOWNER` and the base is someone else's.
        OSError: the filesystem's own error, for example read-only.
        ConnectionError: there is no helper.
        oslo_privsep.comm.PrivsepTimeout: the helper did not answer in time.
    """
    if not _BASE_NAME.fullmatch(name):
        raise ValueError(f"not the name of a base (40 lowercase hex digits): {name!r}")
    directory = _open_cache()
    try:
        # Between the look and the touch the agent's user could put something
        # else under the name. It could only win the time "now" on an entry of
        # its own directory: neither call follows a link.
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            raise PermissionError(f"not a regular file: {name}")
        os.utime(name, dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(directory)


def _open_cache() -> int:
    """Open the directory of the image cache; the caller closes it.

    The two components opened here are those the service user could replace by
    a link: what is above them belongs to root, who may link as he pleases.
    """
    instances = os.open(cfg.CONF.instances_path, OPEN_DIRECTORY)
    try:
        return os.open(cfg.CONF.image_cache.subdirectory_name, OPEN_DIRECTORY, dir_fd=instances)
    finally:
        os.close(instances)
