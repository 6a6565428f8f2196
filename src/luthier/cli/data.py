"""Commands that look at data and write it anew: ``inspect``, ``clean``, ``convert``, ``split``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.console import (
    check_output,
    heavy_imports,
    new_console,
    print_json,
    print_text,
)
from luthier.cli.options import Columns, Json, Objective, Overwrite
from luthier.errors import RecipeError
from luthier.escaping import one_line

if TYPE_CHECKING:
    from luthier.gate.clean import CleaningSummary
    from luthier.gate.scan import ScanProgress

Source = Annotated[str, typer.Argument(help="File, folder, 'pattern*' or s3:// to read.")]


def inspect(
    data: Annotated[
        str, typer.Argument(help="File, folder, 'pattern*' or s3:// with rows or text.")
    ],
    validation: Annotated[str | None, typer.Option(help="Rows to measure on.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows kept for the last measurement.")] = None,
    columns: Columns = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model the rows are encoded for; smollm2-135m-instruct if not given."),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Only the checks that need no model.")
    ] = False,
    objective: Objective = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows of each split whose tokens are shown.")
    ] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Write the whole report as one HTML page.")
    ] = None,
    severity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=SEVERITY", help="off, note, warning or error for a rule; again for more."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file with severities and checks to skip.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Leave a check out; again for more.")
    ] = None,
    json_: Json = False,
) -> None:
    """Check data: errors, warnings, tokens and learned text.

    Exit codes: 0 passed, 1 warnings, 2 errors (`luthier tune` rejects the data, too).
    """
    if no_base and base:
        raise RecipeError("--no-base and --base contradict each other; give one of them")
    check_output(html)
    with heavy_imports():
        from luthier.gate import inspect as gate
        from luthier.gate.policy import parse_severity
        from luthier.recipe import parse_columns

    severities: dict[str, str] = {}
    for each in severity or ():
        severities |= parse_severity(each)
    request = gate.InspectionRequest(
        data,
        validation,
        test,
        parse_columns(columns) if columns else None,
        None if no_base else base or gate.AUTO,
        objective,
        max(rows, 5),  # the page shows some, whatever the terminal does
        severities,
        policy,
        tuple(skip or ()),
    )
    from luthier.cli.progress import can_draw

    messages = new_console(stderr=True)

    def on_stage(text: str) -> None:
        if can_draw():
            messages.print(f"[bold]{text}[/bold] …", highlight=False)

    with inspection_progress() as progress:
        report = gate.inspect(request, on_stage, progress, os.cpu_count() or 1)
    if html is not None:
        from luthier.files import write_bytes

        html.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(html, report.html().encode())
    if json_:
        print_json(report.plain())
    else:
        from luthier.gate.report_text import print_report

        print_report(report, new_console(highlight=False), rows)
        if html is not None:
            messages.print(f"written to {html}", style="dim", markup=False, soft_wrap=True)
    raise typer.Exit(report.exit_code)


@contextmanager
def inspection_progress() -> Iterator[Callable[[ScanProgress], None]]:
    """A bar with bytes, rows, findings and time left; lines where there is no terminal."""
    from luthier.cli.progress import SECONDS_TO_SECOND_LINE, ProgressLines, can_draw

    if not can_draw():
        lines = ProgressLines("inspected", first=SECONDS_TO_SECOND_LINE, percent=True)

        def print_line(at: ScanProgress) -> None:
            text = f"{at.rows:,} rows, {at.findings:,} finding{'s' * (at.findings != 1)}"
            text += " so far" if at.done_bytes < at.total_bytes else ""
            lines.update(at.done_bytes, at.total_bytes, text)

        yield print_line
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        DownloadColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[rows]:,} rows  {task.fields[findings]:,} findings"),
        console=new_console(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task("", total=None, rows=0, findings=0, visible=False)

        def move(at: ScanProgress) -> None:
            bars.update(
                task,
                total=at.total_bytes,
                completed=at.done_bytes,
                rows=at.rows,
                findings=at.findings,
                visible=True,
            )

        yield move


def clean(
    source: Source,
    target: Annotated[
        Path,
        typer.Argument(
            help="New file: .jsonl, .json, .csv, .tsv, .parquet or, of text, .txt; .gz, .zst pack it."
        ),
    ],
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Remove hidden characters; CRLF to LF; NFC.")
    ] = False,
    merge_labels: Annotated[
        bool,
        typer.Option(
            "--merge-labels",
            help="Write labels that differ in case, blanks or marks alone in one way.",
        ),
    ] = False,
    redact: Annotated[
        list[str] | None,
        typer.Option(help="Pseudonyms for email, phone, card ..., or all; may be repeated."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Drop rows that break a rule of inspect, or 'group.*'; unreadable; may be repeated.",
        ),
    ] = None,
    dedupe: Annotated[
        Literal["exact", "near"] | None, typer.Option(help="Keep the first of copies.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="TOML file with these options; those given here win.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model for rules such as row.too_long.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="What is to be learned; chosen by the rows if not given.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows, for leakage.*.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out rows, for leakage.*.")] = None,
    columns: Columns = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Apply fixes to a data set and write a new one.

    A log lists each changed or removed row.
    """
    from luthier.cli.progress import show_progress
    from luthier.recipe import parse_columns
    from luthier.sdk.data import clean as run

    fixes = {
        "normalize": normalize or None, "merge_labels": merge_labels or None, "redact": redact,
        "drop": drop, "dedupe": dedupe,
        "base": base, "objective": objective,
    }  # fmt: skip
    given = {name: value for name, value in fixes.items() if value is not None}
    with show_progress(100, "clean") as done:
        summary = run(
            source, target, validation=validation, test=test, columns=parse_columns(columns),
            overwrite=overwrite, dry_run=dry_run, plan=plan, **given,
            on_progress=lambda read, size: done(100 * read // max(1, size)),
        )  # fmt: skip
    if json_:
        print_json(summary.plain())
    else:
        _print_summary(summary)


def _print_summary(summary: CleaningSummary) -> None:
    from rich.table import Table

    out = new_console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"{summary.rows_in:,}", f"rows read ({summary.form})")
    for rule, count in summary.dropped.items():
        table.add_row(f"{count:,}", f"dropped: {rule}")
    for name, count in summary.changed.items():
        did = ", ".join(f"{n:,} {what}" for what, n in summary.edits.get(name, {}).items())
        table.add_row(f"{count:,}", f"changed: {name} ({did})")
    table.add_row(
        f"{summary.rows_out:,}", "rows would be written" if summary.dry_run else "rows written"
    )
    out.print(table)
    if not summary.dry_run:
        out.print(f"{summary.target}; what became of each row: {summary.changes}", soft_wrap=True)


