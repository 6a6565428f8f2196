"""Validation of Bedrock API responses against the service model, which clients never check."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from botocore.model import OperationModel, Shape

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def check_answer(operation_model: OperationModel, response_dict: Any, **_: Any) -> None:
    """Check status, headers and body members in botocore's event ``before-parse``."""
    status, headers = response_dict["status_code"], response_dict["headers"]
    assert headers["x-amzn-RequestId"]
    assert headers["content-type"] == "application/json"
    body = json.loads(response_dict["body"])
    if status >= 300:
        known = {shape.name: shape for shape in operation_model.error_shapes}
        code = headers["x-amzn-ErrorType"]
        assert isinstance(body["message"], str) and body["message"]
        if code in known:
            assert status == known[code].metadata["error"]["httpStatusCode"], code
            check(known[code], body, code)
        else:
            # Operations reuse client tokens even if their models do not document this.
            assert code in ("SerializationException", "ConflictException"), code
        return
    assert status == operation_model.http["responseCode"]
    if operation_model.output_shape is None:
        assert body == {}
    else:
        check(operation_model.output_shape, body, operation_model.name)


def check(shape: Shape, value: Any, where: str) -> None:
    """Check types, required members, limits, enumerations and patterns of ``shape``."""
    limits = shape.metadata
    if shape.type_name == "structure":
        assert isinstance(value, dict), where
        missing = set(limits.get("required", ())) - value.keys()
        assert not missing, f"{where}: {missing} missing"
        assert not value.keys() - shape.members.keys(), f"{where}: {value.keys()} unknown"
        if limits.get("union"):
            assert len(value) == 1, where
        for name, inner in value.items():
            check(shape.members[name], inner, f"{where}.{name}")
    elif shape.type_name == "list":
        assert isinstance(value, list), where
        for item in value:
            check(shape.member, item, f"{where}[]")
    elif shape.type_name == "map":
        for key, item in value.items():
            check(shape.key, key, f"{where}.key")
            check(shape.value, item, f"{where}.{key}")
    elif shape.type_name == "timestamp":
        assert MOMENT.fullmatch(value), f"{where}: {value!r}"
        datetime.fromisoformat(value)
    elif shape.type_name == "string":
        _check_text(shape, value, where)
    elif shape.type_name == "boolean":
        assert isinstance(value, bool), where
    else:
        kinds = int if shape.type_name in ("integer", "long") else (int, float)
        assert isinstance(value, kinds) and not isinstance(value, bool), where
        assert limits.get("min", value) <= value <= limits.get("max", value), where


def _check_text(shape: Shape, value: Any, where: str) -> None:
    limits = shape.metadata
    assert isinstance(value, str), f"{where}: {value!r}"
    assert limits.get("min", 0) <= len(value) <= limits.get("max", len(value)), f"{where}: {value}"
    if limits.get("enum"):
        assert value in limits["enum"], f"{where}: {value}"
    if "pattern" in limits:
        assert re.fullmatch(limits["pattern"], value), f"{where}: {value}"
