"""Studies with real training: reuse, failures, and continuation after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_commands import Command
from luthier_server import until

from luthier.engine.job import prepare_job
from luthier.errors import RecipeError, RunConflict
from luthier.library.models import custom_models
from luthier.recipe import Recipe
from luthier.workflows.estimate.estimate import PredictionInterval
from luthier.workflows.study import study as module
from luthier.workflows.study.cells import Cell, CellResult
from luthier.workflows.study.grid import Configuration, Dimension, grid_of, parse_dimensions
from luthier.workflows.study.presets import grid_from
from luthier.workflows.study.results import Study
from luthier.workflows.study.study import study

WORDS = ["card", "late", "lost", "refund", "bill", "fee", "where", "is", "my", "the", "please"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "rows.jsonl"
    lines = []
    for number in range(60):
        label = ("card", "refund", "fee")[number % 3]
        text = " ".join(WORDS[(number * 7 + place) % len(WORDS)] for place in range(3))
        lines.append(json.dumps({"text": f"{label} {text} {number}", "label": label}) + "\n")
    path.write_text("".join(lines))
    return path


def recipe_of(rows: Path, name: str | None = None) -> Recipe:
    fields = {
        "base": "fasttext",
        "name": name,
        "data": {"train": str(rows)},
        "training": {"max_steps": 12, "batch_size": 8, "threads": 1, "patience": 0},
    }
    return Recipe.parse({key: value for key, value in fields.items() if value})


def run(rows: Path, *vary: str, resume: bool = False, name: str | None = None) -> Study:
    dimensions = parse_dimensions(vary)
    return study(recipe_of(rows, name), grid_of(dimensions), dimensions, resume=resume)


def test_study_measures_each_configuration_and_reuses_the_measurements(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated = SimpleNamespace(seconds=PredictionInterval.exactly(1.0))
    monkeypatch.setattr(module, "estimate", lambda recipe, reporter: estimated)
    # The second rate overflows: a failed training is a row of the table.
    first = run(rows, "training.learning_rate=0.02,1e32")
    good, failed = first.rows
    assert good.is_measured and failed.reason
    (outcome,) = good.outcomes
    assert outcome.rows is not None and len(outcome.rows["parts"]) == first.held_out
    assert outcome.milliseconds and outcome.saved_bytes and outcome.peak_memory_bytes
    assert custom_models() == []
    assert Path(first.folder, "chosen.toml").is_file()
    monkeypatch.setattr(module, "run_cells", lambda cells, *_: failed.outcomes)
    second = run(rows, "training.learning_rate=0.02,1e32")
    assert second.rows[0].outcomes[0] == outcome
    assert second.folder != first.folder
    with pytest.raises(RunConflict):
        run(rows, "training.learning_rate=0.02,0.5", name=Path(first.folder).name)


def test_more_rows_than_the_data_has_are_refused(rows: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        run(rows, "rows=10,1000")
    assert refused.value.problem.setting == "rows"


@pytest.mark.parametrize(
    "values", ["objective.method=classification,dpo", "adaptation.method=full,prefix"]
)
def test_methods_that_rows_or_network_lack_are_refused_before_training(
    rows: Path, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_cells", None)
    with pytest.raises(RecipeError) as refused:
        run(rows, values)
    assert refused.value.problem.setting == "vary"


def test_preset_leaves_out_what_network_and_rows_lack(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = list[str]()

    def run_cells(cells: Sequence[Cell], *_: object) -> list[CellResult]:
        ran.extend(each.recipe.adaptation.method for each in cells)
        return [CellResult(value=1.0, seconds=1.0) for _ in cells]

    monkeypatch.setattr(module, "run_cells", run_cells)
    monkeypatch.setattr(module._Work, "_estimate", lambda *_: 1.0)
    methods = {"a": "full", "b": "bitfit", "c": "full"}
    grid = [Configuration({"adaptation.method": method}, name) for name, method in methods.items()]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "completion": "b"}\n')
    grid.append(Configuration({"data.mix": [{"train": str(pairs), "weight": 0.5}]}, "other rows"))
    found = study(recipe_of(rows), grid)
    assert ran == ["full", "full"] and [row.name for row in found.rows] == ["a", "c"]
    with pytest.raises(RecipeError):
        study(recipe_of(rows), *grid_from("bits", ()))


def test_name_taken_during_the_check_of_the_data_is_not_used(
    rows: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any) -> Any:
        (luthier_home / "studies" / "rows-1").mkdir(parents=True, exist_ok=True)
        return prepare_job(*arguments)

    monkeypatch.setattr(module, "prepare_job", prepare)
    measured = [CellResult(value=1.0, seconds=1.0)]
    monkeypatch.setattr(module, "run_cells", lambda *_: measured)
    monkeypatch.setattr(module._Work, "_estimate", lambda *_: 1.0)
    assert run(rows, "training.learning_rate=0.02,0.05").name == "rows-2"


def test_losses_of_different_objectives_are_not_compared() -> None:
    varied = [Dimension("objective.method", ("dpo", "ipo"))]
    with pytest.raises(RecipeError):
        module._check_comparable(varied, "loss")
    module._check_comparable(varied, "accuracy")


def pairs_recipe(folder: Path, base: Path) -> Recipe:
    """A short training of ``base`` on 40 prompts with replies of one word."""
    rows = [{"prompt": f"say {n}", "completion": WORDS[n % 5] * 2} for n in range(40)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_steps": 4, "threads": 1}
    return Recipe.parse({"base": str(base), "data": {"train": str(path)}, "training": training})


def test_several_prompts_become_rows_of_one_training() -> None:
    trained = CellResult(value=1.0, seconds=9.0, contenders={
        "tuned": {"value": 0.9}, "base with a.txt": {"value": 0.4, "seconds": 0},
    })  # fmt: skip
    rows = module._rows(Configuration({"prompts": "a.txt"}, "tuned"), [trained, trained])
    assert {row.name: row.value for row in rows} == {"tuned": 0.9, "base with a.txt": 0.4}
    assert [row.figure("seconds") for row in rows] == [9.0, 0]
    failed = replace(trained, reason="diverged")
    (row,) = module._rows(Configuration({}, "tuned"), [trained, failed])
    assert not row.is_measured


@pytest.mark.slow
def test_prompts_of_base_and_tuned_model_answer_the_same_rows(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    instructions = tmp_path / "brief.txt"
    instructions.write_text("Answer with one word.")
    recipe = pairs_recipe(tmp_path, tiny_model_folder)
    found = study(recipe, *grid_from(f"prompts={instructions}", ()))
    assert {row.name for row in found.rows} >= {
        f"{model}{prompt}"
        for model in ("base", "tuned")
        for prompt in ("", " with brief.txt", " with 4 examples")
    }
    assert len({row.order for row in found.rows}) == 1
    assert {len(row.scores or ()) for row in found.rows} == {found.held_out}
    tokens = {row.name: row.figure("prompt_tokens") or 0 for row in found.rows}
    assert tokens["tuned with 4 examples"] > tokens["tuned with brief.txt"] > tokens["tuned"]


@pytest.mark.slow
def test_students_start_from_the_same_half_of_the_teacher(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    recipe = pairs_recipe(tmp_path, tiny_model_folder)
    teacher, taught, alone = study(recipe, *grid_from("student", ())).rows
    assert taught.is_measured and alone.is_measured, taught.reason + alone.reason
    assert taught.outcomes[0].start == pytest.approx(alone.outcomes[0].start)
    assert taught.value != alone.value
    assert taught.outcomes[0].saved_bytes == alone.outcomes[0].saved_bytes
    assert taught.outcomes[0].saved_bytes < teacher.outcomes[0].saved_bytes
    assert [each.id.split(":")[1].split("-")[0] for each in custom_models()] == [
        "teacher", "student",
    ]  # fmt: skip


@pytest.mark.slow
def test_training_on_text_first_changes_the_base_of_the_cell(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROCESS_SECONDS", 1.0)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(WORDS)}) + "\n" for _ in range(40)))
    dimensions = parse_dimensions([f"before=none,{texts}"])
    found = study(pairs_recipe(tmp_path, tiny_model_folder), grid_of(dimensions), dimensions)
    none, after = found.rows
    assert none.is_measured, none.reason
    assert after.is_measured, after.reason
    assert [model.manifest.root for model in custom_models()] == [str(tiny_model_folder)]
    assert none.outcomes[0].start != after.outcomes[0].start
    assert none.scores is not None and len(none.scores) == found.held_out


@pytest.mark.slow
def test_killed_study_ends_with_the_measurements_of_an_undisturbed_study(
    rows: Path, tmp_path: Path
) -> None:
    command = [
        "study", str(rows), "--base", "fasttext", "--vary", "training.learning_rate=0.005,0.02,0.05",
        "--vary", "training.batch_size=4,8,16", "--set", "training.max_steps=60", "--set",
        "training.threads=1", "--name", "killed", "--resume",
    ]  # fmt: skip
    cells = tmp_path / "killed" / "studies" / ".cells"
    for count in (1, 4, 7):
        environment = {**os.environ, "LUTHIER_HOME": str(tmp_path / "killed")}
        process = Command(*command, env=environment, start_new_session=True)
        until(lambda count=count: len([*cells.glob("*/outcome.json")]) >= count)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    results = []
    for home in ("killed", "undisturbed"):
        environment = {**os.environ, "LUTHIER_HOME": str(tmp_path / home)}
        assert Command(*command, env=environment).wait() == 0
        result = json.loads((tmp_path / home / "studies" / "killed" / "result.json").read_text())
        results.append([(row["name"], row["value"]) for row in result["rows"]])
    assert results[0] == results[1]
    assert len(results[0]) == 9
