"""The edits of a cleaning: one row to what becomes of it, and a word on what was done."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from abc import ABC, abstractmethod
from base64 import b32encode
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from luthier.data.chat import ChatFormat
from luthier.data.parsing import Record, quote
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.preferences import JudgedAnswers
from luthier.data.shapes.texts import RawText, TaggedWords
from luthier.data.tokenization import token_spans
from luthier.errors import RecipeError, RowRefused
from luthier.gate.check import CheckContext, RowBatch
from luthier.gate.checks.balance import labels_of
from luthier.gate.checks.encoding import remove_hidden
from luthier.gate.checks.learning import Learning
from luthier.gate.pii import KINDS, Finder, PiiKind, PiiSpan, replace_items
from luthier.gate.rules import TOO_LONG
from luthier.types import Row, Text, map_texts

if TYPE_CHECKING:
    from luthier.gate.clean_plan import CleaningPlan


@dataclass(frozen=True)
class RowDraft:
    """A row on its way, with the keys that stand beside its form."""

    row: Row
    further: Record


@dataclass(frozen=True)
class EditContext:
    """What edits are made from."""

    plan: CleaningPlan
    known: CheckContext
    """The model that rows are to fit, where there is one."""
    key: bytes | None = field(default=None, repr=False)
    """Key of pseudonyms."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """For each label that is written in another way more often, that one."""


class Edit(ABC):
    """One kind of repair. To add one: a class here, a field of the plan, and a line in :data:`EDITS`.

    An object serves one pass over the rows; two passes over the same rows give the same.
    """

    name: ClassVar[str]
    """The field of the plan that asks for it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """What was done in all rows, for the summary."""

    @classmethod
    @abstractmethod
    def of(cls, context: EditContext) -> Self:
        """The edit as the plan asks for it."""

    @abstractmethod
    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """What becomes of ``draft``, and in words what was done; an empty text where nothing was.

        The words hold nothing of the row's texts.

        Raises:
            RowRefused: where the row cannot be mended so.
        """


CHARACTERS, LINE_ENDS, FORM = "characters removed", "CRLF written as LF", "texts put into NFC"


class Strip(Edit):
    """Removes what ``encoding.control`` and ``encoding.invisible`` find; mends ``encoding.not_nfc``.

    Marks that turn the direction of writing, lost characters and mojibake stay: removing them may
    change what is said. Labels, tags and further keys stay as they are, and so does a text of which
    nothing would be left.
    """

    name: ClassVar[str] = "normalize"

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """There is nothing to choose."""
        return cls()

    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """Mend every text."""
        row, done = draft.row, Counter[str]()
        changed = row.edit_texts(lambda field, text: _strip_text(text, done))
        if not done:
            return [draft], ""
        self.counts += done
        words = ", ".join(f"{count} {what}" for what, count in done.items())
        return [RowDraft(changed, draft.further)], words


def _strip_text(text: str, done: Counter[str]) -> str:
    """The text mended until nothing is left to mend: what is removed may bring marks together."""
    if text.isascii() and text.isprintable():
        return text
    found, before = Counter[str](), ""
    mended = text
    while mended != before:
        before = mended
        if lines := mended.count("\r\n"):
            mended = mended.replace("\r\n", "\n")
            found[LINE_ENDS] += lines
        mended, removed = remove_hidden(mended)
        if removed:
            found[CHARACTERS] += removed
        if not unicodedata.is_normalized("NFC", mended):
            mended = unicodedata.normalize("NFC", mended)
            found[FORM] = 1
    if not mended.strip() and text:
        return text
    done += found
    return mended


class MergeLabels(Edit):
    """Writes labels, and names of tags, as the most frequent of their spellings; mends
    ``label.spelling``."""

    name: ClassVar[str] = "merge_labels"

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__()
        self.labels = labels

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """As the labels of all splits say."""
        return cls(context.labels)

    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """Rename the labels of the row; an array names each once."""
        row = draft.row
        renamed = [name for name in dict.fromkeys(labels_of(row)) if name in self.labels]
        if not renamed:
            return [draft], ""
        words = [f"{quote(name)} to {quote(self.labels[name])}" for name in renamed]
        self.counts.update(words)
        if isinstance(row, TaggedWords):
            tags = [tag[:2] + self.labels.get(tag[2:], tag[2:]) for tag in row.tags or ()]
            row = replace(row, tags=tuple(tags))
        elif isinstance(row, Labelled):
            names = dict.fromkeys(self.labels.get(name, name) for name in row.labels)
            label = next(iter(names)) if isinstance(row.label, str) else tuple(names)
            row = replace(row, label=label)  # type: ignore[call-arg]
        return [RowDraft(row, draft.further)], ", ".join(words)


