"""What /metrics counts; the names are words of the contract. Never an id in a label."""

from typing import Final

from prometheus_client import Counter, Gauge

IMAGE_REQUESTS: Final = Counter(
    "bootwright_image_requests_total",
    "Bases asked for: hit, miss, joined (a fetch under way), shared (the bytes were here).",
    ["result"],
)
FETCH_BYTES: Final = Counter("bootwright_fetch_bytes_total", "Bytes received from image sources.")
EVICTIONS: Final = Counter("bootwright_evictions_total", "Bases removed, by reason.", ["reason"])
VERIFY_FAILURES: Final = Counter(
    "bootwright_verify_failures_total", "Bases found damaged on this host's disk."
)
CACHE_BYTES: Final = Gauge("bootwright_cache_bytes", "Bytes on disk of the image cache.")
