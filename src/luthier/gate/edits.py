"""Edits of a cleaning: fix a row and describe the change."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

from luthier.data.files.parsing import Record, quote
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.texts import TaggedWords
from luthier.gate.check import CheckContext
from luthier.gate.checks.balance import labels_of
from luthier.gate.checks.encoding import remove_hidden
from luthier.gate.pii import KINDS, Finder, PiiKind, PiiSpan, replace_items
from luthier.types import Row, map_texts

if TYPE_CHECKING:
    from luthier.gate.clean_plan import CleaningPlan


@dataclass(frozen=True)
class RowDraft:
    """An edited row, with the keys of the record outside the row's form."""

    row: Row
    further: Record


@dataclass(frozen=True)
class EditContext:
    """Plan, model and label spellings that edits are created from."""

    plan: CleaningPlan
    known: CheckContext
    """Base model that the rows must fit, if given."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Most frequent spelling of each label that has several spellings."""


class Edit(ABC):
    """A kind of fix.

    To add an edit: a class here, a field of the plan and a line in :data:`EDITS`. An object serves
    one pass over the rows. Passes over equal rows give equal results.
    """

    name: ClassVar[str]
    """Name of the plan's field."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Statistics for the summary."""

    @classmethod
    @abstractmethod
    def of(cls, context: EditContext) -> Self:
        """Create the edit from the plan."""

    @abstractmethod
    def apply(self, draft: RowDraft) -> tuple[RowDraft, str]:
        """Return the edited draft and a description without the row's texts; empty if unchanged."""


CHARACTERS, LINE_ENDS, FORM = "characters removed", "CRLF written as LF", "texts put into NFC"


class Strip(Edit):
    """Fix for ``encoding.control``, ``encoding.invisible`` and ``encoding.not_nfc``.

    Direction marks, replacement characters and mojibake stay, because removing such characters may
    change the meaning. Labels, tags, unknown keys and texts that would become empty stay unchanged.
    """

    name: ClassVar[str] = "normalize"

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """Create the edit, which has no options."""
        return cls()

    def apply(self, draft: RowDraft) -> tuple[RowDraft, str]:
        """Fix every text of the row."""
        row, done = draft.row, Counter[str]()
        changed = row.edit_texts(lambda field, text: _strip_text(text, done))
        if not done:
            return draft, ""
        self.counts += done
        words = ", ".join(f"{count} {what}" for what, count in done.items())
        return RowDraft(changed, draft.further), words


def _strip_text(text: str, done: Counter[str]) -> str:
    """Fix the text repeatedly: a removal can join characters to a new match."""
    if text.isascii() and text.isprintable():
        return text
    found, before = Counter[str](), ""
    fixed = text
    while fixed != before:
        before = fixed
        if lines := fixed.count("\r\n"):
            fixed = fixed.replace("\r\n", "\n")
            found[LINE_ENDS] += lines
        fixed, removed = remove_hidden(fixed)
        if removed:
            found[CHARACTERS] += removed
        if not unicodedata.is_normalized("NFC", fixed):
            fixed = unicodedata.normalize("NFC", fixed)
            found[FORM] = 1
    # An empty text would make the row invalid, and a row must not be lost by a fix of its
    # characters.
    if not fixed.strip() and text:
        return text
    done += found
    return fixed


class Relabel(Edit):
    """Correction of single labels by a person."""

    name: ClassVar[str] = "relabel"

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__()
        self.labels = labels

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """Create the edit from the plan."""
        return cls(context.plan.relabel)

    def apply(self, draft: RowDraft) -> tuple[RowDraft, str]:
        """Replace the label of a row that the plan names."""
        row = draft.row
        # The plan comes from JSON or TOML, whose keys are text.
        new = self.labels.get(str(int(row.line)))
        if new is None or not isinstance(row, Labelled) or row.labels == (new,):
            return draft, ""
        self.counts["labels changed"] += 1
        label = new if isinstance(row.label, str) else (new,)
        words = f"{', '.join(map(quote, row.labels))} to {quote(new)}"
        return RowDraft(replace(row, label=label), draft.further), words  # type: ignore[call-arg]


