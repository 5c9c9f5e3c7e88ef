"""The job: what may be asked of the agent, parsed at the door once.

`parse` turns what a person or program sent into a `JobRequest`, or says which
field is wrong and which one was probably meant. Everything behind it trusts
the types. The schema is the contract of docs/job.md.
"""

import difflib
import enum
import re
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, assert_never

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from agent.errors import InvalidJob


class Action(enum.StrEnum):
    BOOT = "boot"
    PREPARE = "prepare"
    FETCH = "fetch"
    DELETE = "delete"
    RESIZE = "resize"
    RESCUE = "rescue"
    UNRESCUE = "unrescue"
    REBUILD = "rebuild"

    @property
    def of_existing(self) -> bool:
        """Whether it is about an instance that is there already."""
        return self not in (Action.BOOT, Action.PREPARE, Action.FETCH)


class OnFailure(enum.StrEnum):
    CLEANUP = "cleanup"
    KEEP = "keep"


class ImagesType(enum.StrEnum):
    """The backends of `agent/backends/`."""

    QCOW2 = "qcow2"
    RAW = "raw"
    LVM = "lvm"
    RBD = "rbd"
    PLOOP = "ploop"


class GuestFormat(enum.StrEnum):
    """File systems an ephemeral disk may be born with."""

    EXT4 = "ext4"
    XFS = "xfs"
    VFAT = "vfat"
    NONE = "none"


class ConfigDriveFormat(enum.StrEnum):
    ISO9660 = "iso9660"
    VFAT = "vfat"


class Datasource(enum.StrEnum):
    """Those of cloud-init that a config drive can be made for."""

    OPENSTACK = "openstack"
    NOCLOUD = "nocloud"


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def _canonical_uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise ValueError("must be a UUID such as 0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1") from None


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


# A name becomes a file name, a libvirt domain name and a host name, so it has
# to be acceptable to the strictest of the three.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")


def _host_name(text: str) -> str:
    if _is_uuid(text):
        raise ValueError("must not look like a UUID: it could be taken for another instance's")
    if not _NAME.fullmatch(text):
        raise ValueError(
            "must be 1 to 63 letters, digits, dots and hyphens, starting and ending "
            "with a letter or digit"
        )
    return text


# Glance's ids are UUIDs; other sources may use other names. What may never
# pass is anything that could be read as a path, an option or a URL.
_IMAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def image_id(text: str) -> str:
    """Return the canonical form of an image id; ValueError if it cannot be one."""
    if not _IMAGE_ID.fullmatch(text) or ".." in text:
        raise ValueError(
            "must be an image id: letters, digits, '.', '_' and '-' only, at most 128 of them"
        )
    try:
        return str(uuid.UUID(text)) if len(text) == 36 else text
    except ValueError:
        return text


# A limit also keeps out what is no Unicode: half of a surrogate pair can be written in JSON.
Text = Annotated[str, StringConstraints(max_length=65535)]
Uuid = Annotated[str, AfterValidator(_canonical_uuid)]
HostName = Annotated[str, AfterValidator(_host_name)]
ImageId = Annotated[str, AfterValidator(image_id)]
NetworkName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
BridgeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
MacAddress = Annotated[
    str, StringConstraints(pattern=r"^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$", to_lower=True)
]
RequestId = Annotated[str, StringConstraints(pattern=r"^req-[A-Za-z0-9._-]{1,100}$")]


class Instance(_Schema):
    """The virtual machine a boot job makes."""

    uuid: Uuid | None = None
    """A UUID; made up if absent."""
    name: HostName | None = None
    """Of the domain, and host name of the guest; unique on this host. 1 to 63 letters, digits,
    `.` and `-`, and no UUID. Needed, except where `uuid` names an instance that exists."""
    metadata: dict[Text, Text] = Field(default_factory=dict)
    """Kept with the instance; `meta` on its config drive. Texts of at most 65535 characters."""
    user_data: Text | None = None
    """For cloud-init: the plain text, not base64. Makes a config drive."""
    config_drive: bool = False
    """Attach a read-only disk with the instance's metadata and user data."""
    datasource: Datasource = Datasource.OPENSTACK
    """Which of cloud-init's data sources the config drive is for: `openstack`, labelled
    `config-2`, or `nocloud`, labelled `cidata`."""


class Ephemeral(_Schema):
    size: int = Field(ge=1, le=1 << 20, description="GiB")
    """Of the disk."""
    guest_format: GuestFormat | None = None
    """File system it is born with, labelled `ephemeral0`, `ephemeral1` …; the host's
    `default_ephemeral_format` if absent."""


