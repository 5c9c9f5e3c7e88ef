"""The contract of backends on logical volumes, plain and in a thin pool."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from functional.inside import volumes
from functional.inside.volumes import VolumeSite
from tests.backend_contract import *  # noqa: F403 - the contract suite


@pytest.fixture(params=["plain", "thin"])
def site(request: pytest.FixtureRequest, tmp_path: Path, _helper: None) -> Iterator[VolumeSite]:
    with volumes.site(tmp_path, thin=request.param == "thin") as site:
        yield site
