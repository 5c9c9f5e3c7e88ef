"""Where certificates come from: a directory, and Barbican as castellan speaks to it."""

import http.server
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keystoneauth1.session import Session
from keystoneauth1.token_endpoint import Token
from oslo_config import cfg

from agent import options
from agent.certificates import CertificateDirectory, KeyManager
from agent.errors import ImageSourceUnavailable, ImageUnacceptable
from tests.signing import Signer

TOKEN = "the-token"


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer.make()


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


# A directory


def test_a_certificate_is_found_by_its_id(tmp_path: Path, signer: Signer) -> None:
    (tmp_path / f"{signer.certificate_id}.pem").write_bytes(pem(signer.certificate))
    certificates = CertificateDirectory(tmp_path)
    assert certificates.get(signer.certificate_id.upper()) == signer.certificate


@pytest.mark.parametrize("wrong", ["../secret", "secret", "/etc/passwd", "", "x" * 5000])
def test_what_is_no_uuid_never_becomes_a_path(tmp_path: Path, signer: Signer, wrong: str) -> None:
    (tmp_path / "secret.pem").write_bytes(pem(signer.certificate))
    (tmp_path / "certificates").mkdir()
    with pytest.raises(ImageUnacceptable, match="an id is a UUID"):
        CertificateDirectory(tmp_path / "certificates").get(wrong)


def test_what_is_no_certificate_is_said_to_be_none(tmp_path: Path) -> None:
    known = str(uuid.uuid4())
    path = tmp_path / f"{known}.pem"
    certificates = CertificateDirectory(tmp_path)
    with pytest.raises(ImageUnacceptable, match="there is no file"):
        certificates.get(known)
    path.write_text("no certificate")
    with pytest.raises(ImageUnacceptable, match=r"is no X\.509 certificate"):
        certificates.get(known)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ImageUnacceptable, match=r"is no X\.509 certificate"):
        certificates.get(known)
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageSourceUnavailable, match="cannot be read"):
        certificates.get(known)


# A key manager


class Barbican(http.server.ThreadingHTTPServer):
    """As much of Barbican's API as castellan asks for a secret."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secrets: dict[str, tuple[str, bytes]] = {}
        self.status: int | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Barbican

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.server.status is not None and parts != [""]:
            self._answer(self.server.status, "application/json", b"{}")
        elif self.headers.get("X-Auth-Token") != TOKEN:
            self._answer(401, "application/json", b"{}")
        elif parts[:2] == ["v1", "secrets"] and parts[2] in self.server.secrets:
            kind, payload = self.server.secrets[parts[2]]
            if parts[3:] == ["payload"]:
                self._answer(200, "application/octet-stream", payload)
            else:
                self._answer(200, "application/json", self._metadata(parts[2], kind))
        elif parts == [""]:
            self._answer(200, "application/json", self._versions())
        else:
            body = {"code": 404, "title": "Not Found", "description": "Secret not found."}
            self._answer(404, "application/json", json.dumps(body).encode())

    def _versions(self) -> bytes:
        version = {
            "id": "v1",
            "status": "CURRENT",
            "min_version": "1.0",
            "max_version": "1.1",
            "links": [{"rel": "self", "href": f"{self.server.url}/v1/"}],
        }
        return json.dumps({"versions": [version]}).encode()

    def _metadata(self, secret_id: str, kind: str) -> bytes:
        secret = {
            "secret_ref": f"{self.server.url}/v1/secrets/{secret_id}",
            "name": "a certificate",
            "secret_type": kind,
            "status": "ACTIVE",
            "created": "2026-01-01T00:00:00",
            "content_types": {"default": "application/octet-stream"},
            "algorithm": None,
            "bit_length": None,
            "mode": None,
            "expiration": None,
        }
        return json.dumps(secret).encode()

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def barbican() -> Iterator[Barbican]:
    with Barbican() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def configuration() -> cfg.ConfigOpts:
    """As the agent has it where the configuration says nothing."""
    conf = cfg.ConfigOpts()
    for section, opts in options.declared().items():
        conf.register_opts(opts, group=None if section == "DEFAULT" else section)
    conf([], default_config_files=[])
    return conf


@pytest.fixture
def key_manager(barbican: Barbican) -> KeyManager:
    session = Session(auth=Token(barbican.url, TOKEN))
    return KeyManager(session, configuration())


def test_barbican_is_asked_with_the_credentials_for_glance(
    barbican: Barbican, key_manager: KeyManager, signer: Signer
) -> None:
    barbican.secrets[signer.certificate_id] = ("certificate", pem(signer.certificate))
    assert key_manager.get(signer.certificate_id) == signer.certificate


def test_a_secret_that_is_no_certificate_and_one_that_is_not_there(
    barbican: Barbican, key_manager: KeyManager
) -> None:
    passphrase = str(uuid.uuid4())
    barbican.secrets[passphrase] = ("passphrase", b"secret")
    with pytest.raises(ImageUnacceptable, match="is no certificate"):
        key_manager.get(passphrase)
    with pytest.raises(ImageUnacceptable, match="does not have it"):
        key_manager.get(str(uuid.uuid4()))


@pytest.mark.parametrize("status", [500, 503, 401])
def test_a_barbican_in_trouble_may_do_better_another_time(
    barbican: Barbican, key_manager: KeyManager, signer: Signer, status: int
) -> None:
    barbican.secrets[signer.certificate_id] = ("certificate", pem(signer.certificate))
    barbican.status = status
    with pytest.raises(ImageSourceUnavailable, match="cannot be had from the key manager"):
        key_manager.get(signer.certificate_id)


def test_without_credentials_there_is_no_barbican() -> None:
    with pytest.raises(ImageSourceUnavailable, match="cannot be had from the key manager"):
        KeyManager(None, configuration()).get(str(uuid.uuid4()))
