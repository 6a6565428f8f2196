"""Entry point of the command line.

Exit codes: 0 success, 1 failure, 2 rejected input, 130 interrupted by the user. ``inspect`` returns
0 for passed data, 1 for warnings, and 2 for data that ``tune`` rejects. This module imports no
heavy library, so that ``--help`` is fast; each command imports its libraries when the command runs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from luthier.cli.advise import advise, show_advice
from luthier.cli.compare import compare, show_comparison
from luthier.cli.data import (
    clean,
    convert,
    inspect,
    show_cleaning,
    show_conversion,
    show_report,
    show_split,
    split,
)
from luthier.cli.demo import demo, show_demo
from luthier.cli.distil import distil, show_distillation
from luthier.cli.documents import ask, index_app, show_answer
from luthier.cli.estimate import estimate, show_estimate
from luthier.cli.evaluate import evaluate, judge, show_agreement, show_evaluation
from luthier.cli.examples import examples, show_examples
from luthier.cli.forgetting import forgetting, show_forgetting
from luthier.cli.imports import import_app
from luthier.cli.inference.embed import embed, show_embeddings
from luthier.cli.inference.generate import chat, generate, show_replies
from luthier.cli.inference.images import sample, show_images
from luthier.cli.inference.nearest import nearest, show_neighbours
from luthier.cli.inference.predict import predict, show_predictions
from luthier.cli.launch import launch, print_launch_file
from luthier.cli.mcp.command import mcp
from luthier.cli.models.app import models_app
from luthier.cli.pipeline import pipeline, show_stages
from luthier.cli.plugins import plugins, show_plugins
from luthier.cli.pretrain import pretrain, show_pretraining
from luthier.cli.safety import safety, show_safety
from luthier.cli.service.admin import admin_app
from luthier.cli.service.live import live_app
from luthier.cli.service.serve import serve
from luthier.cli.service.worker import worker
from luthier.cli.study import show_study, study
from luthier.cli.terminal import console
from luthier.cli.terminal.bridge import MORE, Command, CommandGroup
from luthier.cli.tune import print_result, tune
from luthier.formatting import escape_unencodable
from luthier.plugins import PluginTable
from luthier.processes import use_safe_path

app = CommandGroup(
    "Turn a base model and your own data into a custom model you own.",
    name="luthier",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMAND_GROUPS = {
    import_app: "import", admin_app: "admin", models_app: "models", index_app: "index",
    live_app: "live",
}  # fmt: skip
PANELS: dict[str, Sequence[Command | CommandGroup]] = {
    "Data": (
        Command(inspect, show_report),
        Command(clean, show_cleaning),
        Command(convert, show_conversion),
        index_app,
    ),
    "Train": (
        Command(tune, print_result, shares_work=True),
        Command(pretrain, show_pretraining, shares_work=True),
        Command(distil, show_distillation),
    ),
    "Decide": (
        Command(estimate, show_estimate),
        Command(advise, show_advice),
    ),
    "Use": (
        Command(generate, show_replies),
        Command(chat, has_json=False),
        Command(predict, show_predictions),
        Command(embed, show_embeddings),
        Command(ask, show_answer),
    ),
    "Evaluate": (
        Command(evaluate, show_evaluation),
        Command(compare, show_comparison),
        Command(study, show_study),
        Command(forgetting, show_forgetting),
    ),
    "Serve": (Command(serve, has_json=False), Command(mcp, has_json=False), live_app, admin_app),
    "Manage": (
        models_app,
        Command(examples, show_examples),
    ),
    MORE: (
        Command(split, show_split),
        Command(pipeline, show_stages),
        Command(demo, show_demo),
        import_app,
        Command(nearest, show_neighbours),
        Command(sample, show_images),
        Command(judge, show_agreement),
        Command(safety, show_safety),
        Command(launch, print_launch_file, has_json=False),
        Command(plugins, show_plugins),
    ),
}  # fmt: skip
"""Commands by the heading in ``luthier --help``, at most 24 with a line of their own."""
COMMANDS: PluginTable[Command] = PluginTable(
    "commands", Command, {
        each.command: each for row in PANELS.values() for each in row if isinstance(each, Command)
    }
)  # fmt: skip
for panel, commands in PANELS.items():
    for command in commands:
        if isinstance(command, Command):
            app.add(command, panel)
        else:
            app.add_typer(command, name=COMMAND_GROUPS[command], rich_help_panel=panel)
# Not a Command: the log of the work needs the traceback of an unexpected error.
typer.Typer.command(app, "worker", hidden=True)(worker)


def _print_version(value: bool) -> None:
    if value:
        from luthier import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Turn a base model and your own data into a custom model you own."""


def main() -> None:
    """Entry point of the ``luthier`` command."""
    use_safe_path()
    escape_unencodable(sys.stdout, sys.stderr)
    # PEFT imports bitsandbytes if installed, which logs advice about an unused kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers advises a mask against padding, which token trees do not have.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    console.owns_process = True
    if {*COMMANDS.built_in, *COMMAND_GROUPS.values(), "worker"}.isdisjoint(sys.argv[1:2]):
        add_plugin_commands()
    app()


def add_plugin_commands() -> None:
    """Add the commands of other packages. Built-in commands start without these packages."""
    for name, command in COMMANDS.items():
        if name not in COMMANDS.built_in:
            app.add(command, "Plugins")