def convert(
    source: Source,
    target: Annotated[
        Path,
        typer.Argument(
            help="New file: .jsonl, .json, .csv, .tsv or .parquet; .gz and .zst pack it."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="rows (luthier's own), prompt-completion, chat, openai, bedrock, "
            "bedrock-conversation, sharegpt, alpaca or text."
        ),
    ] = "rows",
    format_: Annotated[
        Literal["jsonl", "json", "csv", "tsv", "parquet"] | None,
        typer.Option("--format", help="Where the ending does not tell it."),
    ] = None,
    columns: Columns = None,
    drop_extra_keys: Annotated[
        bool, typer.Option("--drop-extra-keys", help="Leave out keys that are no part of the form.")
    ] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Convert rows to another format or file type.

    Fields that the target cannot store are an error unless dropped explicitly.
    """
    from luthier.cli.progress import show_progress
    from luthier.recipe import parse_columns
    from luthier.sdk.data import convert as run

    with show_progress(100, "convert") as done:
        found = run(
            source, target, to=to, format=format_, columns=parse_columns(columns),
            drop_extra_keys=drop_extra_keys, overwrite=overwrite,
            on_progress=lambda read, size: done(100 * read // max(1, size)),
        )  # fmt: skip
    if json_:
        print_json({**asdict(found), "target": str(target)})
        return
    print_text(f"Recognized: {found.recognized}")
    print_text(f"{found.rows:,} rows written to {target} ({found.format}, {found.form})")
    for names, what in ((found.kept, "kept beside the form"), (found.left_out, "left out")):
        if names:
            print_text(f"{what}: {', '.join(map(one_line, names))}")


def split(
    source: Annotated[Path, typer.Argument(help="JSON Lines file to split.")],
    output: Annotated[Path, typer.Option(help="Folder for the new files; must not exist.")],
    validation: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the rows.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the rows.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are chosen.")] = 0,
    json_: Json = False,
) -> None:
    """Split a file into training and held-out rows.

    Labels keep their proportions, and near-duplicates stay on one side.
    """
    from luthier.sdk.data import split as run

    record = run(source, output, validation=validation, test=test, seed=seed)
    if json_:
        print_json(record)
        return
    out = new_console(highlight=False, soft_wrap=True)
    for name, part in record["splits"].items():
        out.print(f"  {part['rows']:>9,} rows  {output / part['file']}  ({name})")
    kept = record["kept_together"]
    out.print(
        f"{kept['rows']:,} rows in {kept['groups']:,} groups ask the same or nearly the same, and each "
        f"group is on one side. Counts by label: {output / 'split.json'}"
    )
