"""What callers get from the agent: over a real journal, worker and image cache."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.cancellation import Cancellation
from agent.errors import IdempotencyConflict, InvalidJob, NotFound
from agent.hypervisor import Hypervisor
from agent.instances import InstanceRecord
from agent.job import ImagesType, JobRequest
from agent.journal import Journal
from agent.recorder import Recorder
from agent.report import Status, TaskState
from agent.service import Agent
from agent.worker import Worker
from tests.cache_kit import CacheKit, Source
from tests.worker_kit import no_file_grows

LIMIT_S = 20.0


class Host:
    """An agent whose only work is to delete: it forgets the instance."""

    def __init__(self, directory: Path) -> None:
        self.kit = CacheKit(directory=directory / "instances", source=Source())
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.journal = Journal(directory / "journal.db")
        self.worker = Worker(self.journal, self._execute, concurrency=1, untouched=lambda _: True)
        self.agent = Agent(
            journal=self.journal,
            worker=self.worker,
            image_cache=self.kit.cache,
            store=self.kit.store,
            usage=self.kit.usage,
            pruner=self.kit.pruner,
            verifier=self.kit.verifier,
            source=self.kit.source,
            instances=self.kit.instances,
            hypervisor=Hypervisor("test:///default", virt_type="qemu"),
            helper_alive=lambda: True,
        )
        self.worker.start()

    def _execute(self, request: JobRequest, recorder: Recorder, _: Cancellation) -> None:
        assert request.instance is not None
        assert request.instance.uuid is not None
        recorder.phase(TaskState.DELETING)
        self.begun.set()
        assert self.gate.wait(LIMIT_S)
        self.kit.instances.remove(request.instance.uuid)
        recorder.finish(Status.DONE, "the instance is gone")

    def add(self, name: str, uuid_: str | None = None) -> InstanceRecord:
        record = InstanceRecord(
            uuid=uuid_ or str(uuid.uuid4()),
            name=name,
            job_id="job",
            created_at=time.time(),
            image_id="img-1",
            images_type=ImagesType.QCOW2,
        )
        self.kit.instances.write(record)
        return record

    def delete(self, key: str | None = None, **instance: str) -> str:
        document: dict[str, object] = {"action": "delete", "instance": instance}
        if key is not None:
            document["idempotency_key"] = key
        report = self.agent.submit(document, request_id="req-1")
        assert self.agent.wait(report.id, LIMIT_S).status is Status.DONE
        return report.id


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    assert host.worker.drain(LIMIT_S)
    host.kit.cache.close(LIMIT_S)
    host.journal.close()


def test_a_delete_sent_again_with_its_key_is_the_same_job(host: Host) -> None:
    host.add("web-1")
    first = host.delete(key="k", name="web-1")
    assert host.kit.instances.all() == []
    assert host.delete(key="k", name="web-1") == first
    with pytest.raises(IdempotencyConflict):
        host.delete(key="k", name="web-2")
    with pytest.raises(NotFound):
        host.delete(name="web-1")


def test_a_name_that_is_not_the_one_of_the_uuid_deletes_nothing(host: Host) -> None:
    one, other = host.add("web-1"), host.add("web-2")
    with pytest.raises(InvalidJob, match="is called web-1, not web-2"):
        host.delete(uuid=one.uuid, name="web-2")
    assert {record.uuid for record in host.kit.instances.all()} == {one.uuid, other.uuid}
    host.delete(uuid=one.uuid, name="web-1")
    assert host.kit.instances.all() == [other]


def test_a_name_is_never_taken_for_a_uuid(host: Host) -> None:
    wanted = str(uuid.uuid4())
    impostor = host.add(wanted)  # no job can call it so any more
    host.add("web-1", uuid_=wanted)
    report = host.agent.delete_instance(wanted, request_id="req-1")
    assert host.agent.wait(report.id, LIMIT_S).status is Status.DONE
    assert host.kit.instances.all() == [impostor]


def test_jobs_are_listed_by_what_they_are_though_the_journal_cannot_be_written(host: Host) -> None:
    host.add("web-1")
    host.gate.clear()
    report = host.agent.submit(
        {"action": "delete", "instance": {"name": "web-1"}}, request_id="req-1"
    )
    listed: dict[Status | None, list[Status]] = {}
    with no_file_grows():
        assert host.begun.wait(LIMIT_S)
        for status in (Status.QUEUED, Status.BUILD, None):
            listed[status] = [job.status for job in host.agent.jobs(status)]
    host.gate.set()
    assert host.agent.wait(report.id, LIMIT_S).status is Status.DONE
    assert listed == {Status.QUEUED: [], Status.BUILD: [Status.BUILD], None: [Status.BUILD]}
    assert [job.id for job in host.agent.jobs(Status.DONE)] == [report.id]


@pytest.mark.parametrize("offset", [3, 10**6, 2**63 - 1])
def test_a_console_is_read_from_any_offset(host: Host, offset: int) -> None:
    record = host.add("web-1")
    host.kit.instances.console_of(record.uuid).write_bytes(b"login:")
    piece = host.agent.console(record.uuid, offset)
    assert (piece.data, piece.complete) == (b"login:"[offset:], True)
