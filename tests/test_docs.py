"""The documentation says what the code says."""

import re
from pathlib import Path

import pytest

from agent import api, errors
from agent.errors import BootwrightError, ImageError
from docs import generate
from tests.fake_service import FakeService

DOCS = Path(__file__).parents[1] / "docs"
ERROR_CODES = sorted(
    known.__name__
    for known in vars(errors).values()
    if isinstance(known, type) and issubclass(known, BootwrightError)
    if known not in (BootwrightError, ImageError)
)


def test_the_generated_parts_are_current() -> None:
    stale = generate.stale()
    assert not stale, "run: python -m docs.generate"


def test_bounds_and_defaults_are_exact() -> None:
    text = (DOCS / "configuration.md").read_text("utf-8")
    assert "| `max_size` | whole number, 0 to 1073741824 | `0` |" in text
    assert "| `images_rbd_glance_store_name` | text |  |" in text
    assert not re.search(r"number, [^|]*[0-9]e[+-]", text)


def test_troubleshooting_knows_every_error_code() -> None:
    text = (DOCS / "operations.md").read_text("utf-8")
    assert [code for code in ERROR_CODES if f"`{code}`" not in text] == []


def test_the_api_page_knows_every_route() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    routes = api.create_app(FakeService()).openapi()["paths"]
    assert [path for path in routes if not re.search(rf"{re.escape(path)}[`?]", text)] == []


@pytest.mark.parametrize(
    "page", [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
