"""Requests to members by name, and members to answers, both by the shapes of an operation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StructureShape

from luthier.api.bedrock.bodies import json_object
from luthier.api.bedrock.constraints import Checker, moment_of
from luthier.api.bedrock.operations import Operation
from luthier.api.wire import Answer, Call, Fault

_BOOLEANS = {"true": True, "false": False}


def members_of(operation: Operation, call: Call) -> dict[str, Any]:
    """What a request asks: segments of its path, its query and its body, by the model's names.

    Unknown members are left out, as a client may be newer than we are.

    Raises:
        Fault: Serialization, for a body that is not what it has to be; Validation, with all that
            breaks the model's constraints.
    """
    if not isinstance(operation.input, StructureShape):
        return {}
    body = _body(operation.input, call)
    given: dict[str, Any] = {}
    for name, shape in operation.input.members.items():
        key = shape.serialization.get("name", name)
        location = shape.serialization.get("location")
        if location == "uri":
            given[key] = call.params.get(key)
        elif location == "querystring":
            given[key] = _of_query(shape, call.query.get(key), name)
        elif location == "header":
            given[key] = call.headers.get(key.lower())
        elif location is None:
            given[key] = body.get(key)
    checker = Checker()
    found = checker.members(operation.input, given)
    checker.finish()
    return found


def answer_of(operation: Operation, members: Mapping[str, Any]) -> Answer:
    """``members`` as the answer of ``operation``; what is ``None`` is left out."""
    if operation.output is None:
        return Answer.of({}, operation.status)
    return Answer.of(plain(operation.output, members), operation.status)


def plain(shape: Shape, value: Any) -> Any:
    """``value`` as JSON has it. A member that the shape does not know is our mistake."""
    if isinstance(shape, StructureShape):
        found = {}
        for name, member in value.items():
            inner = shape.members[name]
            if member is not None and not _unsayable(member):
                found[inner.serialization.get("name", name)] = plain(inner, member)
        return found
    if isinstance(shape, ListShape):
        return [plain(shape.member, item) for item in value]
    if isinstance(shape, MapShape):
        return {key: plain(shape.value, item) for key, item in value.items()}
    return timestamp(value) if isinstance(value, datetime) else value


def timestamp(moment: datetime) -> str:
    """``2026-01-31T12:00:00.123Z``: what is below a millisecond is cut off."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _unsayable(value: Any) -> bool:
    """JSON has no word for a loss that is not a number."""
    return isinstance(value, float) and not math.isfinite(value)


def _body(shape: StructureShape, call: Call) -> Mapping[str, Any]:
    """The body, an object; empty where the operation has none."""
    if all(member.serialization.get("location") for member in shape.members.values()):
        return {}
    return json_object(call)


def _of_query(shape: Shape, values: list[str] | None, name: str) -> Any:
    """A member of the query with the type of ``shape``."""
    if values is None:
        return None
    if isinstance(shape, ListShape):
        return values
    text, kind = values[0], shape.type_name
    if kind in ("integer", "long"):
        # Digits of other scripts are numbers to Python, and thousands of them cost time.
        if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20):
            raise _unreadable(name, "a whole number")
        return int(text)
    if kind == "boolean":
        if text not in _BOOLEANS:
            raise _unreadable(name, "true or false")
        return _BOOLEANS[text]
    if kind == "timestamp":
        # Once here, for a refusal that names the query, and once more by its shape.
        return moment_of(text, name).isoformat()
    return text


def _unreadable(name: str, expected: str) -> Fault:
    return Fault("Validation", f"'{name}' has to be {expected}.", parameter=name)
