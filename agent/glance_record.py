"""What Glance says of an image: its record of the API v2, as far as it matters here."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agent.image import Image

SOURCE: Final = "glance"

# What Glance notes of imports and copies; nobody else may write such properties.
_GLANCES: Final = "os_glance_"

# What the image schema defines itself, and what a store adds. The rest of a
# record are the owner's own properties.
_CORE = frozenset(
    {
        "checksum", "container_format", "created_at", "direct_url", "disk_format", "file", "id",
        "locations", "min_disk", "min_ram", "name", "os_hash_algo", "os_hash_value", "os_hidden",
        "owner", "protected", "schema", "self", "size", "status", "stores", "tags", "updated_at",
        "virtual_size", "visibility",
    }
)  # fmt: skip


_Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
_Count = Annotated[int, Field(ge=0)]


class _Location(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str


class _Record(BaseModel):
    """An image as the v2 API describes it, as far as it matters here."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    id: str
    status: str
    name: _Text = ""
    disk_format: _Text = ""
    container_format: _Text = ""
    size: _Count | None = None
    virtual_size: _Count | None = None
    min_disk: _Count = 0
    min_ram: _Count = 0
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    checksum: str | None = None
    direct_url: str | None = None
    locations: list[_Location] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """The names of stores, and what Glance says of the image beside."""

    image: Image
    finished: frozenset[str]
    running: frozenset[str]
    failed: frozenset[str]


def copies_of(answer: Mapping[str, object], image_id: str) -> Copies:
    """Raises as `image_of`."""

    def names(key: str) -> frozenset[str]:
        return frozenset(str(answer.get(key) or "").split(",")) - {""}

    return Copies(
        image=image_of(answer, image_id),
        finished=names("stores"),
        running=names("os_glance_importing_to_stores"),
        failed=names("os_glance_failed_import"),
    )


def image_of(answer: Mapping[str, object], image_id: str) -> Image:
    """Raises: ValueError: the answer is no record, or of another image."""
    record = _Record.model_validate(dict(answer))
    if record.id != image_id:
        raise ValueError(f"it describes image {record.id!r:.80}")
    return Image(
        id=record.id,
        name=record.name,
        source=SOURCE,
        status=record.status,
        disk_format=record.disk_format,
        container_format=record.container_format,
        size=record.size,
        virtual_size=record.virtual_size,
        min_disk=record.min_disk,
        min_ram=record.min_ram,
        digest=_digest(record),
        properties={
            key: value
            for key, value in (record.model_extra or {}).items()
            if key not in _CORE and not key.startswith(_GLANCES) and isinstance(value, str)
        },
        locations=_locations(record),
    )


def _locations(record: _Record) -> tuple[str, ...]:
    urls = [record.direct_url, *(location.url for location in record.locations)]
    return tuple(dict.fromkeys(url for url in urls if url and url.startswith("rbd://")))


def _digest(record: _Record) -> tuple[str, str] | None:
    algorithm = (record.os_hash_algo or "").lower()
    # The SHAKE functions have no length of their own, so a value alone does not say the digest.
    known = algorithm in hashlib.algorithms_available and not algorithm.startswith("shake")
    if known and record.os_hash_value:
        return algorithm, record.os_hash_value.lower()
    return ("md5", record.checksum.lower()) if record.checksum else None
