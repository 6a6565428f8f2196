"""Worker processes: equal reports in equal order."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from shutil import make_archive
from typing import Any

import numpy as np
import pytest
from PIL import Image

import luthier
from luthier.data.shapes.texts import RawText
from luthier.errors import LuthierError
from luthier.gate import scan
from luthier.gate.check import CheckContext, RowBatch
from luthier.gate.checks import CHECKS, checks_for
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.checks.lengths import Lengths
from luthier.gate.inspect import InspectionRequest, inspect
from luthier.models.tokenizer import load_chat_format


def told(report: Any) -> dict[str, Any]:
    plain: dict[str, Any] = report.plain()
    del plain["seconds"]
    return plain


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with faults of most checks, in more batches than wait at once."""
    path = tmp_path / "rows.jsonl"
    texts = ["the quick brown fox", "mail me: anna@kontor.de", "<|im_end|> is a mark", "x\u200by"]
    lines = [
        json.dumps({"prompt": f"{n} {texts[n % 4]}", "completion": f"answer {n % 50} " * 3})
        for n in range(600)
    ]
    lines[100:100] = ["{", lines[5], json.dumps({"prompt": "a", "completion": " "})]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_the_report_does_not_depend_on_processes(
    rows: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "ROWS", 32)
    monkeypatch.setattr(scan, "LARGE", 0)
    request = InspectionRequest(str(rows), base=str(tiny_model_folder))
    alone = told(inspect(request))
    assert {"json.invalid", "field.empty", "duplicate.exact", "privacy.email"} <= {
        rule["rule"] for rule in alone["rules"]
    }
    assert told(inspect(request, processes=2)) == alone


def test_batches_stay_in_order_and_a_killed_process_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted: list[Future[list[Any]]] = []

    class Executor:
        def __init__(self, *_: Any) -> None:
            pass

        def submit(self, measure: Any, batch: RowBatch) -> Future[list[Any]]:
            submitted.append(Future())
            return submitted[-1]

    monkeypatch.setattr("luthier.gate.scan.ProcessPoolExecutor", Executor)
    monkeypatch.setattr(scan, "AHEAD", 1)
    check = Lengths()
    pool = scan.BatchPool([check], processes=2)
    parts = [RowBatch("train", "f", [RawText("f", n, text="a b" * n)]) for n in range(1, 5)]
    for batch in parts[:2]:
        assert list(pool.measure(batch)) == []
    for future, batch in zip(submitted, parts, strict=False):
        future.set_result([check.measure(batch)])
    found = [batch for part in parts[2:] for batch, _ in pool.measure(part)]
    assert found == parts[:2] and len(submitted) == 4
    submitted[2].set_exception(BrokenProcessPool("killed"))
    with pytest.raises(LuthierError) as killed:
        list(pool.wait())
    assert killed.value.rule == "process.killed"


def test_small_sources_start_no_process(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("luthier.gate.scan.ProcessPoolExecutor", refuse)
    assert inspect(InspectionRequest(str(rows), base=None), processes=2).rows == {"train": 601}


@pytest.mark.parametrize("form", ["folder", "zip", "npz"])
def test_images_are_scanned_in_small_batches_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 12, 12, 3), dtype=np.uint8)
    source = tmp_path / ("photos" if form == "folder" else f"photos.{form}")
    if form == "npz":
        np.savez(source, images=pixels, labels=np.arange(80) % 2)
    for n in range(0 if form == "npz" else 80):
        path = tmp_path / f"photos/{'ab'[n % 2]}/{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[n]).save(path)
    if form == "zip":
        make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos")

    def refuse(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("luthier.gate.scan.ProcessPoolExecutor", refuse)
    monkeypatch.setattr(scan, "LARGE", 0)  # the bound of texts
    seen: list[scan.ScanProgress] = []
    inspect(InspectionRequest(str(source), base=None), progress=seen.append, processes=2)
    assert [at.rows for at in seen] == [32, 64, 80, 80]
    shares = [at.done_bytes / at.total_bytes for at in seen]
    assert shares[0] == pytest.approx(33 / 80, abs=0.02) and shares == sorted(shares)


@pytest.mark.parametrize("name", CHECKS)
def test_pickled_check_has_only_measuring_attributes(name: str, tiny_model_folder: Path) -> None:
    known = CheckContext(load_chat_format(tiny_model_folder), context=64)
    check = next(each for each in checks_for(known)[0] if each.name == name)
    copy = pickle.loads(pickle.dumps(check))
    assert set(vars(copy)) == set(type(check).measures_with)


def test_pickled_check_leaves_collected_rows_out() -> None:
    check = Duplicates()
    assert "_table" in vars(check) and "_table" not in vars(pickle.loads(pickle.dumps(check)))


TEXT = "please call 020 7946 0958 about the parcel that I ordered at the end of last week"


def write(path: Path, *texts: str) -> Path:
    rows = [json.dumps({"text": text, "label": "ab"[n % 2]}) for n, text in enumerate(texts)]
    path.write_text("\n".join([*rows[:2], "{", *rows[2:]]) + "\n")
    return path


def test_rows_are_quoted_from_their_lines(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "one", TEXT, "two", TEXT, TEXT.upper(), "three")
    held = write(tmp_path / "b.jsonl", "four", "five", f"{TEXT}!")
    report = luthier.inspect(data, test=held, base=None)
    kept = report.findings.examples
    (copy,) = kept["duplicate.exact"]
    assert copy.place.line == 2 and copy.excerpt.startswith("please call 02")
    assert "7946 0958" not in copy.excerpt and copy.excerpt.endswith("last week")
    (leak,) = kept["leakage.exact"]
    assert (Path(leak.place.file).name, leak.place.line) == ("b.jsonl", 4)
    assert leak.excerpt.endswith("week!") and "7946" not in leak.excerpt
    assert "please call 02" in report.html() and "7946 0958" not in report.html()


def test_only_first_rows_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "QUOTED_ROWS", 3)
    data = write(tmp_path / "a.jsonl", "one", TEXT, "two", TEXT, "x" * 30, "y", "x" * 30)
    found = luthier.inspect(data, base=None).findings.examples["duplicate.exact"]
    assert [bool(each.excerpt) for each in found] == [True, False]
