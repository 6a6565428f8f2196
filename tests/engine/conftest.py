"""A short run and its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from short_runs import pairs, write_rows

from luthier.recipe import Recipe


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", pairs(24))


@pytest.fixture
def recipe(rows: Path, tiny_model_folder: Path) -> Callable[..., Recipe]:
    """``recipe(name="y", training={...})``: a short run in float32."""

    def build(training: Mapping[str, Any] | None = None, **fields: Any) -> Recipe:
        settings = {"max_steps": 4, "batch_size": 8, "precision": "float32", "threads": 1}
        plain = {
            "base": str(tiny_model_folder),
            "name": "x",
            "data": {"train": str(rows), "validation_share": 0.2},
            "adaptation": {"method": "lora", "rank": 4},
            "training": {**settings, **(training or {})},
        }
        return Recipe.parse({**plain, **fields})

    return build
