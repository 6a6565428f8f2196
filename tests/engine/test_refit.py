"""Refits: stored weights, records, and resume after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from killed_runs import TIMING
from short_runs import Notes, manifest_of, metrics_of, write_rows

from luthier.engine import embedding_rows
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.job import prepare_job, prepare_refit
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.runs import HELD_OUT, REFIT, Result
from luthier.engine.train import store_trial, train
from luthier.engine.verdict import Refit
from luthier.errors import RecipeError
from luthier.files import read_json
from luthier.library import models as store
from luthier.recipe import Recipe

STEPS = 12
ROWS = [
    {"text": f"the {word} and my {other} {n}", "label": "animal" if n % 2 else "thing"}
    for n in range(20)
    for word, other in [(("card", "fox")[n % 2], ("river", "tree")[n // 2 % 2])]
]


@pytest.fixture
def recipe(tmp_path: Path, family_folder: Callable[[str], Path]) -> Callable[..., Recipe]:
    """A classifier from 20 rows, 5 of them held out; measured before the first step and at the end."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def make(
        name: str,
        data_: Mapping[str, Any] | None = None,
        base: str = "",
        **training: Any,
    ) -> Recipe:
        settings = {
            "max_steps": STEPS, "batch_size": 4, "evaluate_every": STEPS, "learning_rate": 1e-2,
            "precision": "float32", "threads": 1, "baseline_seconds": 0,
        }  # fmt: skip
        return Recipe.parse(
            {
                "base": base or str(family_folder("llama")),
                "name": name,
                "objective": {"method": "classification", "probe": False},
                "adaptation": "full",
                "data": {"train": str(data), "validation_share": 0.25, **(data_ or {})},
                "training": {**settings, **training},
            }
        )

    return make


def sha256(result: Result) -> str:
    return str(manifest_of(result)["trained_weights_sha256"])


@pytest.mark.slow
def test_refit_stores_weights_of_run_on_all_rows(recipe: Callable[..., Recipe]) -> None:
    notes = Notes()
    result = train(recipe("x"), reporter=notes)
    assert notes.choices["training.refit"][0] is True
    assert result.verdict is not None and result.verdict.kept_step == STEPS
    assert result.refit == Refit(rows=20, held_out=5, steps=STEPS)
    assert sha256(result) == sha256(train(recipe("again")))
    whole = train(recipe("whole", {"validation_share": 0}))
    assert whole.refit is None
    assert sha256(result) == sha256(whole)
    measured = train(recipe("measured", refit=False))
    assert measured.refit is None and measured.verdict is not None
    assert sha256(result) != sha256(measured)
    # Numbers of steps go on from step to step, over both trainings.
    trained = [line["step"] for line in notes.lines if line["event"] == "train"]
    assert trained == [*range(1, 2 * STEPS + 1)]
    shown = [(line["event"], line["step"]) for line in notes.lines]
    assert shown == [(line["event"], line["step"]) for line in metrics_of(result)]
    assert (result.steps, result.rows) == (2 * STEPS, 20)
    # The scores come from the first training, and the text states this.
    assert result.verdict.kept == measured.verdict.kept
    assert result.validation_loss == measured.validation_loss
    assert result.verdict.text != measured.verdict.text


@pytest.mark.slow
def test_record_of_refit_has_no_learned_row_as_held_out(
    recipe: Callable[..., Recipe],
) -> None:
    result = train(recipe("x", {"test_share": 0.2}))
    manifest = manifest_of(result)
    assert result.refit is not None and result.refit.rows == 15
    assert (manifest["data"]["rows"], manifest["data"]["validation_rows"]) == (15, 0)
    assert manifest["data"]["held_out"] == {}
    assert manifest["recipe"]["training"]["refit"] is True
    assert "was not measured" in manifest["metrics"]["verdict"]["text"]
    assert manifest["metrics"]["refit"] == {"rows": 15, "held_out": 5, "steps": STEPS}
    assert manifest["parity"]["rows"] == 15
    folder = Path(result.run_dir)
    assert list(read_json(folder / HELD_OUT)) == ["test"]
    measured = train(recipe("measured", {"test_share": 0.2}, refit=False))
    before = read_json(Path(measured.run_dir) / HELD_OUT)
    assert read_json(folder / HELD_OUT)["test"] == before["test"]
    assert not (folder / REFIT).exists()
    # Further tuning on the same rows warns that held-out rows were learned.
    notes = Notes()
    train(recipe("y", base=result.model_id, max_steps=1, refit=False), reporter=notes)
    assert any(result.model_id in note and "held-out" in note for note in notes.notes)
    train(recipe("z"))
    assert not (folder.parent / "z" / HELD_OUT).exists()


