"""What values of options may be, beyond what their types say."""

import grp
import ipaddress
from typing import Final

from oslo_config import cfg, types

from agent import options

_EXTENDED_L2_KIB: Final = 16

_LONGEST_SOCKET_PATH: Final = 107
"""Bytes, without the final NUL: unix(7)."""


def rule(opt: cfg.Opt) -> str | None:
    """Return what a value has to be, if the option's type says it completely."""
    match opt.type:
        case types.Boolean():
            found = "must be true or false"
        case types.Integer(min=int(low), max=int(high)):
            found = f"must be a whole number from {low} to {high}"
        case types.Float(min=float(low), max=float(high)):
            found = f"must be a number from {plain(low)} to {plain(high)}"
        case types.String(choices=choices) if choices:
            found = f"must be one of {', '.join(map(str, choices))}"
        case types.String(regex=regex) if regex is not None:
            found = f"does not fit. {opt.help}"
        case types.List():
            found = f"does not fit. {opt.help}"
        case _:
            return None
    return found


def plain(number: float) -> str:
    """Return a bound as people write it: whole or not, never rounded, never `1e+09`."""
    return f"{int(number)}" if number == int(number) else f"{number}"


def problem(conf: cfg.ConfigOpts, section: str, name: str, value: object) -> str | None:
    """Return what is wrong with a value of the right type, None if nothing is."""
    found: str | None = None
    match (section, name, value):
        case ("api", "socket", str(path)) if len(path.encode()) > _LONGEST_SOCKET_PATH:
            length = len(path.encode())
            found = f"is {length} bytes long, the kernel takes {_LONGEST_SOCKET_PATH}"
        case ("api", "socket_group", str(group)) if not _group_exists(group):
            found = "there is no such group on this host"
        case ("api", "metrics_listen", str(listen)):
            found = _address_problem(listen)
        case (_, "user" | "group", str()) if section in options.PRIVSEP_SECTIONS:
            if not conf[section].helper_command:
                found = (
                    "is for a helper that helper_command starts: set helper_command as well, "
                    "or remove this"
                )
        case ("glance", "verify_glance_signatures", True):
            found = _certificates_problem(conf)
        case ("libvirt", "qcow2_cluster_size", int(kib)) if kib & (kib - 1):
            found = "is no power of two"
        case ("libvirt", "qcow2_extended_l2", True) if (
            conf.libvirt.qcow2_cluster_size < _EXTENDED_L2_KIB
        ):
            found = f"needs a qcow2_cluster_size of {_EXTENDED_L2_KIB} or more"
        case ("DEFAULT", "force_raw_images", False):
            found = "this release keeps every base as raw: only true is possible"
        case _:
            found = _volume_problem(conf, section, name, value)
    return found


def _volume_problem(conf: cfg.ConfigOpts, section: str, name: str, value: object) -> str | None:
    libvirt = conf.libvirt
    found: str | None = None
    match (section, name, value):
        case ("libvirt", "images_type", "lvm"):
            if libvirt.images_volume_group is None:
                found = "needs images_volume_group"
        case ("libvirt", "sparse_logical_volumes", True):
            if libvirt.images_thin_pool is None:
                found = "needs images_thin_pool: sparse volumes are those of a thin pool"
        case ("libvirt", "images_thin_pool", str()):
            if libvirt.images_volume_group is None:
                found = "needs images_volume_group, in which it is"
        case ("ephemeral_storage_encryption", "enabled", True):
            if libvirt.images_type != "lvm":
                found = "needs images_type = lvm in [libvirt]: no other kind is encrypted"
        case ("ephemeral_storage_encryption", "key_size", int(bits)) if bits % 8:
            found = "must be a multiple of 8"
        case _:
            pass
    return found


def _certificates_problem(conf: cfg.ConfigOpts) -> str | None:
    barbican = conf.key_manager.backend == "barbican"
    if conf.glance.certificate_source == "directory" or not barbican:
        return None
    glance = conf.images.source == "glance" and conf.glance.auth_type != "none"
    if glance or conf.key_manager.auth_type:
        return None
    return (
        "Barbican, which has the certificates, would be asked without credentials: set "
        "certificate_source = directory and certificate_directory, or auth_type in "
        "[key_manager]"
    )


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _address_problem(listen: str) -> str | None:
    host, _, port = listen.rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError as e:
        return str(e)
    return None if 0 < int(port) <= 65535 else "must have a port from 1 to 65535"
