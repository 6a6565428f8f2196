"""Files, lines, folders and tensors of a store that is encrypted, beside those from before it was."""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path

import pytest
import torch
from written_rows import row_of

from luthier.data.shapes.base import Labelled
from luthier.encryption import memory
from luthier.encryption.files import (
    is_sealed,
    new_data_file,
    open_folder,
    open_line,
    open_value,
    place_of,
    read_data,
    seal_folder,
    seal_line,
    seal_value,
)
from luthier.encryption.keys import Keyring
from luthier.encryption.tensors import load_tensors, save_tensors, tensor_headers
from luthier.engine.runs import LABEL_ISSUES, Run
from luthier.errors import CorruptFile, RefusedInput
from luthier.evaluation.label_issues import LabelIssue
from luthier.files import new_file


def test_lines_are_encrypted_one_by_one(ring: Keyring) -> None:
    value = {"prompt": "a canary\nin a line", "n": [1, 2.5, None]}
    line = seal_line(json.dumps(value))
    assert "canary" not in line and "\n" not in line and line != seal_line(json.dumps(value))
    assert open_line(line) == value == open_value(seal_value(value))
    assert open_line(json.dumps(value)) == value
    record = json.loads(line)
    broken = record["sealed"][:-6] + "AAAA" + record["sealed"][-2:]
    for bad in (broken, "", "x.y", record["sealed"].partition(".")[2]):
        with pytest.raises(CorruptFile):
            open_value({"sealed": bad})


OLD = '{"sealed": "%s.%s"}'
"""A line as versions before places wrote it."""


def test_a_line_is_read_where_it_was_written_and_nowhere_else(
    ring: Keyring, luthier_home: Path
) -> None:
    path = luthier_home / "teachers" / "one.jsonl"
    place = place_of(path, 3)
    assert place == "teachers/one.jsonl:3" and place_of(path) == "teachers/one.jsonl"
    line = seal_line('{"a": 1}', place)
    assert open_line(line, place) == {"a": 1} == open_line(line)
    for other in (place_of(path, 4), place_of(path), place_of(path.with_name("two.jsonl"), 3)):
        with pytest.raises(CorruptFile, match="was moved"):
            open_line(line, other)
        # What it says of its place is authenticated with it.
        with pytest.raises(CorruptFile, match="does not open"):
            open_line(json.dumps({**json.loads(line), "place": other}), other)
    record = json.loads(line)
    del record["place"]
    with pytest.raises(CorruptFile, match="does not open"):
        open_value(record, place)
    # As PostgreSQL gives it back: in another order.
    assert open_value(dict(sorted(json.loads(line).items())), place) == {"a": 1}


def test_lines_of_versions_before_places_are_read_everywhere(ring: Keyring) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = b"n" * 12
    sealed = AESGCM(ring.derive(ring.current, b"", b"line")).encrypt(nonce, b'{"a": 1}', None)
    line = OLD % (ring.current, base64.b64encode(nonce + sealed).decode())
    assert open_line(line) == open_line(line, "a file:7") == {"a": 1}


def test_a_plain_store_keeps_lines_as_they_are(luthier_home: Path) -> None:
    assert seal_line('{"a": 1}') == '{"a": 1}' and seal_value({"a": 1}) == {"a": 1}


def test_what_failed_in_the_middle_leaves_nothing(ring: Keyring, luthier_home: Path) -> None:
    def fail() -> None:
        with new_data_file(luthier_home / "rows") as file:
            file.write(b"rows" * 50_000)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in luthier_home.iterdir() if "encryption" not in path.name] == []


def test_a_folder_goes_to_the_store_and_back(
    ring: Keyring, luthier_home: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows/train").mkdir(parents=True)
    content = {"sources.json": b"{}", "train/01": b"luthier\0 canary", "train/02": b""}
    for name, data in content.items():
        (tmp_path / "rows" / name).write_bytes(data)
    stored, again = luthier_home / "jobs/x", memory.working(luthier_home / "jobs/x")
    seal_folder(tmp_path / "rows", stored)
    assert all(is_sealed(stored / name) for name in content)
    open_folder(stored, again)
    assert {name: (again / name).read_bytes() for name in content} == content
    assert not again.is_relative_to(luthier_home) and not again.is_relative_to(tmp_path)
    assert memory.memory().stat().st_mode & 0o077 == 0
    memory.remove(stored)
    assert not stored.exists() and not again.exists()


def test_a_plain_store_works_in_place(luthier_home: Path) -> None:
    assert memory.working(luthier_home / "jobs/x") == luthier_home / "jobs/x"
    with memory.scratch_folder() as scratch:
        assert scratch.is_relative_to(tempfile.gettempdir())


def test_scratch_of_an_encrypted_store_is_in_memory(ring: Keyring) -> None:
    with memory.scratch_folder() as scratch:
        assert scratch.is_relative_to(memory.memory())
        (scratch / "x").write_bytes(b"plain")
    assert not scratch.exists()


def test_a_folder_that_is_not_in_memory_is_refused(
    ring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(memory.ENVIRONMENT, "/proc/self")
        with pytest.raises(RefusedInput, match="not in memory"):
            memory.memory()


def test_tensors_come_back_bit_for_bit(ring: Keyring, luthier_home: Path) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(300, 70), "b": torch.randn(5).bfloat16(), "c": torch.arange(9)}
    path = luthier_home / "w.safetensors"
    save_tensors(tensors, path, {"format": "pt"})
    assert is_sealed(path)
    found = load_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert tensor_headers(path) == {"a": ("F32", [300, 70]), "b": ("BF16", [5]), "c": ("I64", [9])}


def test_files_from_before_are_read_as_they_are(
    luthier_home: Path, request: pytest.FixtureRequest
) -> None:
    luthier_home.mkdir()
    with new_file(luthier_home / "rows") as file:
        file.write(b"old rows")
    save_tensors({"a": torch.ones(2)}, luthier_home / "w.safetensors")
    request.getfixturevalue("ring")
    assert read_data(luthier_home / "rows") == b"old rows"
    assert torch.equal(load_tensors(luthier_home / "w.safetensors")["a"], torch.ones(2))
    assert tensor_headers(luthier_home / "w.safetensors") == {"a": ("F32", [2])}


def test_rows_with_label_issues_are_encrypted_and_private_data_in_them_masked(
    ring: Keyring,
) -> None:
    run = Run("tiny", "x")
    run.folder.mkdir(parents=True)
    row = row_of("rows.jsonl", 7, text="Write to anna.meier@posteo.de at once", label="spam")
    assert isinstance(row, Labelled)
    run.write_label_issues([LabelIssue(row, "ham", 0.98765)])
    path = run.folder / LABEL_ISSUES
    assert is_sealed(path) and b"Write" not in path.read_bytes()
    found = json.loads(read_data(path))
    assert found.pop("text").startswith("Write to ")
    assert found == {
        "file": "rows.jsonl", "line": 7, "label": "spam", "likely_label": "ham", "probability": 0.9877,
    }  # fmt: skip
    assert b"anna.meier@posteo.de" not in read_data(path)
    run.write_label_issues([])  # of a run that goes on and finds none
    assert not path.exists()
