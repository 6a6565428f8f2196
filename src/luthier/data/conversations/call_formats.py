"""Tool calls in the notations of model families without ``<tool_call>`` tags.

Each notation opens a call with marks. Most then write the function's name and JSON arguments; LFM2
writes Python calls, and Gemma writes objects with bare keys and its own quotes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from luthier.data.files.parsing import decode_embedded, python_value
from luthier.types import CALL_CLOSE, CALL_OPEN

Reader = Callable[[str, int], tuple[Any, int]]
"""A function of a text and a start that returns a value and its end, or raises ``ValueError``."""
_NAME = r"([\w.-]+)"
NAME, ARGUMENTS = "\ufdd2", "\ufdd3"
"""Unicode noncharacters for the function's name and the JSON arguments in the form of a call."""
_JSON_CALL = f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}'
_HEADER = r"<\|start\|>assistant"
_DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


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
    written: tuple[tuple[str, str], ...] = ()
    """Forms of a call with JSON arguments, up to the end of the arguments. A model writes the first
    form whose first text is in its chat template."""
    frame: re.Pattern[str] | None = None
    """Text of the notation outside of calls; default: ``opens`` and ``marks``."""

    def text_of(self, rest: str) -> str:
        """Return the model's own words in ``rest``, which has no calls."""
        marks = "|".join(map(re.escape, (*self.opens, *self.marks)))
        return re.sub(self.frame or marks, "", rest)


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
        arguments[keyword.arg] = python_value(keyword.value)
    return {"name": ast.unparse(node.func), "arguments": arguments}


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
        (("", f"<|tool_call_start|>[{_JSON_CALL}]"),),
    ),
    "Gemma 4": CallFormat(
        ("<|tool_call>",),
        re.compile(rf"<\|tool_call>\s*call:{_NAME}(?={{)"),
        partial(_read_quoted, '<|"|>', "<tool_call|>"),
        ("<tool_call|>", '<|"|>'),
        (("", f"<|tool_call>call:{NAME}{ARGUMENTS}"),),
    ),
    "FunctionGemma": CallFormat(
        ("<start_function_call>",),
        re.compile(rf"<start_function_call>\s*call:{_NAME}(?={{)"),
        partial(_read_quoted, "<escape>", "<end_function_call>"),
        ("<end_function_call>", "<escape>"),
        (("", f"<start_function_call>call:{NAME}{ARGUMENTS}"),),
    ),
    "gpt-oss": CallFormat(
        ("<|channel|>commentary", "<|start|>assistant", " to=functions."),
        re.compile(
            rf"(?:{_HEADER})?(?:<\|channel\|>commentary)? ?to=functions\.{_NAME}"
            r"(?:(?!<\|message\|>).){0,80}<\|message\|>"
        ),
        marks=("<|channel|>", "<|start|>", "<|message|>"),
        written=(("", f" to=functions.{NAME}<|channel|>commentary json<|message|>{ARGUMENTS}"),),
        frame=re.compile(rf"(?:{_HEADER})?<\|channel\|>\w+<\|message\|>|<\|\w+\|>"),
    ),
    "Mistral": CallFormat(
        ("[TOOL_CALLS]",),
        re.compile(rf"\[TOOL_CALLS\]\s*(?:{_NAME}(?:\[CALL_ID\]\w*)?\[ARGS\])?"),
        marks=("[CALL_ID]", "[ARGS]"),
        written=(
            ("[ARGS]", f"[TOOL_CALLS]{NAME}[ARGS]{ARGUMENTS}"),
            ("", f"[TOOL_CALLS][{_JSON_CALL}]"),
        ),
    ),
    "Granite and Phi-4": CallFormat(
        ("<|tool_call|>",),
        re.compile(r"<\|tool_call\|>\s*"),
        marks=("<|/tool_call|>",),
        written=(("", f"<|tool_call|>[{_JSON_CALL}]"),),
    ),
    "DeepSeek V3": CallFormat(
        ("<｜tool▁calls▁begin｜>",),
        re.compile(
            rf"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?{_NAME}(?:<｜tool▁sep｜>|\n```json\n)"
        ),
        marks=(
            "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
            "\n```",
        ),
        written=(
            ("```json", f"{_DEEPSEEK}function<｜tool▁sep｜>{NAME}\n```json\n{ARGUMENTS}"),
            ("", f"{_DEEPSEEK}{NAME}<｜tool▁sep｜>{ARGUMENTS}"),
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
        written=(
            (
                "",
                f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{NAME}:0"
                f"<|tool_call_argument_begin|>{ARGUMENTS}",
            ),
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


def call_form(template: str, tokens: Container[str] = ()) -> str:
    """Return the form of a call, with :data:`NAME` and :data:`ARGUMENTS`.

    The form is that of the chat template, else of the special ``tokens``, else JSON.
    """
    if CALL_OPEN in template:
        return f"{CALL_OPEN}\n{_JSON_CALL}\n{CALL_CLOSE}"
    for known in (template, tokens):
        for form in FORMATS.values():
            if any(mark in known for mark in form.opens):
                return next(text for mark, text in form.written if mark in template)
    return _JSON_CALL


def read_bodies(text: str) -> tuple[list[Any], str]:
    """Return the calls in ``text`` as parsed JSON, and the text next to the calls.

    The last item is ``None`` for an invalid call. The list is empty for a text without an opening
    mark.
    """
    first = find_open(text)
    if first < 0:
        return [], text
    form = next(each for each in FORMATS.values() if text.startswith(each.opens, first))
    bodies: list[Any] = []
    rest, at = text[:first], first
    while header := form.header.search(text, at):
        rest += form.text_of(text[at : header.start()])
        try:
            body, at = form.read(text, header.end())
        except ValueError:
            return [*bodies, None], rest
        name = header[1] if form.header.groups else None
        bodies.append(body if name is None else {"name": name, "arguments": body})
    return bodies or [None], rest + form.text_of(text[at:])
