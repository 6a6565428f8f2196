"""``luthier split``: training, validation and test files made of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.options import Json


def split(
    source: Annotated[Path, typer.Argument(help="JSON Lines file to split.")],
    output: Annotated[Path, typer.Option(help="Folder for the new files; must not exist.")],
    validation: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the rows.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the rows.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Which rows are chosen.")] = 0,
    json_: Json = False,
) -> None:
    """Split a file: each label in proportion, near-duplicates on one side, lines unchanged."""
    from luthier.cli.console import errors, print_json
    from luthier.gate.splits import split_file

    with errors(json_):
        record = split_file(source, output, {"validation": validation, "test": test}, seed)
        if json_:
            print_json(record)
        else:
            _print(record, output)


def _print(record: dict[str, Any], output: Path) -> None:
    from luthier.cli.console import new_console

    out = new_console(highlight=False)
    for name, part in record["splits"].items():
        out.print(f"  {part['rows']:>9,} rows  {output / part['file']}  ({name})", soft_wrap=True)
    kept = record["kept_together"]
    out.print(
        f"{kept['rows']:,} rows in {kept['groups']:,} groups ask the same or nearly the same, and each "
        f"group is on one side. Counts by label: {output / 'split.json'}",
        soft_wrap=True,
    )
