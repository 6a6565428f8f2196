"""Default settings and reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from short_runs import Notes, manifest_of

from luthier.engine import train
from luthier.engine.defaults import (
    DataFacts,
    choose,
    steps_of,
    token_budget,
    unusual_settings,
    validation_share,
)
from luthier.engine.memory import MemoryEstimate
from luthier.recipe import Recipe, Training
from luthier.types import Example


@pytest.mark.parametrize(
    ("rows", "share"), [(1, 0.0), (19, 0.0), (20, 0.1), (2000, 0.1), (10_000, 0.02)]
)
def test_how_much_is_held_out(rows: int, share: float) -> None:
    got, reason = validation_share(rows)
    assert got == pytest.approx(share)
    assert ("too few" in reason) == (share == 0)
    assert round(got * rows) <= 200


@pytest.mark.parametrize(
    ("method", "rows", "held_out", "refit"),
    [
        ("classification", 347, 38, True),
        ("token_classification", 540, 60, True),
        ("classification", 541, 60, None),
        ("classification", 347, 0, None),
        ("contrastive", 347, 38, None),
        ("image_to_text", 347, 38, None),
        ("sft", 347, 38, None),
        ("grpo", 347, 38, None),
    ],
)
def test_few_rows_are_refitted(method: str, rows: int, held_out: int, refit: bool | None) -> None:
    graded = {"grader": {"method": "regex", "pattern": "a"}} if method == "grpo" else {}
    recipe = Recipe.parse({"data": {"train": "x"}, "objective": {"method": method, **graded}})
    chosen, choices = choose(recipe, DataFacts(rows, 100, 40, 384, held_out=held_out))
    assert chosen.training.refit is refit
    assert ("training.refit" in [name for name, _, _ in choices]) is bool(refit)


def plan(rows: int, validation: int = 0, **training: Any) -> tuple[Recipe, dict[str, Any], int]:
    recipe = Recipe.parse({"data": {"train": "x"}, "training": training})
    recipe, choices = choose(recipe, DataFacts(rows, 100, validation, 2000))
    assert all(reason for _, _, reason in choices)
    return recipe, {name: value for name, value, _ in choices}, steps_of(recipe, rows)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"),
    [
        (1, 1, 5.0, 5),
        (19, 1, 5.0, 95),
        (40, 2, 5.0, 100),
        (319, 8, 4.0, 160),
        (320, 16, 5.0, 100),
        (1000, 16, 3.0, 189),
        (10_000, 16, 1.0, 625),
    ],
)
def test_defaults_follow_from_the_number_of_rows(
    rows: int, batch: int, epochs: float, steps: int
) -> None:
    recipe, chosen, count = plan(rows, validation=rows // 10)
    assert chosen["training.batch_size"] == recipe.training.batch_size == batch
    assert chosen["training.epochs"] == recipe.training.epochs == epochs
    assert chosen["training.learning_rate"] == recipe.training.learning_rate == 5e-4
    assert count == steps
    if rows >= 10:
        measurements = 6 if rows == 10_000 else 8  # of 1,000 rows, 21 steps long each
        assert chosen["training.evaluate_every"] == round(steps / measurements)
    else:
        assert "training.evaluate_every" not in chosen


@pytest.mark.parametrize(("held_out", "every"), [(8, 2), (10, 2), (16, 3), (1000, 3)])
def test_validation_takes_at_most_a_tenth_of_time(held_out: int, every: int) -> None:
    _, chosen, steps = plan(256, held_out, batch_size=16, max_steps=16)
    assert steps == 16 and chosen["training.evaluate_every"] == every


def test_given_settings_are_not_chosen() -> None:
    recipe, chosen, steps = plan(1000, 10, batch_size=7, learning_rate=1e-3, max_steps=11)
    assert chosen.keys() == {"training.evaluate_every"}
    assert (recipe.training.batch_size, recipe.training.learning_rate, steps) == (7, 1e-3, 11)
    assert recipe.training.epochs is None
    assert plan(100, epochs=2, batch_size=10)[2] == 20
    assert plan(100, epochs=2, batch_size=10, max_steps=3)[2] == 3
    assert plan(100, epochs=0.001, batch_size=10)[2] == 1


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"learning_rate": 0.01, "batch_size": 400}, 0),
        ({"learning_rate": 50}, 1),
        ({"learning_rate": 1e-9}, 1),
        ({"learning_rate": 1.0, "learning_rate_multiplier": 1000}, 1),
        ({"learning_rate": 50, "batch_size": 100_000}, 2),
    ],
)
def test_unusual_settings_are_reported(fields: dict[str, Any], count: int) -> None:
    training = Training.model_validate(fields)
    usual_rate = 1e-3 * training.learning_rate_multiplier
    assert len(unusual_settings(training, usual_rate, 400)) == count


@pytest.mark.parametrize(("method", "patience"), [("gan", 0), ("diffusion", 0), ("vae", 3)])
def test_few_validation_rows_do_not_stop_early(method: str, patience: int) -> None:
    fields: dict[str, Any] = {"base": "b", "data": {"train": "t"}, "objective": {"method": method}}
    facts = DataFacts(1000, 1, 200, 32, from_scratch=True)
    chosen, choices = choose(Recipe.parse(fields), facts)
    assert chosen.training.patience == patience
    assert ("training.patience" in {name for name, *_ in choices}) == (patience == 0)
    asked, _ = choose(Recipe.parse({**fields, "training": {"patience": 5}}), facts)
    assert asked.training.patience == 5


@pytest.mark.parametrize(
    ("rows", "from_scratch", "batch", "epochs"),
    [
        (720, False, 16, 7.0),
        (720, True, 16, 16.0),
        (90, False, 4, 14.0),
        (90, True, 16, 40.0),
        (9, True, 9, 40.0),
        (8000, True, 16, 3.0),
    ],
)
def test_random_weights_get_more_epochs_and_larger_batches(
    rows: int, from_scratch: bool, batch: int, epochs: float
) -> None:
    recipe = Recipe.parse({"data": {"train": "t"}, "objective": {"method": "classification"}})
    chosen, _ = choose(recipe, DataFacts(rows, 1, 80, 128, from_scratch=from_scratch))
    assert (chosen.training.batch_size, chosen.training.epochs) == (batch, epochs)


def test_rate_by_adaptation() -> None:
    rates = {}
    for name in ("lora", "full", "freeze"):
        for width in (576, 2000):
            recipe = Recipe.parse({"data": {"train": "x"}, "adaptation": name})
            chosen = choose(recipe, DataFacts(100, 100, 0, width))[0]
            rates[name, width] = chosen.training.learning_rate
    assert rates == {
        ("lora", 576): 1.3e-3,
        ("lora", 2000): 5e-4,
        **{(name, 576): 1.3e-4 for name in ("full", "freeze")},
        **{(name, 2000): 5e-5 for name in ("full", "freeze")},
    }


@pytest.mark.parametrize(
    ("adaptation", "new", "rate", "told"),
    [("full", True, 10.0, True), ("full", False, 1.0, False), ("lora", True, 1.0, False)],
)
def test_new_head_on_trained_weights_learns_faster(
    adaptation: str, new: bool, rate: float, told: bool
) -> None:
    recipe = Recipe.parse({"data": {"train": "x"}, "adaptation": adaptation})
    chosen, choices = choose(recipe, DataFacts(100, 100, 0, 576, new))
    assert chosen.training.head_rate_multiplier == rate
    given = recipe.model_copy(update={"training": Training(learning_rate=1e-3)})
    assert choose(given, DataFacts(100, 100, 0, 576, new))[0].training.head_rate_multiplier == 1.0
    assert told == any(name == "training.head_rate_multiplier" for name, _, _ in choices)


def test_token_budget_grows_for_long_shared_prefix() -> None:
    estimate = MemoryEstimate(fixed=1000, per_token=10)
    ends = np.arange(16)[:, None] + 1000
    rows = [np.concatenate([np.arange(400), np.repeat(end, 40)]) for end in ends]
    batch = [Example(ids, np.zeros(len(ids), np.float32), i) for i, ids in enumerate(rows)]
    # one tree has 400 + 16 x 40 = 1,040 nodes; at 1,024 the prefix would be computed twice
    assert token_budget(estimate, [batch], 440, 1 << 30)[0] == 2048
    assert token_budget(estimate, [batch], 440, 2 * (1000 + 1024 * 10))[0] == 1024


def test_token_budget_fits_memory_and_longest_row() -> None:
    estimate = MemoryEstimate(fixed=1000, per_token=10)
    assert token_budget(estimate, [], 100, 1 << 30)[0] == 1024
    assert token_budget(estimate, [], 1200, 1 << 30)[0] == 1200
    assert token_budget(estimate, [], 100, 2 * (1000 + 300 * 10))[0] == 300
    assert (
        token_budget(estimate, [], 100, 0)[0] == 100
    )  # less is not possible; check_memory refuses


def test_contrastive_batch_fits_in_a_single_pass() -> None:
    estimate = MemoryEstimate(fixed=1000, per_token=10)
    ids = [np.arange(100) + 100 * n for n in range(20)]
    batch = [Example(each, np.zeros(100, np.float32), n) for n, each in enumerate(ids)]
    wide = 2 * (1000 + 2500 * 10)
    assert token_budget(estimate, [batch], 100, wide, contrasts_rows=True)[0] == 2500
    assert token_budget(estimate, [batch], 100, wide - 20, contrasts_rows=True)[0] == 1024
    assert token_budget(estimate, [batch[:5]], 100, wide, contrasts_rows=True)[0] == 1024
    assert token_budget(estimate, [batch], 100, wide)[0] == 1024


def test_choices_have_reasons(recipe: Callable[..., Recipe]) -> None:
    plain = recipe().plain()
    del plain["training"]["batch_size"], plain["data"]["validation_share"]
    reporter = Notes()
    result = train.train(Recipe.parse(plain), reporter=reporter)
    assert reporter.choices.keys() == {
        "precision", "objective", "data.validation_share", "training.batch_size",
        "training.learning_rate", "training.evaluate_every", "training.micro_batch_tokens",
    }  # fmt: skip
    assert all(reason for _, reason in reporter.choices.values())
    stored = manifest_of(result)["recipe"]["training"]
    for name in ("batch_size", "learning_rate", "evaluate_every", "micro_batch_tokens"):
        assert stored[name] == reporter.choices[f"training.{name}"][0]
    (said,) = [note for note in reporter.notes if " weights " in note]
    assert f"{result.trained_weights:,} of {result.weights:,}" in said
    adapter = Path(result.model_dir, "adapter_model.safetensors")
    tensors = load_file(adapter).values()
    assert f"{sum(tensor.nbytes for tensor in tensors) / 1e6:,.2f} MB" in said
    assert sum(tensor.numel() for tensor in tensors) == result.trained_weights
    metrics = manifest_of(result)["metrics"]
    assert metrics["saved_bytes"] == result.saved_bytes == adapter.stat().st_size


def test_defaults_module_names_only_fields_of_the_recipe() -> None:
    """Choices are printed under the names of ``--set``."""
    from luthier.recipe import assign

    _, chosen, _ = plan(1000, 100)
    fields: dict[str, Any] = {"data": {"train": "x"}}
    for name, value in chosen.items():
        assign(fields, name.split("."), value)
    assert Recipe.parse(fields).training.epochs == chosen["training.epochs"]
