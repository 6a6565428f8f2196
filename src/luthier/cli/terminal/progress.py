"""Progress display on standard error: a bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.cli.terminal.console import new_console
from luthier.engine.metrics import Reporter, ShownReply, additional_metrics
from luthier.formatting import (
    command_option,
    format_duration,
    list_some,
    map_code,
    one_line,
    printable,
    python_keyword,
)

SECONDS_BETWEEN_LINES = 10.0
"""Interval between progress lines without a bar, in seconds."""
SECONDS_TO_SECOND_LINE = 2.0
"""Time until the second line, in seconds. The first line shows the start, the second the time left."""


def can_draw() -> bool:
    """Return whether standard error is a terminal with cursor control."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class ProgressLines:
    """Progress as occasional lines with the time left."""

    def __init__(self, name: str, first: float = 0.0) -> None:
        """Print the first line after ``first`` seconds, or with the first update if 0."""
        self.name = name
        self._began = (time.monotonic(), 0) if first else None
        self._next = time.monotonic() + first
        self._lines, self._ended = 0, False

    def update(self, done: int, total: int, text: str = "") -> bool:
        """Report that ``done`` of ``total`` are done, with ``text``. Returns whether a line was
        printed."""
        now = time.monotonic()
        # The first update is the start: loading a model before the first step must not count as
        # work.
        if self._began is None:
            self._began = (now, done)
        # Without a line before, the work was short, and its end is no news.
        ends = done >= total and self._lines > 0 and not self._ended
        if now < self._next and not ends:
            return False
        self._ended = done >= total
        start, first = self._began
        left = ""
        if first < done < total and done >= total / 100:  # fewer steps give no reliable time
            left = f", {format_duration((now - start) / (done - first) * (total - done))} left"
        shown = f"  {self.name} {done:,} of {total:,}{left}"
        sys.stderr.write(printable(f"{shown}: {text}" if text else shown) + "\n")
        sys.stderr.flush()
        # A run of days needs no line every ten seconds.
        wait = max(SECONDS_BETWEEN_LINES, 0.01 * (now - start))
        self._next = now + (wait if self._lines else SECONDS_TO_SECOND_LINE)
        self._lines += 1
        return True


SHOWN, INDENT = 40, " " * len("  step 00000  ")
"""Last characters of a prompt that are printed before the reply, below the measurement."""


