"""Search spaces: parsing, rejections and defaults."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.workflows.space import (
    Dimension,
    default_space,
    parse_space,
    searchable,
    with_settings,
)


def recipe(**fields: Any) -> Recipe:
    return Recipe.parse({"data": {"train": "rows.jsonl"}, **fields})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rate=1e-5..1e-3", {"low": 1e-5, "high": 1e-3, "log": True}),
        ("training.weight_decay=0..0.1", {"low": 0, "high": 0.1, "log": False}),
        ("training.weight_decay=0.1..0.9", {"low": 0.1, "high": 0.9, "log": False}),
        ("training.batch_size=4..32", {"low": 4, "high": 32, "log": False}),
        ("adaptation.rank = 4 .. 64", {"low": 4, "high": 64, "log": True}),
        ("adaptation.rank=4,8,4,32", {"choices": (4, 8, 32)}),
        ("training.schedule=cosine, linear", {"choices": ("cosine", "linear")}),
        ("training.shuffle=true,false", {"choices": (True, False)}),
    ],
)
def test_ranges_and_lists_are_read(text: str, expected: dict[str, Any]) -> None:
    [found] = parse_space([text], recipe())
    assert found == Dimension(text.partition("=")[0].strip(), **expected)
    assert found.whole == (isinstance(expected.get("high"), int) or "choices" in expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.learning_rate=0.1", "0.1"),
        ("training.learning_rate=low..high", "'low'"),
        ("training.learning_rate=true..2", "True"),
        ("training.epochs=3..3", "3"),
        ("training.epochs=0..3", "0"),
        ("training.batch_size=1.0..8.0", ""),
        ("training.schedule=cosine,sawtooth", "sawtooth"),
        ("adaptation.dropout=0.5..1.5", "1"),
        ("training.learning_rate", "training.learning_rate"),
        ("training.learning_rate=", "training.learning_rate="),
    ],
)
def test_invalid_dimensions_are_rejected(text: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space([text], recipe())
    key, _, values = text.partition("=")
    assert caught.value.setting == (key if values else "space")
    assert value in str(caught.value)


def test_searchable_fields_depend_on_adaptation() -> None:
    other = recipe(adaptation="freeze")
    assert "adaptation.rank" not in searchable(other)
    assert set(searchable(other)) > {"adaptation.method", "training.layer_decay"}


def test_conflicting_search_dimensions_are_refused() -> None:
    with pytest.raises(RecipeError):
        parse_space(["training.epochs=1,2", "training.epochs=1..3"], recipe())
    with pytest.raises(RecipeError):
        parse_space(["adaptation.method=lora,full", "adaptation.rank=4,8"], recipe())


def test_different_method_does_not_inherit_fields() -> None:
    [dimension] = parse_space(["adaptation.method=lora,full"], recipe(training={"epochs": 2}))
    found = with_settings(recipe(training={"epochs": 2}), {dimension.key: "full"})
    assert (found.adaptation.method, found.training.epochs) == ("full", 2)
    with pytest.raises(RecipeError) as refused:
        parse_space(["adaptation.method=lora,full"], recipe(adaptation={"rank": 4}))
    assert refused.value.rule == "recipe.unknown_field"


def test_with_settings_replaces_only_given_fields() -> None:
    before = recipe(name="x", adaptation={"method": "lora", "alpha": 8.0})
    after = with_settings(before, {"adaptation.rank": 4, "training.learning_rate": 0.25})
    assert after.plain() == {
        **before.plain(),
        "adaptation": {**before.plain()["adaptation"], "rank": 4},
        "training": {**before.plain()["training"], "learning_rate": 0.25},
    }


def resolved(recipe: Recipe, rate: float) -> Recipe:
    """Return ``recipe`` with the learning rate of a run."""
    return with_settings(recipe, {"training.learning_rate": rate, "training.epochs": 2.0})


def test_by_default_the_rate_and_the_rank_are_searched() -> None:
    rate, rank = default_space(recipe(), resolved(recipe(), 3e-4))
    assert rate.log and (rate.low, rate.high) == (6e-5, 1.5e-3)
    assert (rank.key, rank.choices) == ("adaptation.rank", (8, 16, 32))


def test_default_space_surrounds_recipe_values() -> None:
    own = recipe(training={"learning_rate": 0.02}, adaptation={"rank": 12})
    rate, rank = default_space(own, own)
    assert (rate.low, rate.high) == (0.004, 0.1)
    assert rank.choices == (8, 12, 16, 32)


def test_only_lora_has_a_rank_to_search() -> None:
    full = recipe(adaptation="full")
    [rate] = default_space(full, resolved(full, 1e-5))
    assert rate.key == "training.learning_rate"
