"""Fixture: the service in this process, with models that repeat their input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from captured_service import Echo, Running
from luthier_server import home_with_tiny

from luthier.server.service import Service
from luthier.server.settings import Settings


@pytest.fixture
def running(
    luthier_home: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    """The service with an echo in place of models."""
    home_with_tiny(luthier_home, tiny_model_folder)
    monkeypatch.setenv("LUTHIER_BOOTSTRAP", str(luthier_home / "bootstrap.json"))
    service = Service(Settings(work=False))
    echo = Echo()
    for name in ("submit", "embed", "predict", "sample", "reconstruct"):
        monkeypatch.setattr(service.pool, name, getattr(echo, name))
    yield Running(service)
    service.close()
