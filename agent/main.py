"""The life of the agent, from the first system call to the last."""

import enum
import functools
import logging
import queue
import signal
import time
from collections.abc import Callable
from types import FrameType

from agent import image_source, metrics, privileges, systemd
from agent.api import create_app, create_metrics_app
from agent.backends import Backend, Backends
from agent.backends.flat import Flat
from agent.backends.lvm import Clear, Lvm
from agent.backends.ploop import Ploop
from agent.backends.qcow2 import Qcow2
from agent.backends.rbd import Rbd
from agent.cancellation import Cancellation
from agent.castellan_keys import CastellanKeys
from agent.ceph import Cluster
from agent.disk import DiskType
from agent.errors import AgentStopping, BackendError
from agent.files import supports_direct
from agent.glance_copy import GlanceCopy
from agent.host import Defaults, Host
from agent.housekeeping import Housekeeping
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.image_cache import ImageCache
from agent.instance_keys import FileKeys, InstanceKeys
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
from agent.qcow2 import Geometry
from agent.qemu_img import QemuImg
from agent.scrub import Scrub
from agent.service import Agent
from agent.settings import (
    CopySettings,
    EncryptionSettings,
    ImageCacheSettings,
    KeyManager,
    RbdSettings,
    Settings,
)
from agent.signatures import Signatures
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier
from agent.worker import Worker
from privsep import HelperContext, base_owner, volumes

LOG = logging.getLogger(__name__)


# For answering what is under way when the jobs have been interrupted.
CLOSING_S = 15.0
# How often systemd is told how things are when it does not ask to be told.
STATUS_S = 15.0
# What one step of the start may take: removing the disks of many unfinished
# boots, waiting for another host's lock.
START_STEP_S = 90.0


class Wish(enum.Enum):
    """What may wake the main thread."""

    STOP = enum.auto()
    RELOAD = enum.auto()
    HELPER_GONE = enum.auto()


