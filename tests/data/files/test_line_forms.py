"""Tests of annotated lines: fastText and CoNLL."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.files.containers import container_of
from luthier.data.rows import RowReader, load_rows
from luthier.errors import DataError

CONLL = """-DOCSTART- -X- -X- O

Rita NNP B-NP B-PER
sings VBZ B-VP O


In IN B-PP O
Hue NNP B-NP B-LOC
"""


@pytest.mark.parametrize(
    ("line", "rule"), [("sings", "tags.type"), ("sings X", "tags.bio"), ("sings b-PER", "tags.bio")]
)
def test_line_without_a_right_tag_is_named(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Rita B-PER\nsings O\n\n" * 20 + f"Rita B-PER\n{line}\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [(each.rule, each.line) for each in caught.value.problems] == [(rule, 61)]


@pytest.mark.parametrize("name", ["a.txt", "a.train", "a"])
def test_fasttext(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("__label__a Đường về,  xa\r\n__label__b,c\t__label__d low\r\n".encode())
    reader = RowReader(path)
    assert [row.record() for row in reader] == [
        {"text": "Đường về,  xa", "label": "a"},
        {"text": "low", "label": ["b,c", "d"]},
    ]
    assert reader.recognition.containers == ("fasttext",)


def test_fasttext_with_a_line_without_label(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("__label__a low\n" * 8000 + "no label\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [(p.rule, p.line) for p in caught.value.problems] == [("row.mixed_shapes", 8001)]


@pytest.mark.parametrize("name", ["a.txt", "train.conll", "a.bio", "a.tsv"])
@pytest.mark.parametrize(
    "text",
    [
        CONLL,
        "Rita\tB-PER\nsings\tO\n\nIn\tO\nHue\tB-LOC",
        "# sent_id = 1\nRita B-PER\nsings O\n\n# sent_id = 2\nIn O\nHue B-LOC\n",
    ],
)
def test_conll(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    rows = load_rows(path)
    assert [row.record() for row in rows] == [
        {"tokens": ["Rita", "sings"], "tags": ["B-PER", "O"]},
        {"tokens": ["In", "Hue"], "tags": ["O", "B-LOC"]},
    ]
    assert text.split("\n")[rows[1].line - 1].startswith("In")


@pytest.mark.parametrize(
    ("text", "rule"),
    [("1 Rita B-PER\n2 sings O\n", "tags.type"), ("Rita S-PER\nsings O\n", "tags.bio")],
)
def test_conll_with_unsupported_tags_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "a.conll"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [problem.rule for problem in caught.value.problems] == [rule]


@pytest.mark.parametrize(
    "text",
    [
        "__label__ is a prefix.\nIt marks labels.\n",
        "Type O\nis common.\n",
        "a O\nb O\n",
        "So O\n\n",
    ],
)
def test_prose(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert container_of(path).kind == "text"
