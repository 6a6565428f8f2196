"""``luthier distil``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from luthier.cli.console import LiveReporter, heavy_imports, print_json
from luthier.cli.tuning import fields_of, print_result

if TYPE_CHECKING:
    from luthier.distillation import Distilled, DistilRecipe


def distil(
    prompts: str,
    teacher: Mapping[str, str | None],
    flags: Mapping[str, Any],
    settings: Sequence[str],
    resume: bool,
    as_json: bool,
) -> None:
    """Build the recipe, run it, print the result."""
    recipe = recipe_of(prompts, teacher, flags, settings)
    with heavy_imports():
        from luthier.distillation import distil as run

    with closing(LiveReporter(quiet=as_json)) as reporter:
        found = run(recipe, resume, reporter)
    if as_json:
        print_json({**asdict(found.result), "distillation": found.details})
    else:
        _print(found)


def recipe_of(
    prompts: str,
    teacher: Mapping[str, str | None],
    flags: Mapping[str, Any],
    settings: Sequence[str],
) -> DistilRecipe:
    """The recipe of prompts or of a TOML file; ``teacher`` holds what was said of the teacher."""
    from luthier.asking.spec import address_fields
    from luthier.distillation.recipe import DistilRecipe

    named = teacher.get("teacher")
    parts = address_fields(named) if named else {}
    parts |= {key: value for key, value in teacher.items() if value and key != "teacher"}
    given = {f"teacher.{key}": value for key, value in parts.items()}
    return DistilRecipe.parse(fields_of(prompts, {**given, **flags}, settings))


def _print(found: Distilled) -> None:
    from luthier.cli.console import new_console

    print_result(found.result)
    if insights := found.details.get("insights"):
        new_console(highlight=False).print(f"  insights    {insights['file']}", soft_wrap=True)
