"""``luthier pretrain``, and other commands with the resulting model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.cli.pretrain import PRETRAINING
from luthier.cli.terminal.options import assign_fields
from luthier.recipe import fields_of
from luthier.workflows.pretrain_recipe import PretrainRecipe

TEXT = "The quick brown fox jumps over the lazy dog. My card has not arrived yet. " * 80
SHORT = ["--size", "tiny", "--context", "32", "--vocabulary", "300", "--batch-size", "2",
         "--set", "training.max_steps=3", "--set", "training.precision=float32"]  # fmt: skip


def run(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my text.md"
    path.write_text(TEXT)
    return path


def test_pretrained_model_lifecycle(text: Path, tmp_path: Path) -> None:
    made = json.loads(run("pretrain", str(text), "--name", "mine", *SHORT, "--json").stdout)
    assert made["model_id"] == "mine" and made["steps"] == 3
    assert made["validation_loss"] > 0
    listed = json.loads(run("models", "list", "--json").stdout)["base"]
    mine = next(model for model in listed if model["id"] == "mine")
    assert mine["here"] and mine["context"] == 32 and mine["parameters"] > 500_000
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": TEXT[:500]}) + "\n")
    scores = json.loads(run("evaluate", "mine", str(rows), "--json").stdout)["scores"]
    assert 1 < scores["perplexity"] < 320
    body = json.loads(run("generate", "mine", "The", "--max-tokens", "4", "--json").stdout)
    assert body["completion"]
    shown = json.loads(run("models", "show", "mine", "--json").stdout)
    assert shown["lineage"] == ["mine"]
    assert all(file["intact"] for file in shown["files"].values())
    assert "mine" in run("models", "list").stdout
    run("models", "remove", "mine")
    assert "mine" not in run("models", "list").stdout


def test_pretrain_prints_result(text: Path) -> None:
    shown = run("pretrain", str(text), "--name", "mine", *SHORT).stdout
    for words in ("mine is a base model", "3 steps", "perplexity", "luthier generate mine"):
        assert words in " ".join(shown.split())


def test_options_and_settings_reach_the_recipe(tmp_path: Path) -> None:
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    fields = {"name": "x", "family": "palm", "training__beta2": 0.99}
    recipe = PretrainRecipe.parse(assign_fields(fields_of(texts), fields, PRETRAINING))
    assert [path.name for path in recipe.data.train] == ["a.txt", "b.txt"]
    assert recipe.network.family == "palm"
    assert recipe.training.beta2 == 0.99 and recipe.training.weight_decay == 0.1


def test_recipe_file_resolves_relative_text_paths(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "x"\n[data]\ntrain = ["a.txt", "b.md"]\nvalidation = ["c.txt"]\n')
    recipe = PretrainRecipe.parse(fields_of([str(path)]))
    assert recipe.data.train == (tmp_path / "a.txt", tmp_path / "b.md")
    assert recipe.data.validation == (tmp_path / "c.txt",)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ([], "name"),
        (["--name", "x", "--vocabulary", "100"], "tokenizer.vocabulary"),
        (["--name", "x", "--size", "7b"], "network.size"),
        (["--name", "x", "--family", "rwkv"], "network.family"),
        (["--name", "x", "--config", "c.json", "--size", "tiny"], None),
    ],
)
def test_pretrain_rejects_invalid_options_before_work(
    arguments: list[str], setting: str | None, text: Path, luthier_home: Path
) -> None:
    refused = run("pretrain", str(text), *arguments, "--json", code=2)
    assert json.loads(refused.stdout)["error"]["problems"][0]["setting"] == setting
    assert not luthier_home.exists()