def test_rows_of_a_validation_file_are_never_learned_from(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    held = write_rows(
        tmp_path / "held.jsonl", [{"text": f"a new dog {n}", "label": "animal"} for n in range(4)]
    )
    assert train(recipe("x", {"validation": str(held)})).refit is None
    with pytest.raises(RecipeError) as refused:
        train(recipe("y", {"validation": str(held)}, refit=True))
    assert refused.value.rule == "refit.no_held_out"


def test_no_refit_with_initial_weights(
    recipe: Callable[..., Recipe],
) -> None:
    result = train(recipe("x", learning_rate=1e-30))
    assert result.verdict is not None and result.verdict.kept_step == 0
    assert result.refit is None and result.steps == STEPS
    assert manifest_of(result)["data"]["held_out"]


@pytest.mark.slow
def test_no_refit_without_gain(recipe: Callable[..., Recipe]) -> None:
    result = train(recipe("x", learning_rate=1e-6, baseline_seconds=5))
    assert result.verdict is not None and not result.verdict.learned
    assert result.refit is None and result.steps == STEPS
    assert "labelled" not in result.verdict.advice


def test_refit_has_passes_of_best_weights(
    recipe: Callable[..., Recipe],
) -> None:
    asked = recipe("x", max_steps=None, epochs=4.0)
    base = store.find(asked.base)
    job = prepare_job(asked, base, choose_machine("float32", 1), Reporter())
    assert (job.steps, job.refit_steps, job.all_steps) == (16, 20, 36)
    whole = prepare_refit(job, kept_step=12, steps_before=14)
    assert (whole.steps, whole.until, whole.all_steps) == (20, 15, 29)
    assert not whole.data.validation and len(whole.data.train) == 20
    assert whole.recipe.training.model_copy(update={"refit": True}) == job.recipe.training


def test_trials_are_not_trained_once_more(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    result = store_trial(recipe("x", refit=True), tmp_path / "trial", Reporter())
    assert result.steps == STEPS
    assert not (tmp_path / "trial" / REFIT).exists()


class Broken(Exception):
    """End of the first run."""


class BreakingReporter(Reporter):
    """Reporter that raises between the line of a step and the checkpoint, like a kill."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        if line["event"] == "train" and line["step"] == self.step:
            raise Broken


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEPS - 1, STEPS + 1, 2 * STEPS - 1])
def test_interrupted_training_or_refit_resumes_to_equal_bits(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, luthier_home: Path, step: int
) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self, step, size: step % 2 == 0)
    monkeypatch.setattr(embedding_rows, "MIN_NUMBERS", 1)  # small tables, too, by their rows
    whole = train(recipe("whole"))
    with pytest.raises(Broken):
        train(recipe("broken"), reporter=BreakingReporter(step))
    run = Path(whole.run_dir).with_name("broken")
    assert bool([*(run / REFIT / "checkpoints").glob("step-*")]) is (step > STEPS + 2)
    notes = Notes()
    again = train(recipe("broken"), resume=True, reporter=notes)
    if step > STEPS + 2:
        assert f"resuming from step {STEPS - 2}" in notes.notes
    assert sha256(again) == sha256(whole)
    assert (again.steps, again.tokens, again.refit) == (whole.steps, whole.tokens, whole.refit)
    assert again.verdict is not None and whole.verdict is not None
    assert again.verdict.kept == whole.verdict.kept
    lines = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in metrics_of(result)]
        for result in (whole, again)
    ]
    assert lines[0] == lines[1]
    assert not (run / REFIT).exists() and not (run / HELD_OUT).exists()


@pytest.mark.slow
def test_stored_regression_is_fitted_again_on_all_rows(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    """Held-out rows that the regression has right end the run at the first measurement."""
    words = {"animal": "fox fox fox", "thing": "card card card"}
    rows = [{"text": f"{words[name]} {n}", "label": name} for n in range(80) for name in words]
    data = {"train": str(write_rows(tmp_path / "many.jsonl", rows)), "validation_share": 0.25}
    settings = {
        "max_steps": 12, "evaluate_every": 2, "precision": "float32", "threads": 1,
        "baseline_seconds": 0, "learning_rate": 1e-30,
    }  # fmt: skip
    recipe = {"base": str(family_folder("bert")), "data": data, "training": settings}
    objective = {"method": "classification", "probe": True}
    result = train(Recipe.parse({**recipe, "name": "x", "objective": objective}))
    assert result.steps == 2 and result.verdict is not None and result.verdict.kept_step == 0
    assert result.refit == Refit(rows=160, held_out=38, steps=0)
    assert "fitted again on all 160 rows" in result.verdict.text
    manifest = manifest_of(result)
    assert (manifest["data"]["rows"], manifest["data"]["held_out"]) == (160, {})
    measured = {**recipe, "training": {**settings, "refit": False}, "objective": objective}
    other = train(Recipe.parse({**measured, "name": "y"}))
    assert other.refit is None and other.steps > 2 and sha256(other) != sha256(result)
