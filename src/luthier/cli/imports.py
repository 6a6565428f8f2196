"""``luthier import``: what other tools keep, as files of luthier's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.bridge import CommandGroup
from luthier.cli.console import print_json, print_text
from luthier.cli.options import Json

if TYPE_CHECKING:
    from luthier.migrate.files import Import

import_app = CommandGroup("Import rows, graders and recipes of OpenAI or promptfoo.")

Folder = Annotated[Path, typer.Option("--output", help="A new folder for what is written.")]
Judge = Annotated[
    str | None,
    typer.Option(help="Model that rubrics are asked of: an id, or https://host/v1#model."),
]
SHOWN = 12
"""Lines of each part of the report that are printed."""


@import_app.command("promptfoo")
def import_promptfoo(
    config: Path, output: Folder = Path("imported"), judge: Judge = None, json_: Json = False
) -> None:
    """Write the prompts, tests and assertions of a promptfooconfig.yaml as rows and graders."""
    from luthier.migrate import import_promptfoo as run

    _show(run(config, output, judge=judge), json_)


@import_app.command("openai")
def import_openai(
    export: Path, output: Folder = Path("imported"), judge: Judge = None, json_: Json = False
) -> None:
    """Write files, jobs, evals and answers of an OpenAI account as rows, recipes and graders."""
    from luthier.migrate import import_openai as run

    _show(run(export, output, judge=judge), json_)


def _show(result: Import, json_: bool) -> None:
    from luthier.migrate.files import REPORT

    if json_:
        print_json(result.plain())
        return
    for file in result.files:
        print_text(f"{result.folder / file.path}: {file.content}")
    for title, texts in (
        ("earlier results", result.results),
        ("means something else here", result.remarks),
        ("not imported", [f"{each.where}: {each.reason}" for each in result.not_imported]),
        ("go on with", [file.command for file in result.files if file.command]),
    ):
        if texts:
            print_text(f"{title}:")
        for text in texts[:SHOWN]:
            print_text(f"  {text}")
        if len(texts) > SHOWN:
            print_text(f"  … and {len(texts) - SHOWN:,} more, in {result.folder / REPORT}")
