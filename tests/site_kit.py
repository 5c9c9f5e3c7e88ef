"""A host for the jobs of a test: a real image cache, real disks, and libvirt's own test driver.

What needs QEMU is in functional/.
"""

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent.backends import Backends
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.build import Build
from agent.cancellation import Cancellation
from agent.disk import DiskType
from agent.host import Defaults, Host
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.job import ConfigDriveFormat, GuestFormat, ImagesType, JobRequest, parse
from agent.journal import Job, Journal, digest_of
from agent.layout import Formats
from agent.qemu_img import QemuImg
from agent.recorder import Recorder
from agent.report import JobReport, Status
from tests.cache_kit import CacheKit, Source, random_bytes

TEMPLATE = "<domain><os><type>hvm</type></os></domain>"


BROKEN_TEMPLATE = "<domain><name>somebody else</name></domain>"


class Site:
    """A host, and what other tools do to its libvirt."""

    def __init__(self, directory: Path) -> None:
        self.kit = CacheKit(directory=directory / "instances", source=Source())
        self.image: Image = self.kit.source.add(random_bytes(1))
        self.journal = Journal(directory / "journal.db")
        self.hypervisor = Hypervisor("test:///default", virt_type="test")
        self.host = Host(
            image_cache=self.kit.cache,
            backends=Backends({ImagesType.QCOW2: Qcow2(QemuImg()), ImagesType.RAW: Flat()}),
            instances=self.kit.instances,
            hypervisor=self.hypervisor,
            touch=self.touched,
            defaults=Defaults(
                virt_type="test",
                images_type=ImagesType.QCOW2,
                formats=Formats(
                    ephemeral=GuestFormat.EXT4,
                    config_drive=ConfigDriveFormat.ISO9660,
                    force_config_drive=False,
                ),
                cache_modes=dict.fromkeys(DiskType, "none"),
                discard="ignore",
            ),
        )
        self.uuid = str(uuid.uuid4())
        self.name = f"web-{self.uuid[:8]}"
        self.comes_meanwhile: str | None = None
        self.at_touch: list[tuple[str, bool]] = []
        """Of each refreshed base the name, and whether there was a root disk by then."""
        self.cancellation = Cancellation()

    @property
    def directory(self) -> Path:
        return self.kit.directory / self.uuid

    def touched(self, base: str) -> None:
        """Once the job has its base: what another tool defines while it is fetched."""
        self.at_touch.append((base, (self.directory / "disk").exists()))
        if self.comes_meanwhile is not None:
            self.hypervisor.define(self.comes_meanwhile)

    def foreign_domain(self) -> str:
        return (
            f"<domain type='test'><name>foreign-{self.uuid}</name><uuid>{self.uuid}</uuid>"
            "<memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>"
        )

    def accept(self, document: Mapping[str, object]) -> tuple[JobRequest, Job]:
        """Have the journal accept what a client has sent."""
        request = parse(document)
        report = JobReport(
            id=str(uuid.uuid4()),
            action=request.action,
            status=Status.QUEUED,
            request_id="req-1",
            created_at=0,
            updated_at=0,
        )
        self.journal.accept(request, report, body_digest=digest_of(request))
        return request, self.journal.get(report.id)

    def run(
        self, host: Host | None = None, recorder: type[Recorder] = Recorder, **fields: object
    ) -> JobReport:
        """Run one job that asks for `fields` beside the usual; raise as it does."""
        request, job = self.accept(
            {
                "instance": {"name": self.name, "uuid": self.uuid},
                "image": {"id": self.image.id},
                "flavor": {"vcpus": 1, "ram": 64, "disk": 1},
                "networks": [],
                "libvirt": {"domain_xml": TEMPLATE},
                **fields,
            }
        )
        record = recorder(self.journal, job)
        Build(host or self.host, request, record, self.cancellation).run()
        return record.report


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.hypervisor.destroy(site.uuid)
    # The test driver knows no flag to undefine a domain together with it.
    site.hypervisor.discard_saved_state(site.uuid)
    site.hypervisor.undefine(site.uuid)
    site.hypervisor.close()
    site.journal.close()
