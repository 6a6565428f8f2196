"""Next-item recommendation from histories, with a catalogue of known structure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.data.rows import load_rows
from luthier.data.shapes.texts import History, TextPair
from luthier.engine.train import train
from luthier.evaluation.baselines import States
from luthier.gate.row_keys import group_related
from luthier.recipe import Recipe
from luthier.tasks import EMBEDDING

TASTES = ("fox", "dog", "card", "capital")
KINDS = ("quick", "lazy", "brown", "new", "old", "small")


def histories(count: int, seed: int) -> list[dict[str, Any]]:
    """Return histories: each user has one taste and chooses four of its six items in any order."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        chosen = random.permutation(KINDS)[:4]
        items = [f"the {kind} {TASTES[number % len(TASTES)]}" for kind in chosen]
        rows.append({"history": items[:3], "item": items[3]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_history_is_encoded_latest_first_and_written_unchanged(tmp_path: Path) -> None:
    record = {"history": ["a", "b c"], "item": "d"}
    (row,) = load_rows(write(tmp_path / "rows.jsonl", [record]))
    assert isinstance(row, History) and isinstance(row, TextPair)
    assert (row.text, row.positive, row.items) == ("b c\na", "d", ["b c", "a"])
    assert row.record() == record
    chat = {"history": [["hi", "hello"]], "instruction": "x", "output": "y"}
    (other,) = load_rows(write(tmp_path / "chat.jsonl", [chat]))
    assert other.shape == "messages"


def test_users_with_shared_item_are_not_grouped(tmp_path: Path) -> None:
    wanted = ["the same"] * 3 + ["one", "two", "three", "four"]
    texts = [" ".join(f"{word}{n * 7}" for word in KINDS) for n in range(7)]
    both = [*zip(texts, wanted, strict=True)]
    assert len({*group_related([History("f", 1, *each) for each in both]).tolist()}) == 7
    assert len({*group_related([TextPair("f", 1, *each) for each in both]).tolist()}) == 5


def test_baselines_leave_out_the_items_of_histories(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "rows.jsonl", histories(40, 0)))
    draw = torch.Generator().manual_seed(0)
    held_QH, partner_QH = (torch.randn(40, 8, generator=draw) for _ in range(2))
    sides = torch.stack([held_QH, partner_QH], 1).reshape(80, 8).tolist()
    tuned = EMBEDDING.row_scores(rows, [{"embedding": side} for side in sides])
    states = States(held_QH[:0], held_QH, 0, partner_QH=partner_QH)
    scores = {
        method.name: method.measure(rows, rows, states, EMBEDDING)[1].value
        for method in EMBEDDING.baselines(rows, rows)
    }
    assert scores["the base model as it is"] == tuned.value
    # Words of the taste find its six items; three of them are left out.
    assert scores["BM25 on words"] == 1


@pytest.mark.slow
def test_next_item_ranks_high_against_baselines(
    family_folder: Callable[[str], Path], tmp_path: Path, luthier_home: Path
) -> None:
    fields: dict[str, Any] = {
        "base": str(family_folder("bert")),
        "name": "next",
        "data": {
            "train": write(tmp_path / "train.jsonl", histories(96, 0)),
            "validation": write(tmp_path / "test.jsonl", histories(32, 1)),
            "severity": {"leakage.many": "note"},
        },
        "adaptation": "full",
        "training": {"max_steps": 60, "learning_rate": 3e-3, "precision": "float32"},
    }
    result = train(Recipe.parse(fields))
    assert result.comparison is not None
    names = {each.name for each in result.comparison.baselines}
    assert {"the most popular items", "items that were chosen together"} <= names
    found = luthier.evaluate(result.model_id, tmp_path / "test.jsonl")
    assert "24" in " ".join(found.remarks)
    # A known taste leaves 6 items; chance is 10 of 24.
    assert found.scores["recall_at_10"] > 0.8
    assert found.scores["ndcg_at_10"] > 0.3
