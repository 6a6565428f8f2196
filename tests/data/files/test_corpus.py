"""Tests of raw text in pieces: no text is lost, and the pieces tokenize like the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.files import corpus, read
from luthier.data.files.corpus import CorpusPiece, HeldOut, Survey, pieces, sample, survey
from luthier.data.files.read import last_cut
from luthier.errors import MOST_PROBLEMS, DataError
from luthier.models.bpe import encode

MIXED = st.text(st.sampled_from(list(" \n\t\u00a0\u2028ab1'.é漢😀\r")), max_size=60)


def whole(paths: list[Path]) -> list[str]:
    """The documents, put together again."""
    texts: dict[int, str] = {}
    for piece in pieces(paths):
        texts[piece.document] = texts.get(piece.document, "") + piece.text
    return list(texts.values())


def rows_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@settings(max_examples=200, deadline=None)
@given(text=MIXED)
def test_text_cut_into_parts_has_equal_tokens(tokenizer: Any, text: str) -> None:
    cut = last_cut(text)
    left, right, together = encode(tokenizer, [text[:cut], text[cut:], text])
    assert left + right == together


def test_text_is_cut_before_white_space() -> None:
    assert last_cut("one two  three") == len("one two")
    assert last_cut("one \n") == len("one")
    assert last_cut("none") == last_cut("  none") == last_cut("") == 0


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_a_text_file_in_pieces_is_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_CHUNK_BYTES", block)
    text = "Žluťoučký kůň\n\n 漢字 and 😀  end.\r\nLast line without an end"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    if block > 2:  # the mark at the start of a file is not text
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert whole([path]) == [text]
    assert len(list(pieces([path]))) > 2


def test_documents_are_rows_and_text_files_in_order(tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl", ["first", "second one"])
    (tmp_path / "third.md").write_text("# third")
    paths = [rows, tmp_path / "third.md"]
    assert whole(paths) == ["first", "second one", "# third"]
    assert survey(paths) == Survey(3, len("firstsecond one# third"))
    starts = [piece.start for piece in pieces(paths)]
    assert starts == sorted(starts)


def test_long_row_is_split_into_pieces_with_single_end(tmp_path: Path) -> None:
    text = "word " * 40_000
    path = rows_file(tmp_path / "rows.jsonl", [text, "x" * 200_000])
    found = list(pieces([path]))
    assert max(len(piece.text) for piece in found if piece.document == 0) <= corpus.PIECE
    assert whole([path]) == [text, "x" * 200_000]
    assert [piece.ends for piece in found].count(True) == 2 and found[-1].ends


def test_corpus_problems_have_line_and_rule(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": " "}\n{"txt": "x"}\nnot json\n')
    with pytest.raises(DataError) as refused:
        survey([path])
    found = [(problem.line, problem.rule) for problem in refused.value.problems]
    assert found == [(2, "field.empty"), (3, "row.unknown_shape"), (4, "json.invalid")]


def test_corpus_rows_without_raw_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError) as refused:
        survey([path])
    assert refused.value.rule == "row.objective"


def test_reading_stops_at_a_hundred_problems(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("nonsense\n" * 1000)
    with pytest.raises(DataError) as refused:
        survey([path])
    assert len(refused.value.problems) == MOST_PROBLEMS
    assert "100 or more problems" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "rule"),
    [(b"", "file.empty"), (b" \n ", "field.empty"), (b"ab\xff\ncd", "encoding.utf8"),
     (b"text" + bytes(9), "file.binary"), ("é".encode()[:1], "encoding.utf8")],
)  # fmt: skip
def test_unreadable_text_files_are_refused(content: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        survey([path])
    assert [problem.rule for problem in refused.value.problems] == [rule]


def test_invalid_utf8_is_reported_with_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a line\n" * 20_000 + b"bad \xff here\n")
    with pytest.raises(DataError) as refused:
        survey([path])
    assert refused.value.problems[0].line == 20_001


def test_corpus_accepts_duplicate_ids(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "id": 1}\n' * 2)
    assert survey([path]).documents == 2


def test_a_sample_is_spread_over_the_text(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", [f"{n:04}" for n in range(100)])
    assert list(sample([path], 40, 400)) == [f"{n:04}" for n in range(0, 100, 10)]
    assert len(list(sample([path], 1000, 400))) == 100


def test_end_of_single_document_is_held_out() -> None:
    text = "word " * 200
    held = HeldOut(0.25, 0, Survey(1, 1000))
    parts = list(held.parts([CorpusPiece(text, 0, 0, False), CorpusPiece("", 0, 1000, True)]))
    assert [out for _, out in parts] == [False, True, True]
    assert parts[0][0].text + parts[1][0].text == text
    assert len(parts[0][0].text) == 749  # before the space nearest to 750
    assert parts[1][0].start == 749 and [piece.ends for piece, _ in parts] == [False, False, True]


def test_pieces_within_a_split_stay_whole() -> None:
    held = HeldOut(0.25, 0, Survey(1, 1000))
    given_ = [CorpusPiece("a b", 0, start, start == 900) for start in (0, 700, 750, 900)]
    assert [out for _, out in held.parts(given_)] == [False, False, True, True]
    assert [piece for piece, _ in held.parts(given_)] == given_


def test_zero_share_holds_out_no_piece() -> None:
    nothing = HeldOut(0.0, 0, Survey(1, 10)).parts(
        [CorpusPiece("a", 0, 0, False), CorpusPiece("", 0, 10, True)]
    )
    assert [out for _, out in nothing] == [False, False]


def test_held_out_corpus_consists_of_whole_documents() -> None:
    def drawn(seed: int, start: int) -> list[bool]:
        held = HeldOut(0.1, seed, Survey(5000, 10**6))
        return [
            out for _, out in held.parts(CorpusPiece("x y", n, start, False) for n in range(5000))
        ]

    assert 400 < sum(drawn(7, 0)) < 600
    assert drawn(7, 0) == drawn(7, 10**6 - 1)  # all pieces of a document go the same way
    assert drawn(7, 0) != drawn(8, 0)


def test_folders_and_patterns_are_their_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name} words")
    for source in (tmp_path, tmp_path / "*.txt"):
        text = "".join(piece.text for piece in pieces([source]))
        assert text == "a.txt wordsb.txt words"
