"""Tests of the row order of each step."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.loader import MixedSet, RowOrder, one_pass

PROPERTY = settings(max_examples=60, deadline=None, database=None)
rows = st.integers(1, 40)
batch_size = st.integers(1, 12)
seed = st.integers(0, 2**31)


@PROPERTY
@given(rows, batch_size, seed, st.integers(0, 3), st.booleans())
def test_an_epoch_holds_every_row_once(
    rows: int, batch_size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    order = RowOrder(rows, batch_size, seed, shuffle)
    start = epoch * order.steps_per_epoch
    batches = [order.batch(start + step) for step in range(order.steps_per_epoch)]
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == (rows - 1) % batch_size + 1


@PROPERTY
@given(rows, batch_size, seed, st.integers(0, 100))
def test_a_batch_depends_on_seed_and_step_alone(
    rows: int, batch_size: int, seed: int, step: int
) -> None:
    walked = RowOrder(rows, batch_size, seed)
    for earlier in range(step):
        walked.batch(earlier)
    assert walked.batch(step) == RowOrder(rows, batch_size, seed).batch(step)


def test_row_order_differs_per_epoch_and_seed() -> None:
    first = RowOrder(100, 100, seed=0)
    assert first.batch(0) != first.batch(1)
    assert first.batch(0) != RowOrder(100, 100, seed=1).batch(0)
    assert first.batch(0) != list(range(100))


def test_without_shuffling_rows_come_in_the_order_of_the_file() -> None:
    order = RowOrder(10, 4, seed=5, shuffle=False)
    assert [order.batch(step) for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [0, 1, 2, 3],
    ]


def test_steps_of_so_many_epochs() -> None:
    order = RowOrder(10, 4, seed=0)
    assert order.steps_per_epoch == 3
    assert [order.steps(epochs) for epochs in (0.01, 1, 2, 2.4)] == [1, 3, 6, 7]


mixed = st.lists(st.builds(MixedSet, rows=st.integers(1, 30), drawn=st.integers(1, 50)), max_size=3)


def epoch_of(order: RowOrder, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [i for step in range(order.steps_per_epoch) for i in order.batch(first + step)]


@PROPERTY
@given(rows, batch_size, seed, mixed, st.integers(0, 3), st.booleans())
def test_epoch_has_main_rows_once_and_drawn_mixed_rows(
    rows: int, batch_size: int, seed: int, mixed: list[MixedSet], epoch: int, shuffle: bool
) -> None:
    order = RowOrder(rows, batch_size, seed, shuffle, tuple(mixed))
    found = epoch_of(order, epoch)
    assert sorted(i for i in found if i < rows) == list(range(rows))
    first = rows
    for each in mixed:
        assert sum(first <= i < first + each.rows for i in found) == each.drawn
        first += each.rows
    assert max(found) < first


@PROPERTY
@given(seed, st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_mixed_rows_repeat_only_after_the_whole_set(
    seed: int, size: int, drawn: int, shuffle: bool
) -> None:
    order = RowOrder(5, 3, seed, shuffle, (MixedSet(size, drawn),))
    counts = Counter[int]()
    for epoch in range(4):
        counts.update(i for i in epoch_of(order, epoch) if i >= 5)
        seen = [counts[5 + row] for row in range(size)]
        assert max(seen) - min(seen) <= 1


@PROPERTY
@given(seed, st.integers(20, 60), st.integers(1, 4), st.booleans())
def test_every_batch_holds_the_sets_in_proportion(
    seed: int, rows: int, ratio: int, shuffle: bool
) -> None:
    order = RowOrder(rows, 4 * (1 + ratio), seed, shuffle, (MixedSet(17, ratio * rows),))
    for step in range(order.steps_per_epoch - 1):
        main = sum(i < rows for i in order.batch(step))
        assert abs(main - 4) <= 2


def test_one_pass_has_the_proportions_of_an_epoch() -> None:
    mixed = (MixedSet(rows=4, drawn=2), MixedSet(rows=2, drawn=3))
    assert one_pass(9, mixed) == [0, 1, 2, 3, 5, 7, 7, 8]
    assert one_pass(3, ()) == [0, 1, 2]


def test_order_without_mixed_sets_follows_seed() -> None:
    order = RowOrder(50, 50, seed=3)
    assert order.batch(1) == np.random.default_rng([3, 1]).permutation(50).tolist()


def test_mixed_rows_leave_order_of_main_rows() -> None:
    plain, with_others = RowOrder(30, 30, 4), RowOrder(30, 45, 4, mixed=(MixedSet(100, 15),))
    assert [i for i in with_others.batch(0) if i < 30] == plain.batch(0)
    assert with_others.steps(2) == 2
