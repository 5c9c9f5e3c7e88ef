"""The parts of the agent, put together in the one place that knows all of them."""

import logging
import time

from agent import disk_backends, image_source, metrics, privileges, systemd
from agent.api import create_app, create_metrics_app
from agent.base_maker import BaseMaker
from agent.cancellation import Cancellation
from agent.disk import DiskType
from agent.errors import AgentStopping, BackendError
from agent.files import supports_direct
from agent.host import Defaults, Host
from agent.housekeeping import Housekeeping
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.image_cache import ImageCache
from agent.instances import Instances
from agent.job import ImagesType
from agent.journal import Job, Journal
from agent.last_use import LastUse
from agent.layout import Formats
from agent.listener import Listener, MetricsListener
from agent.lost_bases import LostBases
from agent.provision import Provisioner
from agent.prune import Policy
from agent.pruner import Pruner
from agent.qemu_img import QemuImg
from agent.scrub import Scrub
from agent.service import Agent
from agent.settings import ImageCacheSettings, Settings
from agent.signatures import Signatures
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier
from agent.worker import Worker

LOG = logging.getLogger(__name__)

# For answering what is under way when the jobs have been interrupted.
CLOSING_S = 15.0
# What one step of the start may take: removing the disks of many unfinished
# boots, waiting for another host's lock.
START_STEP_S = 90.0