class MergeLabels(Edit):
    """Fix for ``label.spelling``: write labels and tag names in the most frequent spelling."""

    name: ClassVar[str] = "merge_labels"

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__()
        self.labels = labels

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """Create the edit from the label spellings of all splits."""
        return cls(context.labels)

    def apply(self, draft: RowDraft) -> tuple[RowDraft, str]:
        """Rename the labels of the row; an array names each once."""
        row = draft.row
        renamed = [name for name in dict.fromkeys(labels_of(row)) if name in self.labels]
        if not renamed:
            return draft, ""
        words = [f"{quote(name)} to {quote(self.labels[name])}" for name in renamed]
        self.counts.update(words)
        if isinstance(row, TaggedWords):
            tags = [tag[:2] + self.labels.get(tag[2:], tag[2:]) for tag in row.tags or ()]
            row = replace(row, tags=tuple(tags))
        elif isinstance(row, Labelled):
            # Two spellings in one array become the same label, which must not occur twice.
            names = dict.fromkeys(self.labels.get(name, name) for name in row.labels)
            label = next(iter(names)) if isinstance(row.label, str) else tuple(names)
            row = replace(row, label=label)  # type: ignore[call-arg]
        return RowDraft(row, draft.further), ", ".join(words)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Location and pseudonym of a replaced item, without the item."""

    field: str
    """Field name, as in ``luthier.gate.batch_text``."""
    start: int
    """Offset of the first character in the original field."""
    end: int
    kind: PiiKind
    detail: str
    pseudonym: str


@dataclass
class Redactor:
    """Replaces personal data and secrets in the rows of a data set, with consistent pseudonyms."""

    finder: Finder = field(default_factory=Finder)
    counts: Counter[PiiKind] = field(default_factory=Counter)
    """Items replaced, by kind."""

    def __post_init__(self) -> None:
        self._numbers: dict[tuple[PiiKind, str], int] = {}
        self._seen: Counter[PiiKind] = Counter()

    def redact(self, row: Row) -> tuple[Row, tuple[Replacement, ...]]:
        """Return ``row`` with every item replaced, and the changes.

        Labels and tags stay. Tokens covered by one item become one token with the first token's
        tag.
        """
        changes: list[Replacement] = []
        edited: Row
        if isinstance(row, TaggedWords):
            edited = self._words(row, changes)
        else:
            edited = row.edit_texts(lambda field, text: self._text(text, field, changes))
        return (edited if changes else row), tuple(changes)

    def text(self, text: str) -> str:
        """Replace every item of a text outside a row."""
        return self._text(text, "text", [])

    def _text(self, text: str, name: str, changes: list[Replacement]) -> str:
        found = self.finder.find(text)
        return replace_items(text, found, lambda span: self._pseudonymize(span, name, changes))

    def _words(self, row: TaggedWords, changes: list[Replacement]) -> TaggedWords:
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

    def _pseudonymize(self, span: PiiSpan, name: str, changes: list[Replacement]) -> str:
        pseudonym = self.pseudonym(span)
        self.counts[span.kind] += 1
        changes.append(Replacement(name, span.start, span.end, span.kind, span.detail, pseudonym))
        return pseudonym

    def pseudonym(self, span: PiiSpan) -> str:
        """Return the pseudonym of an item. Equal items have equal pseudonyms."""
        item = span.kind, span.value
        if item not in self._numbers:
            self._seen[span.kind] += 1
            self._numbers[item] = self._seen[span.kind]
        return f"[{span.kind.upper()}_{self._numbers[item]}]"


class Redact(Edit):
    """Fix for ``privacy.*``. The description lists fields, kinds and pseudonyms only."""

    name: ClassVar[str] = "redact"

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self.redactor = redactor

    @classmethod
    def of(cls, context: EditContext) -> Self:
        """Return the edit for the kinds of the plan."""
        chosen = context.plan.redact
        kinds = tuple(kind for kind in KINDS if "all" in chosen or kind in chosen)
        return cls(Redactor(Finder(kinds)))

    def apply(self, draft: RowDraft) -> tuple[RowDraft, str]:
        """Redact all texts, including unknown keys, because the new data set contains the unknown
        keys."""
        before = Counter(self.redactor.counts)
        row, changes = self.redactor.redact(draft.row)
        further = map_texts(draft.further, self.redactor.text)
        new = self.redactor.counts - before
        if not new:
            return draft, ""
        self.counts.update({str(kind): count for kind, count in new.items()})
        changed_fields = [f"{change.field}: {change.pseudonym}" for change in changes]
        if further != draft.further:
            changed_fields.append(f"{sum(new.values()) - len(changes)} in further keys")
        return RowDraft(row, further), ", ".join(changed_fields)


_KINDS: tuple[type[Edit], ...] = (Strip, Relabel, MergeLabels, Redact)
EDITS: Mapping[str, type[Edit]] = {kind.name: kind for kind in _KINDS}
"""Edits by name. Hidden characters go first: an address or a number may contain hidden characters."""


def edits_for(context: EditContext) -> list[Edit]:
    """Create the edits of the plan."""
    return [kind.of(context) for name, kind in EDITS.items() if name in context.plan.edits]
