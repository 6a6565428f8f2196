"""``luthier clean``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.options import Columns, Json

if TYPE_CHECKING:
    from luthier.gate.clean import Summary


def clean(
    source: Annotated[str, typer.Argument(help="File, folder, 'pattern*' or s3:// to read.")],
    target: Annotated[
        Path,
        typer.Argument(
            help="New file: .jsonl, .csv, .tsv, .parquet or, of plain text, .txt; .gz and .zst pack it."
        ),
    ],
    strip: Annotated[
        bool, typer.Option("--strip", help="Remove hidden characters; CRLF to LF; NFC.")
    ] = False,
    redact: Annotated[
        list[str] | None,
        typer.Option(help="Pseudonyms for email, phone, card ..., or all; may be repeated."),
    ] = None,
    redact_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key: equal in every file.")
    ] = None,
    split_long: Annotated[
        bool, typer.Option("--split-long", help="Split raw text to the context of --base.")
    ] = False,
    truncate: Annotated[
        Literal["end", "start"] | None,
        typer.Option(
            help="Cut rows to the context of --base: end of the answer, start of the input."
        ),
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
    balance: Annotated[
        str | None, typer.Option(metavar="down|ROWS", help="Rows of each class at most.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Which rows of a class are kept.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="TOML file with these options; those given here win.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model that rows are to fit.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="What is to be learned; chosen by the rows if not given.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out rows, for leakage.*.")] = None,
    test: Annotated[str | None, typer.Option(help="Held-out rows, for leakage.*.")] = None,
    columns: Columns = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files where there are some.")
    ] = False,
    json_: Json = False,
) -> None:
    """Apply chosen fixes and write a new data set, with a log of what became of each row."""
    from luthier.cli.console import errors

    fields = {
        "strip": strip or None, "redact": redact, "redact_key_env": redact_key_env,
        "split_long": split_long or None, "truncate": truncate, "drop": drop, "dedupe": dedupe,
        "balance": int(balance) if balance and balance.isdecimal() else balance, "seed": seed,
        "base": base, "objective": objective,
    }  # fmt: skip
    held = {"validation": validation, "test": test}
    with errors(json_):
        summary = _clean(source, target, plan, fields, held, columns, overwrite, dry_run, json_)
        if json_:
            from luthier.cli.console import print_json

            print_json(summary.plain())
        else:
            _print(summary)


def _clean(
    source: str,
    target: Path,
    plan: Path | None,
    fields: Mapping[str, Any],
    held: Mapping[str, str | None],
    columns: list[str] | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> Summary:
    from luthier.cli.console import counting
    from luthier.gate.clean import clean as run
    from luthier.gate.clean_plan import Plan
    from luthier.recipe import parse_columns, read_toml

    given = {name: value for name, value in fields.items() if value is not None}
    chosen = Plan.of({**(read_toml(plan) if plan else {}), **given})
    splits = {split: each for split, each in held.items() if each is not None}
    with counting(100, "clean", as_json) as done:
        return run(
            source, target, chosen, splits, parse_columns(columns or []), overwrite, dry_run,
            told=lambda read, size: done(100 * read // max(1, size)),
        )  # fmt: skip


def _print(summary: Summary) -> None:
    from rich.table import Table

    from luthier.cli.console import new_console

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
