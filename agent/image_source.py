"""The image source that the configuration names."""

from agent.directory import DirectorySource
from agent.glance import GlanceSource
from agent.settings import ImageSourceName, ImagesSettings
from agent.transfer import ImageSource


def of(settings: ImagesSettings) -> ImageSource:
    """Return the image source; it has not yet spoken to anybody.

    Raises:
        OSError: the directory of local images cannot be made.
    """
    match settings.source:
        case ImageSourceName.DIRECTORY:
            settings.directory.mkdir(parents=True, exist_ok=True)
            return DirectorySource(settings.directory)
        case ImageSourceName.GLANCE:
            return glance(settings)


def glance(settings: ImagesSettings) -> GlanceSource:
    """Return the Glance that the configuration names."""
    found = settings.glance
    if found is None:
        raise AssertionError("the configuration guarantees it")
    return GlanceSource(
        found.session,
        endpoints=found.endpoints,
        service_type=found.service_type,
        service_name=found.service_name,
        interfaces=found.interfaces,
        region_name=found.region_name,
        stall_timeout_s=found.stall_timeout_s,
    )
