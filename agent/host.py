"""What building and changing instances works with: the parts of one host, and its defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.backends import Backends
from agent.disk import DiskType
from agent.hypervisor import Hypervisor
from agent.image_cache import ImageCache
from agent.instances import Instances
from agent.job import ImagesType
from agent.layout import Formats


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What the configuration says where a job says nothing."""

    virt_type: str
    images_type: ImagesType
    formats: Formats
    cache_modes: Mapping[DiskType, str]
    discard: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The same for all jobs."""

    image_cache: ImageCache
    backends: Backends
    instances: Instances
    hypervisor: Hypervisor
    touch: Callable[[str], None]
    """Refreshes a base's last use; never fails."""
    defaults: Defaults
