"""Columns on disk: read in pieces, and brought together by a key part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from luthier.gate.check import Places
from luthier.gate.columns import Column, ColumnStore, partition
from luthier.gate.near_duplicates import rows_by_value


@pytest.mark.parametrize("spilled", [False, True])
def test_chunks_are_the_column(spilled: bool) -> None:
    column = Column(np.uint64)
    for start in range(0, 100, 7):
        column.append(np.arange(start, min(100, start + 7)))
        if spilled and start == 49:
            column.spill()
    pieces = list(column.chunks(30))
    assert [len(piece) for piece in pieces] == [30, 30, 30, 10]
    assert np.concatenate(pieces).tolist() == list(range(100)) == column.read().tolist()


@pytest.mark.parametrize("size", [10, 64, 1000])
def test_groups_of_all_parts_are_the_groups_of_all_rows(size: int) -> None:
    rng = np.random.default_rng(size)
    keys = rng.integers(0, 1 << 63, 60, np.uint64)[rng.integers(0, 60, 500)]
    table = ColumnStore(100)
    for start in range(0, 500, 33):
        table.append("key", keys[start : start + 33])
        table.append("more", np.arange(start, min(500, start + 33)))

    def chunks() -> Iterator[tuple[Any, ...]]:
        return table.chunks("key", "more")

    found, seen = [], []
    for rows, (part, more) in partition(chunks, 500, size):
        assert rows.tolist() == more.tolist() == sorted(rows.tolist())
        assert (keys[rows] == part).all()
        seen += rows.tolist()
        found += [rows[group].tolist() for group in rows_by_value(part)]
    assert sorted(seen) == list(range(500))
    assert sorted(found) == sorted(group.tolist() for group in rows_by_value(keys))
    assert found


def test_places_of_batches_with_and_without_gaps() -> None:
    places = Places()
    lines = [np.arange(1, 4), np.array([4, 6, 9]), np.array([1]), np.array([7, 8])]
    for number, lines_N in enumerate(lines):
        places.add("train" if number < 2 else "test", "a" if number < 2 else "b", lines_N)
    found = [(place.file, place.line) for place in map(places.place, range(places.total))]
    assert found == [("a", n) for n in (1, 2, 3, 4, 6, 9)] + [("b", n) for n in (1, 7, 8)]
    assert places.splits_N().tolist() == [0] * 6 + [1] * 3
    assert places.split(5) == "train" and places.split(6) == "test"
