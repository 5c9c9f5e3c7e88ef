"""Which backends this host has, as its configuration says, and how each is set up."""

import functools
from collections.abc import Callable

from agent import image_source
from agent.backends import Backend, Backends
from agent.backends.flat import Flat
from agent.backends.lvm import Clear, Lvm
from agent.backends.ploop import Ploop
from agent.backends.qcow2 import Qcow2
from agent.backends.rbd import Rbd
from agent.cancellation import Cancellation
from agent.castellan_keys import CastellanKeys
from agent.ceph import Cluster
from agent.glance_copy import GlanceCopy
from agent.hypervisor import Hypervisor
from agent.image import Image
from agent.image_cache import ImageCache
from agent.instance_keys import FileKeys, InstanceKeys
from agent.job import ImagesType
from agent.qcow2 import Geometry
from agent.qemu_img import QemuImg
from agent.settings import (
    CopySettings,
    EncryptionSettings,
    KeyManager,
    RbdSettings,
    Settings,
)


def of(
    settings: Settings,
    qemu_img: QemuImg,
    hypervisor: Hypervisor,
    volumes: Lvm | None,
    image_cache: ImageCache,
) -> Backends:
    """Return all there are; `volumes` is what `lvm` has returned."""
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
    if volumes is not None:
        backends[ImagesType.LVM] = volumes
    if settings.libvirt.rbd is not None:
        backends[ImagesType.RBD] = _rbd(settings.libvirt.rbd, settings, hypervisor, image_cache)
    return Backends(backends, only=None if settings.encryption is None else ImagesType.LVM)


def lvm(settings: Settings) -> Lvm | None:
    """Return the one for logical volumes, None without a volume group."""
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
