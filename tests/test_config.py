"""The configuration: what is read, what is warned of, what stops the start."""

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from oslo_config import cfg, types

from agent import config, config_files, config_values
from agent.config import ConfigError, Configuration
from agent.config_files import api_socket
from agent.disk import DiskType
from agent.job import GuestFormat, ImagesType
from agent.settings import (
    CopySettings,
    EncryptionSettings,
    ImageSourceName,
    KeyManager,
    Settings,
    VolumeSettings,
)

Write = Callable[..., str]

LOCAL = "[images]\nsource = directory\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "bootwright.conf") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def read(*files: str, directories: tuple[str, ...] = ()) -> Configuration:
    return Configuration(files, directories, conf=cfg.ConfigOpts())


def settings(*files: str) -> Settings:
    return read(*files).settings()


def problem(text: str, write: Write) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(write(text))
    (only,) = caught.value.problems
    return only


def test_defaults(write: Write) -> None:
    found = settings(write(LOCAL))
    assert found.instances_path == Path("/var/lib/bootwright/instances")
    assert found.image_cache.directory == Path("/var/lib/bootwright/instances/_base")
    assert found.api.socket == Path("/run/bootwright/bootwright.sock")
    assert found.libvirt.images_type is ImagesType.QCOW2
    assert found.libvirt.cache_modes == {}
    assert found.libvirt.discard is None
    assert found.default_ephemeral_format is GuestFormat.EXT4
    assert found.images.source is ImageSourceName.DIRECTORY
    assert found.images.glance is None
    assert found.images.vmdk_types == ("monolithicSparse", "streamOptimized")
    assert found.api.metrics_listen is None


def test_disks_in_ceph(write: Write) -> None:
    assert settings(write(LOCAL)).libvirt.rbd is None
    found = settings(write(LOCAL + "[libvirt]\nrbd_user = cinder\n")).libvirt.rbd
    assert found is not None
    assert (found.pool, found.ceph_conf) == ("rbd", None)
    assert found.glance_pools == {"images"}
    configured = (
        "[libvirt]\nrbd_user = cinder\nimages_rbd_pool = vms\n"
        "images_rbd_ceph_conf = /srv/ceph.conf\nimages_rbd_glance_pools = a,b\n"
    )
    found = settings(write(LOCAL + configured)).libvirt.rbd
    assert found is not None
    assert (found.pool, found.ceph_conf) == ("vms", Path("/srv/ceph.conf"))
    assert found.glance_pools == {"a", "b"}
    assert found.copy is None
    copying = "[libvirt]\nrbd_user = cinder\nimages_rbd_glance_store_name = ceph\n"
    found = settings(write(LOCAL + copying)).libvirt.rbd
    assert found is not None
    assert found.copy == CopySettings(store="ceph", interval_s=15, limit_s=600)
    none = "[libvirt]\nrbd_user = cinder\nimages_rbd_glance_pools =\n"
    found = settings(write(LOCAL + none)).libvirt.rbd
    assert found is not None
    assert found.glance_pools == set()
    assert "rbd_user" in problem(LOCAL + "[libvirt]\nimages_type = rbd\n", write)
    assert "images_rbd_glance_pools" in problem(
        LOCAL + "[libvirt]\nimages_rbd_glance_pools = a/b\n", write
    )


def test_flat_is_novas_other_name_for_raw(write: Write) -> None:
    found = settings(write(LOCAL + "[libvirt]\nimages_type = flat\n"))
    assert found.libvirt.images_type is ImagesType.RAW


def test_values_reach_the_settings(write: Write) -> None:
    found = settings(
        write(
            "[DEFAULT]\nuse_cow_images = false\ninstances_path = /srv/i\n"
            "[libvirt]\ndisk_cachemodes = file=writeback,network=none\n"
            "images_address_space_limit = 4\n"
            "[glance]\nendpoint_override = http://a:1,https://b/image\ntimeout = 5\n"
            "[api]\nmetrics_listen = [::1]:9000\n"
        )
    )
    assert found.libvirt.images_type is ImagesType.RAW
    assert found.libvirt.cache_modes[DiskType.FILE] == "writeback"
    assert found.qemu_img.address_space == 4 << 30
    assert found.image_cache.directory == Path("/srv/i/_base")
    assert found.images.glance is not None
    assert found.images.glance.endpoints == ("http://a:1", "https://b/image")
    assert found.images.glance.session.timeout == 5.0
    assert found.api.metrics_listen == ("::1", 9000)


