"""Run by test_shared_bases.py as the service user: fetches one image of two with the same bytes."""

import json
import random
import sys
from pathlib import Path

from tests.cache_kit import MIB, CacheKit, Source


def main() -> None:
    """Fetch the image named on the command line; print what came of it as JSON."""
    source = Source()
    image = source.add(random.Random(1).randbytes(2 * MIB), image_id=sys.argv[2])
    base = CacheKit(directory=Path(sys.argv[1]), source=source).fetch(image)
    right = base.path.read_bytes() == source.data[image.id]
    json.dump({"downloads": len(source.opened), "path": str(base.path), "right": right}, sys.stdout)


if __name__ == "__main__":
    main()
