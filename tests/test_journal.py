"""The journal: a real SQLite file, closed and opened again, and cut off by SIGKILL."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import IdempotencyConflict, InsufficientFreeSpace, NotFound
from agent.job import Action, JobRequest, parse
from agent.journal import Journal, JournalUnusable, digest_of
from agent.report import JobReport, Status, TaskState

DAY_S = 86400.0


def request(name: str = "web-1", **fields: object) -> JobRequest:
    return parse(
        {
            "instance": {"name": name},
            "image": {"id": "img-1"},
            "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
            **fields,
        }
    )


def report(job_id: str, *, created_at: float = 100.0) -> JobReport:
    return JobReport(
        id=job_id,
        action=Action.BOOT,
        status=Status.QUEUED,
        request_id="req-1",
        created_at=created_at,
        updated_at=created_at,
    )


def accept(journal: Journal, job_id: str, wanted: JobRequest | None = None) -> JobReport:
    wanted = wanted or request()
    return journal.accept(wanted, report(job_id), body_digest=digest_of(wanted))


def test_a_job_is_found_by_its_key_and_by_its_body(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    wanted = request(idempotency_key="k")
    assert journal.by_key("k", digest_of(wanted)) is None
    accepted = accept(journal, "job-1", wanted)
    assert journal.by_key("k", digest_of(wanted)) == accepted
    with pytest.raises(IdempotencyConflict, match="job-1"):
        journal.by_key("k", digest_of(request("web-2")))
    journal.close()


def test_accepted_job_is_there_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    accepted = accept(journal, "job-1", request(deadline_s=60))
    journal.close()

    again = Journal(tmp_path / "journal.db")
    job = again.get("job-1")
    assert (job.request, job.report) == (request(deadline_s=60), accepted)
    assert [each.report.id for each in again.unfinished()] == ["job-1"]
    again.close()


def test_job_of_no_such_id_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="job-9"):
        Journal(tmp_path / "journal.db").get("job-9")


def test_journal_is_for_its_owner_alone(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.db")
    assert (tmp_path / "journal.db").stat().st_mode & 0o777 == 0o600


def test_same_key_and_body_is_the_same_job(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    first = accept(journal, "job-1", request(idempotency_key="k", request_id="req-a"))
    again = accept(journal, "job-2", request(idempotency_key="k", request_id="req-b"))
    assert again.id == first.id == "job-1"
    assert len(journal.jobs()) == len(journal.events(0)) == 1


def test_same_key_returns_the_job_as_it_has_become(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    accepted = accept(journal, "job-1", request(idempotency_key="k"))
    journal.record(accepted.model_copy(update={"status": Status.ACTIVE}), "the domain is running")
    assert accept(journal, "job-2", request(idempotency_key="k")).status is Status.ACTIVE


def test_same_key_with_another_body_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    accept(journal, "job-1", request(idempotency_key="k"))
    with pytest.raises(IdempotencyConflict, match="job-1"):
        accept(journal, "job-2", request("web-2", idempotency_key="k"))
    assert [job.report.id for job in journal.jobs()] == ["job-1"]
    accept(journal, "job-3", request("web-2"))


def test_jobs_come_in_the_order_of_their_acceptance_and_by_status(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    for number in (3, 1, 2):
        accept(journal, f"job-{number}")
    done = report("job-1").model_copy(update={"status": Status.DONE})
    journal.record(done, "done")
    assert [job.report.id for job in journal.jobs()] == ["job-3", "job-1", "job-2"]
    assert [job.report.id for job in journal.jobs((Status.DONE,))] == ["job-1"]
    assert [job.report.id for job in journal.unfinished()] == ["job-3", "job-2"]


def test_events_go_on_from_any_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    for number in range(5):
        accept(journal, f"job-{number}")
    seqs = [event.seq for event in journal.events(0)]
    assert seqs == sorted(set(seqs))
    assert journal.last_event() == seqs[-1]
    assert [event.job_id for event in journal.events(seqs[2])] == ["job-3", "job-4"]
    assert [event.seq for event in journal.events(0, limit=2)] == seqs[:2]
    assert journal.events(seqs[-1]) == []


def test_what_is_announced_lasts_once_it_has_been_told(tmp_path: Path) -> None:
    path = tmp_path / "before/journal.db"
    path.parent.mkdir()
    journal = Journal(path)
    running = accept(journal, "job-1").model_copy(update={"status": Status.BUILD})
    for phase in ("image resolving", "image downloading"):
        journal.announce(running, phase)
    assert journal.get("job-1").report == running
    # What a crash would leave: the file and its log as they are now.
    shutil.copytree(path.parent, tmp_path / "untold")
    told = journal.events(0)
    shutil.copytree(path.parent, tmp_path / "told")
    journal.close()

    assert [event.message for event in told[1:]] == ["image resolving", "image downloading"]
    untold = Journal(tmp_path / "untold/journal.db")
    assert untold.events(0) == told[:1]
    assert untold.get("job-1").report.status is Status.QUEUED
    untold.close()
    again = Journal(tmp_path / "told/journal.db")
    assert again.events(0) == told
    assert again.get("job-1").report == running
    again.close()


def test_what_is_announced_comes_before_what_is_recorded_after_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    running = accept(journal, "job-1").model_copy(update={"status": Status.BUILD})
    journal.announce(running, "spawning")
    accept(journal, "job-2")
    journal.announce(running, "still spawning")
    done = running.model_copy(update={"status": Status.DONE})
    journal.record(done, "done")
    assert [event.message for event in journal.events(0)] == [
        "boot accepted", "spawning", "boot accepted", "still spawning", "done"
    ]  # fmt: skip
    assert journal.get("job-1").report == done
    journal.close()


def test_what_cannot_be_written_at_all_is_in_nobody_s_way(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    accepted = accept(journal, "job-1")
    with pytest.raises(ValueError, match="surrogates"):
        journal.record(accepted.model_copy(update={"domain_xml": "\ud800"}), "done")
    accept(journal, "job-2")
    assert [event.job_id for event in journal.events(0)] == ["job-1", "job-2"]
    assert journal.get("job-1").report == accepted
    journal.close()


def test_jobs_are_counted_and_listed_as_announced(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    running = accept(journal, "job-1").model_copy(update={"status": Status.BUILD})
    journal.announce(running, "spawning")
    assert [job.report for job in journal.jobs((Status.BUILD,))] == [running]
    journal.announce(running.model_copy(update={"status": Status.QUEUED}), "back")
    assert journal.counts() == {Status.QUEUED: 1}
    journal.close()


def test_old_jobs_are_forgotten_with_their_events_and_unfinished_ones_never(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.db", now=lambda: 10 * DAY_S)
    for job_id in ("old", "old-unfinished"):
        accept(journal, job_id)
    wanted = request()
    journal.accept(wanted, report("new", created_at=9.5 * DAY_S), body_digest=digest_of(wanted))
    for job_id in ("old", "new"):
        finished = journal.get(job_id).report.model_copy(update={"status": Status.ERROR})
        journal.record(finished, "it failed")

    assert journal.forget(older_than_s=DAY_S) == 1

    assert [job.report.id for job in journal.jobs()] == ["old-unfinished", "new"]
    assert {event.job_id for event in journal.events(0)} == {"old-unfinished", "new"}


def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is no database " * 100)
    with pytest.raises(JournalUnusable, match="cannot be used"):
        Journal(path)
    assert path.read_bytes() == b"this is no database " * 100


def test_journal_that_the_system_does_not_open_is_no_other_agents(tmp_path: Path) -> None:
    with pytest.raises(JournalUnusable, match=r"cannot be opened: No such file.*agent's user"):
        Journal(tmp_path / "nowhere/journal.db")


def test_journal_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(JournalUnusable, match="newer release"):
        Journal(path)


_SCHEMA_1 = """
CREATE TABLE job (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    body_digest     TEXT NOT NULL,
    status          TEXT NOT NULL,
    created_at      REAL NOT NULL,
    request         TEXT NOT NULL,
    report          TEXT NOT NULL,
    cancelled       TEXT
);
CREATE INDEX job_status ON job (status);
CREATE TABLE event (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id     TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    time       REAL NOT NULL,
    status     TEXT NOT NULL,
    task_state TEXT,
    message    TEXT NOT NULL
);
CREATE INDEX event_job ON event (job_id);
PRAGMA user_version = 1;
"""


def test_journal_of_an_older_release_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    connection = sqlite3.connect(path)
    connection.executescript(_SCHEMA_1)
    wanted, known = request(idempotency_key="key-1"), report("old")
    connection.execute(
        "INSERT INTO job (id, idempotency_key, body_digest, status, created_at, request, report)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        ("old", "key-1", digest_of(wanted), known.status, 0.0, wanted.model_dump_json(),
         known.model_dump_json()),
    )  # fmt: skip
    connection.execute(
        "INSERT INTO event (job_id, time, status, message) VALUES ('old', 0, 'QUEUED', 'accepted')"
    )
    connection.commit()
    connection.close()

    for _ in range(2):  # also once it has become one of this release
        journal = Journal(path, now=lambda: 10 * DAY_S)
        again = journal.accept(wanted, report("again"), body_digest=digest_of(wanted))
        assert again == known
        journal.close()
    journal = Journal(path, now=lambda: 10 * DAY_S)
    journal.record(known.model_copy(update={"status": Status.DONE}), "done")
    first, second = journal.events(0)
    assert first.seq < second.seq
    assert journal.forget(older_than_s=DAY_S) == 1
    assert journal.events(0) == []
    accept(journal, "new")
    assert [event.seq for event in journal.events(0)] == [second.seq + 1]


# Whoever writes is killed the moment it says that something is durable.
_WRITER = """
import sys
from pathlib import Path
from agent.journal import Journal
from tests.test_journal import accept
journal = Journal(Path(sys.argv[1]))
for number in range(10**6):
    accept(journal, f"job-{number}")
    print(f"job-{number}", flush=True)
