"""Tool calls in the notations of model families without ``<tool_call>`` tags.

Each notation opens a call with marks. Most then write the function's name and JSON arguments; LFM2
writes Python calls, and Gemma writes objects with bare keys and its own quotes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from luthier.data.parsing import decode_embedded

Reader = Callable[[str, int], tuple[Any, int]]
"""A function of a text and a start that returns a value and its end, or raises ``ValueError``."""
_NAME = r"([\w.-]+)"


@dataclass(frozen=True)
class CallFormat:
    """Notation of tool calls of a family of models."""

    opens: tuple[str, ...]
    """Texts that can begin the first call of a reply."""
    header: re.Pattern[str]
    """Text before the body of each call. Group 1 is the function's name; without a name, the body
    has the name."""
    read: Reader = decode_embedded
    marks: tuple[str, ...] = ()
    """Special tokens within a call, in addition to ``opens``."""


def _read_python(close: str, text: str, at: int) -> tuple[Any, int]:
    """Return the Python calls before ``close``, or a JSON value."""
    try:
        return decode_embedded(text, at)
    except ValueError:
        source, mark, _ = text[at:].partition(close)
    try:
        body = ast.parse(source.strip(), mode="eval").body
        calls = body.elts if isinstance(body, ast.List) else [body]
        return [_python_call(call) for call in calls], at + len(source) + len(mark)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("the call is not valid Python") from error


def _python_call(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("the text is not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("an argument has no name")
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    # Python literals without a form in JSON, such as bytes, are errors.
    found, _ = decode_embedded(json.dumps(arguments, allow_nan=False))
    return {"name": ast.unparse(node.func), "arguments": found}


class _JsonNames(ast.NodeTransformer):
    """Conversion of JSON's ``true``, ``false`` and ``null``, which templates write in Python."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        values = {"true": True, "false": False, "null": None}
        return ast.Constant(values[node.id]) if node.id in values else node


_BARE_KEY = re.compile(r'([{,]\s*)([^\s{}\[\]:,"][^{}\[\]:,"]*):')
_BARE_NONE = re.compile(r"(?<=[:,\[])\s*None\b")


def _read_quoted(quote: str, close: str, text: str, at: int) -> tuple[Any, int]:
    """Return an object with bare keys, and strings between two ``quote``; or a JSON object."""
    try:
        return decode_embedded(text, at)
    except ValueError:
        source, mark, _ = text[at:].partition(close)
    parts = source.split(quote)
    for place, part in enumerate(parts):
        if place % 2:
            parts[place] = json.dumps(part)
        else:
            # A string before the part cannot be followed by a bare key without a comma.
            parts[place] = _BARE_NONE.sub("null", _BARE_KEY.sub(r'\1"\2":', part))
    value, _ = decode_embedded("".join(parts))
    return value, at + len(source) + len(mark)


FORMATS: Mapping[str, CallFormat] = {
    "LFM2": CallFormat(
        ("<|tool_call_start|>",),
        re.compile(r"<\|tool_call_start\|>\s*"),
        partial(_read_python, "<|tool_call_end|>"),
        ("<|tool_call_end|>",),
    ),
    "Gemma 4": CallFormat(
        ("<|tool_call>",),
        re.compile(rf"<\|tool_call>\s*call:{_NAME}(?={{)"),
        partial(_read_quoted, '<|"|>', "<tool_call|>"),
        ("<tool_call|>", '<|"|>'),
    ),
    "FunctionGemma": CallFormat(
        ("<start_function_call>",),
        re.compile(rf"<start_function_call>\s*call:{_NAME}(?={{)"),
        partial(_read_quoted, "<escape>", "<end_function_call>"),
        ("<end_function_call>", "<escape>"),
    ),
    "gpt-oss": CallFormat(
        ("<|channel|>commentary", "<|start|>assistant", " to=functions."),
        re.compile(rf"to=functions\.{_NAME}(?:(?!<\|message\|>).){{0,80}}<\|message\|>"),
        marks=("<|channel|>", "<|start|>", "<|message|>"),
    ),
    "Mistral": CallFormat(
        ("[TOOL_CALLS]",),
        re.compile(rf"\[TOOL_CALLS\]\s*(?:{_NAME}(?:\[CALL_ID\]\w*)?\[ARGS\])?"),
        marks=("[CALL_ID]", "[ARGS]"),
    ),
    "Granite and Phi-4": CallFormat(
        ("<|tool_call|>",), re.compile(r"<\|tool_call\|>\s*"), marks=("<|/tool_call|>",)
    ),
    "DeepSeek V3": CallFormat(
        ("<｜tool▁calls▁begin｜>",),
        re.compile(
            rf"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?{_NAME}(?:<｜tool▁sep｜>|\n```json\n)"
        ),
        marks=(
            "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
        ),
    ),
    "Kimi K2": CallFormat(
        ("<|tool_calls_section_begin|>",),
        re.compile(
            r"<\|tool_call_begin\|>\s*(?:functions\.)?([\w.-]+)(?::\d+)?\s*"
            r"<\|tool_call_argument_begin\|>"
        ),
        marks=(
            "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
    ),
}  # fmt: skip
OPENS = tuple(mark for form in FORMATS.values() for mark in form.opens)
"""All texts that can begin a call."""
MARKS = frozenset(mark for form in FORMATS.values() for mark in (*form.opens, *form.marks))
"""All marks, of which tokenizers with the mark as a special token drop none from decoded text."""


def find_open(text: str, opens: tuple[str, ...] = OPENS) -> int:
    """Return the index of the first of ``opens`` in ``text``; -1 without any."""
    return min((at for mark in opens if (at := text.find(mark)) >= 0), default=-1)


def read_bodies(text: str) -> list[Any]:
    """Return the calls in ``text`` as parsed JSON; ``None`` as last item for an invalid call.

    The list is empty for a text without an opening mark.
    """
    first = find_open(text)
    if first < 0:
        return []
    form = next(each for each in FORMATS.values() if text.startswith(each.opens, first))
    bodies: list[Any] = []
    at = first
    while header := form.header.search(text, at):
        try:
            body, at = form.read(text, header.end())
        except ValueError:
            return [*bodies, None]
        name = header[1] if form.header.groups else None
        bodies.append(body if name is None else {"name": name, "arguments": body})
    return bodies or [None]
