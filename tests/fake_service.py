"""An agent that lives in memory: obeys `agent.api.Service` and touches nothing."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from agent.errors import BackendError, IdempotencyConflict, NotFound
from agent.job import Action, parse
from agent.report import (
    ErrorReport,
    ImageReport,
    InstanceReport,
    JobReport,
    Progress,
    Status,
    TaskState,
)
from agent.views import (
    AgentStatus,
    CacheStatus,
    Check,
    ConsolePiece,
    Decision,
    Event,
    GcReport,
    ImageEntry,
    ImageState,
    InstanceView,
    Reason,
    Soundness,
    Verification,
)

INSTANCE_UUID = "7e0f2b7c-6a35-4a55-9f3e-6f0b8f0d1a11"


class FakeService:
    """Jobs run when they are looked at, or when `finish` says so if `hold` is set."""

    def __init__(self) -> None:
        self.hold = False
        self.failure: ErrorReport | None = None
        self.defect: Exception | None = None
        self.checks: tuple[Check, ...] = (Check(name="libvirt", ok=True, message="9.0.0"),)
        self.added: dict[str, bytes] = {}
        self.damaged: set[str] = set()
        self.console_output = b"Linux version 6.1\n" * 3
        self.console_gone = 0
        self.console_rotates = False
        self.changed = threading.Condition()
        self.waiting = 0
        """How many wait for a job or an event right now."""
        self.all_events: list[Event] = []
        self.all_jobs: dict[str, JobReport] = {}
        self._keys: dict[str, tuple[dict[str, object], str]] = {}
        self._instances: dict[str, InstanceView] = {}
        self._images: dict[str, ImageEntry] = {}

    def submit(self, document: dict[str, object], *, request_id: str) -> JobReport:
        if self.defect is not None:
            raise self.defect
        request = parse(document)
        if request.idempotency_key is not None:
            body, job_id = self._keys.setdefault(
                request.idempotency_key, (document, str(uuid.uuid4()))
            )
            if body != document:
                raise IdempotencyConflict("the key is taken by another job", "use another key")
            if job_id in self.all_jobs:
                return self.all_jobs[job_id]
        else:
            job_id = str(uuid.uuid4())
        instance = request.instance
        report = JobReport(
            id=job_id,
            action=request.action,
            status=Status.QUEUED,
            request_id=request.request_id or request_id,
            idempotency_key=request.idempotency_key,
            created_at=time.time(),
            updated_at=time.time(),
            instance=InstanceReport(uuid=INSTANCE_UUID, name=instance.name or "")
            if instance
            else None,
            image=ImageReport(id=request.image.id) if request.image else None,
        )
        self._put(report)
        if self.hold:
            progress = Progress(
                phase=TaskState.IMAGE_DOWNLOADING, bytes_done=1 << 20, bytes_total=4 << 20
            )
            self._put(
                report.model_copy(
                    update={
                        "status": Status.BUILD,
                        "task_state": TaskState.IMAGE_DOWNLOADING,
                        "progress": progress,
                    }
                )
            )
        else:
            self.finish(job_id)
        return report

    def finish(self, job_id: str) -> None:
        """Bring a job to its end."""
        report = self.all_jobs[job_id]
        if self.failure is not None:
            self._put(report.model_copy(update={"status": Status.ERROR, "error": self.failure}))
            return
        final = Status.ACTIVE if report.action is Action.BOOT else Status.DONE
        if report.instance is not None and report.action is Action.BOOT:
            self._instances[report.instance.name] = InstanceView(
                uuid=INSTANCE_UUID,
                name=report.instance.name,
                state="running",
                job_id=job_id,
                created_at=1.0,
            )
        if report.instance is not None and report.action is Action.DELETE:
            self._instances.pop(report.instance.name, None)
        if report.image is not None:
            entry = ImageEntry(id=report.image.id, state=ImageState.CACHED, virtual_size=1 << 30)
            self._images[report.image.id] = entry
        self._put(report.model_copy(update={"status": final, "task_state": None}))

    def _put(self, report: JobReport) -> None:
        with self.changed:
            self.all_jobs[report.id] = report
            event = Event(
                seq=len(self.all_events) + 1,
                time=time.time(),
                job_id=report.id,
                status=report.status,
                task_state=report.task_state,
            )
            self.all_events.append(event)
            self.changed.notify_all()

    def job(self, job_id: str) -> JobReport:
        if job_id not in self.all_jobs:
            raise NotFound(f"there is no job {job_id}", "'bootwright job list' shows all")
        return self.all_jobs[job_id]

    def jobs(self, status: Status | None) -> Sequence[JobReport]:
        return [job for job in self.all_jobs.values() if status in (None, job.status)]

    def wait(self, job_id: str, timeout_s: float) -> JobReport:
        self._wait(lambda: self.job(job_id).status.final, timeout_s)
        return self.job(job_id)

    def cancel(self, job_id: str) -> JobReport:
        self._put(self.job(job_id).model_copy(update={"status": Status.CANCELLED}))
        return self.job(job_id)

    def events(self, since: int, timeout_s: float) -> Sequence[Event]:
        self._wait(lambda: len(self.all_events) > since, timeout_s)
        return self.all_events[since:]

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with self.changed:
            self.waiting += 1
            self.changed.wait_for(condition, timeout_s)
            self.waiting -= 1

    def images(self) -> Sequence[ImageEntry]:
        return list(self._images.values())

    def image(self, image_id: str) -> ImageEntry:
        if image_id not in self._images:
            raise NotFound(f"there is no image {image_id}")
        return self._images[image_id]

    def remove_image(self, image_id: str) -> None:
        self.image(image_id)
        if self._instances:
            raise BackendError("an instance stands on the image", "delete the instance first")
        del self._images[image_id]

    def why_image(self, image_id: str) -> Decision:
        entry = self.image(image_id)
        return Decision(
            image_id=image_id,
            base_name="0" * 40,
            remove=not (self._instances or entry.pinned),
            reason=Reason.IN_USE if self._instances or entry.pinned else Reason.AGE,
            detail="needed by a pin" if entry.pinned else "who knows",
            bytes=0 if self._instances or entry.pinned else 1 << 20,
        )

    def pin_image(self, image_id: str, seconds: float | None) -> ImageEntry:
        until = None if seconds is None else time.time() + seconds
        return self._pinned(image_id, pinned=True, until=until)

    def unpin_image(self, image_id: str) -> ImageEntry:
        return self._pinned(image_id, pinned=False, until=None)

    def _pinned(self, image_id: str, *, pinned: bool, until: float | None) -> ImageEntry:
        update = {"pinned": pinned, "pinned_until": until}
        self._images[image_id] = self.image(image_id).model_copy(update=update)
        return self._images[image_id]

    def verify_image(self, image_id: str) -> Verification:
        return Verification(
            image_id=self.image(image_id).id,
            path="/cache/0",
            soundness=Soundness.DAMAGED if image_id in self.damaged else Soundness.INTACT,
            digest="sha512:00",
            expected="sha512:00",
        )

    def gc(self, *, dry_run: bool) -> GcReport:
        decisions = tuple(self.why_image(image_id) for image_id in self._images)
        if not dry_run:
            for decision in decisions:
                if decision.remove:
                    del self._images[decision.image_id]
        freed = sum(decision.bytes for decision in decisions)
        return GcReport(dry_run=dry_run, decisions=decisions, bytes=freed)

    def fetch_image(self, image_id: str, *, request_id: str) -> JobReport:
        return self.submit({"action": "fetch", "image": {"id": image_id}}, request_id=request_id)

    def add_image(
        self,
        chunks: Iterator[bytes],
        *,
        disk_format: str,
        name: str | None,
        image_id: str | None,
        properties: dict[str, str],
    ) -> ImageEntry:
        new_id = image_id or str(uuid.uuid4())
        self.added[new_id] = b"".join(chunks)
        words = (disk_format, name or "", *(f"{k}={v}" for k, v in properties.items()))
        return ImageEntry(id=new_id, state=ImageState.AVAILABLE, name=" ".join(words))

    def cache(self) -> CacheStatus:
        return CacheStatus(directory="/cache", entries=1, disk_usage=4096, free_space=1 << 30)

    def instances(self) -> Sequence[InstanceView]:
        return list(self._instances.values())

    def instance(self, name_or_uuid: str) -> InstanceView:
        if name_or_uuid not in self._instances:
            raise NotFound(f"there is no instance {name_or_uuid}")
        return self._instances[name_or_uuid]

    def delete_instance(self, name_or_uuid: str, *, request_id: str) -> JobReport:
        view = self.instance(name_or_uuid)
        document: dict[str, object] = {"action": "delete", "instance": {"name": view.name}}
        return self.submit(document, request_id=request_id)

    def console(self, name_or_uuid: str, offset: int) -> ConsolePiece:
        self.instance(name_or_uuid)
        if self.console_rotates and offset:
            # Between two requests the guest says so much that the oldest line goes.
            self.console_rotates, self.console_gone = False, 18
        kept = self.console_output[self.console_gone :]
        return ConsolePiece(
            data=kept[offset : offset + 20],
            begins=str(self.console_gone),
            complete=not self.console_gone,
        )

    def status(self) -> AgentStatus:
        return AgentStatus(
            version="1.2.3", pid=4711, started_at=1.0, cache=self.cache(), checks=self.checks
        )

    def live(self) -> bool:
        return True

    def ready(self) -> Sequence[Check]:
        return self.checks
