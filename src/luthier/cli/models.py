"""``luthier models``: the commands; what they do is in ``inventory``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.options import Json

models_app = typer.Typer(help="Base models and custom models.", no_args_is_help=True)


@models_app.command("list")
def models_list(json_: Json = False) -> None:
    """List base models and custom models."""
    from luthier.cli import inventory
    from luthier.cli.console import errors

    with errors(json_):
        inventory.list_models(json_)


@models_app.command("show")
def models_show(model: str, json_: Json = False) -> None:
    """Show what a model is, where its files are, and that they are intact."""
    from luthier.cli import inventory
    from luthier.cli.console import errors

    with errors(json_):
        inventory.show(model, json_)


@models_app.command("capabilities")
def models_capabilities(
    model: Annotated[
        str | None, typer.Argument(help="Model; all base models of the list when not given.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say what a model can be trained for, in which ways, and what fits into memory here."""
    from luthier.cli import capabilities
    from luthier.cli.console import errors

    with errors(json_):
        capabilities.show(model, json_)


@models_app.command("pull")
def models_pull(model: str, json_: Json = False) -> None:
    """Fetch a base model."""
    from luthier.cli import inventory
    from luthier.cli.console import errors

    with errors(json_):
        inventory.pull_model(model, json_)


@models_app.command("export")
def models_export(
    model: str,
    folder: Path,
    merged: Annotated[bool, typer.Option("--merged", help="Fold the adapter in.")] = False,
    json_: Json = False,
) -> None:
    """Write a model as a Hugging Face directory, or an adapter as PEFT's."""
    from luthier.cli import inventory
    from luthier.cli.console import errors

    with errors(json_):
        inventory.export_model(model, folder, merged, json_)


@models_app.command("remove")
def models_remove(model: str, json_: Json = False) -> None:
    """Delete a custom model, or a base model made here, and its run."""
    from luthier.cli import inventory
    from luthier.cli.console import errors

    with errors(json_):
        inventory.remove(model, json_)