_LETTERS = 10
"""Letters of a pseudonym made of a key: 50 bits, so that a million items collide with chance 4e-4."""


@dataclass(frozen=True, slots=True)
class Change:
    """One replaced item; it does not hold the item."""

    field: str
    """As in ``luthier.gate.texts``."""
    start: int
    """First character in the field as it was."""
    end: int
    kind: PiiKind
    detail: str
    pseudonym: str


@dataclass
class Redactor:
    """Replaces items in rows; one for a whole data set."""

    finder: Finder = field(default_factory=Finder)
    key: bytes | None = field(default=None, repr=False)
    """At least 16 bytes; makes pseudonyms equal across data sets."""
    table: dict[str, str] | None = field(default=None, repr=False)
    """Where pseudonyms and what they stand for are written, in clear; ``None`` for nowhere."""
    counts: Counter[PiiKind] = field(default_factory=Counter)
    """Items replaced, by kind."""

    def __post_init__(self) -> None:
        if self.key is not None and len(self.key) < 16:
            raise ValueError("the key of pseudonyms must have at least 16 bytes")
        # Numbers are remembered by a hash that nobody can try values against.
        self._secret = self.key or secrets.token_bytes(32)
        self._numbers: dict[bytes, int] = {}
        self._seen: Counter[PiiKind] = Counter()

    def redact(self, row: Row) -> tuple[Row, tuple[Change, ...]]:
        """``row`` with every item of its texts replaced, and what was replaced.

        Labels and tags stay. Tokens that an item covers together become one, with the first one's tag.
        """
        changes: list[Change] = []
        edited: Row
        if isinstance(row, TaggedWords):
            edited = self._words(row, changes)
        else:
            edited = row.edit_texts(lambda field, text: self._text(text, field, changes))
        return (edited if changes else row), tuple(changes)

    def text(self, text: str) -> str:
        """A text that is in no row, with every item replaced."""
        return self._text(text, "text", [])

    def _text(self, text: str, name: str, changes: list[Change]) -> str:
        found = self.finder.find(text)
        return replace_items(text, found, lambda span: self._pseudonymize(span, name, changes))

    def _words(self, row: TaggedWords, changes: list[Change]) -> TaggedWords:
        found = self.finder.find(" ".join(row.tokens))
        tokens: list[str] = []
        tags: list[str] = []
        at, done = 0, 0
        waiting = iter([*found, None])
        span = next(waiting)
        for number, token in enumerate(row.tokens):
            start, end = at, at + len(token)
            at = end + 1
            kept, begins = "", start >= done
            low = max(start, done)
            while span is not None and span.start < end:
                kept += token[low - start : span.start - start]
                kept += self._pseudonymize(span, "tokens", changes)
                low = done = span.end
                span = next(waiting)
            kept += token[max(low - start, 0) :] if low < end else ""
            if begins:
                tokens.append(kept)
                tags += [row.tags[number]] if row.tags is not None else []
            else:
                tokens[-1] += kept
        return replace(row, tokens=tuple(tokens), tags=None if row.tags is None else tuple(tags))

    def _pseudonymize(self, span: PiiSpan, name: str, changes: list[Change]) -> str:
        pseudonym = self.pseudonym(span)
        self.counts[span.kind] += 1
        changes.append(Change(name, span.start, span.end, span.kind, span.detail, pseudonym))
        return pseudonym

    def pseudonym(self, span: PiiSpan) -> str:
        """What stands for an item, for good."""
        said = f"{span.kind}\0{span.value}".encode("utf-8", "surrogatepass")
        digest = hmac.new(self._secret, said, hashlib.sha256).digest()
        if self.key is not None:
            # Letters first: digits alone might be taken for a number again.
            name = b32encode(digest).decode()[:_LETTERS]
        else:
            if digest not in self._numbers:
                self._seen[span.kind] += 1
                self._numbers[digest] = self._seen[span.kind]
            name = str(self._numbers[digest])
        pseudonym = f"[{span.kind.upper()}_{name}]"
        if self.table is not None:
            self.table[pseudonym] = span.value
        return pseudonym


