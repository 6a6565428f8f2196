"""Grading of replies that must be valid JSON for a schema."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Grader
from luthier.graders.code import code_blocks
from luthier.graders.regex import check_pattern, matches

SCHEMA_CHARACTERS, SCHEMA_DEPTH = 65_536, 100
TIME_LIMIT_S = 5.0
"""Time limit per reply, in seconds. Nested references and alternatives can take exponential time."""
VALUES = ("enum", "const", "default", "examples")
"""Keywords with plain values, whose objects are not schemas."""
_deadline: ContextVar[float] = ContextVar("deadline")


class JsonSchema(Grader):
    """1 if the reply is JSON, bare or in one fenced block, that a JSON Schema accepts.

    The ``jsonschema`` library checks by the draft that ``$schema`` names, or else by 2020-12.
    ``format`` is not checked, which is the standard's default. A ``$ref`` must stay inside the
    schema. ``patternProperties`` is rejected, and a schema that takes more than 5 s on a reply is
    an error.
    """

    method: Literal["json_schema"] = "json_schema"
    against: dict[str, Any] | Path
    """The JSON Schema as a table, or its file."""

    needs_expected = False

    def check(self) -> None:
        """Reject a schema that is invalid or may take unbounded time.

        Raises:
            RecipeError: the schema is unsuitable.
        """
        from jsonschema import SchemaError
        from referencing.exceptions import Unresolvable

        schema = self._schema
        if depth_of(schema) > SCHEMA_DEPTH:
            raise _bad_schema(f"more than {SCHEMA_DEPTH} levels of nesting")
        if (size := len(json.dumps(schema, ensure_ascii=False))) > SCHEMA_CHARACTERS:
            raise _bad_schema(f"{size:,} characters; at most {SCHEMA_CHARACTERS:,} are allowed")
        if not isinstance(schema, (dict, bool)):
            raise _bad_schema("a schema is an object, true or false")
        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise _bad_schema("$schema must be the address of a draft")
        try:
            for each in subschemas(schema):
                if "patternProperties" in each:
                    # Python's `re`, which the library uses for names, has no time limit.
                    raise _bad_schema("patternProperties is not supported; list the properties")
                if isinstance(each.get("pattern"), str):
                    check_pattern(each["pattern"])
            type(self._validator).check_schema(schema)
            _check_references(schema, self._validator._resolver)
        except (ValueError, RecursionError) as error:
            raise _bad_schema(str(error) or "a pattern is nested too deeply") from error
        except Unresolvable as error:
            raise _bad_schema(
                f"$ref {error.ref!r} has no target in the schema; define it under $defs"
            ) from error
        except SchemaError as error:
            place = "/".join(map(str, error.absolute_path)) or "the top"
            raise _bad_schema(f"invalid at {place}: {error.message}") from error

    def score(self, answer: Answer) -> float:
        """Return 1 or 0; raise :class:`TimeoutError` after :data:`TIME_LIMIT_S`."""
        blocks = code_blocks(answer.check_length(answer.reply, "the reply"))
        text = blocks[0][1] if len(blocks) == 1 else answer.reply
        try:
            value = json.loads(text, parse_constant=_reject_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(self.first_error(value) is None)

    def first_error(self, value: Any) -> str | None:
        """Return why the schema rejects a JSON value, or None.

        Raises:
            TimeoutError: after :data:`TIME_LIMIT_S`.
        """
        validator = self._validator  # importing the library does not count
        token = _deadline.set(time.monotonic() + TIME_LIMIT_S)
        try:
            error = next(validator.iter_errors(value), None)
        except RecursionError:
            raise ValueError("the schema's references form a circle") from None
        finally:
            _deadline.reset(token)
        if error is None:
            return None
        place = "".join(f"[{part!r}]" for part in error.absolute_path)
        return f"{place}: {error.message}" if place else str(error.message)

    @cached_property
    def _schema(self) -> Any:
        if isinstance(self.against, dict):
            return self.against
        try:
            return json.loads(self.against.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _bad_schema(f"{self.against} cannot be read: {error}") from error

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import extend, validator_for
        from referencing import Registry

        draft = validator_for(self._schema, default=Draft202012Validator)
        keywords = {name: _with_deadline(check) for name, check in draft.VALIDATORS.items()}
        keywords |= {"pattern": _pattern, "uniqueItems": _unique}
        # An empty registry fetches nothing.
        return extend(draft, keywords)(self._schema, registry=Registry())


def _bad_schema(reason: str) -> RecipeError:
    return RecipeError(f"grader `json_schema`: bad schema: {reason}", setting="against")


def subschemas(value: Any) -> Iterator[dict[str, Any]]:
    """Yield each schema object, except the values that the schema compares with."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += [inner for key, inner in each.items() if key not in VALUES]
        elif isinstance(each, list):
            waiting += each


def depth_of(value: Any) -> int:
    """Return how deep lists and objects of JSON are nested, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [
            item for each in level for item in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


def _check_references(schema: Any, resolver: Any) -> None:
    """Resolve each reference, which raises ``Unresolvable`` for a missing target."""
    from referencing.jsonschema import DRAFT202012

    if isinstance(schema, dict):
        if isinstance(schema.get("$id"), str):
            resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                resolver.lookup(value)
            elif key not in VALUES:
                _check_references(value, resolver)
    elif isinstance(schema, list):
        for each in schema:
            _check_references(each, resolver)


Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]
"""Keyword function of ``jsonschema``: validator, value of the keyword, instance, schema."""


def _with_deadline(check: Keyword) -> Keyword:
    def check_in_time(*given: Any) -> Iterator[Any] | None:
        if time.monotonic() > _deadline.get():
            raise TimeoutError(f"the schema took more than {TIME_LIMIT_S:g} s on this reply")
        return check(*given)

    return check_in_time


def _unique(validator: Any, unique: bool, instance: Any, schema: Any) -> Iterator[Any]:
    """Check ``uniqueItems``; the library compares objects pair by pair, in quadratic time."""
    from jsonschema import ValidationError

    is_list = unique and validator.is_type(instance, "array")
    if is_list and len(set(map(_hashable, instance))) < len(instance):
        yield ValidationError("the list has equal items")


def _hashable(value: Any) -> Any:
    """Return a hashable value with JSON Schema's equality: 1 equals 1.0 and differs from true."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    return value


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """Check ``pattern`` with a time limit."""
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
