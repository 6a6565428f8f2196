"""Bodies of runtime requests: parsing and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.server.http.messages import Fault, Request
from luthier.validation import describe_error


class NativeBody(BaseModel):
    """A body in a model's native form, with strict types and without unknown members."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


T = TypeVar("T", bound=BaseModel)


def json_object(request: Request) -> dict[str, Any]:
    """Return the body of ``request``, parsed as JSON whatever the Content-Type header."""
    try:
        body = request.json
    except ValueError as error:
        raise Fault("Serialization", f"The body of the request is not JSON: {error}.") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise Fault("Serialization", "The body of the request must be a JSON object.")
    return body


def native_object(request: Request) -> dict[str, Any]:
    """Return the body of InvokeModel; raises :class:`Fault` Validation if the body is not JSON.

    The protocol allows any bytes, so AWS reports Validation instead of Serialization.
    """
    try:
        return json_object(request)
    except Fault as fault:
        raise malformed_input(fault.message) from fault


def parse_native(kind: type[T], body: Mapping[str, Any]) -> T:
    """Return the parsed body; raises :class:`Fault` Validation with each problem."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems = [
            f"#/{'/'.join(map(str, each['loc']))}{describe_error(dict(each))}"
            for each in error.errors(include_url=False)
        ]
    raise malformed_input(", ".join(problems))


def malformed_input(text: str) -> Fault:
    """Return AWS's error for a body in a model's native form."""
    return Fault(
        "Validation",
        f"Malformed input request: {text.rstrip('.')}, please reformat your input and try again.",
    )