class Redact(Edit):
    """Runs a :class:`Redactor`; what is told of a row are fields, kinds and pseudonyms."""

    name: ClassVar[str] = "redact"

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor = redactor

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """With the kinds and the key of the plan."""
        chosen = context.plan.redact
        kinds = tuple(kind for kind in KINDS if "all" in chosen or kind in chosen)
        return cls(Redactor(Finder(kinds), context.key))

    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """Redact the texts, and every text under further keys: a new data set is passed on whole."""
        before = Counter(self.redactor.counts)
        row, changes = self.redactor.redact(draft.row)
        further = map_texts(draft.further, self.redactor.text)
        new = self.redactor.counts - before
        if not new:
            return [draft], ""
        self.counts.update({str(kind): count for kind, count in new.items()})
        said = [f"{change.field}: {change.pseudonym}" for change in changes]
        if further != draft.further:
            said.append(f"{sum(new.values()) - len(changes)} in further keys")
        return [RowDraft(row, further)], ", ".join(said)


_MOST_CHARACTERS = 64
"""Characters of a token at most, on average over a text that is worth to be tried whole."""
_TURN = 32
"""Bytes that are left for what a template writes around a turn, where rows are passed by unread."""
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"[.!?…]['\"”’)\]]*\s+|[。！？]\s*")
_SPACE = re.compile(r"\s+")
LOST, MADE = "tokens lost", "rows made of them"


class Truncate(Edit):
    """Cuts the end of what is learned, or the start of what is given, token by token.

    What is kept of a cut answer ends as if it were whole: the model learns to stop there. Of judged
    answers both are cut to the same length. A cut that would leave nothing is refused.
    """

    name: ClassVar[str] = "truncate"

    def __init__(self, side: Literal["end", "start"], judge: Learning, strict: bool = True) -> None:
        super().__init__()
        self.side, self.judge, self.strict = side, judge, strict

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """For the model; rows that cannot be cut are left where they will be dropped."""
        side = context.plan.truncate
        assert side is not None
        strict = TOO_LONG.id not in context.plan.dropped_rules
        return cls(side, _judge(context), strict)

    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """Cut the row where it is too long, by as little as makes it fit."""
        row = draft.row
        if _surely_fits(row, self.judge.context):
            return [draft], ""
        fits, before = self._length(row)
        if fits:
            return [draft], ""
        cut = self._cut(row)
        if cut is None:
            if not self.strict:
                return [draft], ""
            message = (
                f"Cutting the {self.side} cannot make the row fit; what is beside it is too long."
            )
            raise RowRefused(TOO_LONG.id, message, "Cut the other side, or --drop row.too_long.")
        lost = before - self._length(cut)[1]
        self.counts[LOST] += lost
        return [RowDraft(cut, draft.further)], f"{lost} tokens cut at the {self.side}"

    def _length(self, row: Row) -> tuple[bool, int]:
        """Whether the row fits as the gate judges it, and its tokens."""
        found = self.judge.measure(RowBatch("train", row.file, [row]))
        long = any(spot.rule == TOO_LONG.id for spot in found.spots)
        return not long, int(sum(found.tokens_N))

    def _cut(self, row: Row) -> Row | None:
        """The longest cut that fits; between two lengths the half is tried."""
        chosen = [(text, _ends(text.content, self.judge.chat)) for text in self._texts(row)]
        low, high = 0, max((len(ends) for _, ends in chosen), default=0)
        best: Row | None = None
        while high - low > 1:
            kept = (low + high) // 2
            new = {text.field: self._shorten(text.content, ends, kept) for text, ends in chosen}
            tried = row.edit_texts(new.get)
            if all(map(str.strip, new.values())) and self._length(tried)[0]:
                best, low = tried, kept
            elif not all(map(str.strip, new.values())):
                low = kept
            else:
                high = kept
        return best

    def _texts(self, row: Row) -> list[Text]:
        """What may be cut: the last answer (and its rejected one), or the first thing that is asked."""
        every = [
            text
            for text in row.texts()  # reasoning and calls are not cut: half of one is none
            if text.field != "tokens" and not text.field.endswith((".reasoning", "]"))
        ]
        learned = [text for text in every if text.part == "target"]
        given = [text for text in every if text.part == "input"]
        if (turns := row.turns()) and turns[0].role == "system":
            given = given[1:]
        if self.side == "start":
            return (given or learned)[:1]
        others: dict[str, Text] = {}
        if isinstance(row, JudgedAnswers):  # the last turn of each other answer
            others = {t.field.rpartition("[")[0]: t for t in every if t.part == "other"}
        return [*(learned or given)[-1:], *others.values()]

    def _shorten(self, text: str, ends: Sequence[int], kept: int) -> str:
        if kept >= len(ends):
            return text
        return text[: ends[kept - 1]] if self.side == "end" else text[ends[len(ends) - kept - 1] :]


