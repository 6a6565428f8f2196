"""Tests of format detection, decompression and damaged files."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from luthier.data.files.containers import Container, container_of
from luthier.data.files.read import read_records
from luthier.data.rows import load_rows
from luthier.data.rules import RULES
from luthier.errors import DataError, Problem, RowRefused

zstandard = pytest.importorskip("zstandard")

LINES = b'{"text": "a\xe2\x80\xa8b"}\n{"text": "c"}\n'
PRETTY = b'{\n  "text": "a"\n}\n'
ARRAY = b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n'


def container(folder: Path, name: str, data: bytes) -> Container:
    path = folder / name
    path.write_bytes(data)
    return container_of(path)


def read(path: Path) -> tuple[list[tuple[int, dict[str, object]]], list[Problem]]:
    problems: list[Problem] = []
    return list(read_records(path, problems)), problems


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jsonl", LINES, "jsonl"),
        ("a.json", LINES, "jsonl"),
        ("a", LINES, "jsonl"),
        ("a.txt", LINES, "jsonl"),
        ("a.md", LINES, "text"),
        ("a.data", b"\xef\xbb\xbf" + LINES, "jsonl"),
        ("a.jsonl", b"", "jsonl"),
        ("a.json", PRETTY, "json"),
        ("a.what", PRETTY, "json"),
        ("a.jsonl", PRETTY, "jsonl"),
        ("a.json", ARRAY, "json"),
        ("a.jsonl", ARRAY, "json"),
        ("a.json", b'[{"text": "a"}]', "json"),
        ("a.jsonl", b'[1]\n{"text": "a"}\n', "jsonl"),
        ("a.json", b'{"text": "' + b"x" * 100_000 + b'"}', "json"),
        ("a.json", b'[{"text": "' + b"x" * 100_000 + b'"}]', "json"),
        ("a.txt", b'{"text": "one"}\nand then words', "text"),
        ("a.txt", b"{braces} and words\n", "text"),
        ("a.txt", b"[1] a footnote\n", "text"),
        ("a.csv", b"text,label\na,b\n", "csv"),
        ("file-1", b"text,label\na,b\n", "csv"),
        ("file-1", b"timestamp,value\n1,2.5\n", "csv"),
        ("a.csv", b'{"text": 1}\n', "csv"),
        ("a.tsv", b"text\tlabel\na\tb\n", "tsv"),
        ("a.dat", b"prompt;completion\na;b\n", "csv"),
        ("a.parquet", b"PAR1\x15\x04", "parquet"),
        ("wrong.jsonl", b"PAR1\x15\x04", "parquet"),
    ],
)
def test_container_follows_content_before_file_ending(
    tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    assert container(tmp_path, name, data).kind == kind
    if kind != "parquet":
        for packing, packed in (
            ("gzip", gzip.compress(data)),
            ("zstd", zstandard.ZstdCompressor().compress(data)),
        ):
            ending = {"gzip": ".gz", "zstd": ".zst"}[packing]
            assert container(tmp_path, name + ending, packed).kind == kind
            found = container(tmp_path, name, packed)  # the ending does not name the packing
            assert (found.kind, found.packing) == (kind, packing)


@pytest.mark.parametrize(
    ("data", "delimiter"),
    [
        (b"prompt,completion\na;b,c\n", ","),
        (b"prompt;completion\na,b;c\n", ";"),
        (b"prompt\tcompletion\na,b\tc\n", "\t"),
        (b"prompt|completion\na|c\n", "|"),
        (b'"a;b;c;d",completion\n', ","),
        (b"text\nx, y\n", ","),
    ],
)
def test_header_determines_delimiter(tmp_path: Path, data: bytes, delimiter: str) -> None:
    assert container(tmp_path, "a.csv", data).delimiter == delimiter


def test_unknown_format_suggests_rename(tmp_path: Path) -> None:
    with pytest.raises(RowRefused) as caught:
        container(tmp_path, "a.dat", b"some words, some more\nand so on, and on\n")
    assert caught.value.rule == "file.unknown_format"
    assert "rename" in caught.value.problem.advice


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_packed_file_equals_plain_file(tmp_path: Path, packing: str) -> None:
    rows = b"".join(json.dumps({"text": f"{n} \u2028 words"}).encode() + b"\n" for n in range(5000))
    pack = gzip.compress if packing == "gzip" else zstandard.ZstdCompressor().compress
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.x"
    plain.write_bytes(rows)
    packed.write_bytes(
        pack(rows[:70_000]) + pack(rows[70_000:])
    )  # two members, as `cat` makes them
    assert read(packed) == read(plain)


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("spoil", ["cut", "changed", "head"])
def test_damaged_packed_files_are_refused(tmp_path: Path, packing: str, spoil: str) -> None:
    rows = b"".join(b'{"text": "%d %s"}\n' % (n, bytes([97 + n % 26]) * n) for n in range(900))
    pack = (
        gzip.compress
        if packing == "gzip"
        else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    data = pack(rows)
    middle = len(data) // 2
    data = {
        "cut": data[:-20],
        "changed": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "head": data[:6],
    }[spoil]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    _, problems = read(path)
    assert "file.damaged" in [p.rule for p in problems]
    with pytest.raises(DataError):
        load_rows(path)


def test_a_bomb_is_not_unpacked_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(bytes(400_000_000)))
    tracemalloc.start()
    _, problems = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p.rule for p in problems] == ["file.binary"]
    assert peak < 300_000_000


@pytest.mark.parametrize(
    ("module", "data", "extra"),
    [
        ("zstandard", zstandard.ZstdCompressor().compress(LINES), "zstd"),
        ("pyarrow", b"PAR1\x15\x04", "parquet"),
    ],
)
def test_missing_package_suggests_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, data: bytes, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    (problem,) = read(path)[1]
    assert problem.rule == "file.extra" and problem.rule in RULES
    assert f"luthier[{extra}]" in problem.advice


def zip_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["rows.zip", "rows"])
@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("rows.jsonl", b'{"text": "a", "label": "x"}\n'),
        ("data/rows.csv", b"text,label\na,x\n"),
        ("rows.json", b'{"train": [{"text": "a", "label": "x"}]}'),
        ("rows.txt", b"__label__x a\n"),
    ],
)
def test_data_file_in_a_zip_archive(tmp_path: Path, name: str, member: str, data: bytes) -> None:
    more = {"__MACOSX/rows.jsonl": b"\0", "README.md": b"# Rows", "data/.x.csv": b"a"}
    path = zip_of(tmp_path / name, **{**more, member: data})
    records = [record for _, record in read_records(path, [])]
    assert records == [{"text": "a", "label": "x"}]
    assert container_of(path).packing == "zip"


def test_several_data_files_in_a_zip_archive(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "rows.zip", **{"train.csv": b"text\na", "test.csv": b"text\na"})
    with pytest.raises(RowRefused) as caught:
        container_of(path)
    assert caught.value.rule == "file.directory"


def test_damaged_data_file_in_a_zip_archive(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "rows.zip", **{"rows.jsonl": b'{"text": "a"}\n' * 10_000})
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    problems: list[Problem] = []
    assert [*read_records(path, problems)] == []
    assert [problem.rule for problem in problems] == ["file.damaged"]


@pytest.mark.parametrize("mark", ["\t", ","])
@pytest.mark.parametrize("label", ["ham", "pos"])  # "pos" is a key for pairs, too
def test_text_file_with_cells_and_without_names(tmp_path: Path, label: str, mark: str) -> None:
    path = tmp_path / "rows.txt"
    lines = ["ham\tSee you at 10", "spam\tWin now!", *["ham\tSorry."] * 3, 'ham\t"x"']
    lines = [line.replace("ham", label) for line in lines]
    path.write_text("\n".join(lines).replace("\t", mark))
    problems: list[Problem] = []
    assert [*read_records(path, problems)] == []
    assert [problem.rule for problem in problems] == ["table.header"]
    assert "printf 'label" in problems[0].advice and "rename the file to .md" in problems[0].advice
    path.write_text("\tSee you.\nspam\tWin now!\nham\tLate, sorry.\n".replace("\t", mark))
    assert container_of(path) == Container("text")


@pytest.mark.parametrize("mark", ["\t", ";", ",", "|"])
@pytest.mark.parametrize("names", ["text\tlabel", "Message\tlabel", "Message text\tkind"])
def test_text_file_with_names_of_columns(tmp_path: Path, names: str, mark: str) -> None:
    path = tmp_path / "rows.txt"
    lines = [names, 'See you.\t"ham, \nor not"', *["Win now!\tspam"] * 3]
    path.write_text("\n".join(lines).replace("\t", mark))
    records = [[*record.values()] for _, record in read_records(path, [])]
    assert records == [["See you.", "ham, \nor not"], *[["Win now!", "spam"]] * 3]


def test_empty_optional_cells_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,expected,id\na,x,\nb,,2\nc,,\n")
    problems: list[Problem] = []
    assert [len(record) for _, record in read_records(path, problems)] == [2, 2, 1]
    assert not problems


def test_text_file_with_wrong_rows_below_names_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("text,label\n" + "See you,ham\n" * 2 + "Sorry, no,ham\nLate, too,ham\n")
    problems: list[Problem] = []
    assert len([*read_records(path, problems)]) == 2
    assert [problem.rule for problem in problems] == ["table.cells"] * 2


@pytest.mark.parametrize(
    "line",
    [
        "Roses are red, violets are blue",
        "2026-11-29 10:05:38,123 INFO started",
        "\u5e8a\u524d\u660e\u6708\u5149,\u7591\u662f\u5730\u4e0a\u971c\u3002",
        "To the gate,",
        "| a | b |",
        "x = f(a, b); y = 1",
    ],
)
def test_prose_with_delimiters_is_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(f"{line}\n" * 20, encoding="utf-8")
    assert container_of(path) == Container("text")
