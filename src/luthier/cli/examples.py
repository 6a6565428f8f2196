"""``luthier examples``: use cases with sample rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.cli.terminal.console import new_table, print_table, print_text
from luthier.errors import RecipeError
from luthier.examples import contents, files_of, use_case, use_cases
from luthier.files import write_json


@dataclass(frozen=True)
class Examples:
    """Use cases, and the folder with the rows or the notebook of the requested use case."""

    uses: Sequence[Mapping[str, Any]]
    folder: Path | None = None
    notebook: Path | None = None


def examples(
    name: str | None = None,
    folder: Path | None = None,
    *,
    notebook: bool = False,
) -> Examples:
    """List use cases, or write the rows or the notebook of a use case.

    Args:
        name: Use case; all are listed by default.
        folder: New folder for the rows; "rows" by default.
        notebook: Write NAME.ipynb, whose cells call the functions.

    Raises:
        RecipeError: for an unknown use case, or an existing folder or notebook.
    """
    if notebook:
        if name is None or folder is not None:
            raise RecipeError("--notebook needs a use case and no folder: its cells write the rows")
        from luthier.cli.notebook import as_notebook

        file = Path(f"{use_case(name)['name']}.ipynb")
        if file.exists():
            raise RecipeError(f"{file} exists. Rename or remove the notebook")
        write_json(file, as_notebook(use_case(name)))
        return Examples([use_case(name)], notebook=file)
    if name is None:
        return Examples(use_cases())
    chosen = use_case(name)
    target = folder or Path("rows")
    if target.exists():
        raise RecipeError(f"{target} exists. Name a new folder: luthier examples {name} FOLDER")
    for path, source in files_of(chosen).items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents(source))
    return Examples([chosen], target)


def show_examples(found: Examples) -> None:
    """Print the use cases with their scores, or the files and the commands of one."""
    if found.notebook is not None:
        print_text(f"{found.notebook} written. Open the notebook: jupyter lab {found.notebook}")
        return
    if found.folder is not None:
        (use,) = found.uses
        print_text(f"{len(use['files']):,} files written to {found.folder}. {use['credit']}")
        folder = shlex.quote(f"{found.folder}/")
        for command in use["commands"][1:]:  # the first writes the rows
            print_text(f"  {command.replace('rows/', folder)}")
        return
    table = new_table("use case", "result", "task")
    for use in found.uses:
        table.add_row(use["name"], use["result"], use["title"])
    print_table(table)
    print_text("Write the rows of a use case: luthier examples NAME")
