"""Complete advice with tiny models: gate, estimate, measurements and recipe."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.data.shapes.texts import LabelledText
from luthier.recipe import Recipe
from luthier.workflows.advise.evidence import HELD_OUT_LABELS, divide_rows

WORDS = ("fox", "dog", "card", "bank", "river", "tree", "house", "cloud", "stone", "bird")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [
        {"text": f"the {a} and the {b} {n}", "label": "animal" if "fox" in (a, b) else "other"}
        for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
    ]
    return write(tmp_path / "labelled.jsonl", rows)


def asked(*arguments: object) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["advise", *map(str, arguments), "--json"])
    assert found.exit_code == 0, found.output
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


@pytest.mark.slow
def test_advise_tries_four_techniques_for_decoder(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [{"prompt": f"say {a} {b}", "completion": b} for a in WORDS for b in WORDS if a != b]
    data = write(tmp_path / "rows.jsonl", rows)
    text = tmp_path / "about.txt"
    text.write_text("A fox is an animal.\nA bank is a house.\n" * 20)
    recipe = tmp_path / "advised.toml"
    found = asked(
        data, "--base", tiny_model_folder, "--documents", text, "--trial", 1, "--recipe", recipe
    )
    evidence = found["facts"]["evidence"]
    names = [each["technique"] for each in evidence["tried"]]
    assert names == ["zero-shot", "prompt engineering", "prompt engineering", "RAG", "fine-tuning"]
    assert all(0 <= each["score"] <= 1 < each["prompt_tokens"] for each in evidence["tried"])
    assert 5 <= evidence["held_rows"] <= 80 and evidence["trial_steps"] >= 1
    assert found["facts"]["estimate"]["seconds"]["value"] > 0
    assert Recipe.parse(tomllib.loads(recipe.read_text())).data.train == str(data)


@pytest.mark.slow
def test_advise_compares_encoder_with_simple_baselines(labelled: Path, family_folder: Any) -> None:
    found = asked(labelled, "--base", family_folder("bert"), "--trial", 1)
    tried = {each["name"]: each for each in found["facts"]["evidence"]["tried"]}
    assert {"always the most frequent label", "naive Bayes on words"} <= set(tried)
    assert "logistic regression on the base model" in tried
    assert all(0 <= each["score"] <= 1 for each in tried.values())
    assert [each["technique"] for each in found["techniques"]][1] == "simple baselines"


@pytest.mark.parametrize("kind", ["image", "window"])
def test_advise_without_text_names_inspect_and_estimate(tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"image": "photos", "window": "series.csv"}[kind]
    if kind == "window":
        path.write_text("timestamp,value\n1,2.5\n2,2.6\n")
    else:
        (path / "a").mkdir(parents=True)
        (path / "a" / "1.png").write_bytes(b"never opened")
    found = CliRunner().invoke(app, ["advise", str(path)])
    assert found.exit_code == 2 and "\n" not in found.output.strip()
    for command in ("luthier inspect", "luthier estimate"):
        assert f"{command} {path}" in found.output
    assert not list((tmp_path / "models").glob("*")), "a base was fetched"


def test_advise_on_refused_or_unreadable_data(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [{"prompt": "q", "completion": "a"}] * 3
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "q", "completion": ""}])
    found = asked(data, "--base", tiny_model_folder)
    assert found["recommendation"]["techniques"] == []
    assert "field.empty" in found["recommendation"]["reasons"][0]
    data.write_text("{\n")
    result = CliRunner().invoke(app, ["advise", str(data), "--base", str(tiny_model_folder)])
    assert result.exit_code == 2


def test_rows_of_a_validation_file_are_drawn_from_all_labels(tmp_path: Path) -> None:
    labels = [f"label {number // 200}" for number in range(800)]
    rows = [
        LabelledText("f", n, text=f"a text about number {n} of {label}", label=label)
        for n, label in enumerate(labels, 1)
    ]
    lines = [{"text": row.text, "label": row.label} for row in rows]
    held = write(tmp_path / "held.jsonl", lines)
    train = [
        *(
            LabelledText("t", n, text=f"quite other words {n * n}", label="label 1")
            for n in range(50)
        ),
        *rows[:400],  # also queried
    ]
    recipe = Recipe.parse({
        "base": "x", "objective": "classification",
        "data": {"train": str(held), "validation": str(held)},
    })  # fmt: skip
    learned, asked_rows = divide_rows(recipe.data, train, {}, HELD_OUT_LABELS)
    counts = Counter(row.label for row in asked_rows if isinstance(row, LabelledText))
    assert sorted(counts) == sorted({*labels}) and max(counts.values()) - min(counts.values()) < 2
    questions = {row.plain_text() for row in asked_rows}
    assert not questions & {row.plain_text() for row in learned} and len(learned) < len(train)
