"""Which resource answers to which method and path below ``/v1/`` and ``/openai/v1/``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import unquote

from luthier.api.openai import errors
from luthier.api.openai.methods import setting_name
from luthier.api.wire import Answer, Call, Fault, Handler, Route
from luthier.files import Sink
from luthier.limits import BODY_BYTES

PREFIXES = ("/openai/v1/", "/v1/")


@dataclass(frozen=True)
class Operation:
    """One method and path, and what carries it out."""

    method: str
    path: str
    """Segments below the prefix; one in braces is a parameter by that name."""
    name: str
    """``files.create``: what policies, the audit log and metrics call it, behind ``openai.``."""
    handler: Handler
    body_limit: int = BODY_BYTES
    long: bool = False
    """Whether a model answers it."""
    grading: bool = False
    """Whether it works on a grader."""
    sink: Callable[[Call], AbstractContextManager[Sink]] | None = None
    """Opens what takes its body; see :class:`luthier.api.wire.Route`."""

    def match(self, method: str, segments: list[str]) -> Mapping[str, str] | None:
        """The parameters in the decoded ``segments``; ``None`` where they are another path."""
        wanted = self.path.split("/")
        if method != self.method or len(wanted) != len(segments):
            return None
        params = {}
        for name, given in zip(wanted, segments, strict=True):
            if name.startswith("{"):
                params[name[1:-1]] = given
            elif name != given:
                return None
        return params if all(params.values()) else None


class Resource(Protocol):
    """A part of the API."""

    def operations(self) -> Iterable[Operation]:
        """What it can do."""


class Routing:
    """A face over its resources."""

    def __init__(self, resources: Iterable[Resource]) -> None:
        self.operations = [each for resource in resources for each in resource.operations()]

    def route(self, method: str, path: str) -> Route:
        """What answers to ``method`` on the raw ``path``; raises :class:`Fault` where nothing does."""
        prefix = next((each for each in PREFIXES if path.startswith(each)), "")
        rest = path[len(prefix) :].rstrip("/")
        segments = [unquote(segment) for segment in rest.split("/")]
        for operation in self.operations if prefix else ():
            params = operation.match(method, segments)
            if params is not None:
                name = f"openai.{operation.name}"
                handler = _answered(operation.handler)
                return Route(
                    name,
                    handler,
                    params,
                    operation.body_limit,
                    operation.long,
                    operation.grading,
                    operation.sink,
                )
        raise Fault("UnknownOperation", f"Unknown request URL: {method} {path}.")

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        """``fault`` in OpenAI's envelope."""
        return errors.refusal(fault.named(setting_name), request_id)


def _answered(handler: Handler) -> Callable[[Call], Answer]:
    def handle(call: Call) -> Answer:
        answer = handler(call)
        return replace(answer, headers={**answer.headers, "x-request-id": call.request_id})

    return handle