"""


def test_every_acknowledged_job_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(50)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    assert acknowledged[-1] != "job-999999"

    journal = Journal(path)
    known = [job.report.id for job in journal.jobs()]
    assert known[: len(acknowledged)] == acknowledged
    # The one it was killed before it could acknowledge may be there, whole; with its event.
    assert len(known) <= len(acknowledged) + 1
    assert [event.job_id for event in journal.events(0, limit=10**6)] == known
    journal.close()


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["accept", "phase", "finish", "read", "reopen"]),
        st.integers(min_value=0, max_value=3),
        st.sampled_from(list(TaskState)),
        st.sampled_from([status for status in Status if status.final]),
    ),
    max_size=25,
)


@given(steps=_STEPS)
@settings(max_examples=40, deadline=None)
def test_whatever_happens_jobs_and_events_survive_a_restart_at_any_point(
    steps: list[tuple[str, int, TaskState, Status]],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        journal = Journal(path)
        jobs: dict[str, JobReport] = {}
        events: list[tuple[str, Status, TaskState | None]] = []
        for step, number, phase, status in steps:
            job_id = f"job-{number}"
            match step:
                case "accept" if job_id not in jobs:
                    jobs[job_id] = accept(journal, job_id)
                case "phase" if job_id in jobs:
                    jobs[job_id] = jobs[job_id].model_copy(
                        update={"status": Status.BUILD, "task_state": phase}
                    )
                    journal.announce(jobs[job_id], "on its way")
                case "finish" if job_id in jobs:
                    jobs[job_id] = jobs[job_id].model_copy(
                        update={"status": status, "task_state": None}
                    )
                    journal.record(jobs[job_id], "at its end")
                case "read":
                    assert len(journal.events(0)) == len(events)
                    continue
                case "reopen":
                    journal.close()
                    journal = Journal(path)
                    continue
                case _:
                    continue
            events.append((job_id, jobs[job_id].status, jobs[job_id].task_state))
        journal.close()

        again = Journal(path)
        assert {job.report.id: job.report for job in again.jobs()} == jobs
        assert [(e.job_id, e.status, e.task_state) for e in again.events(0)] == events
        assert [job.report.id for job in again.unfinished()] == [
            job_id for job_id, known in jobs.items() if not known.status.final
        ]
        again.close()


def test_a_full_disk_is_said_to_be_one_and_leaves_the_journal_usable(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    try:
        (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")

        def fill() -> None:
            for number in range(200):
                accept(journal, f"job-{number}")

        with pytest.raises(InsufficientFreeSpace, match="journal"):
            fill()
        before = len(journal.jobs())
        journal._connection.execute("PRAGMA max_page_count = 1000000")

        accept(journal, "afterwards")

        assert len(journal.jobs()) == before + 1
    finally:
        journal.close()
