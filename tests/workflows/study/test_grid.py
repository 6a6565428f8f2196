"""Grids of studies: parsing, combinations and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.cli.study import study
from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.workflows.study.grid import (
    MAX_TRAININGS,
    Configuration,
    check_grid,
    check_limits,
    grid_of,
    parse_dimensions,
    with_settings,
)
from luthier.workflows.study.presets import PRESETS, grid_from


def recipe(**data: Any) -> Recipe:
    return Recipe.parse({"data": {"train": "rows.jsonl", **data}})


def check(*texts: str, of: Recipe | None = None, seeds: int = 1) -> list[Configuration]:
    dimensions = parse_dimensions(texts)
    grid = grid_of(dimensions)
    check_grid(grid, dimensions, of or recipe(), seeds)
    return grid


def test_grid_has_each_combination_once_in_order() -> None:
    grid = check("adaptation.method=full,lora,full", "training.epochs=1,2")
    assert [each.name for each in grid] == [
        "full, epochs 1", "full, epochs 2", "lora, epochs 1", "lora, epochs 2",
    ]  # fmt: skip


def test_seeds_share_the_held_out_rows() -> None:
    (first, _) = check("training.epochs=1,2")
    recipes = [first.recipe(recipe(), seed, rows=100) for seed in (0, 1)]
    assert [each.training.seed for each in recipes] == [0, 1]
    assert [each.data.split_seed for each in recipes] == [0, 0]


def test_rows_are_a_share_of_the_share_in_the_recipe() -> None:
    some, all_rows = check("rows=50,all")
    half = recipe(train_share=0.5)
    assert some.recipe(half, 0, rows=200).data.train_share == pytest.approx(0.125)
    assert all_rows.recipe(half, 0, rows=200).data.train_share == 0.5


def test_mixing_share_becomes_a_weight() -> None:
    mixed = recipe(mix=[{"train": "old.jsonl", "weight": 1.0}])
    none, some = check("mix.share=0,0.2", of=mixed)
    assert none.recipe(mixed, 0, rows=10).data.mix == ()
    assert some.recipe(mixed, 0, rows=10).data.mix[0].weight == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("texts", "place"),
    [
        ([], "vary"),
        (["training.epochs"], "vary"),
        (["training.epochs=1,,2"], "vary"),
        (["training=1,2"], "vary"),
        (["adaptation.targets=[1],[2]"], "vary"),
        (["rows=true,all"], "rows"),
        (["training.epochs=1,2", "training.epochs=3,4"], "training.epochs"),
        (["training.epochs=1"], "training.epochs"),
        (["training.epochs=1..3"], "training.epochs"),
        (["training.epochs=3..1"], "training.epochs"),
        (["training.epochs=1..b"], "training.epochs"),
        (["training.seed=1,2"], "training.seed"),
        (["data.validation_share=0.1,0.2"], "data.validation_share"),
        (["adaptation.method=lora,lorra"], "vary"),
        (["adaptation.rank=4,8", "adaptation.method=lora,full"], "vary"),
        (["training.speed=1,2"], "vary"),
        (["objective.beta=0.1,0.2"], "vary"),
        (["rows=few,all"], "rows"),
        (["before=none,missing.jsonl"], "before"),
        (["mix.share=0,0.5"], "mix.share"),
    ],
)
def test_invalid_grid_is_refused(texts: list[str], place: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check(*texts)
    assert refused.value.problem.setting == place


def test_grid_of_ten_thousand_is_refused_before_enumeration() -> None:
    values = ",".join(map(str, range(1, 101)))
    with pytest.raises(RecipeError, match=f"{MAX_TRAININGS}"):
        grid_of(parse_dimensions([f"training.epochs={values}", f"training.batch_size={values}"]))
    with pytest.raises(RecipeError, match="trainings"):
        check("training.epochs=1,2", seeds=MAX_TRAININGS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_valid_recipes(name: str, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("")
    given = f"{name}={file}" if PRESETS[name].needs_file else name
    grid, dimensions = grid_from(given, ())
    check_grid(grid, dimensions, recipe(), 1)
    assert len({each.name for each in grid}) == len(grid) >= (1 if name == "prompts" else 2)


@pytest.mark.parametrize(
    ("preset", "vary"),
    [("method", ()), ("domain", ()), ("rate=x", ()), ("rate", ["training.epochs=1,2"])],
)
def test_invalid_preset_is_refused(preset: str, vary: list[str]) -> None:
    with pytest.raises(RecipeError):
        grid_from(preset, vary)


def test_different_method_does_not_inherit_fields() -> None:
    before = Recipe.parse(
        {"data": {"train": "x"}, "adaptation": {"rank": 4}, "training": {"epochs": 2}}
    )
    after = with_settings(before, {"adaptation": "full"})
    assert (after.adaptation.method, after.training.epochs) == ("full", 2)
    with pytest.raises(RecipeError) as refused:
        with_settings(before, {"adaptation.method": "full"})
    assert refused.value.rule == "recipe.unknown_field"


def test_with_settings_replaces_only_given_fields() -> None:
    before = Recipe.parse({"data": {"train": "x"}, "adaptation": {"method": "lora", "alpha": 8.0}})
    after = with_settings(before, {"adaptation.rank": 4, "training.learning_rate": 0.25})
    assert after.plain() == {
        **before.plain(),
        "adaptation": {**before.plain()["adaptation"], "rank": 4},
        "training": {**before.plain()["training"], "learning_rate": 0.25},
    }


def test_each_value_of_a_large_search_is_checked() -> None:
    ranks = ",".join(map(str, range(1, MAX_TRAININGS + 1)))
    dimensions = parse_dimensions(["adaptation.method=lora,lorra", f"adaptation.rank={ranks}"])
    with pytest.raises(RecipeError, match="lorra"):
        check_grid(grid_of(dimensions, 5), dimensions, recipe(), 1, 5)


def test_limit_of_zero_or_less_is_rejected() -> None:
    check_limits({"ms": 0.5}, forgetting=False)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(RecipeError):
            check_limits({"ms": limit}, forgetting=False)


@pytest.mark.parametrize(
    ("given", "named"), [(["ms=x"], "'ms=x'"), (["ms=1", "ms=2"], "twice"), (["ms=-1"], "above 0")]
)
def test_invalid_limit_of_command_is_rejected(given: Any, named: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(RecipeError, match=named):
        study(str(rows), vary=["training.epochs=1,2"], at_most=given)
