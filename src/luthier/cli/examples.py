"""``luthier examples``: use cases with sample rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.cli.terminal.console import new_table, print_table, print_text
from luthier.errors import RecipeError

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "examples" / "index.json"
"""Use cases with commands, scores and files; written by ``benchmarks/use_cases.py``."""


@dataclass(frozen=True)
class Examples:
    """Use cases, and the folder with the rows of the requested use case."""

    uses: Sequence[Mapping[str, Any]]
    folder: Path | None = None


def examples(name: str | None = None, folder: Path | None = None) -> Examples:
    """List use cases, or write the rows of a use case.

    Args:
        name: Use case; all are listed by default.
        folder: New folder for the rows; "rows" by default.

    Raises:
        RecipeError: for an unknown use case or an existing folder.
    """
    uses = json.loads(INDEX.read_text())
    if name is None:
        return Examples(uses)
    chosen = [use for use in uses if use["name"] == name]
    if not chosen:
        known = ", ".join(use["name"] for use in uses)
        raise RecipeError(f'unknown use case "{name}". Use cases: {known}')
    target = folder or Path("rows")
    if target.exists():
        raise RecipeError(f"{target} exists. Name a new folder: luthier examples {name} FOLDER")
    for source, path in chosen[0]["files"].items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, file)
    return Examples(chosen, target)


def show_examples(found: Examples) -> None:
    """Print the use cases with their scores, or the files and the commands of one."""
    if found.folder is not None:
        (use,) = found.uses
        print_text(f"{len(use['files']):,} files written to {found.folder}. {use['credit']}")
        for command in use["commands"]:
            print_text(f"  {command.replace('rows/', f'{found.folder}/')}")
        return
    table = new_table("use case", "result", "task")
    for use in found.uses:
        table.add_row(use["name"], use["result"], use["title"])
    print_table(table)
    print_text("Write the rows of a use case: luthier examples NAME")
