"""The running record of a job, over a real journal and a clock that a test turns."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import ImageSourceUnavailable
from agent.job import parse
from agent.journal import Journal, digest_of
from agent.recorder import Recorder
from agent.report import JobReport, PhaseReport, Progress, Role, Status, TaskState

DOWNLOADING = TaskState.IMAGE_DOWNLOADING
RESOLVING = TaskState.IMAGE_RESOLVING


class Clock:
    """Stands still until somebody sets it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    request = parse({"action": "fetch", "image": {"id": "img-1"}})
    report = JobReport(
        id="job-1",
        action=request.action,
        status=Status.QUEUED,
        request_id="req-1",
        created_at=0,
        updated_at=0,
    )
    journal.accept(request, report, body_digest=digest_of(request))
    yield journal
    journal.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(journal: Journal, clock: Clock) -> Recorder:
    return new_recorder(journal, clock)


def new_recorder(journal: Journal, clock: Clock) -> Recorder:
    return Recorder(journal, journal.get("job-1"), now=lambda: 50.0, clock=clock)


def test_phase_is_told_when_it_begins(journal: Journal, recorder: Recorder) -> None:
    recorder.phase(RESOLVING)
    assert [event.message for event in journal.events(0)][1:] == ["image resolving"]
    report = journal.get("job-1").report
    assert (report.status, report.task_state) == (Status.BUILD, RESOLVING)
    assert report.updated_at == 50.0


def test_note_goes_with_the_next_entry(journal: Journal, recorder: Recorder) -> None:
    recorder.note(domain_xml="<domain/>")
    assert recorder.report.domain_xml == "<domain/>"
    assert journal.get("job-1").report.domain_xml is None
    recorder.phase(RESOLVING)
    assert [job.report.domain_xml for job in journal.jobs()] == ["<domain/>"]


def test_timeline_adds_up_phases_that_come_back(
    journal: Journal, recorder: Recorder, clock: Clock
) -> None:
    for phase, at in ((RESOLVING, 0.0), (DOWNLOADING, 1.0), (RESOLVING, 3.0), (DOWNLOADING, 3.5)):
        clock.seconds = at
        recorder.phase(phase)
    recorder.count(received=100, resumed=10)
    recorder.count(received=5, resumed=0)
    clock.seconds = 10.0
    recorder.finish(Status.DONE, "done")

    report = journal.get("job-1").report
    assert report.timeline == (
        PhaseReport(phase=RESOLVING, seconds=1.5),
        PhaseReport(phase=DOWNLOADING, seconds=8.5, bytes=105, resumed=10),
    )
    assert (report.status, report.task_state, report.error) == (Status.DONE, None, None)


def test_timeline_goes_on_after_a_restart_without_the_time_between(
    journal: Journal, recorder: Recorder, clock: Clock
) -> None:
    recorder.progress(Progress(phase=DOWNLOADING))
    recorder.count(received=100, resumed=0)
    clock.seconds = 2.0
    recorder.progress(Progress(phase=TaskState.IMAGE_VERIFYING))

    clock.seconds = 1000.0
    again = new_recorder(journal, clock)
    again.phase(DOWNLOADING)
    again.count(received=7, resumed=93)
    clock.seconds = 1001.0
    again.finish(Status.DONE, "done")

    assert again.report.timeline == (
        PhaseReport(phase=DOWNLOADING, seconds=3.0, bytes=107, resumed=93),
        PhaseReport(phase=TaskState.IMAGE_VERIFYING, seconds=0.0),
    )


def test_progress_begins_its_phase_once_and_is_never_journaled(
    journal: Journal, recorder: Recorder
) -> None:
    for done in (1, 2, 3):
        recorder.progress(Progress(phase=DOWNLOADING, bytes_done=done))
    assert recorder.report.progress == Progress(phase=DOWNLOADING, bytes_done=3)
    known = journal.get("job-1").report
    assert (known.task_state, known.progress) == (DOWNLOADING, None)
    assert len(journal.events(0)) == 2
    recorder.phase(TaskState.SPAWNING)
    assert recorder.report.progress is None


def test_events_say_of_which_image_a_phase_is(journal: Journal, recorder: Recorder) -> None:
    for role in (Role.KERNEL, Role.ROOT):
        for phase in (DOWNLOADING, TaskState.IMAGE_VERIFYING):
            recorder.progress(Progress(phase=phase, role=role))
    assert [event.message for event in journal.events(0)][1:] == [
        "image downloading (kernel)",
        "image verifying (kernel)",
        "image downloading (root)",
        "image verifying (root)",
    ]


def test_error_names_the_phase_in_which_it_came(journal: Journal, recorder: Recorder) -> None:
    recorder.phase(DOWNLOADING)
    recorder.finish(Status.ERROR, "no", ImageSourceUnavailable("Glance is away", "start it"))
    report = journal.get("job-1").report
    assert report.error is not None
    assert report.error.model_dump() == {
        "code": "ImageSourceUnavailable",
        "message": "Glance is away",
        "hint": "start it",
        "retriable": True,
        "phase": DOWNLOADING,
    }
    assert (report.status, report.task_state) == (Status.ERROR, None)
