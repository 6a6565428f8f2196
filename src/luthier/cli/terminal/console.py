"""Output of commands: results on standard output, messages on standard error, exit codes.

All terminal output passes through this module. Foreign text (keys, names, messages, generated text)
is escaped by :func:`~luthier.formatting.printable`. This module imports no heavy library.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from luthier.errors import Interrupted, LuthierError, RecipeError, RefusedInput
from luthier.files import write_bytes
from luthier.formatting import (
    command_option,
    finite_or_none,
    map_code,
    one_line,
    printable,
    printable_json,
)
from luthier.models.process_group import ProcessGroup

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from luthier import pages
    from luthier.engine.metrics import Reporter


owns_process = False
"""Whether this process runs a command, in contrast to a program that imports :mod:`luthier`."""
NO_WRAP = 10_000
"""Line width without a terminal, in columns."""


def check_processes(shares_work: bool) -> None:
    """Reject a command that a launcher started several times, unless the processes share the work."""
    size = ProcessGroup.of_environment().size
    if size > 1 and not shares_work:
        raise RefusedInput(
            f"a launcher started {size} processes (WORLD_SIZE). Only `luthier tune` and `luthier "
            "pretrain` share work. Start this command without the launcher"
        )


def train_in_other_process(train: Callable[[], object]) -> bool:
    """Run ``train`` and return True in every process of a launcher except the first.

    The first process reports for all processes; other processes print only their own errors. A
    process started by torchrun's agent ends with the agent.
    """
    from luthier.engine.processes import has_agent, watch_agent

    if has_agent():
        watch_agent(os.getppid())
    rank = ProcessGroup.of_environment().rank
    if rank == 0:
        return False
    try:
        train()
    except LuthierError as error:
        if not (error.reported or isinstance(error, Interrupted)):
            note(f"luthier: process {rank}: {error}")
        raise typer.Exit(error.exit_code) from error
    return True


def print_json(value: Any) -> None:
    """Print the JSON value of ``--json``, with null for numbers that are not finite."""
    text = json.dumps(finite_or_none(value), ensure_ascii=False, allow_nan=False)
    write_json(text + "\n")
    sys.stdout.flush()


def write_json(text: str) -> None:
    """Write JSON, or lines of JSON, to standard output."""
    sys.stdout.write(printable_json(text, getattr(sys.stdout, "encoding", None) or "utf-8"))


def print_text(text: str, end: str = "\n") -> None:
    """Print a result as text."""
    sys.stdout.write(printable(text) + end)


def stream_text(piece: str) -> None:
    """Print a piece of generated text: unescaped into files and pipes."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def stream_reasoning(piece: str) -> None:
    """Print a piece of reasoning, dimmed, on standard error: reasoning is not part of the reply."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = printable(piece) if sys.stderr.isatty() else piece
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m" if dim else text)
    sys.stderr.flush()


def new_console(**options: Any) -> Console:
    """Return a console of rich that escapes foreign control sequences."""
    options.setdefault("emoji", False)  # rich would print the id `base:x:` as an emoji
    if os.environ.get("NO_COLOR"):
        # With NO_COLOR alone, rich omits colours but still writes bold.
        options["color_system"] = None
    return _console_class()(**options)


@cache
def _console_class() -> type[Console]:
    # Rich takes part of a second to import, and most commands do not need rich.
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


def new_table(*names: str, numbers: Collection[str] = ()) -> Table:
    """Return a table without borders, with right-aligned columns ``numbers``."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        side: Literal["left", "right"] = "right" if name in numbers else "left"
        # A name from the data is text, not markup of rich.
        table.add_column(Text(one_line(name)), justify=side, overflow="fold")
    return table


def print_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table."""
    from rich.markup import escape

    def cell_text(value: Any) -> str:
        if value is None or value is False:
            return ""
        if value is True:
            return "yes"
        if isinstance(value, Mapping):
            return " ".join(f"{name}={each}" for name, each in value.items())
        return str(value)

    table = new_table(*(column.replace("_", " ") for column in columns))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(escape(one_line(cell_text(row.get(column)))) for column in columns))
    print_table(table)


def print_tables(tables: Iterable[pages.Table]) -> None:
    """Print tables of a report, without the bars and details of its page."""
    from rich.text import Text

    for table in tables:
        shown = [n for n, (_, kind) in enumerate(table.columns) if kind not in ("bar", "detail")]
        numbers = [name for name, kind in table.columns if kind == "number"]
        drawn = new_table(*(table.columns[n][0] for n in shown), numbers=numbers)
        for row in table.rows:
            cells = (row[n] for n in shown)
            drawn.add_row(
                *(Text(one_line(str(value)), "bold" * (kind == "strong")) for value, kind in cells)
            )
        print_text(table.caption)
        print_table(drawn)
        if table.further:
            print_text(f"… and {table.further:,} more")


def print_table(table: Table) -> None:
    """Print a table in the width of the terminal, without line breaks into pipes and files."""
    (new_console() if sys.stdout.isatty() else new_console(width=NO_WRAP)).print(table)


def note(text: str) -> None:
    """Print a message on standard error."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Disable the garbage collector during imports and loading, which create no garbage.

    The collector would scan hundreds of thousands of objects of torch and transformers: 3.05 s with
    and 2.45 s without collector for a start.
    """
    gc.disable()
    try:
        yield
    finally:
        if owns_process:  # a program of a user may have garbage of its own
            gc.freeze()
        gc.enable()


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Replace an import error by a message with the extra ``name`` of the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not name or package == "luthier":
            raise
        raise RefusedInput(f"this needs {package}: pip install 'luthier[{name}]'") from error


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn a :class:`LuthierError` into a message and its exit code."""
    try:
        yield
    except LuthierError as error:
        if as_json:
            body: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
            body["problems"] = [problem.to_dict() for problem in error.problems]
            print_json({"error": body})
        note(f"luthier: {map_code(str(error), command_option)}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        note("\nstopped")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None


def print_written(count: int, what: str, target: Path) -> None:
    """Print the file that contains the results."""
    print_text(f"{count:,} {what} written to {target}")


def write_page(target: Path, page: str, reporter: Reporter) -> None:
    """Write an HTML page and report the path."""
    write_bytes(target, page.encode())
    reporter.note(f"page: {target}")


_OTHER_FORMS = {".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".txt"}


def check_json_lines(target: Path | None) -> None:
    """Reject a file name whose suffix contradicts JSON Lines."""
    if target is not None and (kind := target.suffix.lower()) in _OTHER_FORMS:
        raise RecipeError(
            f"the output is JSON Lines, not {kind}. Name the file "
            f"{target.with_suffix('.jsonl').name}"
        )


def is_standard_output(target: Path | None) -> bool:
    """Return whether an option names standard output, as ``-``."""
    return target == Path("-")


def check_output(target: Path | None, *sources: str | Path | None, overwrite: bool = True) -> None:
    """Reject an output file that cannot be written, before the work starts.

    ``sources`` are the command's input files, which must not be overwritten. Without ``overwrite``,
    an existing file is rejected too.
    """
    if target is None:
        return
    from luthier.data.files.writers import check_target

    check_target(target, [], [each for each in sources if each is not None], overwrite)


def check_figure(target: Path | None, *sources: str | Path | None) -> None:
    """Reject a path of a figure that is no SVG file or cannot be written."""
    if target is not None and target.suffix != ".svg":
        raise RecipeError(f"the figure is SVG. Name the file {target.with_suffix('.svg').name}")
    check_output(target, *sources)