def run(settings: Settings, reload: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status.

    `reload` reads the configuration again, at SIGHUP.

    Raises:
        PrivilegesNotDropped: the process has powers it must not have.
        ListenError, JournalUnusable, OSError: it cannot serve or write where it should.
    """
    # First of all: a helper is a fork, and the agent goes on without a power.
    privileges.start_helpers(_helpers(settings))
    wishes = _listen_for_wishes()
    parts = _Parts(settings)
    try:
        parts.start()
        # Only now do all threads exist that might have kept something.
        privileges.verify()
        systemd.ready(parts.summary())
        LOG.info("ready, serving on %s", settings.api.socket)
        return _attend(parts, wishes, reload)
    finally:
        systemd.stopping()
        systemd.extend_timeout(settings.drain_timeout_s + CLOSING_S)
        parts.stop(settings.drain_timeout_s)


def _listen_for_wishes() -> "queue.SimpleQueue[Wish]":
    wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()

    def wish_for(wish: Wish) -> Callable[[int, FrameType | None], None]:
        # SimpleQueue.put is reentrant, so a signal handler may call it.
        return lambda _number, _frame: wishes.put(wish)

    signal.signal(signal.SIGTERM, wish_for(Wish.STOP))
    signal.signal(signal.SIGINT, wish_for(Wish.STOP))
    signal.signal(signal.SIGHUP, wish_for(Wish.RELOAD))
    privileges.on_helper_exit(lambda: wishes.put(Wish.HELPER_GONE))
    return wishes


def _attend(parts: "_Parts", wishes: "queue.SimpleQueue[Wish]", reload: Callable[[], None]) -> int:
    """Keep the watchdog quiet until somebody wishes the end; wait for nothing else."""
    interval = min(systemd.watchdog_interval() or STATUS_S, STATUS_S)
    while True:
        try:
            match wishes.get(timeout=interval):
                case Wish.STOP:
                    LOG.info("stopping: no new jobs; what is running goes on after the next start")
                    return 0
                case Wish.HELPER_GONE:
                    LOG.error("a privileged helper has ended, so the agent does; start it again")
                    return 1
                case Wish.RELOAD:
                    reload()
        except queue.Empty:
            pass
        if parts.agent.live():
            systemd.watchdog()
        systemd.status(parts.summary())


class _Parts:
    """Everything the agent is made of, put together in the one place that knows all of it."""

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
        self.image_cache = ImageCache(
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
            signatures=Signatures(
                image_source.certificates(settings.images),
                verify=settings.images.signatures.verify,
                validate=settings.images.signatures.validate,
                trusted=settings.images.signatures.trusted,
                policy=_policy(settings),
            ),
            converter=qemu_img,
            policy=_policy(settings),
            require_hash=cache.require_hash,
            verify_before_use=cache.verify_before_use,
            vmdk_types=settings.images.vmdk_types,
            max_concurrent_fetches=cache.max_concurrent_fetches,
            max_connections_per_image=(
                settings.images.glance.max_connections_per_image if settings.images.glance else 1
            ),
        )
        self.scrub = (
            None
            if cache.scrub_interval_s is None
            else Scrub(self.store, verifier, interval_s=cache.scrub_interval_s, repair=self._repair)
        )
        metrics.CACHE_BYTES.set_function(self.store.allocated)
        touch = LastUse().refresh
        self.lvm = _lvm(settings)
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
            backends=_backends(settings, qemu_img, hypervisor, self.lvm, self.image_cache),
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


def _helpers(settings: Settings) -> list[HelperContext]:
    return [base_owner] if settings.volumes is None else [base_owner, volumes]


def _backends(
    settings: Settings,
    qemu_img: QemuImg,
    hypervisor: Hypervisor,
    lvm: Lvm | None,
    image_cache: ImageCache,
) -> Backends:
    backends: dict[ImagesType, Backend] = {
        ImagesType.QCOW2: Qcow2(
            qemu_img,
            preallocate=settings.preallocate,
            geometry=Geometry(
                cluster_size=settings.libvirt.qcow2_cluster_size,
                extended_l2=settings.libvirt.qcow2_extended_l2,
            ),
        ),
        ImagesType.RAW: Flat(preallocate=settings.preallocate),
        ImagesType.PLOOP: Ploop(qemu_img),
    }
    if lvm is not None:
        backends[ImagesType.LVM] = lvm
    if settings.libvirt.rbd is not None:
        backends[ImagesType.RBD] = _rbd(settings.libvirt.rbd, settings, hypervisor, image_cache)
    return Backends(backends, only=None if settings.encryption is None else ImagesType.LVM)


def _lvm(settings: Settings) -> Lvm | None:
    if settings.volumes is None:
        return None
    return Lvm(
        settings.volumes.group,
        thin=settings.volumes.thin,
        bases=settings.image_cache.directory,
        scratch=settings.instances_path,
        clear=Clear(settings.volumes.clear),
        clear_size=settings.volumes.clear_size,
        keys=None if settings.encryption is None else _instance_keys(settings.encryption),
    )


def _rbd(
    rbd: RbdSettings, settings: Settings, hypervisor: Hypervisor, image_cache: ImageCache
) -> Rbd:
    return Rbd(
        Cluster(rbd.ceph_conf, rbd.user, connect_timeout_s=rbd.connect_timeout_s),
        host=settings.image_cache.host_id,
        pool=rbd.pool,
        secret_uuid=rbd.secret_uuid,
        # What somebody has chosen the uuid of, somebody may have given a value.
        share_key=functools.partial(hypervisor.ensure_secret, replace=rbd.secret_uuid is None),
        scratch=settings.instances_path,
        # What nobody reads nobody can say to be signed.
        clone_pools=frozenset() if settings.images.signatures.verify else rbd.glance_pools,
        copy=_copy(rbd.copy, settings, image_cache),
        busy_retries=rbd.busy_retries,
        busy_interval_s=rbd.busy_interval_s,
    )


def _copy(
    copy: CopySettings | None, settings: Settings, image_cache: ImageCache
) -> Callable[[Image, Cancellation], Image | None] | None:
    if copy is None or settings.images.glance is None:
        return None
    return GlanceCopy(
        image_source.glance(settings.images),
        store=copy.store,
        is_cached=image_cache.has,
        interval_s=copy.interval_s,
        limit_s=copy.limit_s,
    ).bring


def _instance_keys(encryption: EncryptionSettings) -> InstanceKeys:
    match encryption.key_manager:
        case KeyManager.FILE:
            return FileKeys(encryption.key_directory, bits=encryption.key_size)
        case KeyManager.BARBICAN:
            return CastellanKeys(encryption.key_directory, bits=encryption.key_size)


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
