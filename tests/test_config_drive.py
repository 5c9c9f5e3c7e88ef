"""The config drive, read back with blkid and xorriso."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from agent.cancellation import Cancellation
from agent.config_drive import ConfigDrive
from agent.job import ConfigDriveFormat, Datasource, Network

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"
NETWORKS = (Network(network="default", mac="52:54:00:12:34:56"),)
ISO, VFAT = ConfigDriveFormat.ISO9660, ConfigDriveFormat.VFAT


def drive(
    user_data: str | None = "#!/bin/sh\necho ü\n",
    networks: tuple[Network, ...] | None = NETWORKS,
    datasource: Datasource = Datasource.OPENSTACK,
) -> ConfigDrive:
    return ConfigDrive(
        datasource=datasource,
        instance_uuid=UUID,
        name="web-1",
        metadata={"role": "blue ☃"},
        user_data=user_data,
        networks=networks,
    )


def written(config_drive: ConfigDrive, directory: Path, format_: ConfigDriveFormat = ISO) -> Path:
    path = directory / "disk.config"
    with path.open("wb") as file:
        file.truncate(config_drive.size(format_))
        config_drive.writing(format_, Cancellation())(file.fileno())
    assert path.stat().st_size == config_drive.size(format_)
    return path


def extracted(path: Path, into: Path, *options: str) -> dict[str, bytes]:
    command = ["xorriso", *options, "-osirrox", "on", "-indev", str(path)]
    subprocess.run([*command, "-extract", "/", str(into)], capture_output=True, check=True)
    return {
        str(file.relative_to(into)): file.read_bytes() for file in into.rglob("*") if file.is_file()
    }


def copied_from_fat(path: Path, into: Path) -> dict[str, bytes]:
    into.mkdir()
    subprocess.run(["mcopy", "-s", "-n", "-i", path, "::/*", into], check=True)
    return {
        str(file.relative_to(into)): file.read_bytes() for file in into.rglob("*") if file.is_file()
    }


def read(path: Path, into: Path, way: str) -> dict[str, bytes]:
    match way:
        case "rockridge":
            return extracted(path, into)
        case "joliet":
            return extracted(path, into, "-read_fs", "norock")
        case _:
            return copied_from_fat(path, into)


def probed(path: Path) -> str:
    return subprocess.run(
        ["blkid", "-p", "-o", "export", path], capture_output=True, text=True, check=True
    ).stdout


WAYS = [("rockridge", ISO), ("joliet", ISO), ("fat", VFAT)]


@pytest.mark.parametrize(("way", "format_"), WAYS)
def test_guest_finds_the_documents(way: str, format_: ConfigDriveFormat, tmp_path: Path) -> None:
    found = read(written(drive(), tmp_path, format_), tmp_path / "read", way)
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


@pytest.mark.parametrize(("way", "format_"), WAYS)
def test_guest_finds_a_nocloud_seed(way: str, format_: ConfigDriveFormat, tmp_path: Path) -> None:
    path = written(drive(datasource=Datasource.NOCLOUD), tmp_path, format_)
    assert "LABEL=cidata\n" in probed(path)
    found = read(path, tmp_path / "read", way)
    assert yaml.safe_load(found["meta-data"]) == {
        "instance-id": UUID,
        "local-hostname": "web-1",
        "meta": {"role": "blue ☃"},
    }
    assert found["user-data"].decode() == "#!/bin/sh\necho ü\n"
    assert yaml.safe_load(found["network-config"])["ethernets"]["nic0"] == {
        "match": {"macaddress": "52:54:00:12:34:56"},
        "dhcp4": True,
    }
    assert len(found) == 3


def test_nocloud_seed_has_user_data_even_if_nobody_gave_any() -> None:
    seed = drive(user_data=None, networks=None, datasource=Datasource.NOCLOUD)
    assert seed.files["user-data"] == b""
    assert sorted(seed.files) == ["meta-data", "user-data"]


@pytest.mark.parametrize(("format_", "type_"), [(ISO, "iso9660"), (VFAT, "vfat")])
def test_guest_finds_the_drive_by_its_label(
    format_: ConfigDriveFormat, type_: str, tmp_path: Path
) -> None:
    output = probed(written(drive(), tmp_path, format_))
    assert "LABEL=config-2\n" in output
    assert f"TYPE={type_}\n" in output


def test_what_is_not_given_is_not_there() -> None:
    assert sorted(drive(user_data=None, networks=None).files) == [
        "openstack/latest/meta_data.json",
        "openstack/latest/vendor_data.json",
    ]


def test_guest_without_cards_is_told_so() -> None:
    files = drive(networks=()).files
    assert json.loads(files["openstack/latest/network_data.json"]) == {
        "links": [],
        "networks": [],
        "services": [],
    }
    seed = drive(networks=(), datasource=Datasource.NOCLOUD).files
    assert yaml.safe_load(seed["network-config"]) == {"version": 2, "ethernets": {}}


def test_content_and_size_are_the_same_each_time() -> None:
    assert drive().files == drive().files
    assert len({drive().size(ISO) for _ in range(3)}) == 1


@pytest.mark.parametrize(("way", "format_"), WAYS)
def test_largest_user_data_fits(way: str, format_: ConfigDriveFormat, tmp_path: Path) -> None:
    path = written(drive(user_data="x" * 65535), tmp_path, format_)
    assert len(read(path, tmp_path / "read", way)["openstack/latest/user_data"]) == 65535
