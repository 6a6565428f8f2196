"""The command line. Exit codes: 0 done, 1 failed, 2 input refused, 130 stopped by the user.

``inspect`` ends with what it found: 0 passed, 1 warnings, 2 refused, as ``tune`` would refuse it.
Nothing heavy is imported here, so that ``--help`` answers at once; each command imports what it
needs when it runs.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.administration import admin_app
from luthier.cli.advising import advise
from luthier.cli.auditing import audit_app
from luthier.cli.cleaning import clean
from luthier.cli.converting import convert
from luthier.cli.estimating import estimate
from luthier.cli.models import models_app
from luthier.cli.options import (
    Adaptation,
    Base,
    Columns,
    Data,
    Json,
    LongRows,
    Mix,
    Objective,
    Prices,
    Validation,
)
from luthier.cli.plugins import plugins
from luthier.cli.serving import serve
from luthier.cli.shrinking import student
from luthier.cli.splitting import split
from luthier.cli.using import chat, evaluate, generate, inspect, predict, samples
from luthier.cli.working import import_worker, worker

app = typer.Typer(
    name="luthier",
    help="Turn a base model and your own data into a custom model you own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(admin_app, name="admin")
app.add_typer(audit_app, name="audit")


def _named(
    validation: str | None,
    columns: list[str] | None,
    base: str | None,
    name: str | None,
    objective: str | None,
    adaptation: str | None,
    mix: list[str] | None,
    long_rows: str | None,
) -> dict[str, Any]:
    """Fields of the recipe by the options that name them."""
    return {
        "data.validation": validation,
        "data.columns": columns,
        "data.mix": mix,
        "data.long_rows": long_rows,
        "base": base,
        "name": name,
        "objective.method": objective,
        "adaptation.method": adaptation,
    }


def _version(value: bool) -> None:
    if value:
        from luthier import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a base model and your own data into a custom model you own."""


@app.command()
def tune(
    data: Data,
    validation: Validation = None,
    columns: Columns = None,
    mix: Mix = None,
    long_rows: LongRows = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Name of the custom model.")] = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the row order and new weights.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe: KEY=VALUE, e.g. adaptation.rank=8."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    estimate_: Annotated[
        bool, typer.Option("--estimate", help="First say what it will take, from a few steps.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Refuse a run that is estimated to take longer.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Refuse a run that is estimated to cost more.")
    ] = None,
    prices: Prices = None,
    json_: Json = False,
) -> None:
    """Tune a model on your data and store the custom model."""
    from luthier.cli import tuning
    from luthier.cli.console import errors

    flags = _named(validation, columns, base, name, objective, adaptation, mix, long_rows) | {
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.seed": seed,
    }
    limits = tuning.Limits(estimate_, max_minutes, max_cost, prices)
    with errors(json_):
        tuning.tune(data, flags, set_ or [], resume, json_, limits)


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="TOML file with the stages.")],
    check: Annotated[bool, typer.Option("--check", help="Check all stages, train none.")] = False,
    json_: Json = False,
) -> None:
    """Run several tunings as one, each from a model of an earlier one; done stages are not repeated."""
    from luthier.cli import pipelining
    from luthier.cli.console import errors

    with errors(json_):
        pipelining.pipeline(file, check, json_)


