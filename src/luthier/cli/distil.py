"""``luthier distil`` and ``luthier models student``: smaller models from larger models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import heavy_imports, new_console
from luthier.cli.terminal.options import (
    TUNING,
    RecipeField,
    assign_fields,
    parse_whole_numbers,
    recipe_keywords,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.distil.responses import Distilled
    from luthier.workflows.student import Student


DISTILLATION: Mapping[str, RecipeField] = {
    "teacher": RecipeField("teacher", "Model id, or https://host/v1#model of an endpoint."),
    "student": RecipeField("base", "Student model."),
    "method": RecipeField("method", "responses, logits, on_policy, encoder or embedding."),
    "max_tokens": RecipeField("sampling.max_tokens", "Token limit of a reply.", int),
    "temperature": RecipeField("sampling.temperature", "Sampling temperature.", float),
    "grader": RecipeField("insights.grader", "Keep only replies that pass this grader."),
    **{
        name: TUNING[name]
        for name in (
            "validation", "columns", "name", "adaptation", "epochs", "batch_size", "learning_rate"
        )
    },
}  # fmt: skip
"""Recipe fields of a distillation by short name."""


def distil(
    prompts: str | Path | None = None,
    *,
    documents: Sequence[str | Path] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
    **fields: Annotated[Any, recipe_keywords(DISTILLATION)],
) -> Distilled:
    """Distil a teacher into a student.

    From documents, the teacher writes questions with answers, and the student learns to answer them
    from passages, with citations.

    Args:
        prompts: Prompts, conversations or rows, or a recipe (.toml).
        documents: Document or folder for questions by the teacher.
        resume: Resume an interrupted distillation.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, such as ``teacher="..."``, ``student="..."`` or
            ``sampling__max_tokens=256``, with ``__`` for the dot.

    Returns:
        The ``result`` of the student's run, and ``details`` of the distillation.

    Raises:
        RefusedInput: for invalid prompts or settings, or too few accepted replies.
        LuthierError: if the teacher is not reachable. The replies so far are kept.
    """
    from luthier.chat_models.base import address_fields
    from luthier.recipe import fields_of
    from luthier.workflows.distil.recipe import DistilRecipe

    if (prompts is None) == (not documents):
        raise RecipeError("Give either prompts or --documents.", setting="documents")
    if prompts is None:
        from luthier.data.in_memory import store_rows
        from luthier.documents.readers import load_texts
        from luthier.workflows.distil.questions import prompts_of

        prompts = store_rows(prompts_of(load_texts(documents)))
        defaults = {"data.long_rows": "drop", "insights.minimum": 2}
        fields = {**defaults, "insights.questions": True, **fields}
    plain = fields_of(prompts)
    if isinstance(plain.get("teacher"), str):
        plain["teacher"] = address_fields(plain["teacher"])
    if isinstance(teacher := fields.pop("teacher", None), str):
        address = {f"teacher.{part}": value for part, value in address_fields(teacher).items()}
        fields = {**address, **fields}
    recipe = DistilRecipe.parse(assign_fields(plain, fields, DISTILLATION))
    with heavy_imports():
        from luthier.workflows.distil import distil as run

    return run(recipe, resume, reporter)


def show_distillation(found: Distilled) -> None:
    """Print the student's run, and the file with the replies."""
    from luthier.cli.tune import print_result

    print_result(found.result)
    if insights := found.details.get("insights"):
        new_console(highlight=False).print(f"  insights    {insights['file']}", soft_wrap=True)


def student(
    teacher: Annotated[str, typer.Option("--from")],
    *,
    name: str,
    layers: int | None = None,
    keep: Annotated[Sequence[int] | None, FromText(str, parse_whole_numbers)] = None,
    heads: int | None = None,
    intermediate: int | None = None,
    hidden: int | None = None,
    reporter: Reporter | None = None,
) -> Student:
    """Create a smaller model from a teacher's weights.

    The student must be tuned before use.

    Args:
        teacher: Model whose weights are copied.
        name: Name of the student model.
        layers: Number of layers, spread evenly over the teacher.
        keep: Layers by number from 0, e.g. 0,2,4,7,9,11.
        heads: Attention heads of each layer.
        intermediate: Neurons of each MLP.
        hidden: Width of the residual stream.
        reporter: Receives progress; silent if not given.

    Returns:
        Model id, folder and number of weights.

    Raises:
        RefusedInput: for invalid sizes, an unknown family, a used name or too little disk space.
    """
    from luthier.models.shrinking.student import StudentShape

    shape = StudentShape(layers, None if keep is None else tuple(keep), heads, intermediate, hidden)
    shape.check()
    with heavy_imports():
        from luthier.workflows.student import make_student

    return make_student(teacher, name, shape, reporter)


def show_student(made: Student) -> None:
    """Print the size of the student and the next command."""
    out = new_console(highlight=False, soft_wrap=True)
    out.print(
        f"[bold green]{made.model_id}[/bold green] is stored and verified: "
        f"{made.weights / made.teacher_weights:.0%} of the weights of {made.parent}, "
        f"{made.saved_bytes / 1e6:,.0f} MB"
    )
    out.print("  tune the student before use:")
    out.print(f"  luthier tune DATA --base {made.model_id} --adaptation full")
