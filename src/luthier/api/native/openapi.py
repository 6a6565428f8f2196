"""The OpenAPI 3.1 document of the native face, made from its operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from luthier.api.native.operations import STATUS, Operation

_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "parameter": {"type": "string", "description": "The field that is meant."},
            },
        }
    },
}


def document(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    bodies = [each.body for each in operations if each.body is not None]
    answers = [each.answer for each in operations if each.answer is not None]
    wanted: list[tuple[type[BaseModel], Any]] = [(each, "validation") for each in bodies]
    wanted += [(each, "serialization") for each in answers]
    references, found = models_json_schema(
        list(dict.fromkeys(wanted)),
        ref_template=_REFERENCE,  # each model once
    )
    schemas = {"Error": _ERROR, **found.get("$defs", {})}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, references)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "luthier",
            "version": version,
            "description": "Jobs, reports, estimates, models and certificates of a luthier server.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(each: Operation, references: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"type": "object"}}
    if each.answer is not None:
        content = {"schema": references[each.answer, "serialization"]}
    elif each.media != "application/json":
        content = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "operationId": each.name,
        "summary": each.about,
        "parameters": [*_path(each), *_query(each.query)],
        "responses": {
            str(each.status): {"description": each.about, "content": {each.media: content}},
            **{str(status): _refused(status) for status in sorted(set(STATUS.values()))},
        },
    }
    if each.body is not None:
        schema = references[each.body, "validation"]
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _refused(status: int) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model="Error")}
    return {
        "description": f"Refused with status {status}.",
        "content": {"application/json": {"schema": schema}},
    }


def _path(each: Operation) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)\}", each.path)
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]


def _query(kind: type[BaseModel]) -> list[dict[str, Any]]:
    schema = kind.model_json_schema()
    needed = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in needed, "schema": value}
        for name, value in schema.get("properties", {}).items()
    ]
