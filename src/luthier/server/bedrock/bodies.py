"""Bodies of the runtime's requests: read, and refused with the words of AWS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.server.http.messages import Fault, Request
from luthier.validation import custom_message, expected_type, type_of


class NativeBody(BaseModel):
    """A body in a model's own form, whose members are all known and of strict types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T", bound=BaseModel)


def json_object(request: Request) -> dict[str, Any]:
    """The body of ``request``, which is JSON whatever its Content-Type says."""
    try:
        found = request.json
    except ValueError as error:
        raise Fault("Serialization", f"The body of the request is not JSON: {error}.") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Fault("Serialization", "The body of the request has to be a JSON object.")
    return found


def native_object(request: Request) -> dict[str, Any]:
    """The body of InvokeModel: bytes of any kind to the protocol, so that the model refuses them.

    Raises:
        Fault: Validation, as AWS has it; members of other operations are refused by the protocol, as
            Serialization.
    """
    try:
        return json_object(request)
    except Fault as fault:
        raise malformed_input(fault.message) from fault


def parsed_native(kind: type[T], given: Mapping[str, Any]) -> T:
    """A body in a model's own form; raises :class:`Fault` Validation with all that is wrong."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        wrong = [_describe_error(dict(each)) for each in error.errors(include_url=False)]
    raise malformed_input(", ".join(wrong))


def malformed_input(text: str) -> Fault:
    """What is wrong with a body in a model's own form, in the words AWS has for those."""
    return Fault(
        "Validation",
        f"Malformed input request: {text.rstrip('.')}, please reformat your input and try again.",
    )


def _place(error: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))


def _describe_error(error: Mapping[str, Any]) -> str:
    place = _place(error)
    if error["type"] == "extra_forbidden":
        return f"extraneous key [{place}] is not permitted"
    if error["type"] == "missing":
        return f"required key [{place}] not found"
    return f"#/{place.replace('.', '/')}: {_describe_constraint(error)}"


def _describe_constraint(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"Member must have value greater than or equal to {context['ge']}"
        case "greater_than":
            return f"Member must have value greater than {context['gt']}"
        case "less_than":
            return f"Member must have value less than {context['lt']}"
        case "less_than_equal":
            return f"Member must have value less than or equal to {context['le']}"
        case "too_short" | "string_too_short":
            return f"Member must have length greater than or equal to {context['min_length']}"
        case "too_long" | "string_too_long":
            return f"Member must have length less than or equal to {context['max_length']}"
        case "string_pattern_mismatch":
            return f"Member must satisfy regular expression pattern: {context['pattern']}"
        case "literal_error":
            return f"Member must satisfy enum value set: [{context['expected']}]"
    if (expected := expected_type(error)) is not None:
        return f"expected type: {_name(expected)}, found: {_name(type_of(error['input']))}"
    return custom_message(error)


def _name(json_type: str) -> str:
    return f"JSON{json_type.title()}" if json_type in ("array", "object") else json_type.title()
