"""Batch inference with several processes: order, no repeated work, and resuming after kills."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from upper_task import KILL, LOG, SHARD_ROWS, STOP, STOPPED, WAIT, UpperTask, run

from luthier.data.shapes.conversations import PromptOnly
from luthier.engine.metrics import Reporter
from luthier.errors import DataError, LuthierError, RecipeError, RunConflict
from luthier.files import lock
from luthier.models.decoding.sampling import Sampling
from luthier.workflows import batch_inference
from luthier.workflows.batch_inference import InferenceRunner, _shards, shards_folder
from luthier.workflows.inference_tasks import GenerateTask, InputRow

ROWS = 30


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the modules of the tests."""
    folder = Path(__file__).parent.parent / "plugins"
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    write(path)
    return path


def write(path: Path, **texts: str) -> None:
    """Write rows; ``row_7`` replaces the text of row 7."""
    rows = [{"text": texts.get(f"row_{n}", f"text {n}"), "id": n} for n in range(1, ROWS + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def expected(source: Path, mark: str = "") -> str:
    rows = map(json.loads, source.read_text().splitlines())
    return "".join(json.dumps({**row, "upper": row["text"].upper()}) + mark + "\n" for row in rows)


def answered(source: Path) -> Counter[int]:
    """Return the number of answers per row."""
    lines = (source.parent / LOG).read_text().splitlines()
    return Counter(int(line.split()[0]) for line in lines)


def when(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Heard(Reporter):
    """Stores notes and the numbers of answered rows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: int, total: int, what: str) -> None:
        self.rows.append((done, total))


@pytest.mark.slow
def test_rows_are_answered_once_and_written_in_their_order(source: Path, tmp_path: Path) -> None:
    output, heard = tmp_path / "out.jsonl", Heard()
    found = run(source, output, 3, reporter=heard)
    assert output.read_text() == expected(source)
    assert answered(source) == Counter(range(1, ROWS + 1))
    assert (found.rows, found.resumed_rows, found.processes) == (ROWS, 0, 3)
    assert found.counts == {"n": ROWS}
    assert heard.rows[0] == (0, ROWS) and heard.rows[-1] == (ROWS, ROWS)
    assert not shards_folder(output).exists()


@pytest.mark.slow
def test_progress_counts_rows_of_unfinished_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_inference, "CHECK_SECONDS", 0.1)
    output, heard = tmp_path / "out.jsonl", Heard()
    (tmp_path / WAIT).touch()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run, source, output, 1, reporter=heard)
        try:
            when(lambda: (3 * SHARD_ROWS + 1, ROWS) in heard.rows)
        finally:
            (tmp_path / WAIT).unlink()
        found.result()
    assert output.read_text() == expected(source)


@pytest.mark.slow
def test_refused_rows_do_not_count_as_done(source: Path, tmp_path: Path) -> None:
    write(source, row_7="?")
    heard = Heard()
    with pytest.raises(DataError):
        run(source, tmp_path / "out.jsonl", 1, reporter=heard)
    assert heard.rows[-1] == (ROWS - SHARD_ROWS, ROWS)


@pytest.mark.slow
def test_stopped_process_does_not_delay_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_inference, "END_SECONDS", 0.5)
    (tmp_path / STOP).touch()
    run(source, tmp_path / "out.jsonl", 2)
    assert (tmp_path / "out.jsonl").read_text() == expected(source)
    stopped = int((tmp_path / STOPPED).read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)


@pytest.mark.slow
def test_killed_process_restarts_with_remaining_rows(source: Path, tmp_path: Path) -> None:
    output, heard = tmp_path / "out.jsonl", Heard()
    (tmp_path / KILL).touch()
    run(source, output, 2, reporter=heard)
    assert output.read_text() == expected(source)
    assert answered(source) == Counter(range(1, ROWS + 1))
    [_note] = heard.notes


@pytest.mark.slow
def test_killed_command_resumes_without_repeated_rows(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / WAIT).touch()
    command = [sys.executable, "-m", "upper_task", "run", str(source), str(output), "2"]
    with subprocess.Popen(command) as process:
        when(lambda: len([*shards_folder(output).glob("*.answers")]) == 3)
        process.kill()
    assert not output.exists()
    (tmp_path / WAIT).unlink()
    found = run(source, output, 1)
    assert found.resumed_rows >= 3 * SHARD_ROWS
    assert output.read_text() == expected(source)
    once = answered(source)
    assert all(once[line] == 1 for line in range(1, 3 * SHARD_ROWS + 1))


@pytest.mark.slow
def test_terminated_command_ends_worker_processes(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / WAIT).touch()
    command = [sys.executable, "-m", "upper_task", "run", str(source), str(output), "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        when(lambda: len([*shards_folder(output).glob("*.answers")]) == 3)
        process.send_signal(signal.SIGTERM)
        _, _errors = process.communicate()
    (tmp_path / WAIT).unlink()
    assert run(source, output, 1).resumed_rows == 3 * SHARD_ROWS


@pytest.mark.slow
def test_refused_row_repeats_only_affected_shard(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(source, row_7="?", row_8="?")
    with pytest.raises(DataError) as refused:
        run(source, output, 1)
    assert [problem.line for problem in refused.value.problems] == [7, 8]
    assert not output.exists()
    write(source)
    assert run(source, output, 1).resumed_rows == ROWS - SHARD_ROWS
    assert output.read_text() == expected(source)
    assert answered(source) == Counter(range(1, ROWS + 1))


@pytest.mark.slow
def test_changed_settings_preserve_earlier_shards(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(source, row_30="?")
    for mark in ("", " "):
        with pytest.raises(DataError):
            run(source, output, 1, mark)
    assert answered(source)[1] == 2
    write(source)
    assert run(source, output, 1).resumed_rows == ROWS // SHARD_ROWS * SHARD_ROWS
    assert output.read_text() == expected(source)


def test_changed_image_or_series_changes_shard_name(tmp_path: Path) -> None:
    photo, series = tmp_path / "photos" / "a.png", tmp_path / "series.csv"
    photo.parent.mkdir()

    def names() -> list[list[str]]:
        tasks = [UpperTask(model="none", source=str(each)) for each in (photo.parent, series)]
        return [[shard.name for shard in _shards(task, [], tmp_path, Reporter())] for task in tasks]

    found = []
    for value in (1, 2):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(photo)
        os.utime(photo, (value, value))
        series.write_text("timestamp,value\n" + "".join(f"{n},{value}\n" for n in range(60)))
        found.append(names())
        assert names() == found[-1]
    (photos, windows), (other_photos, other_windows) = found
    assert photos and windows
    assert not {*photos} & {*other_photos} and not {*windows} & {*other_windows}


def test_unreadable_rows_are_refused_before_inference(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() + '{"id": 31}\n{"text": "x", "upper": 1}\n')
    output = tmp_path / "out.jsonl"
    with pytest.raises(DataError) as refused:
        run(source, output, 1)
    assert [problem.line for problem in refused.value.problems] == [31, 32]
    assert not shards_folder(output).exists() and not (tmp_path / LOG).exists()


@pytest.mark.slow
def test_failed_process_raises_and_finished_shards_remain(source: Path, tmp_path: Path) -> None:
    write(source, row_9="!")
    output = tmp_path / "out.jsonl"
    with pytest.raises(LuthierError):
        run(source, output, 1)
    assert sum(1 for _ in shards_folder(output).glob("*.answers")) == 2


@pytest.mark.slow
def test_source_changed_during_inference_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (tmp_path / WAIT).touch()
    command = [sys.executable, "-m", "upper_task", "run", str(source), str(output), "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        when(lambda: len([*shards_folder(output).glob("*.answers")]) == 3)
        # The waiting process has already read the small file; the next process finds the change.
        write(source, row_20="another text")
        (tmp_path / KILL).touch()
        (tmp_path / WAIT).unlink()
        _, _errors = process.communicate()
    assert not output.exists()


def test_second_command_for_same_output_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    folder = shards_folder(output)
    folder.mkdir()
    with lock(folder / ".lock"), pytest.raises(RunConflict):
        run(source, output, 1)


def test_foreign_files_in_shards_folder_are_preserved(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    kept = shards_folder(output) / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(RecipeError):
        run(source, output, 2)
    assert kept.read_text() == "mine" and not output.exists()
    with pytest.raises(RecipeError):
        run(source, Path("/dev/null"), 2)
    with pytest.raises(RecipeError):
        run(source, tmp_path / f"{'x' * 250}.jsonl", 2)


def test_long_rows_make_small_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = UpperTask(model="none", source=str(source))
    for characters, rows in ((14, 2), (1, 1)):  # a single row always fits
        monkeypatch.setattr(batch_inference, "SHARD_BYTES", characters)
        shards = [*_shards(task, [], tmp_path, Reporter())]
        assert [shard.rows for shard in shards] == [rows] * (ROWS // rows)


@pytest.mark.slow
def test_lines_are_packed_by_the_ending_of_the_output(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl.gz"
    run(source, output, 2)
    assert gzip.decompress(output.read_bytes()).decode() == expected(source)


def test_processes_are_limited_by_memory_and_shards() -> None:
    runner = InferenceRunner()
    with pytest.raises(RecipeError):
        runner.plan_processes(1, 1 << 50, 10)
    processes, threads = runner.plan_processes(2, 1, 1)
    assert (processes, threads) == (1, len(os.sched_getaffinity(0)))


def test_extra_fields_are_converted_to_json() -> None:
    task = GenerateTask(model="x", source="rows.parquet", sampling=Sampling())
    rows = [
        InputRow(
            "rows.parquet", 1, {"when": date(2026, 11, 26)}, PromptOnly("rows.parquet", 1, "Hi")
        )
    ]
    assert task.records(rows) == [{"prompt": "Hi", "when": "2026-11-26"}]
    bad = [InputRow("rows.parquet", 2, {"x": float("nan")}, PromptOnly("rows.parquet", 2, "Hi"))]
    with pytest.raises(DataError) as refused:
        task.records(bad)
    assert refused.value.rule == "convert.container"
