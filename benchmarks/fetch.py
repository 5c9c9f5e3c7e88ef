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
from agent.qemu_img import QemuImg
from agent.transfer import RetryPolicy


def main(url: str, image_id: str, directory: Path) -> None:
    cache = ImageCache(
        directory / "_base",
        locks=directory / "locks",
        source=GlanceSource(Session(auth=NoAuth(), timeout=30), endpoints=[url]),
        converter=QemuImg(),
        policy=RetryPolicy(),
        require_hash=True,
        max_concurrent_fetches=1,
        in_use=lambda _: [],
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
