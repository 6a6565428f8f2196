"""Places of rows by number."""

from __future__ import annotations

import numpy as np

from luthier.gate.check import Places


def test_places_of_batches_with_and_without_gaps() -> None:
    places = Places()
    lines = [np.arange(1, 4), np.array([4, 6, 9]), np.array([1]), np.array([7, 8])]
    for number, lines_N in enumerate(lines):
        places.add("train" if number < 2 else "test", "a" if number < 2 else "b", lines_N)
    found = [(place.file, place.line) for place in map(places.place, range(places.total))]
    assert found == [("a", n) for n in (1, 2, 3, 4, 6, 9)] + [("b", n) for n in (1, 7, 8)]
    assert places.splits_N().tolist() == [0] * 6 + [1] * 3
    assert places.split(5) == "train" and places.split(6) == "test"