class Parts:
    """Everything the agent is made of; started once, stopped once."""

    def __init__(self, settings: Settings) -> None:
        settings.instances_path.mkdir(parents=True, exist_ok=True)
        settings.state_path.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(settings.state_path / "journal.db")
        self.instances = Instances(settings.instances_path)
        source = image_source.of(settings.images)
        qemu_img = QemuImg(
            cpu_s=settings.qemu_img.cpu_time_s,
            address_space=settings.qemu_img.address_space,
            timeout_s=settings.qemu_img.timeout_s,
        )
        cache = settings.image_cache
        self.store = Store(cache.directory)
        self.usage = Usage(self.store, self.instances, host_id=cache.host_id)
        pruner = Pruner(self.store, self.usage, _prune_policy(cache))
        verifier = Verifier(self.store, self.usage)
        policy = _policy(settings)
        signatures = Signatures(
            image_source.certificates(settings.images),
            verify=settings.images.signatures.verify,
            validate=settings.images.signatures.validate,
            trusted=settings.images.signatures.trusted,
            policy=policy,
        )
        maker = BaseMaker(
            self.store,
            self.usage,
            Space(
                self.store,
                reserved_free_space=cache.reserved_free_space,
                max_size=cache.max_size,
                make_room=pruner.make_room,
            ),
            verifier,
            source=source,
            signatures=signatures,
            converter=qemu_img,
            policy=policy,
            require_hash=cache.require_hash,
            verify_before_use=cache.verify_before_use,
            vmdk_types=settings.images.vmdk_types,
            max_concurrent_fetches=cache.max_concurrent_fetches,
            max_connections_per_image=(
                settings.images.glance.max_connections_per_image if settings.images.glance else 1
            ),
        )
        self.image_cache = ImageCache(
            self.store, self.usage, maker, source=source, signatures=signatures, policy=policy
        )
        self.scrub = (
            None
            if cache.scrub_interval_s is None
            else Scrub(self.store, verifier, interval_s=cache.scrub_interval_s, repair=self._repair)
        )
        metrics.CACHE_BYTES.set_function(self.store.allocated)
        touch = LastUse().refresh
        self.lvm = disk_backends.lvm(settings)
        self.housekeeping = Housekeeping(
            self.store,
            self.usage,
            pruner,
            self.journal,
            source,
            touch=touch,
            tidy=None if self.lvm is None else self.lvm.tidy,
            mend=LostBases(self.instances, source, fetch=self._repair).mend,
            prune_interval_s=cache.prune_interval_s,
        )
        hypervisor = Hypervisor(
            settings.libvirt.connection_uri, virt_type=settings.libvirt.virt_type
        )
        host = Host(
            image_cache=self.image_cache,
            backends=disk_backends.of(settings, qemu_img, hypervisor, self.lvm, self.image_cache),
            instances=self.instances,
            hypervisor=hypervisor,
            touch=touch,
            defaults=Defaults(
                virt_type=settings.libvirt.virt_type,
                images_type=settings.libvirt.images_type,
                formats=Formats(
                    ephemeral=settings.default_ephemeral_format,
                    config_drive=settings.config_drive_format,
                    force_config_drive=settings.force_config_drive,
                ),
                cache_modes=_cache_modes(settings),
                discard=settings.libvirt.discard or "ignore",
            ),
        )
        self.worker = Worker(
            self.journal,
            Provisioner(host=host, settle=self._settle).execute,
            concurrency=settings.max_concurrent_builds,
            untouched=self._untouched,
        )
        self.agent = Agent(
            journal=self.journal,
            worker=self.worker,
            image_cache=self.image_cache,
            store=self.store,
            usage=self.usage,
            pruner=pruner,
            verifier=verifier,
            source=source,
            instances=self.instances,
            hypervisor=hypervisor,
            helper_alive=privileges.helpers_alive,
        )
        self._listeners: list[Listener | MetricsListener] = [
            Listener(create_app(self.agent), settings.api.socket, group=settings.api.socket_group)
        ]
        if settings.api.metrics_listen is not None:
            probes = create_metrics_app(self.agent)
            self._listeners.append(MetricsListener(probes, settings.api.metrics_listen))

    def _untouched(self, job: Job) -> bool:
        instance = job.request.instance
        uuid = None if instance is None else instance.uuid
        record = None if uuid is None else self.instances.get(uuid)
        return record is None or not record.has_of(job.report.id)

    def _settle(self, instance_uuid: str, job_id: str, cancellation: Cancellation) -> None:
        self.worker.settle(instance_uuid, job_id, cancellation)

    def start(self) -> None:
        """Set right what a crash left, go on with unfinished jobs, and open the door."""
        systemd.extend_timeout(START_STEP_S)
        for path in self.instances.sweep():
            LOG.info("removed %s, left by a job that did not come far", path)
        systemd.extend_timeout(START_STEP_S)
        self.housekeeping.sweep()
        self._open_disks()
        self.worker.start()
        unfinished = self.journal.unfinished()
        if unfinished:
            LOG.info("going on with %d unfinished jobs", len(unfinished))
        for job in unfinished:
            self.worker.enqueue(job.report.id)
        self.housekeeping.start()
        if self.scrub is not None:
            self.scrub.start()
        for listener in self._listeners:
            listener.start()

    def _open_disks(self) -> None:
        """Let libvirt start the domains again whose disks are encrypted."""
        disks = [disk for record in self.instances.all() for disk in record.disks]
        for disk in disks:
            if self.lvm is not None and disk.backend is ImagesType.LVM:
                try:
                    self.lvm.open(disk)
                except BackendError as e:
                    LOG.error("a domain cannot start until the agent has started again: %s", e)

    def _repair(self, image: Image) -> None:
        """Have an image fetched anew whose base is damaged under instances, or gone."""
        self.agent.fetch_image(image.id, request_id="repair")

    def summary(self) -> str:
        """Return one line for `systemctl status`."""
        running = len(self.worker.running())
        fetches = self.image_cache.fetches()
        rate = sum(fetch.rate for fetch in fetches) / (1 << 20)
        return f"{running} jobs running, {len(fetches)} images being fetched, {rate:.0f} MiB/s"

    def stop(self, timeout_s: float) -> None:
        """Refuse new jobs, interrupt the running ones where they can go on, and close.

        All of it together takes `timeout_s` and, for the last answers, `CLOSING_S`.
        """
        deadline = time.monotonic() + timeout_s

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self.agent.draining = True
        self.agent.stopping.cancel(AgentStopping("the agent is stopping"))
        drained = self.worker.drain(left())
        self.image_cache.close(left())
        if self.scrub is not None:
            self.scrub.stop(left())
        tidied = self.housekeeping.stop(left())
        for listener in self._listeners:
            listener.stop()
        if not drained:
            LOG.warning(
                "some job did not come to a point where it can go on within %d s; its last step "
                "is repeated after the restart",
                timeout_s,
            )
        if drained and tidied:  # else a thread may still write to the journal
            self.journal.close()


def _cache_modes(settings: Settings) -> dict[DiskType, str]:
    usual = dict.fromkeys(
        DiskType, "none" if supports_direct(settings.instances_path) else "writeback"
    )
    usual[DiskType.BLOCK] = "none"  # what a file system can do has nothing to do with it
    return {**usual, **settings.libvirt.cache_modes}


def _policy(settings: Settings) -> RetryPolicy:
    glance = settings.images.glance
    if glance is None:
        return RetryPolicy()
    return RetryPolicy(num_retries=glance.num_retries, rate_window_s=glance.stall_timeout_s)


def _prune_policy(cache: ImageCacheSettings) -> Policy:
    return Policy(
        remove_unused=cache.remove_unused,
        minimum_age_s=cache.minimum_age_s,
        max_size=cache.max_size,
        high_watermark=cache.high_watermark,
        low_watermark=cache.low_watermark,
    )
