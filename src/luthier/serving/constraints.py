"""Answers that have to match a JSON schema: which tokens may come next, by the library llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.chat import panics_refused
from luthier.errors import RecipeError
from luthier.serving.inference import InferenceFailed, InferenceRefused, Tool

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

KEPT = 64
"""Compiled grammars that are kept."""
LARGEST = 200_000
"""Characters of a schema at most."""
_FORM: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""White space as Python writes it, and no other: a model cannot fill an answer with line breaks."""
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy())

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next, booleans ``[V]``."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        return torch.from_numpy(np.pad(allowed, (0, vocabulary - len(allowed))))

    def take(self, token: int) -> None:
        """Go on behind ``token``."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InferenceFailed(
                "ModelError", f"The answer cannot be kept to its schema: {_reason(self._matcher)}"
            )


class Constraints:
    """The grammars of one model's vocabulary. Safe to share between threads."""

    def __init__(self, chat: ChatFormat, vocabulary: int) -> None:
        self._chat, self._vocabulary = chat, vocabulary
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def schema(self, schema: Mapping[str, Any] | bool) -> Matcher:
        """A matcher for JSON of ``schema``; for any object where it is ``True``.

        Raises:
            InferenceRefused: where it is no JSON schema, or has what cannot be enforced.
        """
        return self._matcher(_grammar({"type": "object"} if isinstance(schema, bool) else schema))

    def calls(self, tools: Sequence[Tool], marked: bool) -> Matcher:
        """A matcher for one call of one of ``tools``; ``marked`` ones stand between tags."""
        if len(tools) == 1:
            schema = _call(tools[0], "#")
        else:
            schema = {"anyOf": [_call(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]}
        if not marked:
            return self._matcher(_grammar(schema))
        body = json.dumps({**schema, "x-guidance": _FORM})
        lark = f'start: "{CALL_OPEN}\\n" call "\\n{CALL_CLOSE}"\ncall: %json {body}\n'
        from llguidance import LLMatcher

        return self._matcher(LLMatcher.grammar_from_lark(lark))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; a special one, its name."""
        with self._lock:
            try:
                tokenizer = self._tokens()
            except InferenceRefused:  # written in Python, of whole characters
                return self._chat.pieces([token])[0].encode()
        found: bytes = tokenizer.decode_bytes([token])
        return found

    def _matcher(self, grammar: str) -> Matcher:
        from llguidance import LLMatcher

        if len(grammar) > LARGEST:
            raise InferenceRefused(f"The schema is longer than {LARGEST:,} characters.", "schema")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return Matcher(found.deep_copy())
            tokenizer = self._tokens()
        made = LLMatcher(tokenizer, grammar, log_level=0)
        if made.is_error():
            raise InferenceRefused(f"The JSON schema cannot be enforced: {_reason(made)}", "schema")
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return Matcher(made.deep_copy())

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            try:
                with panics_refused():
                    self._tokenizer = self._chat.grammar_tokens(self._vocabulary)
            except (ValueError, RecipeError) as error:
                raise InferenceRefused(
                    f"Answers of this model cannot be kept to a schema: {error}", "schema"
                ) from error
        return self._tokenizer


def _grammar(schema: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping):
        raise InferenceRefused("A JSON schema is an object.", "schema")
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(dict(schema), None, _FORM)
    except (ValueError, TypeError, RecursionError) as error:
        raise InferenceRefused(f"The JSON schema cannot be read: {error}", "schema") from error
    return grammar


def _reason(matcher: Any) -> str:
    return " ".join(str(matcher.get_error()).split())[:300]


def _call(tool: Tool, place: str) -> dict[str, Any]:
    """The schema of a call of ``tool``, where it stands at ``place`` of the whole one."""
    arguments = _moved(dict(tool.parameters), f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """``schema`` with its references to itself, after it was put at ``place`` of another one."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
