"""What a caller may do: evaluation of IAM's identity-based, session and trust policies.

An explicit ``Deny`` wins over any ``Allow``, and what nothing allows is denied. A session policy is a
further boundary: it has to allow as well. Conditions are not evaluated: a statement that has one allows
nothing, and denies as if it held.
Source: the IAM policy evaluation logic for one account, and for roles of another one.
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
from typing import Any, Literal

from luthier.api.http.messages import Caller, Fault
from luthier.store.policy_documents import as_list, statements_of
from luthier.store.principals import role_arn
from luthier.store.sessions import ASSUMED

BEARER = "bedrock:CallWithBearerToken"
ASSUME_ROLE = "sts:AssumeRole"


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


_actions: ContextVar[list[tuple[str, str]] | None] = ContextVar("actions", default=None)


@contextmanager
def record_actions() -> Iterator[list[tuple[str, str]]]:
    """Actions and resources that :func:`authorize` is asked for in the block, by its threads too.

    The audit log names them: what a call acted on is known to who handles it, and asked for here.
    """
    actions: list[tuple[str, str]] = []
    token = _actions.set(actions)
    try:
        yield actions
    finally:
        _actions.reset(token)


def authorize(caller: Caller, action: str, resource: str) -> None:
    """Let ``caller`` do ``action`` (``bedrock:InvokeModel``) to ``resource`` (an ARN or ``*``).

    Who shows a bearer key needs ``bedrock:CallWithBearerToken`` as well.

    Raises:
        Fault: ``AccessDenied``, with the words of AWS.
    """
    record_action(action, resource)
    if caller.bearer:
        _decide(caller, BEARER, "*")
    _decide(caller, action, resource)


def may_anywhere(caller: Caller, action: str) -> bool:
    """Return whether policies allow ``action`` on at least one resource.

    Menus show what a caller may do by it; :func:`authorize` decides on each request.
    """
    for wanted in (BEARER, action) if caller.bearer else (action,):
        for _, statements in _boundaries(caller):
            matching = [each for each in statements if each.actions.match(wanted)]
            if any(each.denies and each.resources.match("*") for each in matching):
                return False
            if all(each.denies for each in matching):
                return False
    return True


@contextmanager
def refusals_naming(resource: str, shown: str) -> Iterator[None]:
    """Let refusals in the block name ``shown`` in place of ``resource``.

    Who asked by a name learns no ARN from them, nor whether there is one.
    """
    try:
        yield
    except Fault as fault:
        raise Fault(fault.code, fault.message.replace(resource, shown)) from None


def record_action(action: str, resource: str) -> None:
    """Let the audit log name what a call did where no policy is asked for it."""
    if (actions := _actions.get()) is not None:
        actions.append((action, resource))


def refuse_denied(caller: Caller, action: str, resource: str) -> None:
    """Refuse ``caller`` what a policy denies, where another action was allowed that comes to the same.

    Raises:
        Fault: as :func:`authorize`, for an explicit ``Deny``; what nothing allows is let pass.
    """
    for kind, statements in _boundaries(caller):
        if any(each.denies and each.applies(action, resource) for each in statements):
            record_action(action, resource)
            raise _denial(caller, action, resource, kind, explicit=True)


def trusts(trust: Mapping[str, Any], caller: Caller) -> Literal["account", "principal"] | None:
    """How a role's trust policy lets ``caller`` assume the role: ``None`` where it does not.

    ``account`` leaves it to the policies of the caller's account; ``principal`` names the caller.
    """
    named = {caller.arn: "principal"}
    if caller.user.startswith(f"{ASSUMED}/"):
        named[role_arn(caller.account, caller.user.split("/")[1])] = "principal"
    named |= dict.fromkeys((caller.account, f"arn:aws:iam::{caller.account}:root"), "account")
    found: set[str] = set()
    for statement in statements_of(trust):
        principal = statement["Principal"]
        given = as_list(principal if isinstance(principal, str) else principal.get("AWS", []))
        matched = {"principal" if each == "*" else named.get(each) for each in given} - {None}
        actions = _patterns(statement, "Action", re.IGNORECASE | re.ASCII)
        if not matched or not actions.match(ASSUME_ROLE):
            continue
        if statement["Effect"] == "Deny":
            return None
        if not statement.get("Condition"):
            found |= {each for each in matched if each}
    if "principal" in found:
        return "principal"
    return "account" if found else None


def _decide(caller: Caller, action: str, resource: str) -> None:
    for kind, statements in _boundaries(caller):
        allowed = False
        for statement in statements:
            if (statement.denies or not allowed) and statement.applies(action, resource):
                if statement.denies:
                    raise _denial(caller, action, resource, kind, explicit=True)
                allowed = True
        if not allowed:
            raise _denial(caller, action, resource, kind, explicit=False)


def _boundaries(caller: Caller) -> Iterator[tuple[str, Iterator[_Statement]]]:
    """Statements of which each set has to allow what is asked, and what such policies are called."""
    documents = (json.dumps(dict(policy), sort_keys=True) for policy in caller.policies)
    yield "identity-based", (each for policy in documents for each in _compile(policy))
    if caller.session is not None and caller.session.policy is not None:
        yield "session", iter(_compile(caller.session.policy))


def _denial(caller: Caller, action: str, resource: str, kind: str, explicit: bool) -> Fault:
    article = "an" if kind == "identity-based" else "a"
    reason = (
        f"with an explicit deny in {article} {kind} policy"
        if explicit
        else f"because no {kind} policy allows the {action} action"
    )
    text = f"User: {caller.arn} is not authorized to perform: {action} on resource: {resource} {reason}"
    return Fault("AccessDenied", text)


@lru_cache(maxsize=4096)
def _compile(policy: str) -> tuple[_Statement, ...]:
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
    given = as_list(statement[f"Not{name}" if negated else name])
    return _Patterns(tuple(_pattern(text, flags) for text in given), negated)


@lru_cache(maxsize=4096)
def _pattern(text: str, flags: re.RegexFlag) -> re.Pattern[str]:
    """``*`` and ``?`` as IAM has them.

    ``fnmatch`` writes each ``*`` as an atomic group, which never goes back: a match takes time in
    proportion to both lengths, whatever the pattern.
    """
    # fnmatch knows classes of letters besides, and IAM does not.
    return re.compile(fnmatch.translate(text.replace("[", "[[]")), flags)