_QUOTA = "quota:disk_"
_MOST_PER_S = 10**15  # QEMU's
_LIMITS = frozenset(
    f"{_QUOTA}{what}_{unit}_sec"
    for what in ("read", "write", "total")
    for unit in ("bytes", "iops")
)


def _extra_specs(specs: dict[str, int]) -> dict[str, int]:
    for name in specs:
        if name not in _LIMITS:
            near = difflib.get_close_matches(name, _LIMITS, n=1)
            also = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_LIMITS))}"
            raise ValueError(f"unknown {name}: {also}")
    for unit in ("bytes", "iops"):
        total = f"{_QUOTA}total_{unit}_sec"
        for part in (f"{_QUOTA}read_{unit}_sec", f"{_QUOTA}write_{unit}_sec"):
            if specs.get(total) and specs.get(part):
                raise ValueError(f"give either {total} or {part}")
    return specs


class Flavor(_Schema):
    vcpus: int = Field(ge=1, le=4096)
    """Virtual processors."""
    ram: int = Field(ge=1, le=1 << 26, description="MiB")
    """Memory."""
    disk: int = Field(ge=0, le=1 << 20, description="GiB; 0 keeps the image's own size")
    """The root disk, exactly."""
    ephemeral: tuple[Ephemeral, ...] = Field(default=(), max_length=200)
    """Further disks, empty but for a file system."""
    swap: int = Field(default=0, ge=0, le=1 << 30, description="MiB")
    """A disk to swap on; 0 for none."""
    extra_specs: (
        Annotated[
            dict[str, Annotated[int, Field(ge=0, le=_MOST_PER_S)]], AfterValidator(_extra_specs)
        ]
        | None
    ) = None
    """What each disk may do: `quota:disk_read_bytes_sec`, `quota:disk_write_iops_sec` and so on,
    `read`, `write` or `total` of `bytes` or `iops`; 0 for no limit. A resize leaves it as it is if
    absent, and takes all limits off if empty."""

    @property
    def iotune(self) -> dict[str, int]:
        """The limits on each disk, by libvirt's name."""
        return {
            name.removeprefix(_QUOTA): limit
            for name, limit in (self.extra_specs or {}).items()
            if limit
        }


class ImageRef(_Schema):
    id: ImageId
    """Image of the root disk: letters, digits, `.`, `_` and `-`, at most 128 of them."""
    kernel_id: ImageId | None = None
    """Image of the kernel; the property `kernel_id` of the root image if absent."""
    ramdisk_id: ImageId | None = None
    """Image of the ramdisk; the property `ramdisk_id` of the root image if absent."""
    os_command_line: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """The kernel's command line; the property `os_command_line` of the root image if absent."""
    trusted_certificates: Annotated[tuple[Uuid, ...], Field(max_length=50)] = ()
    """The images have to be signed with a certificate that one of these has issued, given by their
    ids where `[glance] certificate_source` has them. If empty, the configuration says whether
    images have to be signed."""


class Libvirt(_Schema):
    define: bool = True
    """Define the domain. If false, the result holds its XML instead."""
    start: bool = True
    """Start the domain."""
    domain_xml: Annotated[str, StringConstraints(max_length=1 << 20)] | None = None
    """A domain of your own, whose disks, and name and uuid where it has none, are filled in."""

    @model_validator(mode="after")
    def _start_needs_define(self) -> Self:
        if self.start and not self.define:
            raise ValueError("start: true needs define: true")
        return self


