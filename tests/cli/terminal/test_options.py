"""Recipes from keywords and settings, and commands that parse to the same recipe."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.cli.terminal.options import existing_source, tuning_recipe
from luthier.engine.timings import estimates_folder
from luthier.errors import DataError, RecipeError
from luthier.files import read_json
from luthier.recipe import Recipe, assign, parse_setting
from luthier.workflows.advise import command_of

WORDS = ("fox", "dog", "card", "bank", "river", "tree", "house", "cloud", "stone", "bird")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say {a} {b}", "completion": b} for a in WORDS for b in WORDS if a != b]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_estimate_is_stored_for_run(data: Path, tiny_model_folder: Path) -> None:
    found = luthier.estimate(data, base=str(tiny_model_folder), training__epochs=2)
    assert found.epochs == 2 and found.rows == 81  # a tenth is held out
    assert found.seconds.low <= found.seconds.value <= found.seconds.high
    assert read_json(estimates_folder() / f"{found.key}.json")["steps"] == found.steps
    recipe = luthier.Recipe.parse(
        {"data": {"train": str(data)}, "base": str(tiny_model_folder), "training": {"epochs": 2}}
    )
    assert luthier.estimate(recipe).key == found.key
    with pytest.raises(RecipeError):
        luthier.estimate(recipe, training__epochs=1)


@pytest.mark.slow
def test_advise_returns_facts_and_judgements(data: Path, tiny_model_folder: Path) -> None:
    found = luthier.advise(
        data, trial=0, base=str(tiny_model_folder), training__epochs=2, max_megabytes=10_000
    )
    assert found.facts.rows == 90 and found.facts.wishes.max_megabytes == 10_000
    assert {each.technique for each in found.judgements} > {"fine-tuning", "prompt engineering"}
    assert found.facts.evidence is not None and found.facts.evidence.steps == 0
    plain = json.loads(json.dumps(found.plain()))
    assert plain["recommendation"]["reasons"] == list(found.recommendation.reasons)


@pytest.mark.parametrize(
    "fields",
    [
        {"base": "b", "training.epochs": 2, "training.learning_rate": 1e-3},
        {"objective": "dpo", "adaptation": {"method": "lora", "rank": 8, "dora": True}},
        {"name": "8", "data.columns": {"prompt": "the question"}},
        {"data.validation": Path("held out.jsonl"), "data.long_rows": "drop"},
    ],
)
def test_printed_command_parses_to_same_recipe(fields: dict[str, Any]) -> None:
    luthier_, tune, data, *rest = shlex.split(command_of("rows.jsonl", fields))
    assert (luthier_, tune, data) == ("luthier", "tune", "rows.jsonl")
    flags = {"--base": "base", "--objective": "objective", "--adaptation": "adaptation"}
    flags["--validation"] = "validation"
    given = [
        parse_setting(value) if option == "--set" else (flags[option], value)
        for option, value in zip(rest[::2], rest[1::2], strict=True)
    ]
    expected: dict[str, Any] = {"data": {"train": "rows.jsonl"}}
    for key, value in fields.items():
        assign(expected, key.split("."), value)
    assert tuning_recipe(data, dict(given)) == Recipe.parse(expected)


def test_common_fields_need_no_group(tmp_path: Path) -> None:
    fields = {"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "seed": 7}
    recipe = tuning_recipe("rows.jsonl", {**fields, "adaptation__rank": 4})
    assert {name: getattr(recipe.training, name) for name in fields} == fields
    assert recipe == tuning_recipe(
        "rows.jsonl", {"adaptation__rank": 4, **{f"training__{k}": v for k, v in fields.items()}}
    )
    with pytest.raises(RecipeError):
        tuning_recipe("rows.jsonl", {"epochs": 3, "training__epochs": 3})


def test_package_dir_contains_public_names() -> None:
    assert set(luthier.__all__) <= set(dir(luthier))


@pytest.mark.parametrize("source", [".", "none*.jsonl", "s3://none/a.jsonl", "file:///none.jsonl"])
def test_existing_source_accepts_reader_sources(source: str) -> None:
    assert existing_source(source) == source


def test_missing_source_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        existing_source(str(tmp_path / "none.jsonl"))
    assert refused.value.problems[0].rule == "file.missing"
