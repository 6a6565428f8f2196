"""Fixtures: output folders and a starter of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from killed_runs import Forker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for each module."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Forker:
    """Return a starter of runs with one output folder."""
    return Forker(tmp_path_factory.mktemp("forker"))
