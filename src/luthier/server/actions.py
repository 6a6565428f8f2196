"""Actions of a request, for the audit log: recorded by operations, written by the application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_actions: ContextVar[list[tuple[str, str]] | None] = ContextVar("actions", default=None)


@contextmanager
def record_actions() -> Iterator[list[tuple[str, str]]]:
    """Collect the calls of :func:`record_action` in the block and in threads of the block."""
    actions: list[tuple[str, str]] = []
    token = _actions.set(actions)
    try:
        yield actions
    finally:
        _actions.reset(token)


def record_action(action: str, resource: str) -> None:
    """Record that the request performs ``action`` (``bedrock:InvokeModel``) on ``resource`` (an ARN
    or ``*``)."""
    if (actions := _actions.get()) is not None:
        actions.append((action, resource))


def record_created(resource: str) -> None:
    """Replace the resource of the last recorded action by ``resource``, which the action created."""
    if actions := _actions.get():
        actions[-1] = actions[-1][0], resource
