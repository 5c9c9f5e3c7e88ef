"""Fetch one image into an image cache and end: what `benchmarks.cold` measures as Bootwright.

The agent is a service, so it is measured from the line on standard input on.

python -m benchmarks.fetch GLANCE_URL IMAGE_ID DIRECTORY
"""

import sys
from pathlib import Path

from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from agent.cancellation import Cancellation
from agent.glance import GlanceSource
from agent.image_cache import ImageCache
from agent.instances import Instances
from agent.qemu_img import QemuImg
from agent.space import Space
from agent.store import Store
from agent.transfer import RetryPolicy
from agent.usage import Usage
from agent.verification import Verifier


def main(url: str, image_id: str, directory: Path) -> None:
    store = Store(directory / "_base")
    usage = Usage(store, Instances(directory), host_id="benchmark")
    cache = ImageCache(
        store,
        usage,
        Space(store, reserved_free_space=0, max_size=None, make_room=lambda _: None),
        Verifier(store, usage),
        source=GlanceSource(Session(auth=NoAuth(), timeout=30), endpoints=[url]),
        converter=QemuImg(),
        policy=RetryPolicy(),
        require_hash=True,
        max_concurrent_fetches=1,
    )
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


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
