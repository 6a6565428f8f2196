"""Commands that look at data and write it anew: ``inspect``, ``clean``, ``convert``, ``split``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli import console
from luthier.cli.bridge import FromText
from luthier.cli.console import (
    check_output,
    heavy_imports,
    new_console,
    print_json,
    print_text,
)
from luthier.cli.options import Columns, Json, Mapped, Overwrite
from luthier.escaping import one_line
from luthier.files import write_bytes

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.gate.clean import CleaningSummary
    from luthier.gate.report import Report
    from luthier.gate.scan import ScanProgress

NoneAsText = Annotated[str | None, FromText(str, lambda text: None if text == "none" else text)]
Method = Annotated[str | Mapping[str, object] | None, FromText(str)]


def parse_severities(texts: list[str]) -> dict[str, str]:
    """Parse each ``RULE=SEVERITY`` of ``--severity``."""
    from luthier.gate.policy import parse_severity

    return {rule: value for text in texts for rule, value in parse_severity(text).items()}


Severities = Annotated[
    Mapping[str, str] | None,
    FromText(list[str], parse_severities),
    typer.Option(metavar="RULE=SEVERITY"),
]
Source = Annotated[str, typer.Argument(help="File, folder, 'pattern*' or s3:// to read.")]


def inspect(
    data: str | Path,
    *,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapped = None,
    base: NoneAsText = "auto",
    objective: Method = None,
    rows: Annotated[int, typer.Option(min=0)] = 5,
    html: Path | None = None,
    severity: Severities = None,
    policy: Path | None = None,
    skip: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Report:
    """Check data: errors, warnings, tokens and learned text.

    Exit codes: 0 passed, 1 warnings, 2 errors (`luthier tune` rejects the data, too).

    Args:
        data: Data file, folder, 'pattern*' or s3://.
        validation: Rows for validation.
        test: Rows for the final test.
        columns: Column of a key, e.g. prompt=question; repeatable.
        base: Model for counting tokens; none for no such checks.
        objective: Objective, e.g. dpo; chosen from the rows by default.
        rows: Rows of each split to show with their tokens.
        html: Write the report as an HTML page.
        severity: off, note, warning or error for a rule; repeatable.
        policy: TOML file with severities and checks to skip.
        skip: Name of a check to leave out; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        The report, with ``exit_code``, ``plain()`` and ``html()``. Invalid rows raise no error.

    Raises:
        RefusedInput: for an unknown base, objective, rule or check.
        DownloadError: for a base model that cannot be fetched.
    """
    check_output(html)
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.gate import inspect as gate

    reporter = reporter or Reporter()

    def move(at: ScanProgress) -> None:
        text = f"inspect, {at.rows:,} rows, {at.findings:,} findings (%)"
        reporter.progress(100 * at.done_bytes // max(1, at.total_bytes), 100, text)

    request = gate.InspectionRequest(
        str(data),
        None if validation is None else str(validation),
        None if test is None else str(test),
        columns,
        base,
        objective,
        rows,
        severity or {},
        policy,
        tuple(skip),
    )
    # A program of a user may lack the main guard that further processes need.
    processes = os.cpu_count() if console.owns_process else 1
    report = gate.inspect(request, reporter.stage, move, processes or 1)
    if html is not None:
        write_bytes(html, report.html().encode())
        reporter.note(f"page: {html}")
    return report


def show_report(report: Report, rows: int) -> None:
    """Print the report on the data."""
    from luthier.gate.report_text import print_report

    print_report(report, new_console(highlight=False), rows)


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