@pytest.mark.parametrize(
    ("value", "types"), [("", ()), ("streamOptimized", ("streamOptimized",)), ("a, b", ("a", "b"))]
)
def test_subformats_are_as_many_as_are_named(
    value: str, types: tuple[str, ...], write: Write
) -> None:
    found = settings(write(f"{LOCAL}vmdk_allowed_types = {value}\n"))
    assert found.images.vmdk_types == types


def test_keystone_credentials_make_an_authenticating_session(write: Write) -> None:
    found = settings(
        write(
            "[glance]\nauth_type = password\nauth_url = http://k:5000\nusername = u\n"
            "password = hunter2\nproject_name = p\nregion_name = R\nvalid_interfaces = internal\n"
        )
    )
    assert found.images.glance is not None
    assert found.images.glance.session.auth is not None
    assert found.images.glance.interfaces == ("internal",)
    assert found.images.glance.region_name == "R"


def test_the_last_file_of_a_directory_has_the_last_word(write: Write, tmp_path: Path) -> None:
    main = write(LOCAL + "[DEFAULT]\nmax_concurrent_builds = 1\n")
    write("[DEFAULT]\nmax_concurrent_builds = 3\n", "d/20.conf")
    write("[DEFAULT]\nmax_concurrent_builds = 2\n", "d/10.conf")
    write("[DEFAULT]\nmax_concurrent_builds = 9\n", "d/notes.txt")
    configuration = read(main, directories=(str(tmp_path / "d"),))
    assert configuration.settings().max_concurrent_builds == 3
    values = {value.name: value for value in configuration.effective()}
    assert values["max_concurrent_builds"].origin == str(tmp_path / "d" / "20.conf")
    assert values["drain_timeout"].origin == "default"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[DEFAULT]\nmax_concurent_builds = 3\n", ["did you mean max_concurrent_builds?"]),
        ("[libvrt]\nvirt_type = kvm\n", ["unknown section [libvrt]", "did you mean [libvirt]?"]),
        ("[libvirt]\nendpoint_override = http://a\n", ["it belongs in [glance]"]),
        ("[glance]\nauth_type=password\nauth-url = x\n", ["did you mean auth_url?"]),
        ("[DEFAULT]\nzzz = 1\n", ["[DEFAULT] unknown option zzz"]),
    ],
)
def test_unknown_names_are_warned_of_with_the_nearest(
    write: Write, text: str, words: list[str]
) -> None:
    file = write(text)
    (warning,) = read(file).warnings()
    for word in [file, *words]:
        assert word in warning


