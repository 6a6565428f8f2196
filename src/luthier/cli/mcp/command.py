"""``luthier mcp``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.terminal.console import extra
from luthier.errors import RecipeError


def mcp(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[FOLDER]...")] = None,
) -> None:
    """Serve tools for agents on standard input and output (Model Context Protocol).

    A client such as an editor starts this command. Work that takes longer than a few seconds
    continues as a job, also after the client has gone.

    Args:
        folders: Folders for rows; the working directory by default.

    Raises:
        RecipeError: if a folder does not exist.
    """
    chosen = folders or [Path()]
    for folder in chosen:
        if not folder.is_dir():
            raise RecipeError(f"the folder {folder} does not exist")
    with extra("mcp"):
        from luthier.cli.mcp.server import build_server

    build_server(chosen).run("stdio")
