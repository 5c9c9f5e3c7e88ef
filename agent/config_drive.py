"""The config drive: what the guest is told about itself, as a small read-only disk.

Two layouts, after cloud-init's data sources:

    openstack    volume `config-2`, JSON below openstack/latest; cloudbase-init reads it too
    nocloud      volume `cidata`, YAML in the root

and two file systems: ISO 9660, and FAT for guests that have no driver for that.
"""

import functools
import io
import json
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, assert_never

import pycdlib
import yaml

from agent import process
from agent.backends import Write
from agent.cancellation import Cancellation
from agent.confinement import Confinement
from agent.errors import BackendError
from agent.job import ConfigDriveFormat, Datasource, Network

_LABELS: Final = {Datasource.OPENSTACK: "config-2", Datasource.NOCLOUD: "cidata"}
_LATEST: Final = "openstack/latest"

# What mkisofs adds as well. Whoever looks for labels reads where other file systems
# have theirs, and busybox takes a disk that ends before that for a broken one.
_ISO_PADDING: Final = 150 * 2048

# Nova's size. User data has at most 64 KiB; FAT32 would need more than this.
_VFAT_SIZE: Final = 64 << 20
_VFAT_LIMIT_S: Final = 60.0
_VFAT_LIMITS: Final = process.Limits(cpu_s=60, address_space=1 << 30, file_size=_VFAT_SIZE)


class ConfigDrive:
    """One instance's; the same files for the same arguments, so that it may be made again.

    Only the dates in it are those of its making: pycdlib and mtools take the time themselves.
    """

    def __init__(
        self,
        *,
        datasource: Datasource,
        instance_uuid: str,
        name: str,
        metadata: Mapping[str, str],
        user_data: str | None,
        networks: Sequence[Network] | None,
    ) -> None:
        """`networks` have their MAC addresses.

        None if nobody knows what cards there will be; then there is no network document: to
        cloud-init an empty one means to configure nothing, a missing one to try DHCP on
        whatever there is.
        """
        self._datasource = datasource
        self._uuid = instance_uuid
        self._name = name
        self._metadata = dict(metadata)
        self._user_data = user_data
        self._networks = networks

    @functools.cached_property
    def files(self) -> Mapping[str, bytes]:
        """The content of each file, by its path."""
        match self._datasource:
            case Datasource.OPENSTACK:
                return self._openstack()
            case Datasource.NOCLOUD:
                return self._nocloud()
            case _:
                assert_never(self._datasource)

    def _openstack(self) -> dict[str, bytes]:
        documents: dict[str, object] = {
            "meta_data.json": {
                "uuid": self._uuid,
                "name": self._name,
                "hostname": self._name,
                "launch_index": 0,
                "meta": self._metadata,
            },
            "vendor_data.json": {},
        }
        if self._networks is not None:
            documents["network_data.json"] = _network_data(self._networks)
        found = {
            f"{_LATEST}/{name}": json.dumps(document, sort_keys=True).encode()
            for name, document in documents.items()
        }
        if self._user_data is not None:
            found[f"{_LATEST}/user_data"] = self._user_data.encode()
        return found

    def _nocloud(self) -> dict[str, bytes]:
        documents: dict[str, object] = {
            "meta-data": {
                "instance-id": self._uuid,
                "local-hostname": self._name,
                **({"meta": self._metadata} if self._metadata else {}),
            },
        }
        if self._networks is not None:
            documents["network-config"] = _network_config(self._networks)
        found = {
            name: yaml.safe_dump(document, allow_unicode=True).encode()
            for name, document in documents.items()
        }
        # Both have to be there, or cloud-init takes it for no seed at all.
        found["user-data"] = (self._user_data or "").encode()
        return found

    def size(self, format_: ConfigDriveFormat) -> int:
        """Return the bytes of the disk it makes."""
        match format_:
            case ConfigDriveFormat.ISO9660:
                return len(self._iso9660())
            case ConfigDriveFormat.VFAT:
                return _VFAT_SIZE
            case _:
                assert_never(format_)

    def writing(self, format_: ConfigDriveFormat, cancellation: Cancellation) -> Write:
        """Return what writes it.

        What is returned raises:
            BackendError: a program is missing or failed.
            BootwrightError: the reason of the cancellation.
        """
        match format_:
            case ConfigDriveFormat.ISO9660:
                return lambda fd: _write_all(fd, self._iso9660())
            case ConfigDriveFormat.VFAT:
                return lambda fd: self._vfat(fd, cancellation)
            case _:
                assert_never(format_)

    def _iso9660(self) -> bytes:
        # Level 3 allows names longer than 8.3; Linux reads the Rock Ridge names,
        # Windows the Joliet ones.
        iso = pycdlib.PyCdlib()
        iso.new(
            interchange_level=3, vol_ident=_LABELS[self._datasource], rock_ridge="1.09", joliet=3
        )
        for directory in _directories(self.files):
            iso.add_directory(
                f"/{directory}".upper(), rr_name=directory.name, joliet_path=f"/{directory}"
            )
        for path, data in sorted(self.files.items()):
            iso.add_fp(
                io.BytesIO(data),
                len(data),
                _iso_name(path),
                rr_name=PurePosixPath(path).name,
                joliet_path=f"/{path}",
            )
        written = io.BytesIO()
        iso.write_fp(written)
        iso.close()
        return written.getvalue() + bytes(_ISO_PADDING)

    def _vfat(self, fd: int, cancellation: Cancellation) -> None:
        image = f"/proc/self/fd/{fd}"
        volume = f"{uuid.UUID(self._uuid).fields[0]:08x}"
        with tempfile.TemporaryDirectory(prefix="bootwright-config-drive-") as name:
            for path, data in self.files.items():
                target = Path(name, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            tops = sorted({Path(name, PurePosixPath(path).parts[0]) for path in self.files})
            commands: tuple[list[str | Path], ...] = (
                ["mkfs.vfat", "-n", _LABELS[self._datasource], "-i", volume, image],
                ["mcopy", "-s", "-i", image, *tops, "::/"],
            )
            for argv in commands:
                try:
                    process.run(
                        argv,
                        timeout_s=_VFAT_LIMIT_S,
                        cancellation=cancellation,
                        pass_fds=(fd,),
                        limits=_VFAT_LIMITS,
                        confinement=Confinement(readable=(Path(name),), writable=(Path(image),)),
                    )
                except process.ProgramFailed as e:
                    raise BackendError(f"making the config drive: {e}") from e


def _network_data(networks: Sequence[Network]) -> dict[str, object]:
    links = []
    addresses = []
    for place, network in enumerate(networks):
        link = f"nic{place}"
        links.append({"id": link, "type": "phy", "ethernet_mac_address": network.mac})
        addresses.append({"id": f"network{place}", "type": "ipv4_dhcp", "link": link})
    return {"links": links, "networks": addresses, "services": []}


def _network_config(networks: Sequence[Network]) -> dict[str, object]:
    return {
        "version": 2,
        "ethernets": {
            f"nic{place}": {"match": {"macaddress": network.mac}, "dhcp4": True}
            for place, network in enumerate(networks)
        },
    }


def _directories(files: Mapping[str, bytes]) -> list[PurePosixPath]:
    """Every directory that `files` lie in, outer ones first."""
    found = {parent for path in files for parent in PurePosixPath(path).parents if parent.name}
    return sorted(found, key=lambda directory: len(directory.parts))


def _iso_name(path: str) -> str:
    # The plain names have no hyphen, and end with a version; one without a dot gets one.
    return f"/{path}".upper().replace("-", "_") + (";1" if "." in path else ".;1")


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
