"""Which job goes first: what changes or deletes an instance, and what waits for that."""

from pathlib import Path

from agent.cancellation import Cancellation
from agent.journal import Job, Journal
from agent.report import Status
from agent.worker import Worker
from tests.waiting import LIMIT_S, until
from tests.worker_kit import UUID, Host, entries, host, no_file_grows

__all__ = ["entries", "host"]


def test_job_accepted_after_a_delete_waits_for_it_and_is_not_cancelled(host: Host) -> None:
    host.accept_delete("delete")
    host.accept("boot")
    host.accept_delete("again")
    host.worker.start()
    host.until_begun("delete")

    host.worker.settle(UUID, "delete", Cancellation(LIMIT_S))
    host.work.gate.set()

    assert host.final("boot").status is Status.ACTIVE
    host.final("again")
    assert host.work.begun == ["delete", "boot", "again"]


def test_job_that_changes_an_instance_waits_for_those_accepted_before_it(host: Host) -> None:
    host.accept("boot")
    host.accept("rescue", action="rescue")
    host.accept("unrescue", action="unrescue")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")
    assert set(host.work.begun) == {"boot", "other"}
    host.work.gate.set()
    host.final("unrescue")
    assert [job for job in host.work.begun if job != "other"] == ["boot", "rescue", "unrescue"]


def test_job_that_waits_for_a_delete_holds_up_nobody(host: Host) -> None:
    host.accept_delete("delete")
    for number in range(4):
        host.accept(f"boot-{number}")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")
    assert set(host.work.begun) == {"delete", "other"}
    host.work.gate.set()
    assert [host.final(f"boot-{number}").status for number in range(4)] == [Status.ACTIVE] * 4


def test_job_waits_no_longer_for_a_delete_that_was_cancelled(host: Host) -> None:
    host.accept_delete("delete")
    host.accept("boot")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")

    host.worker.cancel("delete", "cancelled on request")

    host.until_begun("boot")
    host.work.gate.set()
    assert host.final("boot").status is Status.ACTIVE


def test_job_that_waits_for_another_ends_at_its_deadline_though_nobody_is_free(host: Host) -> None:
    host.accept("boot")
    other = "11111111-2222-4333-8444-555555555555"
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=0.3)
    host.accept("unrescue", action="unrescue")
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.until_begun("other")

    report = host.final("rescue")

    assert report.error is not None
    assert (report.status, report.error.code) == (Status.ERROR, "DeadlineExceeded")
    assert {running.id for running in host.worker.running()} == {"boot", "other"}
    host.work.gate.set()
    host.final("unrescue")
    assert "rescue" not in host.work.begun


def test_job_that_waits_for_another_keeps_its_deadline_whatever_ends(host: Host) -> None:
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=1)
    for number in range(2):
        host.accept(
            f"other-{number}",
            instance={"name": "web-2", "uuid": f"{number}1111111-2222-4333-8444-555555555555"},
        )
    host.until_begun("other-0")

    # The worker that gets free has another job to do before it looks at the rescue again.
    host.worker.cancel("other-0", "cancelled on request")
    host.until_begun("other-1")

    report = host.final("rescue")
    assert report.error is not None
    assert (report.status, report.error.code) == (Status.ERROR, "DeadlineExceeded")
    assert {running.id for running in host.worker.running()} == {"boot", "other-1"}
    assert "rescue" not in host.work.begun


