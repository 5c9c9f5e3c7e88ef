"""Does what a job asks for, whichever action it is."""

from collections.abc import Callable
from dataclasses import dataclass

from agent.build import Build
from agent.cancellation import Cancellation
from agent.host import Host
from agent.image import require_active
from agent.job import Action, JobRequest
from agent.rebuild import rebuild
from agent.recorder import Recorder
from agent.removal import remove_instance
from agent.report import ImageReport, InstanceReport, Status, TaskState
from agent.rescue import rescue, unrescue
from agent.resize import resize


@dataclass(frozen=True, kw_only=True, slots=True)
class Provisioner:
    """May be shared by any number of threads; each runs one job."""

    host: Host
    settle: Callable[[str, str, Cancellation], None]
    """`settle(instance_uuid, job_id, cancellation)` ends every job of an instance
    accepted before that one, and returns when they have ended."""

    def execute(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        """Do what `request` asks for, and record the result.

        Raises:
            BootwrightError: it failed.
        """
        match request.action:
            case Action.BOOT | Action.PREPARE:
                Build(self.host, request, recorder, cancellation).run()
            case Action.FETCH:
                self._fetch(request, recorder, cancellation)
            case Action.DELETE:
                self._delete(request, recorder, cancellation)
            case Action.RESIZE:
                resize(self.host, request, recorder, cancellation)
            case Action.RESCUE:
                rescue(self.host, request, recorder, cancellation)
            case Action.UNRESCUE:
                unrescue(self.host, request, recorder, cancellation)
            case Action.REBUILD:
                rebuild(self.host, request, recorder, cancellation)

    def _fetch(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        """Bring an image into the cache, and the kernel and ramdisk it boots with."""
        if request.image is None:
            raise AssertionError("the job's schema guarantees the image")
        cache = self.host.image_cache
        pin = recorder.report.id
        recorder.phase(TaskState.IMAGE_RESOLVING)
        cancellation.check()
        try:
            root = cache.resolve(request.image.id, cancellation)
            companions = (root.kernel_id, root.ramdisk_id)
            images = [cache.resolve(id_, cancellation) for id_ in companions if id_ is not None]
            for image in [*images, root]:
                require_active(image)
                base = cache.acquire(
                    image,
                    pin=pin,
                    max_virtual_size=None,
                    trusted=request.image.trusted_certificates,
                    cancellation=cancellation,
                    on_progress=recorder.progress,
                )
                recorder.count(received=base.received, resumed=base.resumed)
                # Whoever asks for it again wants it kept.
                self.host.touch(base.name)
                recorder.note(
                    image=ImageReport(id=image.id, digest=base.digest, source=base.origin)
                )
        finally:
            cache.unpin(pin)
        recorder.finish(Status.DONE, "the image is in the cache")

    def _delete(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        if request.instance is None or request.instance.uuid is None:
            raise AssertionError("the uuid is filled in when a delete is accepted")
        uuid = request.instance.uuid
        recorder.phase(TaskState.DELETING)
        cancellation.check()
        self.settle(uuid, recorder.report.id, cancellation)
        record = self.host.instances.get(uuid)
        if record is None:
            # It was never finished, or this job ran before and got to its end.
            recorder.finish(Status.DONE, "there is nothing left of the instance")
            return
        recorder.note(instance=InstanceReport(uuid=uuid, name=record.name))
        remove_instance(self.host, record, cancellation)
        recorder.finish(Status.DONE, "the instance is gone")
