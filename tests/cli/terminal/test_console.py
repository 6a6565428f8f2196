"""Foreign text on terminals: no control sequence takes effect in any command."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from principals_of import FIRST
from rich.progress import Progress
from rich.table import Table
from typer.testing import CliRunner

from luthier.cli.service.admin import admin_app
from luthier.cli.terminal import console, progress
from luthier.cli.terminal.console import print_rows
from luthier.engine.metrics import MetricsFile
from luthier.engine.report_file import ReportFile, ReportReader
from luthier.errors import RefusedInput
from luthier.files import write_json
from luthier.library.folders import RUN_REQUEST
from luthier.server.jobs.job_reporter import JobReporter
from luthier.server.tables.audit import Event, append
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import Job

HOSTILE = "key\x1b[2J\x1b]0;title\x07\x9b31m\u202ekcab\x00\x7f\r\u2066\U000e0041"
VISIBLE = r"key\x1b[2J\x1b]0;title\x07\x9b31m\u202ekcab\x00\x7f\x0d\u2066" + r"\U000e0041"


def acts(text: str) -> set[str]:
    """Return the characters of ``text`` that a terminal interprets."""
    return {char for char in text if not char.isprintable()} - {"\n"}


def test_audit_command_prints_escaped_line_per_entry(database: Database) -> None:
    with database.write() as session:
        append(session, Event("s3:PutObject", f"b/{HOSTILE}\n9 forged", account=FIRST, user="ann"))
    done = CliRunner().invoke(admin_app, ["audit"])
    assert not acts(done.stdout) and r"key\x1b[2J" in done.stdout
    assert len(done.stdout.splitlines()) == 2 and r"\n9 forged" in done.stdout
    listed = json.loads(CliRunner().invoke(admin_app, ["audit", "--json"]).stdout)
    assert HOSTILE.replace("\0", "\ufffd") in listed["entries"][0]["resource"]


def test_print_functions_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(HOSTILE)
    console.print_text(HOSTILE)
    console.print_json({"value": HOSTILE})
    print_rows(("name",), [{"name": f"{HOSTILE}\nsecond"}])
    with pytest.raises(typer.Exit), console.errors(False):
        raise RefusedInput(f"there is no {HOSTILE}")
    printed = capsys.readouterr()
    assert not acts(printed.out + printed.err)
    assert printed.err == f"{VISIBLE}\nluthier: there is no {VISIBLE}\n"


def test_console_escapes_terminal_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = io.StringIO()
    out = console.new_console(file=shown, force_terminal=True, width=200)
    table = Table(HOSTILE)
    table.add_row(f"[bold]{HOSTILE}[/bold]")
    out.print(table)
    out.print(HOSTILE, markup=False)
    with Progress(console=out) as progress:
        progress.add_task(HOSTILE, total=1)
    text = shown.getvalue()
    assert "\x1b[1m" in text
    for part in ("\x1b[2J", "\x1b]0", "\x9b", "\u202e", "\x07", "\x00"):
        assert part not in text
    assert r"\x1b[2J" in text


WRITE = """
from luthier.cli.terminal.console import stream_text
for piece in {pieces!r}:
    stream_text(piece)
"""


def test_model_text_is_escaped_only_on_terminal() -> None:
    """An escape sequence may be split; line ends and tabs stay."""
    pieces = ["one\n\ttwo \x1b", "[31m \x9b1m \u202e", "end"]
    command = [sys.executable, "-c", WRITE.format(pieces=pieces)]
    piped = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert piped.stdout.decode() == "".join(pieces)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs)
    assert process.wait(60) == 0
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.replace("\r\n", "\n") == "one\n\ttwo \\x1b[31m \\x9b1m \\u202eend"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(encoding: str) -> None:
    values = ["ấ 😀 é █", "\x9b"]
    code = (
        "import sys; from luthier.formatting import escape_unencodable as escape;"
        "from luthier.cli.terminal.console import note, print_json, print_text;"
        f"escape(sys.stdout, sys.stderr); print_text('█ ✓ ấ é 😀'); print_json({values!r}); note('…')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    text, json_text = done.stdout.decode(encoding).splitlines()
    assert json.loads(json_text) == values
    accent = "\\xe9" if encoding == "ascii" else "é"
    assert text == ("█ ✓ ấ é 😀" if encoding == "utf-8" else rf"# ok: \u1ea5 {accent} \U0001f600")
    has_dots = encoding in ("utf-8", "cp1252")
    assert done.stderr.decode(encoding) == ("…\n" if has_dots else "...\n")


@pytest.mark.parametrize("full", [False, True])
def test_samples_are_printed_escaped(
    luthier_home: Path, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    from luthier.cli.models import samples

    folder = luthier_home / "runs" / "tiny" / "one"
    folder.mkdir(parents=True)
    record: dict[str, Any] = {"step": 1, "line": 1, "tokens": 3, "reward": 1.0}
    MetricsFile(folder / "samples.jsonl").append(
        {**record, "prompt": "\x1b[2J", "completion": "\x9b\u202e \x1b]0;x"}
    )
    samples.show_samples(samples.samples("tiny:one", count=5, last=5), full)
    out = capsys.readouterr().out
    assert not acts(out) and r"\x1b[2J" in out and r"\x9b\u202e" in out


class Clock:
    """Manual clock for the console."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", self)

    def monotonic(self) -> float:
        return self.now