def test_job_that_waits_for_another_is_in_the_queue_once(host: Host, tmp_path: Path) -> None:
    looks: list[str] = []

    class Watched(Journal):
        def unfinished_before(self, job_id: str, *, instance_uuid: str) -> list[Job]:
            looks.append(job_id)
            return super().unfinished_before(job_id, instance_uuid=instance_uuid)

    host.journal.close()
    host.journal = Watched(tmp_path / "journal.db")
    host.go_on()
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue")
    others = [f"other-{number}" for number in range(4)]
    for number, other in enumerate(others):
        host.accept(
            other,
            instance={"name": "web-2", "uuid": f"{number}1111111-2222-4333-8444-555555555555"},
        )
    for other in others:
        host.until_begun(other)
        host.worker.cancel(other, "cancelled on request")
        host.final(other)
    last = "a1111111-2222-4333-8444-555555555555"
    host.accept("last", instance={"name": "web-3", "uuid": last})
    host.until_begun("last")

    # At its turn, and once more after all that were in the queue by the time the first one ended.
    assert looks.count("rescue") == 2
    host.work.gate.set()
    assert host.final("rescue").status is Status.ACTIVE
    assert host.work.begun.count("rescue") == 1


def test_job_that_waits_for_another_ends_as_soon_as_it_is_cancelled(host: Host) -> None:
    host.accept("boot")
    host.accept("rescue", action="rescue", deadline_s=3600)
    other = "11111111-2222-4333-8444-555555555555"
    host.accept("other", instance={"name": "web-2", "uuid": other})
    host.worker.start()
    host.until_begun("other")

    host.worker.cancel("rescue", "cancelled on request")

    assert host.journal.get("rescue").report.status is Status.CANCELLED
    host.work.gate.set()
    host.final("boot")
    assert "rescue" not in host.work.begun


def test_what_an_earlier_run_made_is_undone_in_its_turn_though_the_deadline_has_passed(
    host: Host,
) -> None:
    touched: list[str] = []

    def untouched(job: Job) -> bool:
        touched.append(job.report.id)
        return False

    host.worker = Worker(host.journal, host.work, concurrency=2, untouched=untouched)
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=0.05)

    until(lambda: touched)

    assert host.work.begun == ["boot"]
    host.work.gate.set()
    report = host.final("rescue")
    assert report.error is not None
    assert report.error.code == "DeadlineExceeded"
    assert host.work.begun == ["boot", "rescue"]


def test_deadline_of_a_job_that_waits_is_recorded_as_soon_as_the_journal_can(
    host: Host, entries: list[dict[str, str]]
) -> None:
    host.worker = Worker(
        host.journal, host.work, concurrency=2, untouched=lambda _: True, again_s=0.01
    )
    host.accept("boot")
    host.worker.start()
    host.until_begun("boot")
    host.accept("rescue", action="rescue", deadline_s=1)
    with no_file_grows():
        until(lambda: entries)
        assert host.journal.get("rescue").report.status is Status.QUEUED
    assert host.final("rescue").status is Status.ERROR
    assert host.worker.alive()
    assert "once more in 0.01 s" in entries[0]["MESSAGE"]
    assert {entry.get("JOB_ID") for entry in entries} == {"rescue"}


def test_delete_settles_the_job_that_runs(host: Host) -> None:
    host.worker.start()
    host.accept("job-1")
    host.until_begun("job-1")
    host.accept_delete("job-2")
    host.worker.settle(UUID, "job-2", Cancellation(LIMIT_S))
    assert host.journal.get("job-1").report.status is Status.CANCELLED
    assert "job-1" not in {report.id for report in host.worker.running()}


def test_delete_ends_for_good_a_job_that_a_restart_would_go_on_with(host: Host) -> None:
    host.interrupt("job-1")
    host.accept_delete("job-2")
    host.worker.settle(UUID, "job-2", Cancellation(LIMIT_S))
    report = host.journal.get("job-1").report
    assert report.status is Status.CANCELLED
    assert report.error is not None
    assert "job-2" in report.error.message
    assert [job.report.id for job in host.journal.unfinished()] == ["job-2"]


def test_delete_leaves_the_jobs_of_other_instances_alone(host: Host) -> None:
    host.accept("job-1")
    other = "11111111-2222-4333-8444-555555555555"
    host.accept_delete("job-2", other)
    host.worker.settle(other, "job-2", Cancellation(LIMIT_S))
    assert host.journal.get("job-1").report.status is Status.QUEUED
