"""Which rows each step sees, and which are held out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.loader import RowOrder, hold_out

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


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
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


@PROPERTY
@given(st.integers(2, 60), st.floats(0.001, 0.999), seed)
def test_holding_out_splits_the_rows(rows: int, share: float, seed: int) -> None:
    kept, held = hold_out(rows, share, seed)
    assert sorted(kept + held) == list(range(rows))
    assert kept == sorted(kept) and held == sorted(held)
    assert kept and held
    assert abs(len(held) - share * rows) <= 1
    assert (kept, held) == hold_out(rows, share, seed)


def test_what_is_held_out_depends_on_the_seed() -> None:
    splits = {tuple(hold_out(50, 0.2, seed)[1]) for seed in range(5)}
    assert {len(split) for split in splits} == {10} and len(splits) == 5


def test_nothing_is_held_out_when_nothing_is_asked_or_one_row_is_all() -> None:
    assert hold_out(3, 0.0, seed=0) == ([0, 1, 2], [])
    assert hold_out(1, 0.5, seed=0) == ([0], [])
