"""Graders from plain values: a name, a table of fields, a TOML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from luthier.errors import RecipeError
from luthier.files import read_toml
from luthier.formatting import did_you_mean
from luthier.graders.base import Grader
from luthier.validation import describe_constraint

Spec = str | Mapping[str, Any] | Grader
"""A method name, a table with ``method`` and fields, or a grader."""


def grader_from(value: Any) -> Any:
    """Return the grader of a :data:`Spec`, or raise :class:`ValueError`."""
    from luthier.graders import GRADERS

    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        return value
    method = value.get("method")
    if not isinstance(method, str) or method not in GRADERS:
        known = ", ".join(GRADERS)
        if method is None:
            raise ValueError(f"a grader needs its `method`; there are {known}")
        hint = did_you_mean(method, GRADERS, f"there are {known}")
        raise ValueError(f"unknown grader {method!r}; {hint}")
    return GRADERS[method].model_validate(value)


AnyGrader = Annotated[SerializeAsAny[Grader], BeforeValidator(grader_from)]
"""Type of a field with any grader, given as a name or a table of fields."""


def parse_graders(specs: Sequence[Spec] | Mapping[str, Spec]) -> dict[str, Grader]:
    """Return graders by the given names, or by method.

    Raises:
        RecipeError: for an unknown method or field, a bad value, and two different graders of one
        name.
    """
    if isinstance(specs, Mapping):
        return {name: _build(spec, name) for name, spec in specs.items()}
    chosen: dict[str, Grader] = {}
    for spec in specs:
        grader = _build(spec, "")
        if chosen.setdefault(grader.method, grader) != grader:
            raise RecipeError(
                f'two graders have the method {grader.method!r}; name each, as in {{"name": grader}}'
            )
    return chosen


def read_graders(path: Path) -> dict[str, Spec]:
    """Return the graders of a TOML file, one per table.

    Paths of JSON Schemas are relative to the file.
    """
    tables = read_toml(path, "graders")
    if not tables:
        raise RecipeError(f"{path} has no graders; write [NAME] and method = ... for each grader")
    for table in tables.values():
        _anchor(table, path.parent)
    return tables


def _anchor(table: Any, folder: Path) -> None:
    """Make the path of a schema absolute, also in the parts of ``mix`` and ``multi``."""
    if not isinstance(table, dict):
        return
    if isinstance(table.get("against"), str):
        table["against"] = str(folder / table["against"])
    for parts in (table.get("parts"), table.get("graders")):
        for part in parts.values() if isinstance(parts, dict) else ():
            _anchor(part, folder)


def _build(spec: Spec, name: str) -> Grader:
    try:
        grader = grader_from(spec)
    except ValidationError as error:
        raise RecipeError(_explain(error, name)) from error
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(grader, Grader):
        raise RecipeError(
            f"{spec!r} is not a grader; give a name, a table with `method`, or a Grader"
        )
    grader.check()
    return grader


def _explain(error: ValidationError, name: str) -> str:
    lines = [f"grader {name or error.title} cannot be used:"]
    for item in error.errors():
        where = ".".join(map(str, item["loc"])) or "fields"
        text = describe_constraint(item)
        if item["type"] == "extra_forbidden":
            text = "unknown field"
        lines.append(f"  {where}: {text}")
    return "\n".join(lines)