class SplitLong(Edit):
    """Splits raw text at a paragraph, a sentence, white space or a token's end; nothing is lost."""

    name: ClassVar[str] = "split_long"

    def __init__(self, chat: ChatFormat, context: int) -> None:
        super().__init__()
        self.chat, self.context = chat, context

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """For the model."""
        assert context.known.chat is not None
        return cls(context.known.chat, context.known.context)

    def apply(self, draft: RowDraft) -> tuple[list[RowDraft], str]:
        """Split a raw text; ids of the parts get a number behind them, as ids must differ."""
        row = draft.row
        if not isinstance(row, RawText):
            return [draft], ""
        parts = self._parts(row.text)
        if len(parts) < 2:
            return [draft], ""
        self.counts[MADE] += len(parts)
        drafts = [
            RowDraft(replace(row, text=part), _number_id(draft.further, number))
            for number, part in enumerate(parts, 1)
        ]
        return drafts, f"split into {len(parts)} rows"

    def _parts(self, text: str) -> list[str]:
        """Parts that fit and together are ``text``; the last may be all of it."""
        if len(text.encode()) < self.context or self._fits(text):
            return [text]
        ends = _ends(text, self.chat)
        parts: list[str] = []
        start = 0
        while start < len(text) and not self._fits(text[start:]):
            first = bisect_right(ends, start)
            room = self.context - 1  # a token ends each text
            stop = self._stop(text, start, ends[first + room - 1])
            while not self._fits(text[start:stop]) and room > 1:
                # Tokens at an edge may be others than inside the whole.
                room -= 1
                stop = self._stop(text, start, ends[first + room - 1])
            parts.append(text[start:stop])
            start = stop
        if text[start:].strip() or not parts:
            return [*parts, text[start:]]
        return [*parts[:-1], parts[-1] + text[start:]]

    def _fits(self, text: str) -> bool:
        # A text of many more bytes than the context has tokens is not encoded to the end.
        head = text[: _MOST_CHARACTERS * self.context]
        return len(head) == len(text) and len(self.chat.encode_text(text)) <= self.context

    def _stop(self, text: str, start: int, limit: int) -> int:
        """Where the part that begins at ``start`` ends: in its second half, as far as it can be."""
        half = start + (limit - start) // 2
        for pattern in (_PARAGRAPH, _SENTENCE, _SPACE):
            stops = [m.end() for m in pattern.finditer(text, half, limit) if m.end() <= limit]
            if stops and text[start : stops[-1]].strip():
                return stops[-1]
        return limit


def _number_id(further: dict[str, Any], number: int) -> dict[str, Any]:
    return {**further, "id": f"{further['id']}#{number}"} if "id" in further else further


def _judge(context: EditContext) -> Learning:
    known = context.known
    assert known.chat is not None
    return Learning(known.objective, known.chat, known.context, 0, every=True)


def _surely_fits(row: Row, context: int) -> bool:
    """Whether the row is so short that it need not be encoded: no token is less than a byte."""
    size = sum(len(text.content.encode()) + _TURN for text in row.texts())
    return size < context // 2


def _ends(text: str, chat: ChatFormat) -> list[int]:
    """The character behind each token of ``text``; every character is of some token."""
    if not chat.tokenizer.is_fast:
        raise RecipeError(
            "this model's tokenizer does not tell where its tokens stand; cut by hand"
        )
    ends = [end for _, _, end in token_spans(chat.tokenizer, text)]
    if ends:
        ends[-1] = len(text)
    return ends


_KINDS: tuple[type[Edit], ...] = (Strip, MergeLabels, Redact, SplitLong, Truncate)
EDITS: Mapping[str, type[Edit]] = {kind.name: kind for kind in _KINDS}
"""By name. Hidden characters go first, as they may stand inside an address or a number."""


def edits_for(context: EditContext) -> list[Edit]:
    """New edits as the plan asks for them."""
    return [kind.of(context) for name, kind in EDITS.items() if name in context.plan.edits]
