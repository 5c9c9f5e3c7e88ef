"""Fixtures: an agent in memory behind a real socket."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent.api import create_app
from agent.listener import Listener
from tests.fake_service import FakeService


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.fixture
def listener(service: FakeService, socket_path: Path) -> Iterator[Listener]:
    with Listener(create_app(service), socket_path) as listener:
        yield listener


@pytest.fixture
def http(listener: Listener, socket_path: Path) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(socket_path))
    with httpx.Client(transport=transport, base_url="http://agent", timeout=20) as client:
        yield client
