"""Signed images, and agents that demand signatures in different ways of one cache."""

import subprocess
from pathlib import Path

import pytest

from tests.cache_kit import CacheKit, Source, random_bytes
from tests.signing import Certificates, Signer, signatures

DATA = random_bytes(2)

KEY_TYPES = ("RSA-PSS", "DSA", "ECC_SECP384R1", "ECC_SECP521R1")


@pytest.fixture(scope="module")
def signers() -> dict[str, Signer]:
    return {key_type: Signer.make(key_type, key_type=key_type) for key_type in KEY_TYPES}


@pytest.fixture(scope="module")
def signer(signers: dict[str, Signer]) -> Signer:
    return signers["ECC_SECP384R1"]


class Hosts:
    """One cache, seen by agents that are configured in different ways."""

    def __init__(self, directory: Path, source: Source, certificates: Certificates) -> None:
        self.directory = directory
        self.source = source
        self.certificates = certificates

    def lax(self) -> CacheKit:
        """Demands nothing."""
        return self._kit(verify=False)

    def strict(self, *, require_hash: bool = True) -> CacheKit:
        return self._kit(verify=True, require_hash=require_hash)

    def trusting(self, *trusted: str) -> CacheKit:
        return CacheKit(
            directory=self.directory,
            source=self.source,
            signatures=signatures(self.certificates, verify=True, validate=True, trusted=trusted),
        )

    def _kit(self, *, verify: bool, require_hash: bool = True) -> CacheKit:
        return CacheKit(
            directory=self.directory,
            source=self.source,
            signatures=signatures(self.certificates, verify=verify),
            require_hash=require_hash,
        )


@pytest.fixture
def hosts(tmp_path: Path, source: Source, signer: Signer) -> Hosts:
    return Hosts(tmp_path / "instances", source, Certificates(signer))


def in_cache(kit: CacheKit) -> list[str]:
    """Every file of the cache that bears a base's name or is on its way to one."""
    return sorted(
        str(path.relative_to(kit.store.directory))
        for path in kit.store.directory.rglob("*")
        if path.is_file() and path.parent.name not in (".locks", ".hosts", ".pins")
    )


def qcow2_of(raw: bytes, work: Path) -> bytes:
    (work / "raw").write_bytes(raw)
    command: list[str | Path] = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        work / "raw",
        work / "qcow2",
    ]
    subprocess.run(command, check=True)
    return (work / "qcow2").read_bytes()
