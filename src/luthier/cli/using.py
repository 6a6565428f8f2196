"""Commands that look at data or use a model: inspect, generate, samples, chat, predict, evaluate.

Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from luthier.cli.options import Columns, Json, LongRows, Objective

MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a reply at most; 256, or half of a smaller context.", min=1),
]


def inspect(
    data: Annotated[
        str, typer.Argument(help="File, folder, 'pattern*' or s3:// with rows or text.")
    ],
    validation: Annotated[str | None, typer.Option(help="Rows to measure on.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows kept for the last measurement.")] = None,
    columns: Columns = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model the rows are encoded for; smollm2-135m-instruct if not given."),
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Only the checks that need no model.")
    ] = False,
    objective: Objective = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows of each split whose tokens are shown.")
    ] = 3,
    html: Annotated[
        Path | None, typer.Option(help="Write the whole report as one HTML page.")
    ] = None,
    severity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=SEVERITY", help="off, note, warning or error for a rule; again for more."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file with severities and checks to skip.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Leave a check out; again for more.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say whether data can teach a model, and what is wrong row by row; exits with 0, 1 or 2.

    0: passed. 1: there are warnings. 2: refused, as `luthier tune` would refuse it.
    """
    from luthier.cli import inspecting
    from luthier.cli.console import errors

    with errors(json_):
        request = inspecting.request_of(
            data, validation, test, columns, base, no_base, objective, rows, severity or [], policy,
            skip or [],
        )  # fmt: skip
        inspecting.inspect(request, rows, html, json_)


def generate(
    model: Annotated[str, typer.Argument(help="Model id, local directory or hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="JSONL of prompts or messages to answer.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of prompt and completion.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    json_: Json = False,
) -> None:
    """Answer one prompt, streaming, or a file of prompts."""
    from luthier.cli import answering
    from luthier.cli.console import errors

    sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed
    }  # fmt: skip
    with errors(json_):
        answering.generate(model, prompt, input_, output, sampling, json_)


def samples(
    run: Annotated[str, typer.Argument(help="Custom model or its run: base:name, or a folder.")],
    count: Annotated[int, typer.Option(min=1, help="Texts to show.")] = 20,
    last: Annotated[int, typer.Option(min=1, help="Only of so many last steps.")] = 20,
    lowest: Annotated[bool, typer.Option("--lowest", help="The worst first.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Whole texts, not their beginnings.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show what a model wrote while it learned from rewards or a teacher: texts, lengths, trend."""
    from luthier.cli import samples
    from luthier.cli.console import errors

    with errors(json_):
        samples.show(run, count, last, lowest, full, json_)


def chat(
    model: Annotated[str, typer.Argument(help="Model id, local directory or hub id.")],
    max_tokens: MaxTokens = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
) -> None:
    """Talk to a model. An empty line starts anew, Ctrl-D ends."""
    from luthier.cli import answering
    from luthier.cli.console import errors

    with errors(False):
        answering.chat(model, {"max_tokens": max_tokens, "temperature": temperature})


def predict(
    model: Annotated[str, typer.Argument(help="Custom model that gives labels.")],
    text: Annotated[str | None, typer.Argument(help="What to label.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="JSONL of texts, or .txt with one a line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of texts and answers.")] = None,
    json_: Json = False,
) -> None:
    """Label, rate or tag one text, or a file of texts."""
    from luthier.cli import predicting
    from luthier.cli.console import errors

    with errors(json_):
        predicting.predict(model, text, input_, output, json_)


def evaluate(
    model: Annotated[str, typer.Argument(help="Model id, local directory or hub id.")],
    data: Annotated[
        str,
        typer.Argument(help="Prompts and replies, labelled texts, or raw text; file or folder."),
    ],
    grader: Annotated[
        list[str] | None,
        typer.Option(
            help="A grader's name, such as exact, or a TOML file of graders; again for more."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.FIELD=VALUE", help="A field of a grader, by its name."),
    ] = None,
    on_grader_error: Annotated[
        Literal["fail", "zero"],
        typer.Option(
            help="What a reply that cannot be graded does: fail, or score zero and be counted."
        ),
    ] = "fail",
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write every answer as JSONL.")] = None,
    columns: Columns = None,
    long_rows: LongRows = "error",
    json_: Json = False,
) -> None:
    """Grade a model's replies to held-out rows, or its labels; perplexity where they are raw text."""
    from luthier.cli import answering
    from luthier.cli.console import errors

    with errors(json_):
        answering.evaluate(
            model, data, columns or [], grader or ["exact"], set_ or [], on_grader_error,
            max_tokens, output, json_, long_rows or "error",
        )  # fmt: skip
