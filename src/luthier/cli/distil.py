"""``luthier distil`` and ``luthier student``: what a large model knows in a smaller one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from luthier.cli.console import heavy_imports, new_console, print_json
from luthier.cli.options import (
    Adaptation,
    BatchSize,
    Columns,
    Epochs,
    Json,
    LearningRate,
    Name,
    Resume,
    Validation,
    recipe_fields,
    recipe_options,
)
from luthier.errors import RecipeError


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
    name: Name = None,
    adaptation: Adaptation = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field: KEY=VALUE, e.g. teacher.concurrency=8."),
    ] = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Distil a teacher into a student."""
    options = recipe_options(locals())
    from luthier.chat_models.base import address_fields
    from luthier.workflows.distil.recipe import DistilRecipe

    address = address_fields(teacher) if teacher else {}
    parts = {"url": teacher_url, "model": teacher_model, "key_env": teacher_key_env}
    address |= {part: value for part, value in parts.items() if value}
    options = {f"teacher.{part}": value for part, value in address.items()} | options
    recipe = DistilRecipe.parse(recipe_fields(data, options, set_))
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.cli.tune import print_result
        from luthier.workflows.distil import distil as run

    with LiveReporter() as reporter:
        found = run(recipe, resume, reporter)
    if json_:
        print_json({**asdict(found.result), "distillation": found.details})
        return
    print_result(found.result)
    if insights := found.details.get("insights"):
        new_console(highlight=False).print(f"  insights    {insights['file']}", soft_wrap=True)


def student(
    teacher: Annotated[str, typer.Option("--from", help="Model it is made of.")],
    name: Annotated[str, typer.Option(help="Name of the student.")],
    layers: Annotated[
        int | None, typer.Option(help="Layers, spread evenly over the teacher's.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Or the layers themselves, from 0: 0,2,4,7,9,11.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads of each layer.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Neurons of each MLP.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Channels of the residual stream.")] = None,
    json_: Json = False,
) -> None:
    """Make a smaller model from a teacher's weights."""
    from luthier.models.student import StudentShape

    try:
        numbers = None if keep is None else tuple(int(part) for part in keep.split(","))
    except ValueError as error:
        raise RecipeError(
            f"--keep {keep}: give numbers of layers with commas between them, such as 0,2,4"
        ) from error
    shape = StudentShape(layers, numbers, heads, intermediate, hidden)
    shape.check()
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.workflows.student import make_student

    with LiveReporter() as reporter:
        made = make_student(teacher, name, shape, reporter)
    if json_:
        print_json(asdict(made))
        return
    out = new_console(highlight=False, soft_wrap=True)
    out.print(
        f"[bold green]{made.model_id}[/bold green] is stored and verified: "
        f"{made.weights / made.teacher_weights:.0%} of the weights of {made.parent}, "
        f"{made.saved_bytes / 1e6:,.0f} MB"
    )
    out.print("  it has learned nothing since it was cut; tune it before use:")
    out.print(f"  luthier tune DATA --base {made.model_id} --adaptation full")
