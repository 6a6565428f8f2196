"""Base class of checked field groups, and messages for pydantic errors, shared by recipes, files and
all APIs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict

_TYPES = {
    **dict.fromkeys(("string_type", "string_unicode"), "string"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "integer"),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "boolean"),
    **dict.fromkeys(("list_type", "tuple_type"), "array"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "object"),
    "none_required": "null",
}
"""Expected JSON type by pydantic's error type."""
_WORDS = {
    "string": "a text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "array": "an array", "object": "an object", "null": "null",
}  # fmt: skip
_RULES = {
    "missing": "is required",
    "extra_forbidden": "is not known here",
    "literal_error": "must be {expected}",
    "callable_type": "must be a function",
    "too_short": "must have {min_length} or more items, and has {actual_length}",
    "too_long": "must have at most {max_length} items, and has {actual_length}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
}


class StrictModel(BaseModel):
    """A frozen group of fields that rejects unknown names and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@cache
def field_docstrings(cls: type[BaseModel]) -> Mapping[str, str]:
    """Return the docstrings below the fields of ``cls`` and its base classes.

    pydantic's ``use_attribute_docstrings`` parses the source when a class is created, which takes a
    third of a second at the start of every command.
    """
    docstrings: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if each is BaseModel or not issubclass(each, BaseModel):
            continue
        [written] = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(written, ast.ClassDef)
        for field, below in pairwise(written.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docstrings[field.target.id] = inspect.cleandoc(text.value)
    return docstrings


def expected_type(error: Mapping[str, Any]) -> str | None:
    """Return the expected JSON type of a type error; ``None`` for other errors."""
    return _TYPES.get(error["type"])


def custom_message(error: Mapping[str, Any]) -> str:
    """Return the message of luthier's own validators, or pydantic's."""
    return str(error["msg"]).removeprefix("Value error, ")


def describe_constraint(error: Mapping[str, Any]) -> str:
    """Return the constraint on a value, to follow the name of the field."""
    if (expected := expected_type(error)) is not None:
        return f"must be {_WORDS[expected]}"
    if (rule := _RULES.get(error["type"])) is not None:
        # Bounds are floats in pydantic: 1 instead of 1.0.
        bounds = {
            k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()
        }
        return rule.format(**bounds)
    message = custom_message(error)
    return f"{message[:1].lower()}{message[1:]}"


def describe_located_error(error: Mapping[str, Any], whole: str, skip: int = 0) -> str:
    """Return the path of the invalid field, or ``whole`` without a path, and the constraint.

    ``skip`` first parts of the path are left out.
    """
    place = ".".join(map(str, error["loc"][skip:]))
    return f"{place or whole}{describe_error(error)}"


def describe_error(error: Mapping[str, Any]) -> str:
    """Return the constraint with a separator; a custom message follows a colon."""
    is_builtin = expected_type(error) is not None or error["type"] in _RULES
    return f" {describe_constraint(error)}" if is_builtin else f": {custom_message(error)}"
