"""Boot jobs on a warm cache, and how long each took: what `benchmarks.warm` measures.

The parts of the agent as `main` puts them together, without the socket and without libvirt: each
job is parsed, accepted and journaled, its disk made, the domain's XML written (action prepare).

python -m benchmarks.boots DIRECTORY IMAGES_TYPE WORKERS JOBS
"""

import gc
import json
import sys
import threading
import time
import uuid
from pathlib import Path

from agent.backends import Backends
from agent.backends.flat import Flat
from agent.backends.qcow2 import Qcow2
from agent.base_maker import BaseMaker
from agent.cancellation import Cancellation
from agent.certificates import CertificateDirectory
from agent.directory import DirectorySource
from agent.disk import DiskType
from agent.host import Defaults, Host
from agent.hypervisor import Hypervisor
from agent.image_cache import ImageCache
from agent.instances import Instances
from agent.job import ConfigDriveFormat, GuestFormat, ImagesType, JobRequest, parse
from agent.journal import Journal, digest_of
from agent.layout import Formats
from agent.provision import Provisioner
from agent.qemu_img import QemuImg
from agent.recorder import Recorder
from agent.report import JobReport, Status
from agent.signatures import Signatures
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier
from agent.worker import Worker

IMAGE_ID = "warm"
# Those before count for nothing: the first brings the image into the cache, and the journal's
# log grows until its first checkpoint, as that of an agent does in its first second.
UNCOUNTED = 100


class Boots:
    """Submits jobs, as many at a time as there are workers, and takes the time of each."""

    def __init__(self, directory: Path, images_type: ImagesType, workers: int) -> None:
        self._provisioner = Provisioner(host=host(directory, images_type), settle=lambda *_: None)
        self._journal = Journal(directory / "journal.db")
        self._workers = workers
        self._places = threading.Semaphore(workers)
        self._began: dict[str, float] = {}
        self.milliseconds: list[float] = []
        self._worker = Worker(
            self._journal, self._execute, concurrency=workers, untouched=lambda _: True
        )
        self._worker.start()

    def _execute(self, request: JobRequest, recorder: Recorder, cancellation: Cancellation) -> None:
        self._provisioner.execute(request, recorder, cancellation)
        report = recorder.report
        if report.status is not Status.DONE:
            raise SystemExit(f"a job ended as {report.status}: {report.error}")
        self.milliseconds.append((time.perf_counter() - self._began[report.id]) * 1000)
        self._places.release()

    def run(self, jobs: int) -> float:
        """Return the seconds that so many jobs took in all."""
        began = time.perf_counter()
        for _ in range(jobs):
            self._places.acquire()
            self._submit()
        for _ in range(self._workers):
            self._places.acquire()
        seconds = time.perf_counter() - began
        self._places.release(self._workers)
        return seconds

    def _submit(self) -> None:
        job_id = str(uuid.uuid4())
        document = {
            "action": "prepare",
            "instance": {"name": f"warm-{job_id}", "uuid": str(uuid.uuid4())},
            "flavor": {"vcpus": 1, "ram": 512, "disk": 1},
            "image": {"id": IMAGE_ID},
            "networks": [],
        }
        request = parse(document)
        report = JobReport(
            id=job_id,
            action=request.action,
            status=Status.QUEUED,
            request_id=f"req-{job_id}",
            created_at=time.time(),
            updated_at=time.time(),
        )
        digest = digest_of(request)
        self._began[job_id] = time.perf_counter()
        self._journal.accept(request, report, body_digest=digest)
        self._worker.enqueue(job_id)

    def close(self) -> None:
        self._worker.drain(10)
        self._journal.close()


def host(directory: Path, images_type: ImagesType) -> Host:
    instances_path = directory / "instances"
    instances_path.mkdir(exist_ok=True)
    instances = Instances(instances_path)
    store = Store(instances_path / "_base")
    usage = Usage(store, instances, host_id="benchmark")
    qemu_img = QemuImg()
    source, policy = DirectorySource(directory / "images"), RetryPolicy()
    signatures = Signatures(
        CertificateDirectory(directory), verify=False, validate=False, trusted=(), policy=policy
    )
    maker = BaseMaker(
        store,
        usage,
        Space(store, reserved_free_space=0, max_size=None, make_room=lambda _: None),
        Verifier(store, usage),
        source=source,
        signatures=signatures,
        converter=qemu_img,
        policy=policy,
        require_hash=True,
        verify_before_use=False,
        vmdk_types=(),
        max_concurrent_fetches=1,
        max_connections_per_image=1,
    )
    return Host(
        image_cache=ImageCache(
            store, usage, maker, source=source, signatures=signatures, policy=policy
        ),
        backends=Backends({ImagesType.QCOW2: Qcow2(qemu_img), ImagesType.RAW: Flat()}),
        instances=instances,
        hypervisor=Hypervisor("test:///default", virt_type="test"),
        touch=lambda _: None,
        defaults=Defaults(
            virt_type="kvm",
            images_type=images_type,
            formats=Formats(
                ephemeral=GuestFormat.EXT4,
                config_drive=ConfigDriveFormat.ISO9660,
                force_config_drive=False,
            ),
            cache_modes=dict.fromkeys(DiskType, "none"),
            discard="unmap",
        ),
    )


def main(directory: Path, images_type: ImagesType, workers: int, jobs: int) -> None:
    boots = Boots(directory, images_type, workers)
    boots.run(UNCOUNTED)
    # As `agent.main` does when it is ready.
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = boots.run(jobs)
    result = {"milliseconds": boots.milliseconds[-jobs:], "seconds": seconds}
    print(json.dumps(result), flush=True)
    boots.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ImagesType(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
