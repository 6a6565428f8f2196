"""Public data sets of some tests in the folder ``LUTHIER_TEST_DATA``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("LUTHIER_TEST_DATA", "/nonexistent"))


def needs_data(name: str) -> pytest.MarkDecorator:
    """Skip a test if the data set ``name`` is missing."""
    return pytest.mark.skipif(
        not (FOLDER / name).is_dir(), reason=f"LUTHIER_TEST_DATA names no folder with {name}"
    )
