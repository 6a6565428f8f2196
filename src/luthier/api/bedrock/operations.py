"""The operations of Bedrock and of its runtime, from the service models that botocore ships.

Clients are made from the same files, so that routes, statuses and shapes cannot differ from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import unquote

from botocore.loaders import Loader
from botocore.model import ServiceModel, Shape

SERVICES = ("bedrock", "bedrock-runtime")
"""Their paths never collide: one table serves both."""


@dataclass(frozen=True)
class Operation:
    """One operation of a service model."""

    name: str
    service: str
    method: str
    path: str
    """``/custom-models/{modelIdentifier}``."""
    status: int
    """Of its answer."""
    input: Shape | None
    output: Shape | None


@dataclass
class _Branch:
    """Routes that begin alike. ``any`` takes a segment of which the client chose the text."""

    literal: dict[str, _Branch] = field(default_factory=dict)
    any: _Branch | None = None
    ends: dict[str, Operation] = field(default_factory=dict)
    """What answers here, by method."""

    def add(self, segments: list[str], operation: Operation) -> None:
        if not segments:
            self.ends[operation.method] = operation
            return
        first, *rest = segments
        if first.startswith("{"):
            self.any = self.any or _Branch()
            self.any.add(rest, operation)
        else:
            self.literal.setdefault(first, _Branch()).add(rest, operation)

    def find(self, segments: list[str], method: str) -> Operation | None:
        if not segments:
            return self.ends.get(method)
        first, *rest = segments
        exact = self.literal.get(first)
        found = exact.find(rest, method) if exact else None
        return found or (self.any.find(rest, method) if self.any else None)


class Operations:
    """All operations: by name, and by method and path."""

    def __init__(self, models: Mapping[str, ServiceModel]) -> None:
        """``models`` by the names of their services."""
        self.by_name: dict[str, Operation] = {}
        self.error_status: dict[str, int] = {}
        """HTTP status by the name of an exception, without the word Exception."""
        self._root = _Branch()
        for service, model in models.items():
            for name in model.operation_names:
                operation = _operation(service, model, name)
                self.by_name[name] = operation
                self._root.add(_segments(operation.path), operation)
            for shape in model.error_shapes:
                status = shape.metadata["error"]["httpStatusCode"]
                self.error_status[shape.name.removesuffix("Exception")] = status

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
        """The operation and the segments of the raw ``path`` by name, each decoded once.

        An ARN in a path holds encoded slashes: what is decoded first is split at the wrong places.
        """
        segments = _segments(path)
        operation = self._root.find([unquote(each) for each in segments], method)
        if operation is None:
            return None
        names = _segments(operation.path)
        return operation, {
            name[1:-1].rstrip("+"): unquote(segment)
            for name, segment in zip(names, segments, strict=True)
            if name.startswith("{")
        }


@cache
def operations() -> Operations:
    """Those of the installed botocore; read once, in about a third of a second."""
    loader = Loader()
    return Operations(
        {
            service: ServiceModel(loader.load_service_model(service, "service-2"), service)
            for service in SERVICES
        }
    )


def _operation(service: str, model: ServiceModel, name: str) -> Operation:
    described = model.operation_model(name)
    http: Mapping[str, Any] = described.http
    return Operation(
        name,
        service,
        http["method"],
        http["requestUri"],
        http.get("responseCode", 200),
        described.input_shape,
        described.output_shape,
    )


def _segments(path: str) -> list[str]:
    return path.removeprefix("/").split("/")
