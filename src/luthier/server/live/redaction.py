"""Redaction of JSON values by the personal-data rules, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from luthier.gate.edits import Redactor

_ENCODED = re.compile(r"(?:data:[^,]{1,100},)?[A-Za-z0-9+/=_-]{256,}")
"""Media and vectors in base64."""
_UNREADABLE = ("logprobs", "embedding")
"""Members without readable text: pieces of words, and vectors of unredacted text."""
_TOKENS = ("prompt", "input")
"""Members with text or token ids."""
_MANY = 16
"""Length of a list of numbers that is a vector or a text of token ids."""


def redact(value: Any) -> Any:
    """Return a JSON value with pseudonyms for personal data and secrets.

    An item that the rules recognize in one text is replaced in all texts of the value. Content that
    the rules cannot read is left out: media, vectors, token ids and log probabilities.
    """
    value = _without_unreadable(value)
    redactor = Redactor()
    found: dict[str, str] = {}

    def note(text: str) -> str:
        for span in redactor.finder.find(text):
            found.setdefault(text[span.start : span.end], redactor.pseudonym(span))
        return text

    _map(value, note)
    if not found:
        return value
    items = re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))
    return _map(value, lambda text: items.sub(lambda match: found[match[0]], text))


def _map(value: Any, change: Callable[[str], str]) -> Any:
    """Apply ``change`` to every text and number of a JSON value, object keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map(each, change) for each in value]
    if isinstance(value, dict):
        return {change(key): _map(each, change) for key, each in value.items()}
    if isinstance(value, int) and abs(value) >= 10**8:
        changed = change(str(value))
        return value if changed == str(value) else changed
    return value


def _without_unreadable(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        kept = {key: _without_unreadable(each, key) for key, each in value.items()}
        return {key: each for key, each in kept.items() if key not in _UNREADABLE}
    if isinstance(value, list):
        many = len(value) > _MANY or name in _TOKENS
        if many and all(isinstance(each, int | float) for each in value):
            return []
        return [_without_unreadable(each, name) for each in value]
    if isinstance(value, str) and _ENCODED.fullmatch(value):
        return ""
    return value
