"""Searches: proposals and limits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.workflows.study.cells import CellResult
from luthier.workflows.study.grid import (
    Configuration,
    Dimension,
    grid_of,
    is_search,
    parse_dimensions,
    with_settings,
)
from luthier.workflows.study.results import StudyRow
from luthier.workflows.study.search import Search, default_space

RECIPE = Recipe.parse(
    {
        "base": "x",
        "data": {"train": "rows.jsonl"},
        "training": {"learning_rate": 1e-3, "epochs": 2},
        "adaptation": {"method": "lora", "rank": 4},
    }
)


def searched(*texts: str, trials: int, size: int = 1, limit: float | None = None) -> list[StudyRow]:
    """Return the rows of a search whose loss is the distance of the rate from 3e-3."""
    limits = {} if limit is None else {"minutes": limit}
    search = Search(parse_dimensions(texts), trials, size, limits, RECIPE)
    rows: list[StudyRow] = []
    new: list[StudyRow] = []
    while configurations := search.propose(new):
        new = [measured(each) for each in configurations]
        rows += new
    return rows


def measured(configuration: Configuration) -> StudyRow:
    rate = configuration.settings.get("training.learning_rate", 1e-3)
    loss = 1 + abs(rate - 3e-3)
    return StudyRow(configuration, [CellResult(value=loss, seconds=6e4 * rate)])


def settings(rows: Sequence[StudyRow]) -> list[dict[str, object]]:
    return [dict(row.configuration.settings) for row in rows]


def test_few_values_are_a_grid() -> None:
    methods = parse_dimensions(["adaptation.method=lora,freeze,full"])
    assert not is_search(methods, 3) and len(grid_of(methods, 3)) == 3
    assert is_search(methods, 2)
    ranges = parse_dimensions(["training.learning_rate=1e-4..1e-2"])
    assert is_search(ranges, 100)
    with pytest.raises(RecipeError, match="--search"):
        grid_of(ranges)


def test_no_combination_is_proposed_twice() -> None:
    space = ("adaptation.rank=2,4,8", "training.batch_size=4,8,16")
    found = settings(searched(*space, trials=8, size=2))
    assert len(found) == 8
    assert len({tuple(each.values()) for each in found}) == 8


def test_repeated_search_proposes_the_same_settings() -> None:
    space = ("training.learning_rate=1e-4..1e-2", "adaptation.rank=2,4,8")
    first = searched(*space, trials=7, size=2)
    assert settings(first) == settings(searched(*space, trials=7, size=2))
    assert first[0].configuration.settings == {"training.learning_rate": 1e-3, "adaptation.rank": 4}
    for row in first:
        assert 1e-4 <= row.configuration.settings["training.learning_rate"] <= 1e-2


def test_search_keeps_within_a_limit() -> None:
    rows = searched("training.learning_rate=1e-4..1e-2", trials=25, limit=1.5)
    late = [row.outcomes[0].seconds / 60 for row in rows[10:]]
    free = searched("training.learning_rate=1e-4..1e-2", trials=25)
    without = [row.outcomes[0].seconds / 60 for row in free[10:]]
    assert sum(minutes <= 1.5 for minutes in late) > sum(minutes <= 1.5 for minutes in without)


def test_default_space_is_rate_and_rank() -> None:
    rate, rank = default_space(RECIPE, RECIPE)
    assert rate == Dimension("training.learning_rate", (2e-4, 5e-3), is_range=True)
    assert rank.values == (4, 8, 16, 32)
    full = with_settings(Recipe.parse({"data": {"train": "x"}}), {"adaptation": "full"})
    resolved = with_settings(full, {"training.learning_rate": 1e-4})
    assert [each.key for each in default_space(full, resolved)] == ["training.learning_rate"]
