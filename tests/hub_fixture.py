"""The fixture `hub`: a hub on loopback for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that answers on loopback until the test ends."""
    with Hub(tmp_path / "hf_home") as server:
        yield server
