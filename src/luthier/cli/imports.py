"""``luthier import``: data of other tools as rows, graders and recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.cli.bridge import Command, CommandGroup
from luthier.cli.console import print_text
from luthier.migrate import import_openai

if TYPE_CHECKING:
    from luthier.migrate.files import Import

SHOWN = 12
"""Number of printed lines of each part of the report."""


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