class LiveReporter(Reporter):
    """Shows a run: on a terminal a bar with loss, speed, memory and time left, elsewhere lines."""

    override = "--set NAME=VALUE"

    def __init__(self, resume: bool = False) -> None:
        """Create the reporter; ``resume`` is the option ``--resume``."""
        self.resume = resume
        self.console = new_console(stderr=True)
        self.draws = self.shows_replies = can_draw()
        self._lines: ProgressLines | None = None
        self._progress: Any = None
        self._task: Any = None
        self._validation = ""
        """Last measurement on the validation rows."""
        self._unprinted = ""
        """Last measurement as a line, if not printed yet."""
        self._override_shown = False
        """Whether the note on overriding settings was printed."""

    def __enter__(self) -> LiveReporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stage(self, text: str) -> None:
        """Print the name of the next stage."""
        self.close()
        self._validation = ""
        self._print(f"{text} …", style="bold")

    def note(self, text: str) -> None:
        """Print a note."""
        self._print(f"  {self.map_settings(text)}")

    def map_settings(self, text: str) -> str:
        """Return ``text`` with settings as command-line options."""
        return map_code(text, command_option)

    def nothing_to_resume(self, model_id: str) -> None:
        """Print a note if the user passed ``--resume``. Pipelines and jobs resume without the
        option."""
        from luthier.engine.runs import unfinished_runs

        if not self.resume:
            return
        self.note(f"no interrupted run {model_id}: starting a new run")
        if others := [run.model_id for run in unfinished_runs()]:
            self.note(f"interrupted runs, the latest first: {list_some(others[::-1], 5)}")

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Print each chosen setting with the reason."""
        from rich.table import Table

        rows = [
            (name, f"{value:g}" if isinstance(value, float) else str(value), reason)
            for name, value, reason in defaults
        ]
        if not self._override_shown:
            self._print(f"Chosen for this run (override with {self.override}):")
        self._override_shown = True
        if not self.draws:
            for name, shown, reason in rows:
                self._print(f"  {name}={shown}  {reason}")
            return
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, shown, reason in rows:
            table.add_row(f"  {name}", f"[bold]{shown}[/bold]", f"[dim]{reason}[/dim]")
        self.console.print(table)

    def progress(self, done: int, total: int, what: str) -> None:
        """Update the bar; the last update removes the bar."""
        self._move(done, total, what)
        if done >= total:
            self.close()

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Move the bar."""
        name = line.get("measure", "loss")
        if line["event"] == "validation":
            # The bar is short: lines above the bar show each measurement with its step.
            step = "" if self.draws else f" (step {line['step']})"
            self._validation = f"val {line[name]:.3f}{step}  "
            self._unprinted = f"  step {line['step']}: val {line[name]:.3f}"
            if self.draws:
                kept = "  (kept)" if line["best_step"] == line["step"] else ""
                beside = (each for each in additional_metrics(name) if each in line)
                scores = "".join(f"  {each} {line[each]:.3f}" for each in beside)
                if self._progress is None:
                    self._open(steps)
                self._print(
                    f"  step {line['step']:>5}  validation {name} {line[name]:.4f}{scores}{kept}"
                )
        elif line["event"] == "train":
            part = "" if name in ("loss", "reward") else "train "
            text = f"{part}{name} {line[name]:.3f}  {self._validation}"
            rate = line.get("rows_per_second")
            text += f"{rate:,.0f} rows/s" if rate else f"{line['tokens_per_second']:,.0f} tok/s"
            self._move(line["step"], steps, f"{text}  {line['memory_bytes'] / 1e9:.1f} GB", "step")

    def replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """Print each reply in one line."""
        from rich.text import Text

        for each in replies:
            prompt, reply = one_line(each["prompt"])[-SHOWN:], one_line(each["reply"])
            text = Text(f"{INDENT}{prompt} \N{RIGHTWARDS ARROW} {reply}", "dim")
            self.console.print(text, no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        """Remove the bar. Without a bar, print the last measurement if not printed yet."""
        if self._unprinted and not self.draws:
            self._print(self._unprinted)
        self._lines, self._unprinted = None, ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str, style: str | None = None) -> None:
        # The width of a log viewer is unknown.
        self.console.print(
            text, style=style, highlight=False, markup=False, soft_wrap=not self.draws
        )

    def _move(self, done: int, total: int, text: str, name: str = "") -> None:
        """Show that ``done`` of ``total`` are done, with ``text``."""
        if not self.draws:
            if self._lines is None:
                # A short command prints no progress.
                self._lines = ProgressLines(name or text, 0.0 if name else SECONDS_TO_SECOND_LINE)
            if self._lines.update(done, total, text if name else "") and name:
                self._unprinted = ""
            return
        if self._progress is None:
            self._open(total, text)
        self._progress.update(self._task, completed=done, text=text)

    def _open(self, steps: int, name: str = "tune") -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TimeRemainingColumn(),
            # Short enough for 80 columns.
            TextColumn("left  {task.fields[text]}", table_column=Column(no_wrap=True)),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=steps, text="")


class ProgramReporter(LiveReporter):
    """Shows the run of a Python program on a terminal."""

    override = "keywords such as training__epochs=3"

    def map_settings(self, text: str) -> str:
        """Return ``text`` with columns as keywords; other settings are named as in Python."""
        return map_code(text, python_keyword)


class NotebookReporter(ProgramReporter):
    """Shows a run as one line of a notebook's output, and notes above the line."""

    def __init__(self, resume: bool = False) -> None:
        super().__init__(resume)
        self.draws = False
        self._width = 0
        """Length of the live line."""
        self._next = 0.0
        """Earliest time of the next update."""
        self._began: tuple[str, float, int] | None = None

    def stage(self, text: str) -> None:
        """Show the name of the next stage as the live line."""
        self._began, self._validation = None, ""
        self._write(f"{text} …")

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Print the chosen settings as one line."""
        chosen = (
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value, _ in defaults
        )
        self._print(f"Chosen: {', '.join(chosen)}")

    def close(self) -> None:
        """Remove the live line, and print the last measurement."""
        self._write("")
        sys.stdout.write("\r")
        sys.stdout.flush()
        if self._unprinted:
            self._print(self._unprinted)
        self._unprinted = ""

    def _print(self, text: str, style: str | None = None) -> None:
        self._write(text)
        sys.stdout.write("\n")
        self._width = 0

    def _move(self, done: int, total: int, text: str, name: str = "") -> None:
        now = time.monotonic()
        what = name or text
        work = what.partition(",")[0]  # counts may follow the name
        if self._began is None or self._began[0] != work:
            self._began = (work, now, done)
        elif now < self._next:
            return
        _, start, first = self._began
        left = ""
        if first < done < total:
            left = f", {format_duration((now - start) / (done - first) * (total - done))} left"
        self._write(f"{what} {done:,} of {total:,}{left}{f': {text}' if name else ''}")
        self._next = now + 0.5

    def _write(self, text: str) -> None:
        """Replace the live line. Notebooks do not clear the rest of a line, so spaces do."""
        shown = printable(text)
        sys.stdout.write(f"\r{shown.ljust(self._width)}")
        sys.stdout.flush()
        self._width = len(shown)
