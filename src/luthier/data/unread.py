"""Columns that no shape reads, judged by name and content.

A column that names a target, media or a mark is an error, because the model would learn another task
than the rows describe. The judgement depends on the shape: next to a bare prompt any class is a
missing target, as next to short texts. Next to a reply, or in a corpus of long texts, a class whose
name says nothing is usually a property of the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from luthier.data.conversations.row_context import is_system_key
from luthier.data.conversations.tool_forms import REASONING_KEYS
from luthier.data.files.parsing import quote
from luthier.data.inputs import media_kind
from luthier.data.shapes import SHAPES
from luthier.data.shapes.base import Shape
from luthier.data.shapes.conversations import (
    LONGEST_CLASS,
    Conversation,
    PromptCompletion,
    PromptOnly,
)
from luthier.data.shapes.media import BareAudio, BareImage, MediaRow
from luthier.data.shapes.preferences import thumb_of
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import RawText, TextPair
from luthier.errors import Location, Problem
from luthier.formatting import list_some, nearest_name

MOST_VALUES = 100
"""Most distinct values of a column that may be a class."""
ROWS_PER_VALUE = 4
"""Fewest rows per distinct value, on average, of a column that may be a class."""
SHORT_TEXT = 200
"""Most characters of raw text, on average, that is rather classified than a corpus."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BARE = (RawText, PromptOnly, BareImage, BareAudio)
"""Shapes without a target of their own."""
_WITH_REPLY = (Conversation, PromptCompletion)
_MEDIA = _words("image img picture photo audio speech wav video pixel_values")
_REASONING = _words("thought chain_of_thought cot") | {*REASONING_KEYS}
_SPANS = _words("bbox box bounding_box span entity")
_MARKS = _words(
    "is_impossible kto_tag accepted is_accepted label score rating stars reward thumb quality "
    "preference liked is_good is_correct thumbs_up thumbs_down upvote approved"
)
_CLASSES = _words(
    "label class intent category topic y sentiment emotion tag target score rating stars"
)
_MISSPELT = ("label", "rating", "category", "sentiment")
_REPLIES = _words("output response answer reply completion target")
_TEXTS = _REPLIES | _words(
    "summary translation transcript transcription caption solution expected tldr highlights gold "
    "correction corrected paraphrase simplified translated"
)
_INPUTS = _words("instruction")
_NOTED = _words(
    "id uid uuid guid key index idx hash md5 sha sha256 url uri link href date time timestamp "
    "datetime year month day at source src origin dataset corpus subset split fold lang language "
    "locale licence license file filename path page row line number nr count tokens length version "
    "author user username speaker email title name metadata meta info doc docid comment note "
    "password format encoding model generator engine abstract description keyword tag header html raw "
    "markdown xml json"
)
"""Last words of names that describe where a row comes from."""
_COUNTED = _words("num n nr count created updated")
_ENDINGS = re.compile(r"(?:_(?:name|text|path|url|file|bytes|base64|b64|data|\d+))+$")
_BEFORE = re.compile(r"^(?:(?:gold|true|correct|human|raw)_)+(?=.)")

Severity = Literal["error", "warning", "note"]
UNREAD, CATEGORY, IGNORED = "column.unread", "column.category", "column.ignored"
SEVERITY_OF_RULE: Mapping[str, Severity] = {UNREAD: "error", CATEGORY: "warning", IGNORED: "note"}
"""Default severities of the rules."""


@lru_cache(10_000)
def _snake(name: str) -> str:
    """Return a name in lower case, with words joined by underscores."""
    name = name.rpartition(".")[2]
    return re.sub(r"\W+|(?<=[a-z0-9])(?=[A-Z])", "_", name.strip()).lower().strip("_")


def _is_in(name: str, names: frozenset[str]) -> bool:
    """Return whether a name, its singular or its core is in ``names``."""
    core = _ENDINGS.sub("", _BEFORE.sub("", name))
    if core.endswith("_id") and core[:-3] in _CLASSES:
        core = core[:-3]
    forms = {each for one in (name, core) for each in (one, one.removesuffix("s"))}
    forms |= {each.removesuffix("e") for each in forms if each.endswith(("sse", "xe"))}
    forms |= {f"{each[:-2]}y" for each in forms if each.endswith("ie")}
    return not forms.isdisjoint(names)


@dataclass(slots=True)
class ColumnValues:
    """Values of an ignored column."""

    kind: type[Shape]
    """Shape of the first row with the column."""
    filled: int = 0
    """Rows with a value."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by value; empty for too many or too long values."""
    many: bool = False
    numbers: bool = True
    media: bool = True
    characters: int = 0
    """Characters of all values that are text."""
    context: int = 0
    """Characters of the raw text in all rows with a value."""

    def add(self, value: object, text: object) -> None:
        """Count a value next to a raw text. Null, empty text and empty arrays are no values."""
        if value is None or value == "" or value == [] or value == {}:
            return
        self.filled += 1
        self.numbers &= isinstance(value, int | float)
        if self.media:
            self.media = _is_media(value)
        self.characters += len(value) if isinstance(value, str) else 0
        self.context += len(text) if isinstance(text, str) else 0
        if self.many:
            return
        text = str(value)
        self.counts[text] = self.counts.get(text, 0) + 1
        if len(text) > LONGEST_CLASS or len(self.counts) > MOST_VALUES:
            self.many, self.counts = True, {}

    @property
    def few(self) -> bool:
        """True for at least two values that each occur in several rows."""
        return len(self.counts) > 1 and ROWS_PER_VALUE * len(self.counts) <= self.filled

    @property
    def long(self) -> bool:
        """True for text that is longer than a class, on average."""
        return self.characters > LONGEST_CLASS * self.filled

    @property
    def next_to_short_text(self) -> bool:
        """True if the rows are too short for a corpus."""
        return self.context <= SHORT_TEXT * self.filled

    @property
    def two_sided(self) -> bool:
        """True if each value can be read as a thumb, such as true and false, or good and bad."""
        return not self.many and all(thumb_of(each) is not None for each in self.counts)


