"""What the agent does for its callers: the one place where the API meets the rest."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from agent import console
from agent.cancellation import Cancellation
from agent.directory import DirectorySource
from agent.errors import AgentStopping, BootwrightError, HypervisorError, InvalidJob, NotFound
from agent.files import free_bytes
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.image_cache import ImageCache
from agent.instances import InstanceRecord, Instances
from agent.job import Instance, JobRequest, parse
from agent.journal import Journal, digest_of
from agent.pruner import Pruner
from agent.report import InstanceReport, JobReport, Status
from agent.store import Entry, Store
from agent.transfer import ImageSource
from agent.usage import Usage
from agent.verification import Verifier
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
    Verification,
)
from agent.worker import Worker

# What one request for a console returns at most; the caller asks again.
CONSOLE_CHUNK = 1 << 20


class Agent:
    """Implements `agent.api.Service`; may be called from any number of threads."""

    def __init__(
        self,
        *,
        journal: Journal,
        worker: Worker,
        image_cache: ImageCache,
        store: Store,
        usage: Usage,
        pruner: Pruner,
        verifier: Verifier,
        source: ImageSource,
        instances: Instances,
        hypervisor: Hypervisor,
        helper_alive: Callable[[], bool],
    ) -> None:
        self._journal = journal
        self._worker = worker
        self._image_cache = image_cache
        self._store = store
        self._usage = usage
        self._pruner = pruner
        self._verifier = verifier
        self._source = source
        self._instances = instances
        self._hypervisor = hypervisor
        self._helper_alive = helper_alive
        self._started_at = time.time()
        # Ends what callers have set off that no job stands for.
        self.stopping = Cancellation()
        self.draining = False

    # Jobs

    def submit(self, document: dict[str, object], *, request_id: str) -> JobReport:
        """Raises: InvalidJob, NotFound, IdempotencyConflict, AgentStopping."""
        return self._accept(parse(document), request_id)

    def _accept(self, request: JobRequest, request_id: str) -> JobReport:
        if self.draining:
            raise AgentStopping(
                "the agent is stopping and takes no new jobs", "try again when it is back"
            )
        digest = digest_of(request)
        if request.idempotency_key is not None:
            # Before anything is filled in: the instance of a job that is sent
            # again may be gone, by that very job.
            known = self._journal.by_key(request.idempotency_key, digest)
            if known is not None:
                return self._worker.live(known)
        if request.action.of_existing and request.instance is not None:
            request = self._with_instance(request, self._identify(request.instance))
        elif request.instance is not None and request.instance.uuid is None:
            request = self._with_instance(
                request, request.instance.model_copy(update={"uuid": str(uuid.uuid4())})
            )
        now = time.time()
        job_id = str(uuid.uuid4())
        report = self._journal.accept(
            request,
            JobReport(
                id=job_id,
                action=request.action,
                status=Status.QUEUED,
                request_id=request.request_id or request_id,
                idempotency_key=request.idempotency_key,
                created_at=now,
                updated_at=now,
                instance=_instance_report(request.instance),
            ),
            body_digest=digest,
        )
        if report.id == job_id:
            self._worker.enqueue(job_id)
        return self._worker.live(report)

    @staticmethod
    def _with_instance(request: JobRequest, instance: Instance) -> JobRequest:
        return request.model_copy(update={"instance": instance})

    def _identify(self, wanted: Instance) -> Instance:
        """Return name and uuid of an instance that exists or is being made.

        Raises:
            NotFound: there is none.
            InvalidJob: its uuid is the wanted one, its name is another.
        """
        for known in self._existing_or_being_made():
            if wanted.uuid not in (None, known.uuid):
                continue
            if wanted.uuid is None and wanted.name != known.name:
                continue
            if wanted.name not in (None, known.name):
                raise InvalidJob(
                    f"instance {wanted.uuid} is called {known.name}, not {wanted.name}",
                    "give only the uuid, or only the name, of the one you mean",
                )
            return Instance(uuid=known.uuid, name=known.name)
        raise NotFound(
            f"there is no instance {wanted.uuid or wanted.name} on this host",
            "bootwright instance list shows them",
        )

    def _existing_or_being_made(self) -> Iterator[Instance | InstanceRecord]:
        yield from self._instances.all()
        for job in self._journal.unfinished():
            if job.request.instance is not None:
                yield job.request.instance

    def job(self, job_id: str) -> JobReport:
        return self._worker.live(self._journal.get(job_id).report)

    def jobs(self, status: Status | None) -> Sequence[JobReport]:
        if status is None:
            return [self._worker.live(job.report) for job in self._journal.jobs()]
        # A job that runs may have come further than the journal can say.
        possible = tuple(each for each in Status if each is status or not each.final)
        reports = (self._worker.live(job.report) for job in self._journal.jobs(possible))
        return [report for report in reports if report.status is status]

    def wait(self, job_id: str, timeout_s: float) -> JobReport:
        deadline = time.monotonic() + timeout_s
        with self._journal.changed:
            while True:
                report = self._journal.get(job_id).report
                remaining = deadline - time.monotonic()
                if report.status.final or remaining <= 0:
                    break
                self._journal.changed.wait(remaining)
        return self._worker.live(report)

    def cancel(self, job_id: str) -> JobReport:
        self._worker.cancel(job_id, "cancelled on request")
        return self.job(job_id)

    def events(self, since: int, timeout_s: float) -> Sequence[Event]:
        deadline = time.monotonic() + timeout_s
        with self._journal.changed:
            while not (events := self._journal.events(since)):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._journal.changed.wait(remaining)
        return events

    # Images

    def images(self) -> Sequence[ImageEntry]:
        entries = [self._image_entry(entry) for entry in self._store.entries()]
        here = {entry.id for entry in entries}
        for image in self._image_cache.being_fetched():
            if image.id not in here:
                entries.append(_uncached(image, ImageState.FETCHING))
                here.add(image.id)
        if isinstance(self._source, DirectorySource):
            entries += [
                _uncached(image, ImageState.AVAILABLE)
                for image in self._source.list()
                if image.id not in here
            ]
        return entries

    def image(self, image_id: str) -> ImageEntry:
        try:
            return self._image_entry(self._store.get(image_id))
        except NotFound:
            for image in self._image_cache.being_fetched():
                if image.id == image_id:
                    return _uncached(image, ImageState.FETCHING)
            return _uncached(self._source.get(image_id), ImageState.AVAILABLE)

    def remove_image(self, image_id: str) -> None:
        self._pruner.remove(image_id)

    def why_image(self, image_id: str) -> Decision:
        return self._pruner.why(image_id)

    def pin_image(self, image_id: str, seconds: float | None) -> ImageEntry:
        entry = self._store.get(image_id)
        self._usage.pins.put(entry.name, seconds=seconds)
        return self.image(image_id)

    def unpin_image(self, image_id: str) -> ImageEntry:
        self._usage.pins.remove(self._store.get(image_id).name)
        return self.image(image_id)

    def verify_image(self, image_id: str) -> Verification:
        return self._verifier.verify(image_id, self.stopping)

    def gc(self, *, dry_run: bool) -> GcReport:
        return self._pruner.gc(dry_run=dry_run)

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
        if not isinstance(self._source, DirectorySource):
            raise InvalidJob(
                "this host takes its images from Glance",
                "upload the image there (openstack image create), or set source = directory in "
                "[images]",
            )
        image = self._source.add(
            chunks,
            disk_format=disk_format,
            name=name or "",
            image_id=image_id,
            properties=properties,
        )
        return _uncached(image, ImageState.AVAILABLE)

    def _image_entry(self, entry: Entry) -> ImageEntry:
        image = entry.manifest.image
        pin = self._usage.pins.get(entry.name)
        return ImageEntry(
            id=image.id,
            state=ImageState.CACHED,
            name=image.name,
            source=image.source,
            path=str(entry.path),
            format=entry.manifest.format,
            virtual_size=entry.manifest.virtual_size,
            disk_usage=entry.allocated,
            digest=entry.manifest.digest,
            certificate=None
            if entry.manifest.proof is None
            else entry.manifest.proof.claim.certificate,
            committed_at=entry.manifest.created_at,
            last_used_at=entry.last_used_at,
            instances=tuple(r.uuid for r in self._instances.standing_on(entry.name)),
            pinned=pin is not None,
            pinned_until=None if pin is None else pin.until,
        )

    def cache(self) -> CacheStatus:
        return CacheStatus(
            directory=str(self._store.directory),
            entries=len(self._store.entries()),
            disk_usage=self._store.allocated(),
            free_space=free_bytes(self._store.directory),
            fetching=tuple(self._image_cache.fetches()),
        )

    # Instances

    def instances(self) -> Sequence[InstanceView]:
        return [self._instance_view(record) for record in self._instances.all()]

    def instance(self, name_or_uuid: str) -> InstanceView:
        return self._instance_view(self._instances.find(name_or_uuid))

    def _instance_view(self, record: InstanceRecord) -> InstanceView:
        try:
            state = self._hypervisor.state(record.uuid)
        except HypervisorError:
            state = "unknown"
        return InstanceView(
            uuid=record.uuid,
            name=record.name,
            state=state,
            job_id=record.job_id,
            created_at=record.created_at,
            image_id=record.image_id,
            disks=tuple(disk.report() for disk in record.disks),
            metadata=record.metadata,
        )

    def delete_instance(self, name_or_uuid: str, *, request_id: str) -> JobReport:
        try:
            key = {"uuid": str(uuid.UUID(name_or_uuid))}
        except ValueError:
            key = {"name": name_or_uuid}
        return self.submit({"action": "delete", "instance": key}, request_id=request_id)

    def console(self, name_or_uuid: str, offset: int) -> ConsolePiece:
        record = self._instances.find(name_or_uuid)
        return console.read(self._instances.console_of(record.uuid), offset, CONSOLE_CHUNK)

    # The agent itself

    def status(self) -> AgentStatus:
        return AgentStatus(
            version=version("bootwright"),
            pid=os.getpid(),
            started_at=self._started_at,
            draining=self.draining,
            jobs=self._journal.counts(),
            instances=len(self._instances.all()),
            cache=self.cache(),
            checks=tuple(self.ready()),
        )

    def live(self) -> bool:
        """Whether the agent can do anything at all; systemd restarts it otherwise."""
        self._journal.last_event()
        return self._worker.alive()

    def ready(self) -> Sequence[Check]:
        return [self._check_libvirt(), self._check_cache(), self._check_helper()]

    def _check_libvirt(self) -> Check:
        try:
            return Check(name="libvirt", ok=True, message=self._hypervisor.version())
        except BootwrightError as e:
            return Check(name="libvirt", ok=False, message=e.message, hint=e.hint)

    def _check_cache(self) -> Check:
        directory: Path = self._store.directory
        if os.access(directory, os.W_OK | os.X_OK):
            return Check(name="image cache", ok=True, message=str(directory))
        return Check(
            name="image cache",
            ok=False,
            message=f"{directory} is not writable",
            hint="it has to belong to the user bootwright",
        )

    def _check_helper(self) -> Check:
        if self._helper_alive():
            return Check(name="privileged helper", ok=True, message="running")
        return Check(
            name="privileged helper",
            ok=False,
            message="the helper that refreshes the last use of bases is gone",
            hint="restart the agent: systemctl restart bootwright",
        )


def _instance_report(instance: Instance | None) -> InstanceReport | None:
    if instance is None:
        return None
    return InstanceReport(uuid=str(instance.uuid), name=instance.name or "")


def _uncached(image: Image, state: ImageState) -> ImageEntry:
    return ImageEntry(
        id=image.id,
        state=state,
        name=image.name,
        source=image.source,
        virtual_size=image.virtual_size,
        digest=None if image.digest is None else ":".join(image.digest),
    )