class Network(_Schema):
    network: NetworkName | None = None
    """A network of libvirt; either this or `bridge`."""
    bridge: BridgeName | None = None
    """A bridge of the host; either this or `network`."""
    mac: MacAddress | None = None
    """Made from the instance's UUID if absent."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.network is None) == (self.bridge is None):
            raise ValueError("give either network or bridge")
        return self


class JobRequest(_Schema):
    """One request, as the caller wrote it plus the defaults of the schema."""

    version: Literal[1] = 1
    """Of this format."""
    action: Action = Action.BOOT
    """What to do."""
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    """Sent twice with the same key, the same job is done once; another job under a key that is
    taken is refused."""
    request_id: RequestId | None = None
    """On every log line of the job; made up if absent."""
    deadline_s: float | None = Field(default=None, gt=0, le=7 * 86400, description="seconds")
    """Give up cleanly that long after the job was accepted, restarts of the agent included."""
    on_failure: OnFailure = OnFailure.CLEANUP
    """`cleanup` removes all that a failed job made, `keep` leaves it to be looked at."""
    instance: Instance | None = None
    """Needed, except to fetch."""
    flavor: Flavor | None = None
    """Needed to boot, prepare and resize."""
    image: ImageRef | None = None
    """Needed to boot, prepare, fetch and rebuild; to rescue, the instance's own if absent."""
    images_type: ImagesType | None = None
    """How the disks are kept: `qcow2` is an overlay on the base, `raw` a copy of it; `lvm`, `rbd`
    and `ploop` where the host is set up for them. The host's `images_type` if absent."""
    libvirt: Libvirt = Field(default_factory=Libvirt)
    """What becomes of the domain."""
    networks: tuple[Network, ...] | None = Field(default=None, max_length=16)
    """A network card each; `[]` for none. If absent, one on libvirt's network `default` where that
    is active, else none, and the log says so."""

    @model_validator(mode="after")
    def _needs(self) -> Self:
        needed: dict[str, BaseModel | None]
        match self.action:
            case Action.BOOT | Action.PREPARE:
                needed = {"instance": self.instance, "flavor": self.flavor, "image": self.image}
            case Action.FETCH:
                needed = {"image": self.image}
            case Action.DELETE | Action.RESCUE | Action.UNRESCUE:
                needed = {"instance": self.instance}
            case Action.RESIZE:
                needed = {"instance": self.instance, "flavor": self.flavor}
            case Action.REBUILD:
                needed = {"instance": self.instance, "image": self.image}
            case _:
                assert_never(self.action)
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ValueError(f"action {self.action} needs {' and '.join(missing)}")
        if self.instance is not None:
            if self.action.of_existing:
                if self.instance.name is None and self.instance.uuid is None:
                    raise ValueError("instance needs name or uuid")
            elif self.instance.name is None:
                raise ValueError("instance.name is missing")
        return self


def parse(document: object) -> JobRequest:
    """Return the job that `document` (plain mappings, lists and scalars) describes.

    Raises:
        InvalidJob: naming every field that is wrong, and the nearest known
            name for each that is unknown.
    """
    if not isinstance(document, dict):
        raise InvalidJob(
            f"a job is a mapping of fields, not {_kind(document)}",
            "the smallest one has instance.name, image.id and flavor (docs/job.md)",
        )
    try:
        return JobRequest.model_validate(document)
    except ValidationError as e:
        raise InvalidJob(
            "; ".join(_sentences(e)),
            "check a file with 'bootwright job validate FILE'; the fields are in docs/job.md",
        ) from e


def _kind(document: object) -> str:
    names = {type(None): "empty", str: "a text", list: "a list", int: "a number"}
    return names.get(type(document), f"a {type(document).__name__}")


def _sentences(error: ValidationError) -> Iterable[str]:
    for detail in error.errors(include_url=False, include_input=True):
        where = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            *path, name = (str(part) for part in detail["loc"])
            yield _unknown_field(path, name)
            continue
        message = _expectation(detail)
        given = detail["input"]
        if isinstance(given, str | int | float) and not isinstance(given, bool):
            message = f"{message} (it is {given!r:.80})"
        yield f"{where}: {message}" if where else message


def _expectation(detail: ErrorDetails) -> str:
    """What a value should be: pydantic's words where they are not those of Python."""
    match detail:
        case {"type": "model_type", "ctx": {"class_name": str(name)}}:
            text = f"should be a mapping, such as {_EXAMPLES[name]}"
        case {"type": "dict_type"}:
            text = "should be a mapping, such as {name: value}"
        case {"type": "tuple_type"}:
            text = "should be a list"
        case {"type": "string_type", "input": bool() | int() | float()}:
            text = "should be a text: put it in quotes"
        case {"type": "string_type"}:
            text = "should be a text"
        case {"type": "string_pattern_mismatch", "loc": (*_, "mac")}:
            text = "should look like 52:54:00:12:34:56"
        case _:
            text = detail["msg"].removeprefix("Value error, ")
            text = text.removeprefix("Input ").removeprefix("String ")
    return text


def _unknown_field(path: list[str], name: str) -> str:
    full = ".".join([*path, name])
    known = _fields_at(path)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"unknown field {full}: did you mean {'.'.join([*path, *near])}?"
    return f"unknown field {full}: known here are {', '.join(sorted(known))}"


def _fields_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = JobRequest
    for part in path:
        if part.isdigit():
            continue
        model = _MODELS[part]
    return list(model.model_fields)


_EXAMPLES = {
    "Instance": "{name: web-1}",
    "Flavor": "{vcpus: 1, ram: 512, disk: 10}",
    "Ephemeral": "{size: 10}",
    "ImageRef": "{id: 0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1}",
    "Libvirt": "{start: false}",
    "Network": "{network: default}",
}
"""Of each mapping within a job, as YAML."""

_MODELS: dict[str, Any] = {
    "instance": Instance,
    "flavor": Flavor,
    "ephemeral": Ephemeral,
    "image": ImageRef,
    "libvirt": Libvirt,
    "networks": Network,
}
