"""What can be configured of the disks and of those who handle them: libvirt, qemu-img, backends.

Part of `agent.options`, by section.
"""

from typing import Final

from oslo_config import cfg, types

from agent.config_files import ABSOLUTE_PATH
from privsep.options import CIPHER, KEY_SIZE, THIN_POOL, VOLUME_GROUP

LIBVIRT: Final[list[cfg.Opt]] = [
    cfg.StrOpt(
        "connection_uri",
        default="qemu:///system",
        regex=r"^[a-z+]+://",
        help="URI of the libvirt daemon of this host.",
    ),
    cfg.StrOpt(
        "virt_type",
        default="kvm",
        choices=[
            ("kvm", "hardware virtualization"),
            ("qemu", "emulation: slow, needs nothing of the processor"),
        ],
        help="Type of the domains.",
    ),
    cfg.StrOpt(
        "images_type",
        default="default",
        choices=[
            ("default", "what use_cow_images says"),
            ("qcow2", "an overlay on the base in the image cache"),
            ("raw", "a copy of the base, as a reflink where the filesystem can"),
            ("flat", "the same"),
            ("lvm", "a logical volume in images_volume_group"),
            ("ploop", "a copy of the base in a ploop image, with the tools of package ploop"),
            ("rbd", "an image in a Ceph cluster: needs rbd_user"),
        ],
        help="How disks are made when the job does not say.",
    ),
    cfg.IntOpt(
        "qcow2_cluster_size",
        default=64,
        min=4,
        max=2048,
        help="KiB that a qcow2 disk takes from the filesystem at a time: a power of two. With "
        "larger ones QEMU keeps fewer tables, with smaller ones it copies less of the base for "
        "each write (benchmarks/geometry.py).",
    ),
    cfg.BoolOpt(
        "qcow2_extended_l2",
        default=False,
        help="Let qcow2 disks take and copy a 32nd of a cluster at a time (QEMU 5.2 and later): "
        "small writes to a new disk take a third of the time and less space "
        "(benchmarks/geometry.py). Programs other than QEMU may not read such disks.",
    ),
    VOLUME_GROUP,
    THIN_POOL,
    cfg.BoolOpt(
        "sparse_logical_volumes",
        default=False,
        help="Let logical volumes take space when the guest writes. Only with images_thin_pool, "
        "which does so in any case: the sparse volumes of Nova, snapshots of nothing, lose the "
        "whole disk when they are full.",
    ),
    cfg.StrOpt(
        "volume_clear",
        default="zero",
        choices=[
            ("zero", "overwrite them with zeros"),
            ("shred", "overwrite them with noise three times, then with zeros"),
            ("none", "leave them as they are; the next disk to get them is zeroed all the same"),
        ],
        help="What is done to the blocks of a logical volume before it is removed. Nothing in a "
        "thin pool, which zeroes blocks before it gives them away.",
    ),
    cfg.IntOpt(
        "volume_clear_size",
        default=0,
        min=0,
        max=1 << 30,
        help="MiB from the beginning of a logical volume that volume_clear is for; 0 for all.",
    ),
    cfg.StrOpt(
        "rbd_user",
        regex=r"^[A-Za-z0-9_.-]+$",
        help="User of the Ceph cluster, without client. in front; the agent has to be able to read "
        "its keyring. If it is set jobs may ask for images_type rbd.",
    ),
    cfg.StrOpt(
        "rbd_secret_uuid",
        regex=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
        help="UUID of libvirt's secret with the key of rbd_user, made if it is missing; one that "
        "follows from the cluster and the user if not set.",
    ),
    cfg.StrOpt(
        "images_rbd_pool",
        default="rbd",
        regex=r"^[A-Za-z0-9_.-]+$",
        help="Pool of the disks.",
    ),
    cfg.ListOpt(
        "images_rbd_glance_pools",
        default=["images"],
        item_type=types.String(regex=r"^[A-Za-z0-9_.-]+$"),
        help="Pools in which Glance keeps images, its rbd_store_pool: raw images there are cloned, "
        "not fetched. What Glance calls the location of an image may be its owner's word, so "
        "nothing is cloned from any other pool. Empty: all images are fetched.",
    ),
    cfg.StrOpt(
        "images_rbd_glance_store_name",
        default="",
        regex=r"^[A-Za-z0-9_.-]*$",
        help="Store of Glance whose pool is in images_rbd_glance_pools: a raw image that is "
        "neither there nor in the image cache is copied there by Glance, which needs the policy "
        "copy_image and shall show multiple locations, and then cloned. Empty: it is fetched.",
    ),
    cfg.IntOpt(
        "images_rbd_glance_copy_poll_interval",
        default=15,
        min=1,
        max=600,
        help="Seconds between two looks whether Glance has copied an image.",
    ),
    cfg.IntOpt(
        "images_rbd_glance_copy_timeout",
        default=600,
        min=0,
        max=7 * 86400,
        help="Seconds to wait for such a copy, but no more than half of what a job's deadline "
        "leaves. After that the image is fetched.",
    ),
    cfg.StrOpt(
        "images_rbd_ceph_conf",
        regex=ABSOLUTE_PATH,
        help="Configuration of the Ceph cluster: an absolute path. Where Ceph itself looks if not "
        "set.",
    ),
    cfg.IntOpt(
        "rbd_connect_timeout",
        default=5,
        min=1,
        max=300,
        help="Seconds to wait for a connection to the Ceph cluster.",
    ),
    cfg.IntOpt(
        "rbd_destroy_volume_retries",
        default=12,
        min=0,
        max=1000,
        help="How often the removal of an image that somebody has open is tried again.",
    ),
    cfg.IntOpt(
        "rbd_destroy_volume_retry_interval",
        default=5,
        min=0,
        max=600,
        help="Seconds between two such attempts.",
    ),
    cfg.ListOpt(
        "disk_cachemodes",
        default=[],
        item_type=types.String(
            regex=r"^(file|block|network)=(default|none|writethrough|writeback|directsync|unsafe)$"
        ),
        help="Cache mode per kind of disk, as kind=mode. Kinds: file, block, network. Modes are "
        "QEMU's: default, none, writethrough, writeback, directsync, unsafe. A kind that is not "
        "here has none where the filesystem of instances_path can do direct I/O, else writeback; "
        "block always has none.",
    ),
    cfg.StrOpt(
        "hw_disk_discard",
        choices=[
            ("ignore", "the disk keeps its size"),
            ("unmap", "the disk gives the space back"),
        ],
        help="What happens when a guest discards blocks; QEMU's default if not set.",
    ),
    cfg.IntOpt(
        "images_cpu_time_limit",
        default=3600,
        min=1,
        max=7 * 86400,
        help="Seconds of processor time one run of qemu-img may use.",
    ),
    cfg.IntOpt(
        "images_address_space_limit",
        default=2,
        min=1,
        max=1024,
        help="GiB of address space one run of qemu-img may use.",
    ),
]

QEMU_IMG: Final[list[cfg.Opt]] = [
    cfg.IntOpt(
        "timeout",
        default=7200,
        min=1,
        max=7 * 86400,
        help="Seconds one run of qemu-img may take by the clock on the wall.",
    ),
]

ENCRYPTION: Final[list[cfg.Opt]] = [
    cfg.BoolOpt(
        "enabled",
        default=False,
        help="Encrypt the root, ephemeral and swap disks of instances with dm-crypt, each instance "
        "with a key of its own. Needs images_type = lvm; jobs that ask for another are refused.",
    ),
    CIPHER,
    KEY_SIZE,
    cfg.StrOpt(
        "key_manager",
        default="file",
        choices=[
            ("file", "one file per instance, in key_directory"),
            ("barbican", "Barbican, or what [key_manager] says, through castellan"),
        ],
        help="Where the keys are kept.",
    ),
    cfg.StrOpt(
        "key_directory",
        default="/var/lib/bootwright/keys",
        regex=ABSOLUTE_PATH,
        help="Directory of the keys, or for key_manager = barbican of their ids there: an absolute "
        "path. Mode 0700. Who can read a key can read the disks, so let it lie on another device "
        "than those.",
    ),
]