def _is_media(value: object) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    if not isinstance(value, str):
        return isinstance(value, bytes)
    return value.startswith(("data:image/", "data:audio/", "data:video/")) or (
        "\n" not in value and media_kind(value) is not None
    )


def judge(name: str, values: ColumnValues) -> tuple[Severity, str]:
    """Return how serious it is that a column is ignored, and the key for its content.

    The key is empty if luthier has none for the shape.
    """
    kind, called = values.kind, _snake(name)
    bare, replies = issubclass(kind, _BARE), issubclass(kind, _WITH_REPLY)
    if _is_in(called, _MEDIA):
        return "error", "image" if kind is RawText else ""
    if _is_in(called, _REASONING | {"is_impossible", "kto_tag"}):
        return "error", ""
    spans = _is_in(called, _SPANS) or (called in ("start", "end") and values.numbers)
    if spans and issubclass(kind, (*_BARE, MediaRow, AnsweredQuestion)):
        return "error", ""
    words = called.split("_")
    noted = words[-1].removesuffix("s") in _NOTED or words[-1] in _NOTED or words[0] in _COUNTED
    if words[-1] in ("url", "urls", "uri", "link", "links"):
        return "note", ""
    if replies and _is_in(called, _MARKS):
        rated = values.numbers and kind is PromptCompletion
        return "error", "label" if values.two_sided else "rating" if rated else ""
    if replies and _is_in(called, _REPLIES):
        return "error", "completion" if kind is PromptCompletion else ""
    if (replies or bare) and (_is_in(called, _INPUTS) or (bare and is_system_key(name))):
        return "error", ""
    if bare and (_is_in(called, _CLASSES | _TEXTS | _MARKS)):
        return "error", _target_key(kind, called, values)
    if replies and _is_in(called, _CLASSES):
        return "warning", ""
    if kind is TextPair and values.two_sided and values.few:
        return "warning", ""  # pairs marked as unlike would be learned as alike
    if noted or not (bare or replies):
        return "note", ""
    if values.filled and values.media:
        return "error", "image" if kind is RawText else ""
    misspelt = nearest_name(called, _MISSPELT, 0.8)
    if bare and (_is_in(words[-1], _CLASSES | _TEXTS) or (misspelt and misspelt[0] == called[0])):
        return "error", _target_key(kind, called, values)
    if kind is RawText and values.long:
        return "error", "completion"
    if values.few and issubclass(kind, (RawText, PromptOnly)):
        is_target = kind is PromptOnly or values.two_sided or values.next_to_short_text
        return "error" if is_target else "warning", _target_key(kind, called, values)
    if values.few and replies:
        return "warning", ""
    return "note", ""


def _target_key(kind: type[Shape], called: str, values: ColumnValues) -> str:
    """Return the key under which a column next to bare text or a prompt is learned."""
    if kind is PromptOnly:
        return "" if values.numbers else "completion"
    if values.few or _is_in(called, _CLASSES - {"target"}):
        return "rating" if values.numbers and not values.few else "label"
    if values.numbers:
        return "rating"
    return "completion" if kind is RawText else "text"


def _fix(name: str, key: str, kind: type[Shape]) -> str:
    """Return the settings that read or ignore a column."""
    ignore = f"`data.columns.{name}=`"
    if "[]." in name:
        return "Remove the key."
    if key in ("", name):
        return f"Leave {quote(name)} out with {ignore}."
    read = f"`data.columns.{key}={name}`"
    if kind is RawText and key == "completion":
        read = f"`data.columns.prompt=text` and {read}"
    return f"Read {quote(name)} with {read}, or leave it out with {ignore}."


class UnreadColumns:
    """Ignored columns of a source, in order of appearance."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.names_in_file = {key: name for key, name in columns.items() if name}
        self.values: dict[str, ColumnValues] = {}

    def add(self, shape: str, unread: Iterable[str], record: Mapping[str, object]) -> None:
        """Count the values of a row.

        Args:
            shape: shape of the row.
            unread: ignored columns that may be new.
            record: row with luthier's keys.
        """
        for key in unread:
            if key not in self.values:
                self.values[key] = ColumnValues(SHAPES[shape])
        for key, values in self.values.items():
            values.add(record.get(key), record.get("text"))

    def problems(self, location: Location, keys_of_turns: Iterable[str] = ()) -> list[Problem]:
        """Return at most one problem per rule.

        Args:
            location: the source.
            keys_of_turns: ignored keys of turns, such as ``messages[].thinking``.
        """
        found: dict[Severity, list[tuple[str, str]]] = {"error": [], "warning": [], "note": []}
        turns = {key: ColumnValues(Conversation, 1, media=False) for key in keys_of_turns}
        for key, values in {**self.values, **turns}.items():
            if not values.filled:
                continue
            name = self.names_in_file.get(key, key)
            severity, read_as = judge(key, values)
            what = f"{quote(name)} ({len(values.counts):,} values)" if values.few else quote(name)
            found[severity].append((what, _fix(name, read_as, values.kind)))
        problems = []
        for rule, severity in SEVERITY_OF_RULE.items():
            if columns := found[severity]:
                verb = "is" if len(columns) == 1 else "are"
                message = f"{list_some((what for what, _ in columns), 10)} {verb} not read."
                fix = " ".join(fix for _, fix in columns[:10]) if severity != "note" else ""
                problems.append(Problem(rule, message, fix, location))
        return problems
