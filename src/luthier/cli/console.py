"""How commands speak: results on standard output, progress on standard error, exit codes.

Whatever is printed for people comes through here, and what others wrote of it (keys, names, messages,
texts of models) is made :func:`~luthier.printable.printable`: no command writes to a terminal itself.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from luthier.engine.metrics import Reporter
from luthier.errors import DataError, LuthierError, RecipeError, RefusedInput
from luthier.printable import printable, printable_json
from luthier.setting_names import option, with_setting_names

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """The one object a command prints with ``--json``."""
    sys.stdout.write(printable_json(json.dumps(value, ensure_ascii=False)) + "\n")
    sys.stdout.flush()


def print_text(text: str, end: str = "\n") -> None:
    """Print a result for people."""
    sys.stdout.write(printable(text) + end)


def stream_text(piece: str) -> None:
    """Print a piece of what a model or a program wrote: as it is into files and pipes."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def new_console(**options: Any) -> Console:
    """A console of rich; of what it prints nothing but its own styles acts on a terminal."""
    return _console_class()(**options)


@cache
def _console_class() -> type[Console]:
    # Rich takes part of a second to import, which most commands do without.
    from rich.console import Console
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(printable(segment.text), segment.style)

    return PrintableConsole


def measured(name: str, loss: float) -> str:
    """A validation loss for people: where a reward is measured, it is minus the reward."""
    return f"{loss:.4f}" if name == "loss" else f"{name} {-loss:.4f}"


def note(text: str) -> None:
    """Tell people something on standard error."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import and load with the garbage collector off: nothing made here is ever garbage.

    Looking for some among the hundreds of thousands of objects that torch and transformers leave
    takes a fifth of the start (3.05 s with, 2.45 s without, measured).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra has the library that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "luthier":
            raise
        text = f"this needs {package}: pip install 'luthier[{name}]'"
        raise RefusedInput(text) from error


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors raised on purpose into a message and the exit code they carry."""
    try:
        yield
    except LuthierError as error:
        _fail(error, as_json)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None


def _fail(error: LuthierError, as_json: bool) -> NoReturn:
    if as_json:
        body: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, DataError):
            fields = ("file", "line", "rule", "message", "fix")
            body["count"] = len(error.problems)
            body["problems"] = [
                {name: getattr(problem, name) for name in fields} for problem in error.problems
            ]
        print_json({"error": body})
    sys.stderr.write(f"luthier: {printable(with_setting_names(str(error), option))}\n")
    raise typer.Exit(error.exit_code) from error


class LiveReporter(Reporter):
    """Draws a run on a terminal: a bar with loss, speed, memory and time left."""

    def __init__(self, quiet: bool) -> None:
        """``quiet`` keeps standard output free for the result (``--json``)."""
        self.console = new_console(stderr=True)
        self.quiet = quiet
        self._progress: Any = None
        self._task: Any = None
        self._validation = ""

    def stage(self, text: str) -> None:
        """Name the part of the work that begins."""
        self.close()
        if self.console.is_terminal:
            self.console.print(f"[bold]{text}[/bold] …", highlight=False)

    def note(self, text: str) -> None:
        """Print a line worth knowing."""
        if not self.quiet or self.console.is_terminal:
            text = with_setting_names(text, option)
            self.console.print(f"  {text}", highlight=False, markup=False)

    def chosen(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Print each setting that was chosen, and why."""
        if self.quiet and not self.console.is_terminal:
            return
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, value, reason in defaults:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            table.add_row(f"  {name}", f"[bold]{shown}[/bold]", f"[dim]{reason}[/dim]")
        self.console.print("Chosen for this run (override with --set NAME=VALUE):")
        self.console.print(table)

    def counted(self, done: int, total: int, what: str) -> None:
        """Move a bar with the time left; the last one takes it down."""
        if not self.console.is_terminal:
            return
        if self._progress is None:
            self._open(total, what)
        self._progress.update(self._task, completed=done, text=what)
        if done >= total:
            self.close()

    def recorded(self, line: Mapping[str, Any], steps: int) -> None:
        """Move the bar."""
        if not self.console.is_terminal:
            return
        if self._progress is None:
            self._open(steps)
        name = line.get("measure", "loss")
        if line["event"] == "validation":
            self._validation = f"val {line[name]:.3f}  "
            best = "  best so far" if line["best_step"] == line["step"] else ""
            self._progress.console.print(
                f"  step {line['step']:>5}  validation {name} {line[name]:.4f}{best}",
                highlight=False,
            )
            return
        if line["event"] != "train":
            return
        speed = line["tokens_per_second"]
        text = f"{name} {line[name]:.3f}  {self._validation}{speed:,.0f} tok/s"
        memory = f"{line['memory_bytes'] / 1e9:.1f} GB"
        self._progress.update(self._task, completed=line["step"], text=f"{text}  {memory}")

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

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


@contextmanager
def counting(total: int, text: str) -> Iterator[Any]:
    """A bar for ``total`` things on a terminal; yields a function that takes how many are done."""
    from rich.progress import Progress

    console = new_console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def check_output(target: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done."""
    if target is None:
        return
    if target.is_dir():
        raise RecipeError(f"{target} is a folder; --output names a file")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir():
        raise RecipeError(f"{target} cannot be written: {parent} is not a folder")
