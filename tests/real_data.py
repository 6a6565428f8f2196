"""Public data sets that some tests read: ``LUTHIER_TEST_DATA`` names the folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("LUTHIER_TEST_DATA", "/nonexistent"))


def needs_data(name: str) -> pytest.MarkDecorator:
    """Skip a test where the data set ``name`` is not there."""
    return pytest.mark.skipif(
        not (FOLDER / name).is_dir(), reason=f"LUTHIER_TEST_DATA names no folder with {name}"
    )
