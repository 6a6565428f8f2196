"""What is wrong with a member of a body in OpenAI's form of words: what was expected, and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.validation import custom_message, expected_type, plain_number, type_of

_ARTICLES = {"integer": "an", "array": "an", "object": "an"}
_LONGEST_QUOTED = 100
_BOUNDS = {
    "greater_than_equal": ("below minimum", "ge", ">=", "below_min_value"),
    "greater_than": ("below minimum", "gt", ">", "below_min_value"),
    "less_than_equal": ("above maximum", "le", "<=", "above_max_value"),
    "less_than": ("above maximum", "lt", "<", "above_max_value"),
}
_LENGTHS = {
    **dict.fromkeys(("too_short", "string_too_short"), ("short", "min", "below_min_length")),
    **dict.fromkeys(("too_long", "string_too_long"), ("long", "max", "above_max_length")),
}


def describe_error(errors: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
    """The message and OpenAI's code for what is wrong with the member ``where``.

    ``errors`` are pydantic's about it: several where it may be of several types, and is of none.
    """
    error, member = errors[0], f"'{where}'" if where else "the body"
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"Missing required parameter: '{where}'.", "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"Unknown parameter: {member}.", "unknown_parameter"
    if kind == "union_tag_not_found":
        tag = context["discriminator"].strip("'")
        return f"Missing required parameter: '{where}.{tag}'.", "missing_required_parameter"
    literal = next((each for each in errors if each["type"] == "literal_error"), None)
    if kind == "union_tag_invalid" or (literal is not None and isinstance(given, str)):
        known = context["expected_tags"] if literal is None else literal["ctx"]["expected"]
        # A word stands in the place of a number ("auto"); who sends one does not mean an object.
        types = dict.fromkeys(map(_describe_type, errors))
        further = "".join(f" or {each}" for each in types if each in ("an integer", "a number"))
        return (
            f"Invalid value for {member}: {_quote(context.get('tag', given))}. Supported values are: "
            f"{known}{further}.",
            "invalid_value",
        )
    if kind == "literal_error" or expected_type(error):
        expected = list(dict.fromkeys(filter(None, map(_describe_type, errors))))
        one = ", ".join(expected[:-1]) + " or " * (len(expected) > 1) + expected[-1]
        return (
            f"Invalid type for {member}: expected {'one of ' * (len(expected) > 1)}{one}, but got "
            f"{_with_article(type_of(given))} instead.",
            "invalid_type",
        )
    if kind in _BOUNDS:
        words, bound, sign, code = _BOUNDS[kind]
        name = "integer" if type(given) is type(context[bound]) is int else "decimal"
        return (
            f"Invalid {member}: {name} {words} value. Expected a value {sign} "
            f"{plain_number(context[bound])}, but got {_quote(given)} instead.",
            f"{name}_{code}",
        )
    if kind in _LENGTHS:
        words, bound, code = _LENGTHS[kind]
        name = type_of(given)
        a_name = _with_article(name)
        came = f"{a_name} with length {len(given)}" if given else f"an empty {name}"
        return (
            f"Invalid {member}: {f'{name} too {words}' if given else f'empty {name}'}. Expected "
            f"{a_name} with {bound}imum length {context[f'{bound}_length']}, but got {came} instead.",
            f"{name}_{code}" if given else f"empty_{name}",
        )
    if kind == "string_pattern_mismatch":
        return (
            f"Invalid {member}: string does not match pattern. Expected a string that matches the "
            f"pattern '{context['pattern']}'.",
            "invalid_value",
        )
    message = custom_message(error).rstrip(".")
    return f"Invalid value for {member}: {message[:1].lower()}{message[1:]}.", "invalid_value"


def _describe_type(error: Mapping[str, Any]) -> str:
    """What a value of another type could have been; empty for an error that is not about types."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    name = expected_type(error)
    return _with_article(name) if name is not None else ""


def _with_article(json_type: str) -> str:
    return json_type if json_type == "null" else f"{_ARTICLES.get(json_type, 'a')} {json_type}"


def _quote(value: Any) -> str:
    """A value as it came, long ones cut."""
    text = str(value)
    cut = text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}…"
    return f"'{cut}'" if isinstance(value, str) else cut
