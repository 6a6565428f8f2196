"""``luthier import``: data of other tools as rows, graders and recipes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import print_text
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.migrate.files import Import

SHOWN = 12
"""Number of printed lines of each part of the report."""


def import_openai(
    export: str | Path, folder: str | Path = "imported", *, judge: str | None = None
) -> Import:
    """Write rows, recipes and graders of an OpenAI account.

    The export has the objects of the API as ``.json`` or ``.jsonl``, and the contents of files by
    id or name.

    Args:
        export: Folder with the exported objects.
        folder: New folder for the result.
        judge: Judge for graders: model id, or https://host/v1#model.

    Returns:
        The files with commands for each, and the parts without an equivalent.

    Raises:
        RecipeError: for a folder without OpenAI objects, and for a target folder with files.
    """
    from luthier.migrate.openai import convert

    with _new_import(Path(export), Path(folder)) as result:
        convert(Path(export), result, judge)
    return result


@contextmanager
def _new_import(source: Path, folder: Path) -> Iterator[Import]:
    from luthier.files import check_creatable, new_folder
    from luthier.migrate.files import Import

    check_creatable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is not empty. Choose a new folder")
    with new_folder(folder) as target:
        result = Import(source, folder, target)
        yield result
        result.write_report()


def show_import(result: Import) -> None:
    """Print the files, and differences and omissions of the import."""
    from luthier.migrate.files import REPORT

    for file in result.files:
        print_text(f"{result.folder / file.path}: {file.content}")
    for title, texts in (
        ("earlier results", result.results),
        ("differs in luthier", result.remarks),
        ("not imported", [f"{each.where}: {each.reason}" for each in result.not_imported]),
        ("next", [file.command for file in result.files if file.command]),
    ):
        if texts:
            print_text(f"{title}:")
        for text in texts[:SHOWN]:
            print_text(f"  {text}")
        if len(texts) > SHOWN:
            print_text(f"  … and {len(texts) - SHOWN:,} more, in {result.folder / REPORT}")


import_app = CommandGroup("Import rows, graders and recipes of an OpenAI account.")
import_app.add(Command(import_openai, show_import, "openai"))
