"""The config drive, read back with blkid and xorriso."""

import json
import subprocess
from pathlib import Path

import pytest

from agent.config_drive import content, image
from agent.job import Network

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
NETWORKS = (Network(network="default", mac="52:54:00:12:34:56"),)


def drive_content(
    user_data: str | None = "#!/bin/sh\necho ü\n", networks: tuple[Network, ...] = NETWORKS
) -> dict[str, bytes]:
    return content(
        instance_uuid=UUID,
        name="web-1",
        metadata={"role": "blue ☃"},
        user_data=user_data,
        networks=networks,
    )


def extracted(path: Path, into: Path, *options: str) -> dict[str, bytes]:
    command = ["xorriso", *options, "-osirrox", "on", "-indev", str(path)]
    subprocess.run([*command, "-extract", "/", str(into)], capture_output=True, check=True)
    return {
        str(file.relative_to(into)): file.read_bytes() for file in into.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("names", ["rockridge", "joliet"])
def test_guest_finds_the_documents(names: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.config"
    path.write_bytes(image(drive_content()))
    options = ("-read_fs", "norock") if names == "joliet" else ()
    found = extracted(path, tmp_path / "read", *options)
    latest = "openstack/latest"
    assert json.loads(found[f"{latest}/meta_data.json"]) == {
        "uuid": UUID,
        "name": "web-1",
        "hostname": "web-1",
        "launch_index": 0,
        "meta": {"role": "blue ☃"},
    }
    assert json.loads(found[f"{latest}/vendor_data.json"]) == {}
    assert found[f"{latest}/user_data"].decode() == "#!/bin/sh\necho ü\n"
    network = json.loads(found[f"{latest}/network_data.json"])
    assert network["links"][0]["ethernet_mac_address"] == "52:54:00:12:34:56"
    assert network["networks"][0]["link"] == network["links"][0]["id"]
    assert len(found) == 4


def test_guest_finds_the_drive_by_its_label(tmp_path: Path) -> None:
    path = tmp_path / "disk.config"
    path.write_bytes(image(drive_content()))
    output = subprocess.run(
        ["blkid", "-p", "-o", "export", path], capture_output=True, text=True, check=True
    ).stdout
    assert "LABEL=config-2\n" in output
    assert "TYPE=iso9660\n" in output


def test_what_is_not_given_is_not_there() -> None:
    assert sorted(drive_content(user_data=None, networks=())) == [
        "meta_data.json",
        "vendor_data.json",
    ]


def test_content_is_the_same_each_time() -> None:
    assert drive_content() == drive_content()


def test_size_is_known_before_it_is_made() -> None:
    assert len({len(image(drive_content())) for _ in range(3)}) == 1


def test_largest_user_data_fits(tmp_path: Path) -> None:
    path = tmp_path / "disk.config"
    path.write_bytes(image(drive_content(user_data="x" * 65535)))
    assert len(extracted(path, tmp_path / "read")["openstack/latest/user_data"]) == 65535
