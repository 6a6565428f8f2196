"""``luthier student``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Annotated

import typer


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
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Make a smaller model of a teacher's own weights, to be tuned or distilled into."""
    from luthier.cli.console import LiveReporter, errors, heavy_imports, print_json
    from luthier.models.student import StudentShape

    with errors(json_):
        shape = StudentShape(layers, _numbers(keep), heads, intermediate, hidden)
        shape.check()
        with heavy_imports():
            from luthier.engine.student import make_student
        with closing(LiveReporter(quiet=json_)) as reporter:
            made = make_student(teacher, name, shape, reporter)
        if json_:
            print_json(asdict(made))
            return
        from luthier.cli.console import new_console

        out = new_console(highlight=False)
        out.print(
            f"[bold green]{made.model_id}[/bold green] is stored and verified: "
            f"{made.weights / made.teacher_weights:.0%} of the weights of {made.parent}, "
            f"{made.saved_bytes / 1e6:,.0f} MB"
        )
        out.print("  it has learned nothing since it was cut; tune it before use:")
        out.print(f"  luthier tune DATA --base {made.model_id} --adaptation full", soft_wrap=True)


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from luthier.errors import RecipeError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            f"--keep {text}: give numbers of layers with commas between them, such as 0,2,4"
        ) from error
