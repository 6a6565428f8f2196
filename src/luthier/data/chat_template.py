"""Chat templates, rendered as transformers renders them, without importing it.

A template is a program that comes with a model. It runs in Jinja's sandbox, on copies of plain values,
with the filters, functions and white space that templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateError, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import TrackingCodeGenerator
from jinja2.nodes import Scope
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that the reasoning of a turn has; the first is the one that templates read."""
_FUNCTIONS = frozenset({"raise_exception"})
"""Functions that every template can call and no caller can replace, without Jinja's own."""


class _GenerationTag(Extension):
    """``{% generation %}`` around what the assistant writes: only its content counts here."""

    tags = {"generation"}  # noqa: RUF012 - an attribute of instances in Jinja

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)  # what is set inside stays inside


_EXTENSIONS: list[str | type[Extension]] = [_GenerationTag, "jinja2.ext.loopcontrols"]


@lru_cache(maxsize=32)
def names_read(template: str) -> frozenset[str]:
    """Names that a chat template takes from its caller: what it sets itself before it reads it is none.

    A template that is no Jinja reads none; who renders it is told why.
    """
    # Else what is constant would be computed, such as a text of three gigabytes: what finalizes values
    # is asked at run time only, and no optimizer goes over the expressions.
    environment = Environment(  # noqa: S701 - parsed and never rendered
        extensions=_EXTENSIONS, finalize=pass_context(lambda _, value: value)
    )
    try:
        tracker = TrackingCodeGenerator(environment)
        tracker.optimizer = None
        tracker.visit(environment.parse(template))
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(tracker.undeclared_identifiers - _FUNCTIONS)


def render_template(
    template: str,
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    names: Mapping[str, Any],
) -> str:
    """The text that ``template`` makes of a conversation; ``names`` are what else it may read.

    Raises:
        ValueError: for a conversation without turns.
        Exception: whatever the template, which is a program, runs into.
    """
    if not turns:
        raise ValueError("a conversation has at least one message")
    text: str = _compile(template).render(
        messages=[_copy_turn(turn) for turn in turns],
        tools=_copy(list(tools)) if tools else None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **_copy(names),
    )
    return text


def _copy_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without keys of no value, its reasoning under the names that templates read."""
    fields: dict[str, Any] = {k: _copy(v) for k, v in turn.items() if v is not None}
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _copy(value: Any) -> Any:
    """Plain values alone: methods of others may be none that the sandbox knows to be dangerous."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration's own gives its name
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_copy(key): _copy(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copy(each) for each in value]
    if isinstance(value, tuple):
        return tuple(_copy(each) for each in value)
    return f"<{type(value).__name__}>"


class _Dict:
    """What ``dict`` is in a template: the class itself would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's ``namespace``, which takes no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a field "self"
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template stores {name!r}; names must not begin with an underscore")


@lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes the characters of HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    compiled = environment.from_string(template)
    # Each rendering copies them, and a chain of maps slowly.
    compiled.globals = dict(compiled.globals)
    return compiled
