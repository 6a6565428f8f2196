"""Which operation answers to a method and a path: one table and one router for every face."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import unquote

from luthier.limits import BODY_BYTES
from luthier.server.http.messages import Fault, Request, RequestHead, Response
from luthier.server.http.streams import RequestBody, Run

Handler = Callable[[Request], Response]
StreamHandler = Callable[[Request, RequestBody, Run], Awaitable[Response]]
"""Reads the body itself, as it comes; all that blocks it calls by ``run``, in threads."""


@dataclass(frozen=True)
class Operation:
    """One thing that clients can ask for."""

    name: str
    """``CreateModelCustomizationJob``, ``openai.files.create``: the name in metrics."""
    method: str
    path: str
    """``/custom-models/{model}``; a segment in braces takes any text, and gives it that name."""
    handler: Handler | None = None
    body_limit: int = BODY_BYTES
    """Bytes of a body at most; a larger one is refused before it is read whole."""
    long: bool = False
    """Whether it takes a model's time: such requests take turns, account by account."""
    grading: bool = False
    """Whether it works on a grader: such requests have turns of their own, few at once."""
    stream: StreamHandler | None = None
    """Instead of ``handler`` where bodies may be large."""
    action: str = ""
    """Action that the caller's role has to allow (:data:`luthier.server.roles.PERMISSIONS`); empty
    where the API checks the action itself."""
    hashed: bool = False
    """Whether the signature has a hash of the body, with which it is compared as it is read."""


@dataclass(frozen=True)
class Route:
    """What a request asks for, and the segments of its path by name, each decoded once."""

    operation: Operation
    params: Mapping[str, str] = field(default_factory=dict)


class Face(Protocol):
    """One way to talk to the service."""

    name: str
    request_id_header: str
    """In which every response names its request."""

    def serves(self, head: RequestHead, service: str) -> bool:
        """Whether a request is for this face; ``service`` is that of the scope of its signature."""

    def route(self, head: RequestHead) -> Route:
        """What answers to a request; raises :class:`Fault` where nothing does."""

    def refusal(self, fault: Fault, request_id: str) -> Response:
        """``fault`` as this face's clients expect it."""


@dataclass(frozen=True)
class MountedApplication:
    """An API with an ASGI application of its own, which the server calls once it knows the caller.

    The application finds in ``scope["state"]``: ``caller``, ``record`` (whose ``operation`` and
    ``error`` it sets), and the context managers ``model_turn`` and ``stream_turn``. The path in
    its scope is the raw path.
    """

    name: str
    prefix: str
    """Beginning of the paths of the API."""
    app: Callable[..., Awaitable[None]]
    refusal: Callable[[Fault, str], Response]
    """Writes a fault in the API's form; the second argument is the id of the request."""
    request_id_header: str = "x-request-id"

    def serves(self, head: RequestHead, service: str) -> bool:
        """Return whether a request is for this API."""
        return head.path.startswith(self.prefix)


@dataclass
class _Branch:
    """Operations whose paths begin alike; ``any`` takes a segment of any text."""

    literal: dict[str, _Branch] = field(default_factory=dict)
    any: _Branch | None = None
    operations: dict[str, Operation] = field(default_factory=dict)
    """Those whose path ends here, by method."""


class Router:
    """Finds operations by raw paths: an ARN in one holds encoded slashes, and is one segment."""

    def __init__(self, operations: Iterable[Operation], *, empty: bool = False) -> None:
        """``empty`` says whether a segment that takes any text takes none, too."""
        self._root, self._empty, self.operations = _Branch(), empty, tuple(operations)
        for operation in self.operations:
            branch = self._root
            for segment in _segments(operation.path):
                if segment.startswith("{"):
                    branch.any = branch.any or _Branch()
                    branch = branch.any
                else:
                    branch = branch.literal.setdefault(segment, _Branch())
            branch.operations[operation.method] = operation

    def route(self, method: str, path: str) -> Route | None:
        """Return what answers at ``path``; a literal segment goes before one of any text."""
        segments = [unquote(each) for each in _segments(path)]
        branches = [self._root]
        for segment in segments:
            below = [(each.any, each.literal.get(segment)) for each in branches]
            branches = [each for pair in below for each in pair if each is not None]
        for branch in reversed(branches):
            if (operation := branch.operations.get(method)) is not None:
                pairs = zip(_segments(operation.path), segments, strict=True)
                params = {
                    name[1:-1].rstrip("+"): text for name, text in pairs if name.startswith("{")
                }
                if self._empty or all(params.values()):
                    return Route(operation, params)
        return None


def _segments(path: str) -> list[str]:
    return path.removeprefix("/").split("/")
