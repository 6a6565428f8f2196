"""Grading replies that are to be JSON of a given form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Grader
from luthier.graders.fences import fenced
from luthier.graders.patterns import found


class JsonSchema(Grader):
    """1 when the reply is JSON, bare or in one fenced block, that a JSON Schema accepts.

    Checked by the ``jsonschema`` library, by the draft that ``$schema`` names and else 2020-12.
    ``format`` is not checked, which is the standard's default. Other documents are not fetched: a
    ``$ref`` must stay inside the schema. The time of ``pattern`` is bounded; ``patternProperties`` is
    refused, as its time is not.
    """

    method: Literal["json_schema"] = "json_schema"
    against: dict[str, Any] | Path
    """The JSON Schema as a table, or the file that holds it."""

    needs_expected = False

    def check(self) -> None:
        """Refuse a schema that cannot be read, is none, or could take unbounded time."""
        from jsonschema import SchemaError

        schema = self._schema
        if "patternProperties" in _keys(schema):
            raise RecipeError(
                "grader `json_schema` does not take patternProperties: texts could make it run for "
                "ever. Name the keys under properties, or bound them with propertyNames and pattern"
            )
        try:
            type(self._validator).check_schema(schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path)) or "the top"
            raise RecipeError(
                f"grader `json_schema`: no valid JSON Schema at {where}: {error.message}"
            ) from error

    def score(self, answer: Answer) -> float:
        """1 or 0."""
        blocks = fenced(answer.reply)
        text = blocks[0].text if len(blocks) == 1 else answer.reply
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(self._validator.is_valid(value))

    @cached_property
    def _schema(self) -> Any:
        if isinstance(self.against, dict):
            return self.against
        try:
            return json.loads(self.against.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"grader `json_schema` cannot read the schema {self.against}: {error}. "
                "Give a JSON file, or the schema itself as a table"
            ) from error

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import extend, validator_for
        from referencing import Registry

        draft = validator_for(self._schema, default=Draft202012Validator)
        return extend(draft, {"pattern": _pattern})(self._schema, registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """The keyword ``pattern``, under a time limit."""
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _keys(value: Any) -> set[str]:
    """All keys at any depth."""
    if isinstance(value, Mapping):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