def step(number: int, **further: Any) -> dict[str, Any]:
    line = {"event": "train", "step": number, "loss": 0.5, "tokens_per_second": 120.0}
    return {**line, "memory_bytes": 6e8, **further}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_progress_lines_without_terminal_are_throttled(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = progress.LiveReporter()
    reporter.metrics({"event": "validation", "step": 0, "loss": 0.7, "best_step": 0}, 100)
    counts = []
    for number in range(1, 101):
        reporter.metrics(step(number), 100)
        counts.append(len(capsys.readouterr().err.splitlines()))
        clock.now += 1
    places = [number for number, count in enumerate(counts, 1) if count]
    assert places == [1, 3, *range(13, 100, 10), 100]
    assert max(counts) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_nothing_to_resume_is_reported_only_with_resume_option(
    resume: bool, luthier_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pipelines and jobs resume without an option, so the note is only for users of ``--resume``."""
    write_json(luthier_home / "runs" / "base" / "y" / RUN_REQUEST, {})
    file = ReportFile(tmp_path / "reports.jsonl")
    file.nothing_to_resume("base:x")
    ReportReader(file.path).forward(progress.LiveReporter(resume))
    text = capsys.readouterr().err
    assert ("base:x:" in text) == ("base:y" in text) == resume
    job = Job(id="j", details={})
    ReportReader(file.path).forward(JobReporter(job, str))
    assert "interrupted" not in str(job.details)


def test_progress_line_has_remaining_time_and_losses(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = progress.LiveReporter()
    reporter.metrics(step(1), 101)
    clock.now += 30
    reporter.metrics({"event": "validation", "step": 10, "loss": 0.7, "best_step": 10}, 101)
    reporter.metrics(step(11), 101)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "  step 1 of 101: loss 0.500  120 tok/s  0.6 GB"
    assert (
        second
        == "  step 11 of 101, 4.5 min left: loss 0.500  val 0.700 (step 10)  120 tok/s  0.6 GB"
    )


def test_last_validation_is_printed_before_next_stage(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = progress.LiveReporter()
    for number in (1, 2):
        reporter.metrics(step(number), 4)
        held = {"event": "validation", "step": number, "loss": 0.7 / number, "best_step": number}
        reporter.metrics(held, 4)
    reporter.stage("Training once more")
    reporter.metrics(step(3), 4)
    reporter.close()
    first, last, stage, again = capsys.readouterr().err.splitlines()
    assert "val" not in first
    assert (last, stage) == ("  step 2: val 0.350", "Training once more …")
    assert again.startswith("  step 3 of 4") and "val" not in again


def test_short_progress_is_not_printed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress.LiveReporter()
    for number in range(1, 11):
        reporter.progress(number, 10, "predict")
    assert capsys.readouterr().err == ""
    reporter.progress(0, 400, "predict")
    for done in (100, 400):
        clock.now += 30
        reporter.progress(done, 400, "predict")
    assert capsys.readouterr().err == ("  predict 100 of 400, 90 s left\n  predict 400 of 400\n")


def test_table_is_not_wrapped_in_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    table = console.new_table("name[/]\n[b]", "about")
    table.add_row("a", "long " * 100)
    console.print_table(table)
    heading, _ = capsys.readouterr().out.splitlines()
    assert r"name[/]\n[b]" in heading


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_forced_colours_draw_no_progress_bar_into_file(
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "1")
    reporter = progress.LiveReporter()
    reporter.settings([("training.epochs", 2.0, "as [asked]")])
    reporter.metrics(step(1), 10)
    reporter.metrics(step(10), 10)
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert "training.epochs=2  as [asked]" in lines[1]
    assert [line.partition(":")[0] for line in lines[2:]] == ["  step 1 of 10", "  step 10 of 10"]


def test_chosen_settings_are_not_wrapped_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress.LiveReporter()
    reporter.settings([("training.learning_rate", 0.0018, "a reason " * 30)])
    reporter.note("a note " * 40)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_no_color_disables_bold_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, escaped in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        shown = io.StringIO()
        out = console.new_console(file=shown, force_terminal=True, color_system="standard")
        out.print("[bold]a[/bold]")
        assert ("\x1b" in shown.getvalue()) == escaped
