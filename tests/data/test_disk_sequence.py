"""Tests of sequences on disk: equal items, constant memory."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data import disk_sequence as module
from luthier.data.disk_sequence import concatenate, select, spool
from luthier.data.inputs import Media, MediaInput
from luthier.data.shapes.media import BareImage
from luthier.data.shapes.texts import RawText
from luthier.errors import DiskFull
from luthier.media.processors import ImageProcessor
from luthier.types import Example


def texts(count: int, size: int = 200) -> list[RawText]:
    return [RawText("rows.jsonl", line, f"{line} " * (size // 5)) for line in range(1, count + 1)]


def test_few_rows_stay_a_list_of_the_same_objects() -> None:
    rows = texts(100)
    found = spool(iter(rows))
    assert isinstance(found, list)
    assert all(one is other for one, other in zip(found, rows, strict=True))


@pytest.mark.parametrize("limit", [0, 1, 20_000])
def test_spooled_rows_equal_original_rows(limit: int) -> None:
    rows = texts(500)
    found = spool(iter(rows), limit)
    assert not isinstance(found, list)
    assert len(found) == 500
    assert list(found) == rows
    assert [found[place] for place in (0, 499, -1, -500, 250)] == [
        rows[place] for place in (0, 499, -1, -500, 250)
    ]
    assert found[10:490:7] == rows[10:490:7]
    assert [*reversed(found)] == rows[::-1]
    for place in (500, -501):
        with pytest.raises(IndexError):
            found[place]


def test_empty_and_large_items_are_read_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BUFFER", 100)
    items = ["", "a" * 1000, "", "b" * 99, "c" * 100, "d" * 101, ""]
    assert list(spool(items, 0)) == items
    assert len(spool([], 0)) == 0


def test_examples_keep_their_arrays_partners_and_types() -> None:
    side = Example(np.arange(3), np.ones(3, np.float32), 0, desirable=True)
    rows = [
        Example(np.arange(row), np.zeros(row, np.float32), row, partner=side) for row in range(64)
    ]
    for one, other in zip(spool(rows, 0), rows, strict=True):
        np.testing.assert_array_equal(one.ids_T, other.ids_T)
        assert (one.ids_T.dtype, one.weight_T.dtype) == (np.int64, np.float32)
        assert one.partner is not None and one.partner.desirable
        np.testing.assert_array_equal(one.partner.weight_T, side.weight_T)


def test_shared_processors_and_arrays_stay_shared() -> None:
    pixels, processor = np.zeros((64, 8, 8), np.uint8), ImageProcessor(8, 8)
    inside = [Media("image", f"a.npz[{n}]", array=pixels[n]) for n in range(32)]
    files = [Media("image", f"{n}.png", f"/x/{n}.png") for n in range(32)]
    rows = [BareImage("a", n, media) for n, media in enumerate([*inside, *files])]
    for row, media in zip(spool(rows, 0), [*inside, *files], strict=True):
        assert row.media == media
        assert (row.media is media) == (media.array is not None)
    one = np.zeros(1, np.int64)
    examples = [
        Example(one, np.ones(1, np.float32), n, media=MediaInput(media, processor))
        for n, media in enumerate(files)
    ]
    inputs = [example.media for example in spool(examples, 0)]
    assert all(each is not None and each.processor is processor for each in inputs)


@pytest.mark.slow
def test_rows_on_disk_take_no_memory() -> None:
    def rows() -> Any:
        return (RawText("rows.jsonl", line, f"{line} " * 250) for line in range(20_000))

    def held(limit: int) -> int:
        gc.collect()
        tracemalloc.start()
        found = spool(rows(), limit)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(found) == 20_000
        return size

    held(0)  # loads imports and caches
    in_memory, on_disk = held(1 << 30), held(100_000)
    assert on_disk < 20_000 * 10 + 2 * module.BUFFER
    assert in_memory > 10 * on_disk


def test_the_file_is_gone_with_the_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = spool(texts(100), 0)
    assert not [*tmp_path.iterdir()], "others cannot open it"
    number = found._file.fileno()  # type: ignore[attr-defined]
    del found
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not there")
    monkeypatch.setattr(
        "tempfile.TemporaryFile", lambda **options: full.open("r+b", options["buffering"])
    )
    with pytest.raises(DiskFull):
        spool(texts(100), 0)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_select_and_concatenate_match_lists(limit: int) -> None:
    rows, more = texts(40), texts(7, 50)
    one, other = spool(rows, limit), spool(more, limit)
    chosen = np.array([3, 3, 39, 0])
    assert [*select(one, chosen)] == [rows[3], rows[3], rows[39], rows[0]]
    both = concatenate([one, [], other])
    assert [*both] == [*rows, *more]
    assert [both[place] for place in range(-47, 47)] == 2 * [*rows, *more]
    assert concatenate([[], one]) is one
    assert [*concatenate([])] == []
