"""A folder for the files that the tests of one module write."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for each module."""
    return tmp_path_factory.mktemp("data")
