"""Tests of token files: every token is read back in trainable sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.tokens import LARGE, SMALL, EncoderTokenFile, TokenFile, TokenWriter, id_type
from luthier.errors import CorruptFile
from luthier.objectives import CausalLM
from luthier.types import Example


def written(path: Path, ids: list[int], kind: str = SMALL) -> dict[str, Any]:
    writer = TokenWriter(path, kind)
    writer.append(ids[:3])
    writer.append(ids[3:])
    return writer.close()


@pytest.mark.parametrize("count", [*range(2, 14), 40])
def test_token_file_sequences_equal_packed_rows(count: int, tmp_path: Path) -> None:
    ids = list(range(100, 100 + count))
    found = TokenFile.open(tmp_path / "t", written(tmp_path / "t", ids), length=4)
    rows = [Example(np.array(ids), np.ones(count, np.float32), 0)]
    expected = CausalLM(sequence_length=4).pack(rows, 99)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids_T.tolist() == theirs.ids_T.tolist() and ours.row == theirs.row
        assert ours.weight_T.tolist() == theirs.weight_T.tolist()
    assert found.longest == max(map(len, expected))


def test_encoder_sequences_have_ends_that_are_not_learned(tmp_path: Path) -> None:
    start, end = 0, 1
    ids = [5, 6, end, 7, 8]
    found = EncoderTokenFile.open(tmp_path / "t", written(tmp_path / "t", ids), 3, start, end)
    first, second = found
    assert first.ids_T.tolist() == [start, 5, 6, end, end] and found.longest == 5
    assert first.weight_T.tolist() == [0, 1, 1, 0, 0]
    assert first.target is not None and first.target.tolist() == [-1, 1, 2, -1, -1]
    assert second.ids_T.tolist() == [start, 7, 8, end]


def test_token_file_supports_indexing_and_slicing(tmp_path: Path) -> None:
    found = TokenFile.open(tmp_path / "t", written(tmp_path / "t", list(range(10))), length=4)
    assert found[-1].ids_T.tolist() == [8, 9]
    assert [example.row for example in found[::2]] == [0, 2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            found[index]


@pytest.mark.parametrize("ids", [[], [5]])
def test_fewer_than_two_tokens_make_no_sequence(ids: list[int], tmp_path: Path) -> None:
    assert len(TokenFile.open(tmp_path / "t", written(tmp_path / "t", ids), length=4)) == 0


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert id_type(1 << 16) == SMALL and id_type((1 << 16) + 1) == LARGE
    facts = written(tmp_path / "t", [70_000, 3, 65_535], LARGE)
    assert TokenFile.open(tmp_path / "t", facts, 4)[0].ids_T.tolist() == [70_000, 3, 65_535]
    assert (tmp_path / "t").stat().st_size == 12


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    facts = written(tmp_path / "t", list(range(10)))
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        TokenFile.open(tmp_path / "t", facts, 4)
