"""The configuration files: read, checked, and turned into `Settings`.

Which options there are is written in `agent.options`. oslo.config's global
object is the default because the privileged helper reads from it too.
"""

import difflib
import io
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import keystoneauth1.exceptions
from keystoneauth1 import loading
from oslo_config import cfg, generator

from agent import ceph_bindings, config_files, config_values, options
from agent.config_files import Assignment, ConfigError
from agent.disk import DiskType
from agent.job import ConfigDriveFormat, GuestFormat, ImagesType
from agent.options import list_opts
from agent.settings import (
    ApiSettings,
    CopySettings,
    EncryptionSettings,
    GlanceSettings,
    ImageCacheSettings,
    ImageSourceName,
    ImagesSettings,
    KeyManager,
    LibvirtSettings,
    QemuImgSettings,
    RbdSettings,
    Settings,
    SignatureSettings,
    VolumeSettings,
)

__all__ = ["ConfigError", "Configuration", "Value", "list_opts", "sample"]

_MASK: Final = "***"


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One option as it is in effect; secrets are masked."""

    section: str
    name: str
    value: str
    origin: str
    """The file it was read from, `environment`, or `default`."""


class Configuration:
    """The configuration files as read; values are checked when asked for."""

    def __init__(
        self,
        files: Sequence[str] = (),
        directories: Sequence[str] = (),
        *,
        conf: cfg.ConfigOpts = cfg.CONF,
    ) -> None:
        """Read `files`, then every .conf file in `directories` by name; the last word counts.

        If both are empty, the default file and directory are read where they exist.

        Raises:
            ConfigError: a file cannot be read.
        """
        found = config_files.find(files, directories)
        self._assignments = [line for file in found for line in config_files.assignments(file)]
        self._conf = conf
        self._known = options.declared()
        for section, opts in self._known.items():
            conf.register_opts(opts, group=_group(section))
        config_files.parse(conf, found)
        self._register_auth_plugin()

    def warnings(self) -> list[str]:
        """A sentence for each section or option nobody knows, with the nearest that is known."""
        known = {section: _names(opts) for section, opts in self._known.items()}
        found: dict[str, None] = {}
        for line in self._assignments:
            if line.section not in known:
                near = _nearest(line.section, known, "[{}]")
                found[f"{line.file}: unknown section [{line.section}]{near}"] = None
            elif line.key not in known[line.section]:
                near = _nearest(line.key, known[line.section], "{}") or _other_section(
                    line.key, known
                )
                found[f"{line.file}: [{line.section}] unknown option {line.key}{near}"] = None
        return list(found)

    def problems(self) -> list[str]:
        """A sentence for each value that cannot be used; empty if the agent would start."""
        try:
            self.settings()
        except ConfigError as e:
            return list(e.problems)
        return []

    def settings(self) -> Settings:
        """Return the values for the components.

        Raises:
            ConfigError: naming every value that is out of its range.
        """
        if problems := list(self._bad_values()):
            raise ConfigError(*problems)
        conf = self._conf
        source = ImageSourceName(conf.images.source)
        # Names that are Nova's alone.
        named = {
            "default": ImagesType.QCOW2 if conf.use_cow_images else ImagesType.RAW,
            "flat": ImagesType.RAW,
        }
        cache_modes = dict(mode.split("=", 1) for mode in conf.libvirt.disk_cachemodes)
        return Settings(
            debug=conf.debug,
            instances_path=Path(conf.instances_path),
            state_path=Path(conf.state_path),
            max_concurrent_builds=conf.max_concurrent_builds,
            default_ephemeral_format=GuestFormat(conf.default_ephemeral_format),
            preallocate=conf.preallocate_images == "space",
            config_drive_format=ConfigDriveFormat(conf.config_drive_format),
            force_config_drive=conf.force_config_drive,
            drain_timeout_s=float(conf.drain_timeout),
            libvirt=LibvirtSettings(
                connection_uri=conf.libvirt.connection_uri,
                virt_type=conf.libvirt.virt_type,
                images_type=named.get(conf.libvirt.images_type)
                or ImagesType(conf.libvirt.images_type),
                cache_modes={DiskType(kind): mode for kind, mode in cache_modes.items()},
                discard=conf.libvirt.hw_disk_discard,
                qcow2_cluster_size=conf.libvirt.qcow2_cluster_size << 10,
                qcow2_extended_l2=conf.libvirt.qcow2_extended_l2,
                rbd=self._rbd(),
            ),
            volumes=self._volumes(),
            encryption=self._encryption(),
            images=ImagesSettings(
                source=source,
                directory=Path(conf.images.directory),
                vmdk_types=tuple(conf.images.vmdk_allowed_types),
                glance=self._glance() if source is ImageSourceName.GLANCE else None,
                signatures=self._signatures(),
            ),
            image_cache=ImageCacheSettings(
                directory=Path(conf.instances_path, conf.image_cache.subdirectory_name),
                require_hash=conf.image_cache.require_hash,
                verify_before_use=conf.image_cache.verify_before_use,
                max_concurrent_fetches=conf.image_cache.max_concurrent_fetches,
                reserved_free_space=conf.image_cache.reserved_free_space << 20,
                max_size=(conf.image_cache.max_size << 30) or None,
                remove_unused=conf.image_cache.remove_unused_base_images,
                minimum_age_s=float(conf.image_cache.remove_unused_original_minimum_age_seconds),
                high_watermark=conf.image_cache.high_watermark,
                # Whoever lowers only the high one means both.
                low_watermark=min(conf.image_cache.low_watermark, conf.image_cache.high_watermark),
                prune_interval_s=float(conf.image_cache.manager_interval) or None,
                scrub_interval_s=float(conf.image_cache.scrub_interval) or None,
                host_id=conf.image_cache.host_id or _host_id(),
            ),
            qemu_img=QemuImgSettings(
                cpu_time_s=conf.libvirt.images_cpu_time_limit,
                address_space=conf.libvirt.images_address_space_limit << 30,
                timeout_s=float(conf.qemu_img.timeout),
            ),
            api=ApiSettings(
                socket=Path(conf.api.socket),
                socket_group=conf.api.socket_group,
                metrics_listen=self._metrics_listen(),
            ),
        )

    def effective(self) -> list[Value]:
        """Every option, its value as text and where that comes from; secrets are masked.

        Raises:
            ConfigError: a value cannot be read.
        """
        if problems := list(self._bad_values()):
            raise ConfigError(*problems)
        return [
            Value(
                section=section,
                name=opt.dest,
                value=self._text(section, opt),
                origin=self._origin(section, opt),
            )
            for section, opts in self._known.items()
            for opt in opts
        ]

    def _rbd(self) -> RbdSettings | None:
        libvirt = self._conf.libvirt
        if libvirt.rbd_user is None:
            if libvirt.images_type == ImagesType.RBD:
                raise ConfigError("[libvirt] images_type = rbd needs rbd_user")
            return None
        if (missing := ceph_bindings.available()) is not None:
            raise ConfigError(f"[libvirt] rbd_user needs the Debian package {missing}")
        return RbdSettings(
            pool=libvirt.images_rbd_pool,
            glance_pools=frozenset(libvirt.images_rbd_glance_pools),
            copy=self._copy(),
            ceph_conf=Path(libvirt.images_rbd_ceph_conf) if libvirt.images_rbd_ceph_conf else None,
            user=libvirt.rbd_user,
            secret_uuid=libvirt.rbd_secret_uuid,
            connect_timeout_s=float(libvirt.rbd_connect_timeout),
            busy_retries=libvirt.rbd_destroy_volume_retries,
            busy_interval_s=float(libvirt.rbd_destroy_volume_retry_interval),
        )

    def _copy(self) -> CopySettings | None:
        libvirt = self._conf.libvirt
        if not libvirt.images_rbd_glance_store_name:
            return None
        return CopySettings(
            store=libvirt.images_rbd_glance_store_name,
            interval_s=float(libvirt.images_rbd_glance_copy_poll_interval),
            limit_s=float(libvirt.images_rbd_glance_copy_timeout),
        )

    def _glance(self) -> GlanceSettings:
        glance = self._conf.glance
        section = self._auth_section()
        auth_type = self._conf[section].auth_type
        if not glance.endpoint_override and auth_type in (None, "none"):
            raise ConfigError(
                "[glance] the image service is nowhere to be found: set endpoint_override to "
                "its URL, or auth_type, auth_url and credentials to find it in the service "
                "catalog; or use local images with source = directory in [images]"
            )
        try:
            auth = loading.load_auth_from_conf_options(self._conf, "glance")
        except keystoneauth1.exceptions.MissingRequiredOptions as e:
            missing = ", ".join(opt.dest for opt in e.options)
            raise ConfigError(f"[{section}] auth_type = {auth_type} also needs {missing}") from e
        except keystoneauth1.exceptions.AuthPluginException as e:
            # It does not say which of its options it means.
            unset = [
                opt.dest for opt in options.auth_plugin(auth_type) if not self._value(section, opt)
            ]
            raise ConfigError(
                f"[{section}] auth_type = {auth_type} cannot be used: {e} These of its options "
                f"are not set: {', '.join(unset)}"
            ) from e
        return GlanceSettings(
            session=loading.load_session_from_conf_options(self._conf, "glance", auth=auth),
            endpoints=tuple(glance.endpoint_override or ()),
            service_type=glance.service_type,
            service_name=glance.service_name,
            interfaces=tuple(glance.valid_interfaces or ()),
            region_name=glance.region_name,
            num_retries=glance.num_retries,
            max_connections_per_image=glance.max_connections_per_image,
            stall_timeout_s=glance.stall_timeout,
            bandwidth_limit=(glance.bandwidth_limit << 20) or None,
        )

    def _signatures(self) -> SignatureSettings:
        glance = self._conf.glance
        return SignatureSettings(
            verify=glance.verify_glance_signatures,
            validate=glance.enable_certificate_validation,
            trusted=tuple(map(str.lower, glance.default_trusted_certificate_ids)),
            certificate_directory=(
                Path(glance.certificate_directory)
                if glance.certificate_source == "directory"
                else None
            ),
        )

    def _volumes(self) -> VolumeSettings | None:
        libvirt = self._conf.libvirt
        if libvirt.images_volume_group is None:
            return None
        return VolumeSettings(
            group=libvirt.images_volume_group,
            thin=libvirt.images_thin_pool is not None,
            clear=libvirt.volume_clear,
            clear_size=(libvirt.volume_clear_size << 20) or None,
        )

    def _encryption(self) -> EncryptionSettings | None:
        encryption = self._conf.ephemeral_storage_encryption
        if not encryption.enabled:
            return None
        return EncryptionSettings(
            key_manager=KeyManager(encryption.key_manager),
            key_directory=Path(encryption.key_directory),
            key_size=encryption.key_size,
        )

    def _metrics_listen(self) -> tuple[str, int] | None:
        listen = self._conf.api.metrics_listen
        if listen is None:
            return None
        host, _, port = listen.rpartition(":")
        return host.strip("[]"), int(port)

    def _register_auth_plugin(self) -> None:
        """Make known what only keystoneauth's plugin knows."""
        section = self._auth_section()
        if section not in self._known:
            self._known[section] = loading.get_auth_common_conf_options()
            self._conf.register_opts(self._known[section], group=section)
        auth_type = self._conf[section].auth_type
        if auth_type is None:
            return
        try:
            opts = options.auth_plugin(auth_type)
        except keystoneauth1.exceptions.NoMatchingPlugin as e:
            known = sorted(loading.get_available_plugin_names())
            near = _nearest(auth_type, known, "{}")
            raise ConfigError(
                f"{self._file_of(section, 'auth_type')}: [{section}] auth_type = {auth_type}: "
                f"no such plugin{near}; there are {', '.join(known)}"
            ) from e
        self._conf.register_opts(opts, group=section)
        self._known[section] = [*self._known[section], *opts]

    def _auth_section(self) -> str:
        return self._conf.glance.auth_section or "glance"

    def _bad_values(self) -> Iterator[str]:
        for section, opts in self._known.items():
            for opt in opts:
                try:
                    value = self._value(section, opt)
                    problem = config_values.problem(self._conf, section, opt.dest, value)
                except (ValueError, cfg.TemplateSubstitutionError) as e:
                    problem = config_values.rule(opt) or str(e)
                if problem:
                    given = self._given(section, opt)
                    yield (
                        f"{self._file_of(section, opt.dest)}: [{section}] {opt.dest} = {given}: "
                        f"{problem}"
                    )

    def _value(self, section: str, opt: cfg.Opt) -> object:
        value: object = (
            self._conf[opt.dest] if section == "DEFAULT" else self._conf[section][opt.dest]
        )
        return value

    def _text(self, section: str, opt: cfg.Opt) -> str:
        value = self._value(section, opt)
        if value is None:
            return ""
        if opt.secret:
            return _MASK
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _origin(self, section: str, opt: cfg.Opt) -> str:
        place = self._conf.get_location(opt.dest, _group(section))
        if place is None or not place.location.is_user_controlled:
            return "default"
        return str(place.detail) if place.location is cfg.Locations.user else "environment"

    def _last(self, section: str, key: str) -> Assignment | None:
        lines = [line for line in self._assignments if (line.section, line.key) == (section, key)]
        return lines[-1] if lines else None

    def _given(self, section: str, opt: cfg.Opt) -> str:
        line = self._last(section, opt.dest)
        return _MASK if opt.secret else line.value if line else "(see there)"

    def _file_of(self, section: str, key: str) -> str:
        line = self._last(section, key)
        return line.file if line else f"environment variable OS_{section.upper()}__{key.upper()}"


def sample() -> str:
    """Return a configuration file with every option, commented out, and its explanation."""
    conf = cfg.ConfigOpts()
    generator.register_cli_opts(conf)
    conf(["--namespace", "bootwright"], default_config_files=[])
    output = io.StringIO()
    generator.generate(conf, output)
    return output.getvalue()


def _host_id() -> str:
    """Return machine-id(5), or what comes next to it on a host that has none."""
    try:
        machine_id = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        machine_id = ""
    if re.fullmatch("[0-9a-f]{32}", machine_id):
        return machine_id
    return re.sub("[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-") or "localhost"


def _group(section: str) -> str | None:
    """oslo.config's name of a section in calls."""
    return None if section == "DEFAULT" else section


def _names(opts: Iterable[cfg.Opt]) -> set[str]:
    names = set()
    for opt in opts:
        names.add(opt.dest)
        names.update(old.name for old in opt.deprecated_opts if old.name)
    return names


def _nearest(name: str, known: Iterable[str], form: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def _other_section(key: str, known: dict[str, set[str]]) -> str:
    homes = sorted(section for section, names in known.items() if key in names)
    return f"; it belongs in [{homes[0]}]" if homes else ""
