"""The config drive: what the guest is told about itself, as a small ISO 9660 disk.

The layout is OpenStack's, which cloud-init and cloudbase-init read: a volume
labelled `config-2` with JSON documents below `openstack/latest`.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Final

import pycdlib

from agent.job import Network

_LABEL: Final = "config-2"
_DIRECTORY: Final = ("openstack", "latest")


def content(
    *,
    instance_uuid: str,
    name: str,
    metadata: Mapping[str, str],
    user_data: str | None,
    networks: Sequence[Network],
) -> dict[str, bytes]:
    """Return the files of `openstack/latest` by name; the same for the same arguments.

    Args:
        networks: with their MAC addresses. Without any there is no
            `network_data.json`: to cloud-init an empty one means to configure
            nothing, a missing one to try DHCP on whatever there is.
    """
    documents: dict[str, object] = {
        "meta_data.json": {
            "uuid": instance_uuid,
            "name": name,
            "hostname": name,
            "launch_index": 0,
            "meta": dict(metadata),
        },
        "vendor_data.json": {},
    }
    if networks:
        documents["network_data.json"] = _network_data(networks)
    found = {key: json.dumps(value, sort_keys=True).encode() for key, value in documents.items()}
    if user_data is not None:
        found["user_data"] = user_data.encode()
    return found


def _network_data(networks: Sequence[Network]) -> dict[str, object]:
    links = []
    addresses = []
    for place, network in enumerate(networks):
        link = f"nic{place}"
        links.append({"id": link, "type": "phy", "ethernet_mac_address": network.mac})
        addresses.append({"id": f"network{place}", "type": "ipv4_dhcp", "link": link})
    return {"links": links, "networks": addresses, "services": []}


def image(files: Mapping[str, bytes]) -> bytes:
    """Return the config drive with these files below `openstack/latest`."""
    # Level 3 allows names longer than 8.3; Linux reads the Rock Ridge names,
    # Windows the Joliet ones.
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident=_LABEL, rock_ridge="1.09", joliet=3)
    parent = ""
    for part in _DIRECTORY:
        parent = f"{parent}/{part}"
        iso.add_directory(parent.upper(), rr_name=part, joliet_path=parent)
    for name, data in sorted(files.items()):
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            # The plain names end with a version; one without a dot gets one.
            f"{parent}/{name}".upper() + (";1" if "." in name else ".;1"),
            rr_name=name,
            joliet_path=f"{parent}/{name}",
        )
    written = io.BytesIO()
    iso.write_fp(written)
    iso.close()
    return written.getvalue()