def test_known_names_are_not_warned_of(write: Write) -> None:
    text = (
        LOCAL + "[glance]\nauth_type = v3applicationcredential\nauth_url = http://k\n"
        "application_credential_id = a\napplication_credential_secret = b\n"
        "[privsep_base_owner]\nhelper_command = sudo x\n[image_cache]\nsubdirectory_name = c\n"
    )
    assert read(write(text)).warnings() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[DEFAULT]\nmax_concurrent_builds = 0\n",
            ["[DEFAULT] max_concurrent_builds = 0", "from 1 to 1000"],
        ),
        ("[DEFAULT]\nmax_concurrent_builds = many\n", ["= many", "whole number from 1 to 1000"]),
        ("[DEFAULT]\nuse_cow_images = maybe\n", ["must be true or false"]),
        ("[DEFAULT]\nstate_path = relative\n", ["absolute path"]),
        ("[libvirt]\nimages_type = tape\n", ["[libvirt]", "default, qcow2, raw"]),
        ("[libvirt]\ndisk_cachemodes = file=fast\n", ["writethrough"]),
        ("[glance]\nstall_timeout = 0\n", ["must be a number from 1 to 3600"]),
        ("[glance]\nendpoint_override = ftp://a\n", ["endpoint_override = ftp://a"]),
        ("[image_cache]\nsubdirectory_name = ../x\n", ["not a path"]),
        ("[image_cache]\nhigh_watermark = 0\n", ["from 1 to 100"]),
        ("[image_cache]\nhost_id = a/b\n", ["host_id"]),
        ("[api]\nmetrics_listen = 127.0.0.1:70000\n", ["1 to 65535"]),
        ("[api]\nmetrics_listen = 999.0.0.1:80\n", ["999.0.0.1"]),
        ("[api]\nsocket = /" + "x" * 120 + "\n", ["107"]),
        ("[api]\nsocket_group = nobodys\n", ["socket_group = nobodys", "no such group"]),
        ("[privsep_base_owner]\nuser = root\n", ["user = root", "set helper_command as well"]),
        ("[privsep_base_owner]\ngroup = kvm\n", ["group = kvm", "set helper_command as well"]),
        ("[privsep_volumes]\nuser = root\n", ["user = root", "set helper_command as well"]),
        ("[libvirt]\nimages_type = lvm\n", ["images_type = lvm", "needs images_volume_group"]),
        ("[libvirt]\nimages_thin_pool = pool\n", ["needs images_volume_group"]),
        ("[libvirt]\nsparse_logical_volumes = true\n", ["needs images_thin_pool"]),
        ("[libvirt]\nimages_volume_group = ../x\n", ["images_volume_group = ../x"]),
        ("[libvirt]\nimages_volume_group = -x\n", ["images_volume_group = -x"]),
        ("[ephemeral_storage_encryption]\nenabled = true\n", ["needs images_type = lvm"]),
        ("[ephemeral_storage_encryption]\nkey_size = 129\n", ["multiple of 8"]),
        ("[ephemeral_storage_encryption]\ncipher = x y\n", ["cipher = x y"]),
        (
            "[glance]\nverify_glance_signatures = true\n[images]\nsource = directory\n",
            ["verify_glance_signatures = true", "certificate_source = directory"],
        ),
        ("[glance]\ndefault_trusted_certificate_ids = ../x\n", ["= ../x", "UUIDs"]),
        ("[images]\nvmdk_allowed_types = a,../x\n", ["= a,../x", "subformats"]),
        ("[glance]\nbandwidth_limit = -1\n", ["from 0 to"]),
        ("[DEFAULT]\nforce_raw_images = false\n", ["force_raw_images = false", "only true"]),
        ("[libvirt]\nqcow2_cluster_size = 96\n", ["qcow2_cluster_size = 96", "power of two"]),
        (
            "[libvirt]\nqcow2_cluster_size = 8\nqcow2_extended_l2 = true\n",
            ["qcow2_extended_l2", "16 or more"],
        ),
        ("[DEFAULT]\npreallocate_images = all\n", ["preallocate_images", "none, space"]),
    ],
)
def test_absurd_value_names_file_section_key_value_and_what_is_allowed(
    write: Write, text: str, words: list[str], tmp_path: Path
) -> None:
    found = problem(text, write)
    for word in [str(tmp_path / "bootwright.conf"), *words]:
        assert word in found


def test_volumes_and_keys_reach_the_settings(write: Write) -> None:
    assert (settings(write(LOCAL)).volumes, settings(write(LOCAL)).encryption) == (None, None)
    found = settings(
        write(
            f"{LOCAL}[libvirt]\nimages_type = lvm\nimages_volume_group = vg-guests\n"
            "images_thin_pool = pool\nvolume_clear = shred\nvolume_clear_size = 2\n"
            "[ephemeral_storage_encryption]\nenabled = true\nkey_size = 256\n"
            "key_directory = /srv/keys\n"
        )
    )
    assert found.volumes == VolumeSettings(
        group="vg-guests", thin=True, clear="shred", clear_size=2 << 20
    )
    assert found.encryption == EncryptionSettings(
        key_manager=KeyManager.FILE, key_directory=Path("/srv/keys"), key_size=256
    )


def test_options_of_the_key_manager_are_known(write: Write) -> None:
    section = "[key_manager]\nauth_type = keystone_password\n[barbican]\nnumber_of_retries = 7\n"
    assert read(write(LOCAL + section)).warnings() == []


def test_all_problems_are_named_at_once(write: Write) -> None:
    text = "[DEFAULT]\ndrain_timeout = -1\nmax_concurrent_builds = 0\n"
    assert len(read(write(text)).problems()) == 2


def test_glance_without_a_place_or_credentials_stops_the_start(write: Write) -> None:
    assert "endpoint_override" in problem("", write)
    found = problem("[glance]\nauth_type = password\nusername = u\n", write)
    assert "auth_url" in found


@pytest.mark.parametrize(
    ("text", "option"),
    [
        (
            "auth_type = v3applicationcredential\napplication_credential_id = a\n",
            "application_credential_secret",
        ),
        ("auth_type = v3password\nusername = u\npassword = p\n", "user_domain_name"),
    ],
)
def test_what_the_plugin_refuses_names_its_section_and_its_options(
    write: Write, text: str, option: str
) -> None:
    found = problem(f"[glance]\nauth_url = http://k:5000\n{text}", write)
    assert "[glance] auth_type = v3" in found
    assert option in found


