"""Where the certificates are that images are signed with: a key manager, or a directory.

castellan has no types, and is met here only; it reaches Barbican or Vault, as
`[key_manager] backend` says. A certificate is known by its id and nothing else.
"""

import io
import os
import uuid
from pathlib import Path
from typing import Final, Protocol, cast

import keystoneauth1.exceptions
from castellan import key_manager
from castellan.common.credentials.credential import Credential
from castellan.common.exception import CastellanException, ManagedObjectNotFoundError
from castellan.common.objects.x_509 import X509
from castellan.common.utils import credential_factory
from cryptography import x509
from keystoneauth1.plugin import BaseAuthPlugin
from keystoneauth1.session import Session
from oslo_config import cfg
from oslo_context.context import RequestContext

from agent.errors import ImageSourceUnavailable, ImageUnacceptable

# The last four are what comes of an answer that is not Barbican's.
_TROUBLE: Final = (
    CastellanException,
    keystoneauth1.exceptions.ClientException,
    OSError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)

_LARGEST: Final = 1 << 20  # bytes of a file


class Certificates(Protocol):
    """Threads may share it."""

    def get(self, certificate_id: str) -> x509.Certificate:
        """Return a certificate.

        Raises:
            ImageUnacceptable: there is none of that id, or it is no certificate.
            ImageSourceUnavailable: it may work another time.
        """


class CertificateDirectory:
    """A directory of PEM files named `<id>.pem`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, certificate_id: str) -> x509.Certificate:
        path = self._directory / f"{_canonical(certificate_id)}.pem"
        try:
            with io.FileIO(path, opener=_opened) as file:
                data = file.read(_LARGEST)
        except FileNotFoundError as e:
            raise _unknown(certificate_id, f"there is no file {path}") from e
        except OSError as e:
            raise ImageSourceUnavailable(
                f"the certificate {path} cannot be read: {e.strerror}",
                "let the agent's user read [glance] certificate_directory and its files",
            ) from e
        try:
            return x509.load_pem_x509_certificate(data)
        except ValueError as e:
            raise _unknown(certificate_id, f"{path} is no X.509 certificate in PEM: {e}") from e


class KeyManager:
    """castellan's, asked with the credentials of an image service's session."""

    def __init__(self, session: Session | None, conf: cfg.ConfigOpts) -> None:
        """castellan finds its own options in `conf`.

        `session`: of the image service, None where there is none. Its
        credentials are used unless `[key_manager]` has some.
        """
        self._session = session
        self._conf = conf

    def get(self, certificate_id: str) -> x509.Certificate:
        known_as = _canonical(certificate_id)
        try:
            manager = key_manager.API(self._conf)
            found = manager.get(self._context(), known_as)
        except ManagedObjectNotFoundError as e:
            raise _unknown(certificate_id, "the key manager does not have it") from e
        except _TROUBLE as e:
            raise ImageSourceUnavailable(
                f"certificate {certificate_id} cannot be had from the key manager: "
                f"{type(e.__cause__ or e).__name__}",
                "check that it runs, and [key_manager] and the section of its backend; without an "
                "auth_type there, the credentials are those of [glance]",
            ) from e
        if not isinstance(found, X509):
            raise _unknown(certificate_id, "what the key manager has is no certificate")
        try:
            return x509.load_der_x509_certificate(cast("bytes", found.get_encoded()))
        except ValueError as e:
            raise _unknown(certificate_id, f"it is no X.509 certificate: {e}") from e

    def _context(self) -> Credential | RequestContext:
        if self._conf.key_manager.auth_type:
            return credential_factory(self._conf)
        return _Context(self._session)


class _Context(RequestContext):
    """How castellan takes a plugin of keystoneauth."""

    def __init__(self, session: Session | None) -> None:
        super().__init__()
        self._session = session

    def get_auth_plugin(self) -> BaseAuthPlugin | None:
        return None if self._session is None else self._session.auth


def _opened(path: str, flags: int) -> int:
    # A FIFO would keep us waiting for its writer.
    return os.open(path, flags | os.O_NONBLOCK)


def _canonical(certificate_id: str) -> str:
    # It comes from a property of an image, where the owner can write anything,
    # and becomes part of a path or a URL.
    try:
        return str(uuid.UUID(certificate_id))
    except ValueError as e:
        raise _unknown(f"{certificate_id!r:.80}", "an id is a UUID") from e


def _unknown(certificate_id: str, reason: str) -> ImageUnacceptable:
    return ImageUnacceptable(
        f"certificate {certificate_id} is not known: {reason}",
        "put it where [glance] certificate_source says, or correct the image's property "
        "img_signature_certificate_uuid",
    )
