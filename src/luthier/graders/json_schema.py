"""Grading replies that are to be JSON of a given form."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Grader
from luthier.graders.code_blocks import code_blocks
from luthier.graders.regex import check_pattern, matches

SCHEMA_CHARACTERS, SCHEMA_DEPTH = 65_536, 100
"""Of a schema as JSON, and levels of objects and lists in it."""
TIME_LIMIT_S = 5.0
"""Seconds for one reply; a long one takes milliseconds. References and alternatives within each other
can take exponential time."""
VALUES = ("enum", "const", "default", "examples")
_deadline: ContextVar[float] = ContextVar("deadline")
"""Of the reply that is checked, by the monotonic clock."""


class JsonSchema(Grader):
    """1 when the reply is JSON, bare or in one fenced block, that a JSON Schema accepts.

    Checked by the ``jsonschema`` library, by the draft that ``$schema`` names and else 2020-12.
    ``format`` is not checked, which is the standard's default. Other documents are not fetched: a
    ``$ref`` must stay inside the schema. The time is bounded: a schema that takes more than 5 s on a
    reply is an error. ``patternProperties`` is refused.
    """

    method: Literal["json_schema"] = "json_schema"
    against: dict[str, Any] | Path
    """The JSON Schema as a table, or the file that holds it."""

    needs_expected = False

    def check(self) -> None:
        """Refuse a schema that cannot be read, is none, or could take unbounded time."""
        from jsonschema import SchemaError
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        schema = self._schema
        if depth_of(schema) > SCHEMA_DEPTH:
            raise RecipeError(
                f"grader `json_schema`: the schema is nested deeper than {SCHEMA_DEPTH} levels"
            )
        if (size := len(json.dumps(schema, ensure_ascii=False))) > SCHEMA_CHARACTERS:
            raise RecipeError(
                f"grader `json_schema`: the schema has {size:,} characters, and may have "
                f"{SCHEMA_CHARACTERS:,}"
            )
        if "patternProperties" in _keys(schema):
            raise RecipeError(
                "grader `json_schema` does not take patternProperties: texts could make it run for "
                "ever. Name the keys under properties, or bound them with propertyNames and pattern"
            )
        if not isinstance(schema, (dict, bool)):
            raise RecipeError("grader `json_schema`: a schema is an object, true or false")
        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise RecipeError(
                "grader `json_schema`: $schema must be a text, the address of a draft"
            )
        try:
            for pattern in _patterns(schema):
                check_pattern(pattern)
            type(self._validator).check_schema(schema)
            _check_references(schema, Registry().resolver_with_root(_resource(schema)))
        except ValueError as error:
            raise RecipeError(f"grader `json_schema`: {error}") from error
        except RecursionError as error:
            raise RecipeError("grader `json_schema`: a pattern is nested too deeply") from error
        except Unresolvable as error:
            raise RecipeError(
                f"grader `json_schema`: $ref {error.ref!r} leads nowhere in the schema, and nothing "
                "is fetched: put what it means under $defs"
            ) from error
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path)) or "the top"
            raise RecipeError(
                f"grader `json_schema`: no valid JSON Schema at {where}: {error.message}"
            ) from error

    def score(self, answer: Answer) -> float:
        """1 or 0.

        Raises:
            TimeoutError: after :data:`TIME_LIMIT_S`.
        """
        blocks = code_blocks(answer.check_length(answer.reply, "the reply"))
        text = blocks[0].text if len(blocks) == 1 else answer.reply
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(self.first_error(value) is None)

    def first_error(self, value: Any) -> str | None:
        """What is wrong with a value ready for JSON; ``None`` where the schema accepts it.

        Raises:
            TimeoutError: after :data:`TIME_LIMIT_S`.
        """
        validator = self._validator  # imports the library, which is not the reply's time
        token = _deadline.set(time.monotonic() + TIME_LIMIT_S)
        try:
            error = next(validator.iter_errors(value), None)
            if error is None:
                return None
            where = "".join(f"[{part!r}]" for part in error.absolute_path)
            return f"{where}: {error.message}" if where else str(error.message)
        except RecursionError:
            raise ValueError("the schema's references go round in a circle") from None
        finally:
            _deadline.reset(token)

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
        keywords = {name: _with_deadline(check) for name, check in draft.VALIDATORS.items()}
        keywords |= {"pattern": _pattern, "uniqueItems": _unique}
        return extend(draft, keywords)(self._schema, registry=Registry())


def _resource(schema: Any) -> Any:
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    return Resource.from_contents(schema, default_specification=DRAFT202012)


def _check_references(schema: Any, resolver: Any) -> None:
    """Look each reference up, as the first reply would."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$id"), str):
            resolver = resolver.in_subresource(_resource(schema))
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                resolver.lookup(value)
            elif key not in VALUES:
                _check_references(value, resolver)
    elif isinstance(schema, list):
        for each in schema:
            _check_references(each, resolver)


Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]
"""A keyword of JSON Schema as ``jsonschema`` calls it: validator, its value, instance, schema."""


def _with_deadline(check: Keyword) -> Keyword:
    """A keyword that ends with the time of the reply."""

    def check_in_time(
        validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[Any] | None:
        if time.monotonic() > _deadline.get():
            raise TimeoutError(f"the schema took more than {TIME_LIMIT_S:g} s on this reply")
        return check(validator, value, instance, schema)

    return check_in_time


def _unique(validator: Any, unique: bool, instance: Any, schema: Any) -> Iterator[Any]:
    """The keyword ``uniqueItems``: the library compares lists of objects pair by pair."""
    from jsonschema import ValidationError

    several = unique and validator.is_type(instance, "array")
    if several and len(set(map(_hashable, instance))) < len(instance):
        yield ValidationError("the list has equal items")


def _hashable(value: Any) -> Any:
    """``value`` of JSON as something that is equal where JSON Schema says so: 1 and 1.0, not true."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    return value


def depth_of(value: Any) -> int:
    """How deep lists and objects of JSON are nested; does not call itself, so that any depth does."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [
            item for each in level for item in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


def _patterns(schema: Any) -> Iterator[str]:
    """All patterns of a schema, at any depth; values that it compares with are no schemas."""
    if isinstance(schema, Mapping):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        inner = [each for key, each in schema.items() if key not in VALUES]
    else:
        inner = schema if isinstance(schema, list) else []
    for each in inner:
        yield from _patterns(each)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """The keyword ``pattern``, under a time limit."""
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _keys(value: Any) -> set[str]:
    """All keys at any depth."""
    if isinstance(value, Mapping):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