@app.command()
def pretrain(
    data: Annotated[
        list[Path],
        typer.Argument(help="Files of raw text (.txt, .md, JSONL), or a recipe (.toml)."),
    ],
    name: Annotated[str | None, typer.Option(help="Id of the new base model.")] = None,
    size: Annotated[str | None, typer.Option(help="tiny, 3m, 10m, 30m or 135m weights.")] = None,
    family: Annotated[str | None, typer.Option(help="llama, gpt2, palm or transfo_xl.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json to build from, instead of size and family.")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens of the tokenizer.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest input in tokens.")] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Raw text to measure on; may be repeated.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the weights and of the order.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe: KEY=VALUE, e.g. training.beta2=0.99."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train a new base model from random weights on raw text, with a tokenizer of its own."""
    from luthier.cli import pretraining
    from luthier.cli.console import errors

    flags = {
        "name": name,
        "network.size": size,
        "network.family": family,
        "network.config": config and str(config),
        "network.context": context,
        "tokenizer.vocabulary": vocabulary,
        "data.validation": [str(path) for path in validation] if validation else None,
        "training.epochs": epochs,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.seed": seed,
    }
    with errors(json_):
        pretraining.pretrain(data, flags, set_ or [], resume, json_)


app.command()(student)
app.command()(split)
app.command()(estimate)
app.command()(advise)
app.command()(plugins)


@app.command()
def search(
    data: Data,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 12,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="Field to search: KEY=LOW..HIGH or KEY=a,b,c; the rate if none is given."
        ),
    ] = None,
    validation: Validation = None,
    columns: Columns = None,
    mix: Mix = None,
    long_rows: LongRows = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option(help="Name of search and custom model.")] = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe: KEY=VALUE, e.g. training.epochs=2."),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="Trials at once, each with a share of the cores.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted search.")
    ] = False,
    range_test: Annotated[
        bool, typer.Option("--range-test", help="Only try 100 growing rates in one short run.")
    ] = False,
    json_: Json = False,
) -> None:
    """Try settings, stop hopeless trials early, and store the best as a custom model."""
    from luthier.cli import searching
    from luthier.cli.console import errors

    flags = _named(validation, columns, base, name, objective, adaptation, mix, long_rows)
    with errors(json_):
        if range_test:
            searching.range_test(data, flags, set_ or [], json_)
        else:
            searching.search(data, flags, set_ or [], trials, space or [], parallel, resume, json_)


@app.command()
def distil(
    data: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="Prompts or rows, or a recipe (.toml).")
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Model id, or https://host/v1#model of an endpoint.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Model that learns.")] = None,
    method: Annotated[
        str | None, typer.Option(help="responses, logits, on_policy, encoder or embedding.")
    ] = None,
    teacher_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint.")] = None,
    teacher_model: Annotated[str | None, typer.Option(help="Its name for the teacher.")] = None,
    teacher_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with its key; OPENAI_API_KEY if not given."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    grader: Annotated[str | None, typer.Option(help="Accept answers by this grader only.")] = None,
    validation: Validation = None,
    columns: Columns = None,
    name: Annotated[str | None, typer.Option(help="Name of the custom model.")] = None,
    adaptation: Adaptation = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field: KEY=VALUE, e.g. teacher.concurrency=8."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted one.")
    ] = False,
    json_: Json = False,
) -> None:
    """Teach a student what a teacher answers, or what it thinks of every token."""
    from luthier.cli import distilling
    from luthier.cli.console import errors

    named = {
        "teacher": teacher, "url": teacher_url, "model": teacher_model, "key_env": teacher_key_env
    }  # fmt: skip
    flags = _named(validation, columns, student, name, None, adaptation, None, None) | {
        "method": method,
        "sampling.max_tokens": max_tokens,
        "sampling.temperature": temperature,
        "insights.grader": grader,
    }
    with errors(json_):
        distilling.distil(data, named, flags, set_ or [], resume, json_)


app.command(hidden=True)(worker)
app.command("import-worker", hidden=True)(import_worker)
for command in (inspect, clean, convert, generate, samples, chat, predict, evaluate, serve):
    app.command()(command)


@app.command()
def demo(json_: Json = False) -> None:
    """Tune the default model on the sample data and compare before and after."""
    from luthier.cli import demonstration
    from luthier.cli.console import errors

    with errors(json_):
        demonstration.run(json_)


def main() -> None:
    """Entry point of the ``luthier`` command."""
    # OpenMP threads spin for milliseconds while they wait. Beside another busy process that made a
    # step take 55 s for 1; a tenth of a millisecond costs nothing. Read once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Where it is installed, PEFT imports it, and it logs advice about a kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()
