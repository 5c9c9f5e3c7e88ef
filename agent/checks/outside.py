"""What is not ours: libvirt, the image source, the agent that may be running."""

import time
from collections.abc import Iterator
from typing import Final

from agent import image_source
from agent.ceph import Cluster
from agent.checks import error, ok, warning
from agent.client import AgentUnavailable, Client, Refused
from agent.directory import DirectorySource
from agent.errors import BootwrightError
from agent.hypervisor import DEFAULT_NETWORK, Hypervisor
from agent.settings import ImageSourceName, Settings
from agent.views import Finding

_SKEW_S: Final = 60.0
"""Tokens live for an hour or more; beyond this somebody's clock is wrong."""


def libvirt(settings: Settings) -> Iterator[Finding]:
    """libvirt answers, and can run our type of guests."""
    hypervisor = Hypervisor(settings.libvirt.connection_uri, virt_type=settings.libvirt.virt_type)
    try:
        yield ok("libvirt", f"{hypervisor.version()} at {settings.libvirt.connection_uri}")
    except BootwrightError as e:
        yield error("libvirt", e.message, e.hint)
        return
    virt_type = settings.libvirt.virt_type
    try:
        hypervisor.check()
        yield ok("virt_type", f"libvirt can run guests of virt_type {virt_type}")
    except BootwrightError as e:
        yield error("virt_type", e.message, e.hint)
    finally:
        hypervisor.close()


def network(settings: Settings) -> Iterator[Finding]:
    """The network of guests whose job names none; nothing to say where libvirt does not answer."""
    hypervisor = Hypervisor(settings.libvirt.connection_uri, virt_type=settings.libvirt.virt_type)
    try:
        active = hypervisor.has_active_network(DEFAULT_NETWORK)
    except BootwrightError:
        return
    finally:
        hypervisor.close()
    name = "network"
    if active:
        yield ok(name, f"libvirt's network {DEFAULT_NETWORK} is active")
        return
    yield warning(
        name,
        f"libvirt's network {DEFAULT_NETWORK} is not active; jobs without networks get no card",
        f"install dnsmasq-base, virsh net-autostart {DEFAULT_NETWORK}, virsh net-start "
        f"{DEFAULT_NETWORK}; or name networks in the jobs",
    )


def ceph(settings: Settings) -> Iterator[Finding]:
    """The cluster answers, and accepts our user; nothing to say where there is none."""
    rbd = settings.libvirt.rbd
    if rbd is None:
        return
    cluster = Cluster(rbd.ceph_conf, rbd.user, connect_timeout_s=rbd.connect_timeout_s)
    try:
        connection = cluster.connection()
        monitors = connection.monitors()
        connection.key()
        with connection.pool(rbd.pool) as pool:
            images = len(pool.names())
    except BootwrightError as e:
        yield error("ceph", e.message, e.hint)
    else:
        yield ok("ceph", f"{len(monitors)} monitors, {images} images in pool {rbd.pool}")


def images(settings: Settings) -> Iterator[Finding]:
    """The image source answers, and accepts our credentials."""
    match settings.images.source:
        case ImageSourceName.DIRECTORY:
            yield from _local_images(settings)
        case ImageSourceName.GLANCE:
            yield from _glance(settings)


def _local_images(settings: Settings) -> Iterator[Finding]:
    directory = settings.images.directory
    if not directory.is_dir():
        yield warning(
            "image source",
            f"{directory} is not there",
            "'bootwright image add' makes it, once started",
        )
        return
    try:
        found = DirectorySource(directory).list()
    except (BootwrightError, OSError) as e:
        yield error("image source", f"{directory}: {e}", "chown bootwright: it")
        return
    if found:
        yield ok("image source", f"images in {directory}: {len(found)}")
    else:
        yield ok("image source", f"{directory} is empty; 'bootwright image add' puts images there")


def _glance(settings: Settings) -> Iterator[Finding]:
    source = image_source.glance(settings.images)
    try:
        endpoints = source.endpoints()
    except BootwrightError as e:
        yield error("glance", e.message, e.hint)
        return
    failures = []
    for endpoint in endpoints:
        try:
            asked = time.time()
            theirs = source.check(endpoint)
        except BootwrightError as e:
            failures.append(e)
            continue
        yield ok("glance", f"{endpoint} answers and accepts our credentials")
        skew = 0.0 if theirs is None else theirs - asked
        if abs(skew) > _SKEW_S:
            yield warning(
                "clock",
                f"{endpoint} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this host",
                "run chrony or systemd-timesyncd on both",
            )
    # One that answers is enough; the others are for when it does not.
    judged = error if len(failures) == len(endpoints) else warning
    for failure in failures:
        yield judged("glance", failure.message, failure.hint)


def agent(settings: Settings) -> Iterator[Finding]:
    """The agent, if it runs, and what it says of itself."""
    try:
        with Client(settings.api.socket) as client:
            status = client.status()
    except (AgentUnavailable, Refused) as e:
        yield warning("agent", str(e), "systemctl start bootwright")
        return
    yield ok("agent", f"version {status.version} runs, pid {status.pid}")
    for check in status.checks:
        if not check.ok:
            yield error(f"agent: {check.name}", check.message, check.hint)
