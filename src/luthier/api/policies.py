"""What a caller may do: evaluation of IAM identity-based policies.

An explicit ``Deny`` wins over any ``Allow``, and what nothing allows is denied. Conditions are not
evaluated: a statement that has one allows nothing, and denies as if it held.
Source: the IAM policy evaluation logic for one account.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from luthier.api.wire import Caller, Fault
from luthier.store.policy_documents import listed, statements_of

BEARER = "bedrock:CallWithBearerToken"


@dataclass(frozen=True)
class _Patterns:
    """What an element of a statement matches."""

    patterns: tuple[re.Pattern[str], ...]
    negated: bool

    def match(self, text: str) -> bool:
        return any(pattern.match(text) for pattern in self.patterns) is not self.negated


@dataclass(frozen=True)
class _Statement:
    denies: bool
    actions: _Patterns
    resources: _Patterns

    def applies(self, action: str, resource: str) -> bool:
        return self.actions.match(action) and self.resources.match(resource)


_asked: ContextVar[list[tuple[str, str]] | None] = ContextVar("asked", default=None)


@contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Actions and resources that :func:`authorize` is asked for in the block, by its threads too.

    The audit log names them: what a call acted on is known to who handles it, and asked for here.
    """
    asked: list[tuple[str, str]] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def authorize(caller: Caller, action: str, resource: str) -> None:
    """Let ``caller`` do ``action`` (``bedrock:InvokeModel``) to ``resource`` (an ARN or ``*``).

    Who shows a bearer key needs ``bedrock:CallWithBearerToken`` as well.

    Raises:
        Fault: ``AccessDenied``, with the words of AWS.
    """
    if (asked := _asked.get()) is not None:
        asked.append((action, resource))
    if caller.bearer:
        _decide(caller, BEARER, "*")
    _decide(caller, action, resource)


def refuse_denied(caller: Caller, action: str, resource: str) -> None:
    """Refuse ``caller`` what a policy denies, where another action was allowed that comes to the same.

    Raises:
        Fault: as :func:`authorize`, for an explicit ``Deny``; what nothing allows is let pass.
    """
    if any(each.denies and each.applies(action, resource) for each in _statements(caller)):
        if (asked := _asked.get()) is not None:
            asked.append((action, resource))
        raise _denied(caller, action, resource, explicit=True)


def _decide(caller: Caller, action: str, resource: str) -> None:
    allowed = False
    for statement in _statements(caller):
        if (statement.denies or not allowed) and statement.applies(action, resource):
            if statement.denies:
                raise _denied(caller, action, resource, explicit=True)
            allowed = True
    if not allowed:
        raise _denied(caller, action, resource, explicit=False)


def _statements(caller: Caller) -> Iterator[_Statement]:
    for policy in caller.policies:
        yield from _compiled(json.dumps(dict(policy), sort_keys=True))


def _denied(caller: Caller, action: str, resource: str, explicit: bool) -> Fault:
    reason = (
        "with an explicit deny in an identity-based policy"
        if explicit
        else f"because no identity-based policy allows the {action} action"
    )
    text = f"User: {caller.arn} is not authorized to perform: {action} on resource: {resource} {reason}"
    return Fault("AccessDenied", text, action=action, resource=resource)


@lru_cache(maxsize=4096)
def _compiled(policy: str) -> tuple[_Statement, ...]:
    statements = []
    for statement in statements_of(json.loads(policy)):
        denies = statement["Effect"] == "Deny"
        if denies or not statement.get("Condition"):
            actions = _patterns(statement, "Action", re.IGNORECASE | re.ASCII)
            resources = _patterns(statement, "Resource", re.NOFLAG)
            statements.append(_Statement(denies, actions, resources))
    return tuple(statements)


def _patterns(statement: Mapping[str, Any], name: str, flags: re.RegexFlag) -> _Patterns:
    negated = name not in statement
    given = listed(statement[f"Not{name}" if negated else name])
    return _Patterns(tuple(_pattern(text, flags) for text in given), negated)


@lru_cache(maxsize=4096)
def _pattern(text: str, flags: re.RegexFlag) -> re.Pattern[str]:
    """``*`` and ``?`` as IAM has them.

    ``fnmatch`` writes each ``*`` as an atomic group, which never goes back: a match takes time in
    proportion to both lengths, whatever the pattern.
    """
    # fnmatch knows classes of letters besides, and IAM does not.
    return re.compile(fnmatch.translate(text.replace("[", "[[]")), flags)
