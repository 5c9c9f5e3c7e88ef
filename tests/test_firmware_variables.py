"""What a firmware keeps of an instance when a rebuild fails."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.domain_facts import sources_of
from agent.errors import AgentStopping, Cancelled, HypervisorError
from agent.rebuild import rebuild
from agent.recorder import Recorder
from tests.change_kit import (
    Refusing,
    accepted,
    files,
    queued,
    record,
    refusing,
    second_image,
    with_uefi,
)
from tests.site_kit import Site, site

__all__ = ["refusing", "site"]


def test_variables_of_the_firmware_that_a_failed_rebuild_had_to_give_up_are_told_of(
    site: Site, refusing: Refusing
) -> None:
    with_uefi(site)
    before = record(site), site.hypervisor.xml(site.uuid), files(site)
    refusing.refused = str(site.directory / "disk.rebuilt")
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})

    with pytest.raises(
        HypervisorError, match=r"says no; .* is gone, .*; its disks are as they were$"
    ):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )

    assert (record(site), site.hypervisor.xml(site.uuid), files(site)) == before
    assert site.hypervisor.state(site.uuid) == "running"
    assert site.hypervisor.starts_with_host(site.uuid)


def test_instance_whose_firmware_gets_its_first_variables_has_lost_none(
    site: Site, refusing: Refusing
) -> None:
    site.run(libvirt={})
    refusing.refused = str(site.directory / "disk.rebuilt")
    image_id = second_image(site, hw_firmware_type="uefi")
    request, recorder = accepted(site, "rebuild", image={"id": image_id})
    with pytest.raises(HypervisorError, match=r"QEMU says no$"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=refusing), request, recorder, Cancellation()
        )


class Keeping(Refusing):
    """Keeps variables as QEMU's driver does: from a start until the domain is undefined."""

    kept: str | None = None
    """On which root disk the firmware was that has begun them."""
    failures: tuple[Exception, ...] = ()
    """They come, each once, instead of the definition of a domain on the old disk."""

    def define(self, xml: str) -> None:
        if self.failures and "disk.rebuilt" not in xml:
            failure, *others = self.failures
            self.failures = tuple(others)
            raise failure
        super().define(xml)

    def start(self, uuid: str) -> None:
        (root,) = sources_of(self.xml(uuid))
        self.kept = self.kept or Path(root).name
        super().start(uuid)

    def undefine(self, uuid: str) -> None:
        super().undefine(uuid)
        self.kept = None


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    hypervisor = Keeping("test:///default", virt_type="test")
    hypervisor.kept = "since it was made"
    yield hypervisor
    hypervisor.close()


def test_variables_that_nothing_has_touched_outlive_a_rebuild_that_fails(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (HypervisorError("defining: no answer"),)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})

    with pytest.raises(HypervisorError, match=r"no answer; .* may be gone"):
        rebuild(
            dataclasses.replace(site.host, hypervisor=keeping), request, recorder, Cancellation()
        )

    assert keeping.kept == "since it was made"
    assert site.hypervisor.state(site.uuid) == "running"


def test_variables_that_nothing_has_touched_outlive_a_crash_and_a_cancellation(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (AgentStopping("enough"),)
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(AgentStopping):
        rebuild(host, request, recorder, Cancellation())
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))

    with pytest.raises(Cancelled):
        rebuild(host, request, Recorder(site.journal, queued(site, recorder)), cancellation)

    assert keeping.kept == "since it was made"
    assert site.hypervisor.state(site.uuid) == "running"


def test_variables_that_nothing_has_touched_outlive_the_next_rebuild(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.failures = (HypervisorError("defining: no answer"),)
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError):
        rebuild(host, request, recorder, Cancellation())

    image = {"id": second_image(site, hw_firmware_type="uefi")}
    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(host, request, recorder, Cancellation())

    assert keeping.kept == "since it was made"


def test_old_domain_does_not_get_the_variables_of_the_new_one(site: Site, keeping: Keeping) -> None:
    with_uefi(site)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(HypervisorError, match="QEMU says no"):
        rebuild(host, request, recorder, Cancellation())
    assert keeping.kept == "disk"


def test_variables_since_the_old_domain_is_back_are_kept(site: Site, keeping: Keeping) -> None:
    with_uefi(site)
    before = site.hypervisor.xml(site.uuid)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError):
        rebuild(host, request, recorder, Cancellation())
    # Its owner goes back by hand.
    keeping.define(before)
    keeping.kept = "since it is back"
    keeping.refused = None

    image = {"id": second_image(site, hw_firmware_type="uefi")}
    request, recorder = accepted(site, "rebuild", image=image)
    rebuild(host, request, recorder, Cancellation())

    assert keeping.kept == "since it is back"


def test_disks_are_not_said_to_be_as_they_were_when_nothing_is_undone(
    site: Site, keeping: Keeping
) -> None:
    with_uefi(site)
    keeping.refused = str(site.directory / "disk.rebuilt")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    image = {"id": second_image(site)}
    request, recorder = accepted(site, "rebuild", image=image, on_failure="keep")
    with pytest.raises(HypervisorError, match=r"TPM had kept is gone, .* recovery key$"):
        rebuild(host, request, recorder, Cancellation())


def test_disks_are_not_said_to_be_as_they_were_when_the_undoing_fails(
    site: Site, keeping: Keeping, caplog: pytest.LogCaptureFixture
) -> None:
    with_uefi(site)
    keeping.failures = HypervisorError("no answer"), HypervisorError("no answer again")
    host = dataclasses.replace(site.host, hypervisor=keeping)
    request, recorder = accepted(site, "rebuild", image={"id": second_image(site)})
    with pytest.raises(HypervisorError, match=r"TPM had kept may be gone, .* recovery key$"):
        rebuild(host, request, recorder, Cancellation())
    assert "is left half rebuilt: no answer again" in caplog.text
