"""Fetch one image into an image cache and end: what `benchmarks.cold` measures as Bootwright.

The agent is a service that was started long ago and goes on: it is measured
from the line on standard input to the moment the base is there.

python -m benchmarks.fetch GLANCE_URL IMAGE_ID DIRECTORY [CONNECTIONS]
"""

import os
import sys
from pathlib import Path

from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from agent.base_maker import BaseMaker
from agent.cancellation import Cancellation
from agent.certificates import CertificateDirectory
from agent.glance import GlanceSource
from agent.image_cache import ImageCache
from agent.instances import Instances
from agent.qemu_img import QemuImg
from agent.signatures import Signatures
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier


def main(url: str, image_id: str, directory: Path, max_connections: int = 4) -> None:
    store = Store(directory / "_base")
    usage = Usage(store, Instances(directory), host_id="benchmark")
    source = GlanceSource(Session(auth=NoAuth(), timeout=30), endpoints=[url])
    policy = RetryPolicy()
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
        converter=QemuImg(),
        policy=policy,
        require_hash=True,
        verify_before_use=False,
        vmdk_types=(),
        max_concurrent_fetches=1,
        max_connections_per_image=max_connections,
    )
    cache = ImageCache(store, usage, maker, source=source, signatures=signatures, policy=policy)
    # Whoever asks Glance for the first time fetches its schemas, once.
    cache.resolve(image_id, Cancellation())
    print("ready", flush=True)
    sys.stdin.readline()
    image = cache.resolve(image_id, Cancellation())
    cache.acquire(
        image,
        pin="benchmark",
        max_virtual_size=None,
        cancellation=Cancellation(),
        on_progress=lambda _: None,
    )
    os._exit(0)  # what a service does not do should take no time


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
