"""Short runs on small files: inputs, messages and results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.engine.dataset import prepare
from luthier.engine.metrics import Reporter
from luthier.engine.runs import Result
from luthier.files import read_json
from luthier.library.models import find, load
from luthier.models.load import as_network
from luthier.objectives.means import mean_loss
from luthier.recipe import Recipe

CPU = torch.device("cpu")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "my",
    "new",
    "card",
]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    made = []
    for index in range(start, start + count):
        said = " ".join(WORDS[(index * 7 + k) % len(WORDS)] for k in range(2 + index % 5))
        made.append({"prompt": f"say {said}", "completion": said.upper()})
    return made


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


def metrics_of(result: Result) -> list[dict[str, Any]]:
    text = (Path(result.run_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def manifest_of(result: Result) -> dict[str, Any]:
    return dict(read_json(Path(result.model_dir) / "luthier.json"))


def stored_loss(model_id: str, data: Path) -> float:
    """Return the stored model's loss on all rows of a file."""
    stored = find(model_id)
    network = as_network(load(stored, torch.float32, CPU), CPU, torch.float32)
    spec = Recipe.parse({"data": {"train": str(data), "validation_share": 0}})
    dataset = prepare(spec.data, None, stored.chat, 1024, 0)
    return mean_loss(dataset.objective, network, dataset.train, 512)


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.choices: dict[str, tuple[Any, str]] = {}
        self.lines: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def settings(self, choices: Sequence[tuple[str, Any, str]]) -> None:
        self.choices = {name: (value, reason) for name, value, reason in choices}

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        self.lines.append(line)
