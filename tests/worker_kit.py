"""A journal, and the workers of an agent that is restarted, for the tests of `agent.worker`."""

import logging
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import logs
from agent.cancellation import Cancellation
from agent.errors import BackendError, BootwrightError
from agent.job import JobRequest, parse
from agent.journal import Journal, digest_of
from agent.recorder import Recorder
from agent.report import JobReport, Status, TaskState
from agent.worker import Worker
from tests.waiting import LIMIT_S, until

UUID = "0b46a3c6-25a5-4b9c-8b3c-9f4dd5a5a2f1"


class Work:
    """An `execute` that waits at its gate and then does what the job's name says."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.lock = threading.Lock()
        self.begun: list[str] = []
        self.interrupted: list[BootwrightError] = []
        self.at_once = 0
        self.most_at_once = 0

    def __call__(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        assert request.instance is not None
        with self.lock:
            self.begun.append(recorder.report.id)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            recorder.phase(TaskState.SPAWNING)
            cancellation.check()
            while not self.gate.is_set():
                cancellation.wait(0.01)
            match request.instance.name:
                case "refused":
                    raise BackendError("no such disk", "make one")
                case "defect":
                    raise ZeroDivisionError
                case _:
                    recorder.finish(Status.ACTIVE, "the domain is running")
        except BootwrightError as e:
            self.interrupted.append(e)
            raise
        finally:
            with self.lock:
                self.at_once -= 1


class Host:
    """A journal and, one after the other, the workers of an agent that is restarted."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        self.work = Work()
        self.worker = Worker(self.journal, self.work, concurrency=2, untouched=lambda _: True)

    def accept(self, job_id: str, name: str = "web-1", **fields: object) -> None:
        self._accept(
            job_id,
            {
                "instance": {"name": name, "uuid": UUID},
                "image": {"id": "img-1"},
                "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
                **fields,
            },
        )

    def accept_delete(self, job_id: str, uuid: str = UUID) -> None:
        instance = {"name": "web-1", "uuid": uuid}
        self._accept(job_id, {"action": "delete", "instance": instance})

    def _accept(self, job_id: str, document: dict[str, object]) -> None:
        request = parse(document)
        now = time.time()
        report = JobReport(
            id=job_id,
            action=request.action,
            status=Status.QUEUED,
            request_id="req-1",
            created_at=now,
            updated_at=now,
        )
        self.journal.accept(request, report, body_digest=digest_of(request))
        self.worker.enqueue(job_id)

    def restart(self) -> None:
        """Stop, and have another worker for what is unfinished; it does not run yet."""
        assert self.worker.drain(LIMIT_S)
        self.go_on()

    def go_on(self) -> None:
        """Have the worker of the agent that comes after this one."""
        self.work = Work()
        self.worker = Worker(self.journal, self.work, concurrency=2, untouched=lambda _: True)
        for job in self.journal.unfinished():
            self.worker.enqueue(job.report.id)

    def interrupt(self, job_id: str, name: str = "web-1") -> None:
        """Have a job begin and the agent stop."""
        self.accept(job_id, name)
        self.worker.start()
        self.until_begun(job_id)
        self.restart()
        assert self.journal.get(job_id).report.status is Status.BUILD

    def until_begun(self, job_id: str) -> None:
        until(lambda: job_id in self.work.begun)

    def final(self, job_id: str) -> JobReport:
        return until(
            lambda: report if (report := self.journal.get(job_id).report).status.final else None
        )


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "journal.db")
    yield host
    assert host.worker.drain(LIMIT_S)
    host.journal.close()


@pytest.fixture
def entries() -> Iterator[list[dict[str, str]]]:
    """What the worker writes to systemd's journal."""
    sent: list[dict[str, str]] = []

    def send(message: str, **fields: str) -> None:
        sent.append({"MESSAGE": message, **fields})

    handler = logs.JournalHandler(send)
    logger = logging.getLogger("agent.worker")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield sent
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@contextmanager
def no_file_grows() -> Iterator[None]:
    """Have every write to a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
