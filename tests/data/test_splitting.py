"""Tests of splits: disjoint parts, whole groups, stratified labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.data.splitting import split_rows, strata_of
from luthier.errors import RecipeError

PROPERTY = settings(max_examples=150, deadline=None)
seed = st.integers(0, 2**63 - 1)


def alone(rows: int) -> np.ndarray:
    return np.arange(rows)


@PROPERTY
@given(st.integers(2, 60), st.floats(0.001, 0.999), seed)
def test_holding_out_of_rows_without_labels(rows: int, share: float, seed: int) -> None:
    kept, held = (part.tolist() for part in split_rows([""] * rows, alone(rows), [share], seed))
    assert sorted(kept + held) == list(range(rows))
    assert kept == sorted(kept) and held == sorted(held)
    assert kept and held
    assert abs(len(held) - share * rows) <= 1
    again = split_rows([""] * rows, alone(rows), [share], seed)
    assert [part.tolist() for part in again] == [kept, held]


def test_held_out_rows_depend_on_seed() -> None:
    splits = {tuple(split_rows([""] * 50, alone(50), [0.2], seed)[1]) for seed in range(5)}
    assert {len(split) for split in splits} == {10} and len(splits) == 5


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 12)), min_size=1, max_size=80),
    st.lists(st.floats(0, 0.45), min_size=1, max_size=2),
    seed,
)
def test_groups_stay_whole_and_labels_stay_in_training(
    rows: list[tuple[str, int]], shares: list[float], seed: int
) -> None:
    # A group has one label here, as near-duplicates mostly do.
    labels = [label for label, _ in rows]
    names = {pair: number for number, pair in enumerate(sorted(set(rows)))}
    groups = np.array([names[pair] for pair in rows])
    parts = split_rows(labels, groups, shares, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    of_group = {
        int(group): {n for n, part in enumerate(parts) if group in groups[part]} for group in groups
    }
    assert all(len(found) == 1 for found in of_group.values())
    for share, part in zip(shares, parts[1:], strict=True):
        # Only a single group may exceed the share by as much as the share.
        if len(part) >= 2 * max(1, round(share * len(rows))):
            assert len(set(groups[part].tolist())) == 1
    assert set(labels) == {labels[row] for row in parts[0]}


def test_group_beyond_goal_is_held_out_if_nearer() -> None:
    stretches = np.repeat(np.arange(9), [48, *[50] * 7, 2])
    _, held = split_rows([""] * 400, stretches, [0.1], 0)
    assert 30 < len(held) < 60


def test_labels_have_their_share() -> None:
    labels = ["a"] * 100 + ["b"] * 50 + ["c"] * 10 + ["d"]
    train, validation, test = split_rows(labels, alone(len(labels)), [0.2, 0.1], 3)
    counts = [Counter(labels[row] for row in part) for part in (train, validation, test)]
    assert counts[1] == {"a": 20, "b": 10, "c": 2}
    assert counts[2] == {"a": 10, "b": 5, "c": 1}
    assert counts[0]["d"] == 1


def test_small_sets_stay_whole_and_full_shares_are_refused() -> None:
    train, held = split_rows(["a"] * 3, np.zeros(3, int), [0.5], 0)
    assert train.tolist() == [0, 1, 2] and not len(held)
    train, held = split_rows(["a", "b"], alone(2), [0.5], 0)
    assert len(train) == 2 and not len(held)
    with pytest.raises(RecipeError) as refused:
        split_rows(["a"] * 3, alone(3), [0.5, 0.5], 0)
    assert refused.value.rule == "split.empty"


def test_strata_of_rows() -> None:
    several = [
        LabelledText("f", 1, text="t", label=names)
        for names in (("x", "y"), ("x",), ("x", "z"), ())
    ]
    assert strata_of(several) == ["y", "x", "z", ""]
    assert strata_of([LabelledText("f", 1, text="t", label="x"), RawText("f", 2, text="t")]) == [
        "x",
        "",
    ]
    classes = [PromptCompletion("f", n, prompt=str(n), completion="ab"[n % 2]) for n in range(16)]
    assert strata_of(classes) == ["a", "b"] * 8
    assert strata_of(classes[:8]) == [""] * 8
