"""Botocore's service models: operations, validation of requests, rendering of responses.

Clients are generated from the same files, so routes, status codes and shapes cannot differ. Clients
validate little before a request: no pattern, no maximum, no enumeration.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import regex
from botocore.loaders import Loader
from botocore.model import (
    ListShape,
    MapShape,
    OperationModel,
    ServiceModel,
    Shape,
    StringShape,
    StructureShape,
)

from luthier.inference.inference import TURNS
from luthier.server.bedrock.bodies import json_object
from luthier.server.http.messages import Fault, Request, Response, timestamp
from luthier.server.tables.text import check_storable

SERVICES = ("bedrock", "bedrock-runtime")
"""AWS services. The paths never collide, so one routing table serves both."""
MOST_PROBLEMS = 50
"""Maximum number of reported problems: a body of 25 MB may have hundreds of thousands."""
LONGEST_UNBOUNDED = 4096
"""Maximum length in characters of a string whose shape has a pattern and no maximum."""
PATTERN_SECONDS = 1.0
"""Time limit for one pattern on one text: some patterns of AWS take exponential time on wrong
texts."""
_SHOWN = 200
"""Maximum length in characters of a rejected value in an error message."""
_ALIAS = "([0-9a-zA-Z][_-]?)+"
_WIDER = {
    # A model from outside, which is a base like any other here.
    "BaseModelIdentifier": (
        "arn:aws:bedrock:[a-z0-9-]{1,20}:[0-9]{12}:custom-model/imported/[a-z0-9]{12}"
    ),
    # The alias of a base model.
    "GetFoundationModelIdentifier": _ALIAS,
    "BedrockModelId": _ALIAS,
}
"""Additional patterns that this server accepts, by name of the shape."""
_BOOLEANS = {"true": True, "false": False}


@cache
def operation_models() -> Mapping[str, OperationModel]:
    """Return the operations of the installed botocore by name, loaded once in about 0.3 seconds."""
    return {
        name: model.operation_model(name) for model in _models() for name in model.operation_names
    }


@cache
def error_statuses() -> Mapping[str, int]:
    """Return HTTP status codes by exception name, without the suffix Exception."""
    return {
        shape.name.removesuffix("Exception"): shape.metadata["error"]["httpStatusCode"]
        for model in _models()
        for shape in model.error_shapes
    }


@cache
def _models() -> tuple[ServiceModel, ...]:
    loader = Loader()
    return tuple(
        ServiceModel(loader.load_service_model(service, "service-2"), service)
        for service in SERVICES
    )


class ShapeChecker:
    """Validation of one request against a shape. The checker collects all problems into one error."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def finish(self) -> None:
        """Raise the collected problems as one :class:`Fault`."""
        if self.problems:
            count = len(self.problems)
            counted = f"{count} validation error{'s' if count > 1 else ''} detected"
            raise Fault("Validation", f"{counted}: {'; '.join(self.problems)}")

    def members(
        self, shape: StructureShape, sent: Mapping[str, Any], path: str = "", located: bool = True
    ) -> dict[str, Any]:
        """Return the known members of ``sent`` by name in the model; ``None`` counts as absent.

        Args:
            shape: the structure.
            sent: the values by name in the protocol.
            path: the path of the structure in the request, for error messages.
            located: whether to include members outside the body, such as path segments.
        """
        members = {}
        for name, member in shape.members.items():
            if not located and member.serialization.get("location"):
                continue
            value = sent.get(member.serialization.get("name", name))
            location = f"{path}.{name}" if path else name
            if value is not None:
                members[name] = self.value(member, value, location)
            elif name in shape.required_members:
                self._add_problem("null", location, "Member must not be null")
        if shape.is_tagged_union and len(members) != 1:
            known = ", ".join(shape.members)
            self._add_problem(
                sorted(members), path, f"Exactly one member must be set, of [{known}]"
            )
        return members

    def value(self, shape: Shape, value: Any, path: str) -> Any:
        """Return ``value`` as a Python object; raises :class:`Fault` for a wrong JSON type."""
        if isinstance(shape, StructureShape):
            if shape.is_document_type:  # any JSON
                return value
            return self.members(shape, _check_type(value, dict, path, "an object"), path)
        if isinstance(shape, ListShape):
            items = _check_type(value, list, path, "a list")
            if not self._size(shape, items, path, "length"):
                return []
            return [
                self._item(shape.member, item, f"{path}.{number}.member")
                for number, item in enumerate(items, 1)
            ]
        if isinstance(shape, MapShape):
            entries = _check_type(value, dict, path, "an object")
            self._size(shape, entries, path, "length")
            return {
                self.value(shape.key, key, f"{path}.key"): self._item(
                    shape.value, item, f"{path}.{key[:_SHOWN]}"
                )
                for key, item in entries.items()
            }
        if isinstance(shape, StringShape):
            return self._text(shape, _check_type(value, str, path, "a string"), path)
        return self._scalar(shape, value, path)

    def _item(self, shape: Shape, value: Any, path: str) -> Any:
        """Return an item of a list or map, which must not be null."""
        if value is None:
            self._add_problem("null", path, "Member must not be null")
            return None
        return self.value(shape, value, path)

    def _scalar(self, shape: Shape, value: Any, path: str) -> Any:
        kind = shape.type_name
        if kind == "boolean":
            return _check_type(value, bool, path, "true or false")
        if kind in ("integer", "long"):
            self._size(shape, _number(value, (int,), path, "a whole number"), path, "value")
            limit = 2**31 if kind == "integer" else 2**63
            if not -limit <= value < limit:
                raise _wrong_type(path, f"a whole number of {32 if limit == 2**31 else 64} bits")
        elif kind in ("float", "double"):
            value = _number(value, (int, float), path, "a number")
            # Not isfinite: to it a whole number of 400 digits is an error of its own.
            if not abs(value) <= sys.float_info.max:
                raise _wrong_type(path, "a finite number")
            self._size(shape, value, path, "value")
        elif kind == "timestamp":
            return parse_time(_check_type(value, str, path, "a time"), path)
        return value

    def _text(self, shape: StringShape, value: str, path: str) -> str:
        try:
            check_storable(value)
        except ValueError:
            raise _wrong_type(path, "text without NUL and lone surrogates") from None
        shown = "***" if shape.metadata.get("sensitive") else value
        if not self._size(shape, value, path, "length", shown):
            return value
        if shape.enum and value not in shape.enum:
            known = ", ".join(shape.enum)
            self._add_problem(shown, path, f"Member must satisfy enum value set: [{known}]")
        pattern = shape.metadata.get("pattern")
        if pattern is not None and not matches(shape, value):
            text = f"Member must satisfy regular expression pattern: {pattern}"
            self._add_problem(shown, path, text)
        return value

    def _size(self, shape: Shape, value: Any, path: str, quantity: str, shown: Any = None) -> bool:
        size = value if quantity == "value" else len(value)
        minimum, maximum = shape.metadata.get("min"), shape.metadata.get("max")
        if maximum is None and isinstance(shape, StringShape) and "pattern" in shape.metadata:
            maximum = LONGEST_UNBOUNDED
        elif maximum is None and isinstance(shape, ListShape):
            maximum = TURNS
        if minimum is not None and size < minimum:
            text = f"Member must have {quantity} greater than or equal to {minimum}"
        elif maximum is not None and size > maximum:
            text = f"Member must have {quantity} less than or equal to {maximum}"
        else:
            return True
        self._add_problem(value if shown is None else shown, path, text)
        return False

    def _add_problem(self, value: Any, path: str, constraint: str) -> None:
        shown = str(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        location = path or "the request"
        self.problems.append(
            f"Value '{shown}' at '{location}' failed to satisfy constraint: {constraint}"
        )
        if len(self.problems) == MOST_PROBLEMS:
            self.finish()


def matches(shape: Shape, value: str) -> bool:
    """Return whether the pattern of ``shape`` matches all of ``value`` within the time limit."""
    pattern = _pattern(shape.metadata["pattern"], _WIDER.get(shape.name, ""))
    try:
        return bool(pattern(value, timeout=PATTERN_SECONDS))
    except TimeoutError:
        return False


def parse_time(text: str, path: str) -> datetime:
    """Parse an ISO 8601 time. A time without a zone is in UTC.

    Raises:
        Fault: Validation for any other text.
    """
    try:
        time = datetime.fromisoformat(text)
        # A moment near the ends of the calendar may have no name in UTC.
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Fault(
            "Validation", f"'{path}' must be a time such as 2026-01-31T12:00:00Z.", parameter=path
        ) from error


@cache
def _pattern(pattern: str, wider: str) -> Callable[..., Any]:
    # The patterns are Java's, whose \s and \d know ASCII alone; those with \p know more than it.
    flags = regex.V0 if r"\p" in pattern else regex.V0 | regex.ASCII
    matcher: Callable[..., Any] = regex.compile(
        f"(?:{pattern})|(?:{wider})" if wider else pattern, flags
    ).fullmatch
    return matcher


def _check_type(value: Any, kind: type, path: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong_type(path, expected)
    return value


def _number(value: Any, kinds: tuple[type, ...], path: str, expected: str) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise _wrong_type(path, expected)
    return value


def _wrong_type(path: str, expected: str) -> Fault:
    return Fault("Serialization", f"'{path}' must be {expected}.", parameter=path)


def parse_body(operation: OperationModel, sent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validated members of a body; raises as :func:`parse_members`."""
    checker = ShapeChecker()
    members = checker.members(operation.input_shape, sent, located=False)
    checker.finish()
    return members


def parse_members(operation: OperationModel, request: Request) -> dict[str, Any]:
    """Return the validated members of a request by name in the model: path, query, headers and
    body.

    Unknown members are ignored, because a client may be newer than the server.

    Raises:
        Fault: Serialization for a wrong type; Validation with all violated constraints.
    """
    if not isinstance(operation.input_shape, StructureShape):
        return {}
    members = operation.input_shape.members
    has_body = any("location" not in shape.serialization for shape in members.values())
    body = json_object(request) if has_body else {}
    sent: dict[str, Any] = {}
    for name, shape in members.items():
        key = shape.serialization.get("name", name)
        location = shape.serialization.get("location")
        if location == "uri":
            sent[key] = request.params.get(key)
        elif location == "querystring":
            sent[key] = _parse_query(shape, request.query.get(key), name)
        elif location == "header":
            sent[key] = request.headers.get(key.lower())
        elif location is None:
            sent[key] = body.get(key)
    checker = ShapeChecker()
    checked = checker.members(operation.input_shape, sent)
    checker.finish()
    return checked


def render_response(operation: OperationModel, members: Mapping[str, Any]) -> Response:
    """Return ``members`` as the response of ``operation``, without members that are ``None``."""
    status = operation.http.get("responseCode", 200)
    if operation.output_shape is None:
        return Response.json({}, status)
    return Response.json(render(operation.output_shape, members), status)


def render(shape: Shape, value: Any) -> Any:
    """Return ``value`` as JSON. A member outside the shape is a bug and raises KeyError."""
    if isinstance(shape, StructureShape):
        rendered = {}
        for name, member in value.items():
            inner = shape.members[name]
            # JSON has no word for a loss that is not a number.
            no_number = isinstance(member, float) and not math.isfinite(member)
            if member is not None and not no_number:
                rendered[inner.serialization.get("name", name)] = render(inner, member)
        return rendered
    if isinstance(shape, ListShape):
        return [render(shape.member, item) for item in value]
    if isinstance(shape, MapShape):
        return {key: render(shape.value, item) for key, item in value.items()}
    return timestamp(value) if isinstance(value, datetime) else value


def _parse_query(shape: Shape, values: list[str] | None, name: str) -> Any:
    """Return a query parameter with the type of ``shape``."""
    if values is None:
        return None
    if isinstance(shape, ListShape):
        return values
    text, kind = values[0], shape.type_name
    if kind in ("integer", "long"):
        # Digits of other scripts are numbers to Python, and thousands of them cost time.
        if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20):
            raise _invalid_parameter(name, "a whole number")
        return int(text)
    if kind == "boolean":
        if text not in _BOOLEANS:
            raise _invalid_parameter(name, "true or false")
        return _BOOLEANS[text]
    if kind == "timestamp":
        # Parsed here, so that errors name the parameter; the shape parses the time again.
        return parse_time(text, name).isoformat()
    return text


def _invalid_parameter(name: str, expected: str) -> Fault:
    return Fault("Validation", f"'{name}' must be {expected}.", parameter=name)
