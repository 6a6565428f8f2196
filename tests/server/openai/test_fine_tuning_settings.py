"""Hyperparameters of a fine-tuning job as fields of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.engine.defaults import DataFacts, choose
from luthier.recipe import Recipe
from luthier.server.openai.fine_tuning import CreateJob, settings_of

BASE = {"model": "tiny", "training_file": "file-a"}
FACTS = DataFacts(rows=40, longest=64, validation_rows=0, hidden=64)


def settings(kind: str, writes: bool = True, **arm: Any) -> dict[str, Any]:
    asked = CreateJob.model_validate({**BASE, "method": {"type": kind, kind: arm}})
    asked.check()
    return settings_of(asked, 5, writes)


def test_auto_hyperparameters_are_omitted_from_settings() -> None:
    assert settings("supervised") == {"training": {"seed": 5}, "objective": {"method": "sft"}}
    # The rows select the objective of an encoder.
    assert settings("supervised", writes=False) == {"training": {"seed": 5}}
    assert settings("dpo") == {"training": {"seed": 5}, "objective": {"method": "dpo"}}


def test_given_hyperparameters_are_passed_to_settings() -> None:
    given = {"n_epochs": 3, "batch_size": 7, "learning_rate_multiplier": 2}
    made = settings("dpo", hyperparameters={**given, "beta": 0.3})
    assert made["training"] == {
        "seed": 5,
        "epochs": 3,
        "batch_size": 7,
        "learning_rate_multiplier": 2,
    }
    assert made["objective"] == {"method": "dpo", "beta": 0.3}
    rewards = {"compute_multiplier": 2, "eval_interval": 9, "eval_samples": 3}
    made = settings("reinforcement", grader={}, hyperparameters=rewards)
    assert made["training"] == {"seed": 5, "evaluate_every": 9}
    assert made["objective"] == {"num_generations": 16}


def test_deprecated_hyperparameters_field_is_accepted() -> None:
    asked = CreateJob.model_validate({**BASE, "hyperparameters": {"n_epochs": 4}})
    assert asked.kind == "supervised"
    assert settings_of(asked, 1, True)["training"] == {"seed": 1, "epochs": 4}


def test_multiplier_scales_chosen_learning_rate() -> None:
    def rate(**training: Any) -> tuple[float | None, list[Any]]:
        recipe = Recipe.parse({"data": {"train": "rows.jsonl"}, "training": training})
        made, choices = choose(recipe, FACTS)
        return made.training.learning_rate, choices

    usual, _ = rate()
    doubled, choices = rate(learning_rate_multiplier=2)
    assert usual and doubled == pytest.approx(2 * usual)
    reasons = {name: why for name, _, why in choices}
    assert "`learning_rate_multiplier` 2" in reasons["training.learning_rate"]
    assert rate(learning_rate_multiplier=2, learning_rate=1e-3)[0] == 1e-3
