"""Signed images from a real Glance, signed as Glance's documentation says: with openssl."""

import base64
import os
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.conftest import MakeAgent
from functional.harness.agent import Agent, Options
from functional.harness.glance import Glance
from functional.harness.guest import Guest

MIB = 1 << 20


def openssl(*arguments: str | Path) -> bytes:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True).stdout


@dataclass(frozen=True, kw_only=True, slots=True)
class Signing:
    """A signer, the authority that has issued its certificate, and the directory with both."""

    certificates: Path
    key: Path
    signer: str
    authority: str

    def properties(self, path: Path) -> dict[str, str]:
        """Return the properties of an image of that file, signed."""
        signature = openssl("dgst", "-sha256", "-sign", self.key, path)
        return {
            "img_signature": base64.b64encode(signature).decode(),
            "img_signature_hash_method": "SHA-256",
            "img_signature_key_type": "ECC_SECP384R1",
            "img_signature_certificate_uuid": self.signer,
        }

    def options(self, **glance: object) -> Options:
        return {
            "glance": {
                "verify_glance_signatures": True,
                "enable_certificate_validation": True,
                "default_trusted_certificate_ids": self.authority,
                "certificate_source": "directory",
                "certificate_directory": self.certificates,
                **glance,
            }
        }


@pytest.fixture(scope="module")
def signing(work: Path) -> Signing:
    root = work / "signing"
    root.mkdir(mode=0o755)
    signer, authority = str(uuid.uuid4()), str(uuid.uuid4())
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1", "-nodes")
    issuer = (root / f"{authority}.pem", root / "authority.key")
    openssl(
        *(*new, "-subj", "/CN=authority", "-days", "2", "-out", issuer[0], "-keyout", issuer[1]),
        *("-addext", "keyUsage=critical,keyCertSign"),
    )
    openssl(
        *(*new, "-subj", "/CN=signer", "-days", "2", "-CA", issuer[0], "-CAkey", issuer[1]),
        *("-out", root / f"{signer}.pem", "-keyout", root / "signer.key"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return Signing(certificates=root, key=root / "signer.key", signer=signer, authority=authority)


@pytest.fixture(scope="module")
def blob(work: Path) -> Path:
    path = work / "signed-blob"
    path.write_bytes(os.urandom(4 * MIB))
    return path


def upload(glance: Glance, path: Path, properties: dict[str, str], *, kind: str = "raw") -> str:
    """Make an image, its signature set afterwards: at an upload Glance verifies it itself."""
    image_id = glance.upload(path, disk_format=kind)
    if properties:
        glance.update(image_id, **properties)
    return image_id


def boot_job(image_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "instance": {"name": "signed"},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 2},
        "image": {"id": image_id},
        "networks": [],
        **fields,
    }


def leftovers(agent: Agent) -> list[Path]:
    return [
        path
        for path in agent.bases.rglob("*")
        if path.is_file() and path.parent.name not in (".locks", ".hosts", ".pins")
    ]


@pytest.fixture
def strict(make_agent: MakeAgent, signing: Signing) -> Agent:
    return make_agent(options=signing.options())


def test_a_signed_image_boots(
    strict: Agent, glance: Glance, guest: Guest, signing: Signing
) -> None:
    disk = guest.disk_qcow2
    image_id = upload(glance, disk, signing.properties(disk), kind="qcow2")

    result = strict.boot(boot_job(image_id))

    assert (result["status"], result["domain"]["state"]) == ("ACTIVE", "running")
    assert strict.json("image", "show", image_id)["certificate"] == signing.signer
    strict.run("instance", "delete", "signed")


@pytest.mark.parametrize("what", ["unsigned", "tampered", "not-trusted"])
def test_an_image_without_the_right_signature_is_refused_and_nothing_is_left(
    strict: Agent, glance: Glance, blob: Path, signing: Signing, what: str
) -> None:
    properties = {} if what == "unsigned" else signing.properties(blob)
    image = blob
    if what == "tampered":
        image = blob.with_name("tampered")
        image.write_bytes(b"x" + blob.read_bytes()[1:])
    image_id = upload(glance, image, properties)
    job = boot_job(image_id)
    if what == "not-trusted":
        job["image"]["trusted_certificates"] = [signing.signer]

    result = strict.boot(job, status=1)

    assert result["error"]["code"] == "ImageUnacceptable"
    assert leftovers(strict) == []
    assert glance.downloads(image_id) == (1 if what == "tampered" else 0)
    assert strict.json("instance", "list")["instances"] == []


def test_a_base_fetched_without_verification_is_not_handed_out_with_it(
    make_agent: MakeAgent, glance: Glance, blob: Path, signing: Signing
) -> None:
    right, wrong = signing.properties(blob), signing.properties(signing.key)
    good = upload(glance, blob, right)
    bad = upload(glance, blob, wrong)
    agent = make_agent()
    agent.json("image", "fetch", good, bad)
    downloads = glance.downloads(good), glance.downloads(bad)
    agent.stop()
    agent.configure_more(signing.options())
    agent.start()

    prepare = {"action": "prepare"}
    result = agent.boot(boot_job(bad, **prepare), status=1)
    assert result["error"]["code"] == "ImageUnacceptable"
    assert "the signature of image" in result["error"]["message"]
    result = agent.boot(boot_job(good, **prepare))
    assert result["image"]["source"] == "cache"
    assert (glance.downloads(good), glance.downloads(bad)) == downloads
