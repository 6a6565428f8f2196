"""``luthier convert``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from luthier.cli.options import Columns, Json


def convert(
    source: Annotated[str, typer.Argument(help="File, folder, 'pattern*' or s3:// to read.")],
    target: Annotated[
        Path, typer.Argument(help="New file: .jsonl, .csv, .tsv or .parquet; .gz and .zst pack it.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="rows (luthier's own), prompt-completion, chat, openai, bedrock, "
            "bedrock-conversation, sharegpt, alpaca or text."
        ),
    ] = "rows",
    format_: Annotated[
        Literal["jsonl", "csv", "tsv", "parquet"] | None,
        typer.Option("--format", help="Where the ending does not tell it."),
    ] = None,
    columns: Columns = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="Leave out keys that are no part of the form.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file where there is one.")
    ] = False,
    json_: Json = False,
) -> None:
    """Write rows in another form or container; what it cannot say is refused, never dropped."""
    from luthier.cli.console import errors

    with errors(json_):
        _convert(source, target, to, format_, columns or [], bare, overwrite, json_)


def _convert(
    source: str,
    target: Path,
    form: str,
    format_: Literal["jsonl", "csv", "tsv", "parquet"] | None,
    columns: Sequence[str],
    bare: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    from luthier.cli.console import counting, print_json, print_text
    from luthier.data.convert import convert as run
    from luthier.printable import one_line
    from luthier.recipe import parse_columns

    with counting(100, "convert", as_json) as done:
        found = run(
            source, target, form, format_, parse_columns(columns), bare, overwrite,
            lambda read, size: done(100 * read // max(1, size)),
        )  # fmt: skip
    if as_json:
        print_json({**asdict(found), "target": str(target)})
        return
    print_text(f"Recognized: {found.recognized}")
    print_text(f"{found.rows:,} rows written to {target} ({found.format}, {found.form})")
    for names, what in ((found.kept, "kept beside the form"), (found.left_out, "left out")):
        if names:
            print_text(f"{what}: {', '.join(map(one_line, names))}")
