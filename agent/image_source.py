"""The image source that the configuration names."""

from oslo_config import cfg

from agent.bandwidth import Bandwidth, Limited
from agent.certificates import CertificateDirectory, Certificates, KeyManager
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
            source = glance(settings)
            limit = None if settings.glance is None else settings.glance.bandwidth_limit
            return source if limit is None else Limited(source, Bandwidth(limit))


def certificates(settings: ImagesSettings) -> Certificates:
    """Return where the certificates are that images are signed with."""
    if settings.signatures.certificate_directory is not None:
        return CertificateDirectory(settings.signatures.certificate_directory)
    session = None if settings.glance is None else settings.glance.session
    # castellan finds its options where oslo.config's default is.
    return KeyManager(session, cfg.CONF)


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