def test_credentials_may_stand_in_a_section_of_their_own(write: Write) -> None:
    keystone = "[keystone]\nauth_type = password\nauth_url = http://k:5000\nusername = u\n"
    file = write(f"[glance]\nauth_section = keystone\n{keystone}")
    glance = settings(file).images.glance
    assert glance is not None
    assert glance.session.auth is not None
    assert read(file).warnings() == []
    with pytest.raises(ConfigError, match=r"\[keystone\] auth_type = pasword"):
        read(write(f"[glance]\nauth_section = keystone\n{keystone.replace('password', 'pasword')}"))


def test_unknown_authentication_plugin_names_those_there_are(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"did you mean password\?") as caught:
        read(write("[glance]\nauth_type = pasword\n"))
    assert "v3applicationcredential" in str(caught.value)


@pytest.mark.parametrize("text", ["[DEFAULT\n", "debug = true\n", "[DEFAULT]\n  what\n"])
def test_a_file_that_is_no_configuration_is_refused_by_name(write: Write, text: str) -> None:
    file = write(text)
    with pytest.raises(ConfigError, match=file):
        read(file)


def test_missing_file_and_directory_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.conf"):
        read(str(tmp_path / "none.conf"))
    with pytest.raises(ConfigError, match=r"none\.d"):
        read(directories=(str(tmp_path / "none.d"),))


def test_secrets_are_masked(write: Write) -> None:
    text = "[glance]\nauth_type = password\nauth_url = http://k\nusername = u\npassword = hunter2\n"
    shown = read(write(text)).effective()
    assert "hunter2" not in str(shown)
    passwords = {value.value for value in shown if value.name == "password"}
    assert passwords == {"***", ""}  # that of [key_manager] is not set


def test_environment_overrides_and_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OS_DEFAULT__DRAIN_TIMEOUT", "7")
    configuration = read(write(LOCAL + "[DEFAULT]\ndrain_timeout = 5\n"))
    shown = {value.name: value for value in configuration.effective()}
    assert (shown["drain_timeout"].value, shown["drain_timeout"].origin) == ("7", "environment")


def test_clients_learn_the_socket_and_nothing_else(write: Write) -> None:
    assert api_socket([write("[api]\nsocket = /s\n[DEFAULT]\ndrain_timeout = x\n")]) == Path("/s")
    assert api_socket([write("")]) == Path("/run/bootwright/bootwright.sock")


def test_a_socket_that_is_no_path_is_said_in_words(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"\[api\] socket .* no absolute path") as caught:
        api_socket([write("[api]\nsocket = relative\n")])
    assert "LocationInfo" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_a_closed_directory_is_said_to_be_unreadable(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "conf.d").mkdir(parents=True)
    closed.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(config_files.Unreadable, match="try as root"):
            config_files.find((), (str(closed / "conf.d"),))
    finally:
        os.seteuid(0)


def test_the_global_configuration_of_the_helper_is_read_too(write: Write) -> None:
    import privsep

    path = write(LOCAL + "[DEFAULT]\ninstances_path = /srv/i\n")
    try:
        for _ in range(2):
            assert Configuration([path]).settings().instances_path == Path("/srv/i")
            assert cfg.CONF.instances_path == "/srv/i"
        assert privsep.base_owner.conf.helper_command is None
    finally:
        cfg.CONF.clear()


def test_reading_twice_does_no_harm(write: Write) -> None:
    conf = cfg.ConfigOpts()
    first = Configuration([write(LOCAL)], conf=conf).settings()
    assert Configuration([write(LOCAL)], conf=conf).settings() == first


def test_every_option_of_ours_has_help_and_every_number_a_range() -> None:
    from agent import options

    for section in ("DEFAULT", "libvirt", "image_cache", "images", "api", "qemu_img"):
        for opt in options.declared()[section]:
            assert opt.help, opt.name
            if isinstance(opt.type, types.Integer | types.Float):
                assert opt.type.min is not None, opt.name
                assert opt.type.max is not None, opt.name


def test_the_sample_file_is_current() -> None:
    try:
        metadata.distribution("bootwright")
    except metadata.PackageNotFoundError:
        if "CI" in os.environ:
            raise
        pytest.skip("bootwright is not installed, so its options have no entry point")
    sample = Path(__file__).parents[1] / "etc" / "bootwright.conf.sample"
    assert sample.read_text(encoding="utf-8") == config.sample(), (
        "run: bootwright config sample > etc/…sample"
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (3600.0, "3600"), (0.5, "0.5"), (1 << 30, "1073741824"), (1048577.0, "1048577")],
)
def test_a_bound_is_written_in_full(number: float, text: str) -> None:
    assert config_values.plain(number) == text
