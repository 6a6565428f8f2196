"""Label distribution of each split: small, dominant, misspelt and unseen classes."""

from __future__ import annotations

import html
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

from luthier.data.files.parsing import quote
from luthier.data.shapes.base import Labelled, is_multi_label
from luthier.data.shapes.texts import TaggedWords
from luthier.formatting import nearest_name
from luthier.gate.check import BatchLines, Check, CheckContext, Places, RowBatch
from luthier.gate.near_duplicates import normalize
from luthier.gate.rules import ONE_CLASS, UNSEEN, Finding, Findings, Place, Rule
from luthier.types import Row

SMALL = Rule(
    "label.few_rows",
    "warning",
    "A class has fewer than 8 training rows.",
    "The result depends on the choice of the rows.",
    "Add rows of the class, or merge the class with a similar class.",
    whole=True,
)
SPELLING = Rule(
    "label.spelling",
    "warning",
    "Labels differ in letter case, white space, punctuation or hidden characters only.",
    "The model learns two classes with the same meaning.",
    "Use the most frequent spelling.",
    whole=True,
)
UNEVEN = Rule(
    "label.imbalance",
    "note",
    "One class has 90 % of the training rows, or 20 times the rows of another class.",
    "A model that always predicts the frequent class has a high accuracy.",
    "Compare macro F1 in `luthier evaluate`. Add rows of the rare classes, or set "
    "`objective.class_weights=balanced` (of `objective.method=classification`).",
    whole=True,
)
UNEVEN_RATIO = 20
"""Rows of the largest class per row of the smallest."""
SEVERAL = Rule(
    "label.several",
    "warning",
    "A row has several labels or none, and nearly all rows have one.",
    "These few rows turn the model into a multi-label model.",
    "Write one label in each row. For a multi-label model, set `objective.multi_label=true`.",
    drop=True,
)
COMBINED = Rule(
    "label.combined",
    "warning",
    "A label consists of several labels of other rows.",
    "The model learns each combination as a separate class with few rows.",
    'Write several labels as a JSON array: ["a", "b"].',
    whole=True,
)
FEW_SEVERAL = 0.1
"""Maximum share of rows with several labels that counts as a mistake."""
FEWEST = 8
"""Minimum rows per class: the smallest number reported for SetFit (Tunstall et al.,
arXiv:2209.11055)."""
FREQUENT = 5
"""Minimum ratio of rows between a frequent label and a possible misspelling."""
MOST_COMPARED = 1000
"""Maximum number of labels for the comparison of rare labels with frequent labels."""


@dataclass(frozen=True)
class _Labels:
    """Labels of a batch."""

    counts: Mapping[str, tuple[int, int]]
    """Number of rows and index of the first row, by label."""
    rows: int
    """Number of rows with labels or tags."""
    tagged: bool
    """True for tagged words, false for row labels."""
    arrays: int
    """Number of rows with a label array."""
    several: Mapping[int, int]
    """Number of labels by row index, for rows with zero or several labels."""


class Balance(Check):
    """Check of row labels and of the names in word tags."""

    name: ClassVar[str] = "balance"
    rules: ClassVar[tuple[Rule, ...]] = (
        ONE_CLASS, UNSEEN, SMALL, SPELLING, UNEVEN, SEVERAL, COMBINED,
    )  # fmt: skip

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check. With a base model, fitting the objective finds unlearnable labels."""
        # A setting of the user overrules the rows, so that several labels in a few rows are no
        # mistake then.
        chosen = getattr(context.objective, "multi_label", None)
        return cls(fitted=context.chat is not None, by_rows=chosen is None)

    def __init__(self, fitted: bool = False, by_rows: bool = True) -> None:
        self.fitted = fitted
        """True if fitting the objective finds labels that cannot be learned."""
        self.by_rows = by_rows
        """True if the rows decide between single-label and multi-label training."""
        self.counts: dict[str, Counter[str]] = {}
        """Rows of each label, by split."""
        self._places: dict[tuple[str, str], Place] = {}
        self._rows: Counter[str] = Counter()
        self._tagged = False
        # Arrays of machine numbers: 16 bytes for a row, also if a million rows have several labels.
        self._several: dict[str, tuple[array[int], array[int]]] = {}
        """Row numbers and label counts of rows with zero or several labels, by split."""
        self._arrays: Counter[str] = Counter()
        """Number of rows with a label array, by split."""

    def measure(self, batch: RowBatch) -> _Labels:
        """Count labels, labelled rows, and rows with zero or several labels."""
        counts: dict[str, tuple[int, int]] = {}
        labelled = 0
        for index, row in enumerate(batch.rows):
            # A set: a word tag that occurs ten times in a row still counts one row.
            names = set(labels_of(row))
            labelled += isinstance(row, Labelled | TaggedWords)
            for name in names:
                count, first = counts.get(name, (0, index))
                counts[name] = (count + 1, first)
        tagged = any(isinstance(row, TaggedWords) for row in batch.rows)
        arrays = {
            index: len(row.label)
            for index, row in enumerate(batch.rows)
            if isinstance(row, Labelled) and not isinstance(row.label, str)
        }
        several = {index: count for index, count in arrays.items() if count != 1}
        return _Labels(counts, labelled, tagged, len(arrays), several)

    def collect(self, where: BatchLines, measured: _Labels, findings: Findings) -> None:
        """Add up, and remember where each label comes first."""
        self._rows[where.split] += measured.rows
        self._tagged |= measured.tagged
        self._arrays[where.split] += measured.arrays
        numbers, labels = self._several.setdefault(where.split, (array("q"), array("q")))
        numbers.extend(where.first + index for index in measured.several)
        labels.extend(measured.several.values())
        total = self.counts.setdefault(where.split, Counter())
        for name, (count, first) in measured.counts.items():
            total[name] += count
            self._places.setdefault((where.split, name), where.place(first))

    def finish(self, places: Places, findings: Findings) -> None:
        """Report small, dominant, misspelt, combined and unseen labels."""
        if not any(self._rows.values()):
            return
        train = self.counts.get("train", Counter())
        if self._rows["train"]:
            self._judge(train, findings)
            self._find_several(places, findings)
        self._spelling(findings)
        for split, counts in self.counts.items():
            # The fitted objective refuses unseen labels itself, with the rule of training.
            for name in sorted(counts.keys() - train.keys()) if train and not self.fitted else ():
                message = (
                    f"{quote(name)} has {_count_rows(counts[name])} in {split} and none in train."
                )
                findings.add(Finding(UNSEEN, self._places[split, name], message))

    def _judge(self, train: Counter[str], findings: Findings) -> None:
        if len(train) == 1 and not (self._tagged or self._takes_several or self.fitted):
            name = next(iter(train))
            place = Place(self._places["train", name].file, 0)
            findings.add(Finding(ONE_CLASS, place, f"every row has the label {quote(name)}."))
            return
        usual = spellings(train)  # `label.spelling` reports the remaining labels
        by_place = sorted(train.items(), key=lambda each: self._places["train", each[0]].number)
        for name, count in by_place:
            if count < FEWEST and name not in usual:
                message = f"{quote(name)} has {_count_rows(count)}; "
                message += f"at least {FEWEST} are recommended."
                fix = (
                    f"Add {_count_rows(FEWEST - count)} with this label, or merge the label with a "
                    "similar label."
                )
                if meant := _likely_spelling(name, train):
                    message += f" Possible misspelling of {quote(meant)}"
                    message += f" ({_count_rows(train[meant])})."
                    fix = f"Write {quote(meant)} if meant. Otherwise: {fix}"
                findings.add(Finding(SMALL, self._places["train", name], message, fix))
        if len(train) < 2 or self._tagged:
            return
        (often, most), (rare, least) = train.most_common(1)[0], train.most_common()[-1]
        if most >= 0.9 * self._rows["train"] or most >= UNEVEN_RATIO * least:
            share = most / self._rows["train"]
            message = f"{quote(often)} has {share:.1%} of the rows, "
            message += f"{quote(rare)} has {_count_rows(least)}."
            place = Place(self._places["train", often].file, 0)
            findings.add(Finding(UNEVEN, place, message))

    @property
    def _takes_several(self) -> bool:
        """Return True if objectives would choose multi-label training for the training rows."""
        numbers, _ = self._several.get("train", ((), ()))
        return is_multi_label(self._rows["train"], self._arrays["train"], len(numbers))

    def _find_several(self, places: Places, findings: Findings) -> None:
        """Report the few rows with several labels among rows with one label."""
        rows = self._rows["train"]
        numbers, labels = self._several["train"]
        if not self.by_rows or self._arrays["train"] > FEW_SEVERAL * rows:
            return
        for number, count in zip(numbers, labels, strict=True):
            has = f"{count} labels" if count else "no label"
            message = (
                f"the row has {has}; {rows - len(numbers):,} of {rows:,} rows have one label, so the "
                "row makes a multi-label model."
            )
            findings.add(Finding(SEVERAL, places.place(number), message))

    def _spelling(self, findings: Findings) -> None:
        """Report labels that differ in spelling only, and labels that combine other labels."""
        first: dict[str, Place] = {}
        for (_, name), place in self._places.items():
            first.setdefault(name, place)
        usual = spellings(sum(self.counts.values(), Counter()))
        parts_of = {name: {*re.split(r"\s*[;|,]\s*", name)} for name in first}
        uses = Counter(part for parts in parts_of.values() for part in parts)
        for name, parts in parts_of.items():
            # Each part must also occur elsewhere: "Salt, pepper and oil" alone is one label with a
            # comma.
            if len(parts) > 1 and all(uses[part] > 1 for part in parts):
                message = f"the label {quote(name)} consists of {len(parts)} labels of other rows."
                findings.add(Finding(COMBINED, first[name], message))
        for name in (name for name in first if name in usual):
            message = (
                f"the label {quote(name)} differs from {quote(usual[name])} in its spelling only."
            )
            findings.add(Finding(SPELLING, first[name], message, others=(first[usual[name]],)))

    def summary(self) -> Mapping[str, Any]:
        """Return the rows per label and split, the labelled rows and the number of labels."""
        if not any(self.counts.values()):
            return {}
        # A row counts once for each kind, and has as many kinds as its words.
        of = {"of": "rows with an entity of the kind"} if self._tagged else {}
        return {
            "labels": len(set[str]().union(*self.counts.values())),
            "kind": (
                "tags"
                if self._tagged
                else "several labels per row"
                if self._takes_several
                else "labels"
            ),
            "rows": dict(self._rows),
            "splits": {
                split: {"counts": dict(counts)} | of for split, counts in self.counts.items()
            },
        }


SpellingKey = tuple[str, ...]


def _is_plain(name: str) -> bool:
    """Return whether a label is written without hidden characters, entities and look-alikes."""
    mixed = name.translate(_LOOK_ALIKE) != name and re.search("[A-Za-z]", name)
    return name.isprintable() and html.unescape(name) == name and not mixed and name != "#N/A"


_LOOK_ALIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаеѕіјорсухԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧοѵ",
    "ABESIJKMHOPCTYXaesijopcyxdqwABEZHIKMNOPTYXov",
)
"""Cyrillic and Greek letters with the shape of a Latin letter (Unicode Technical Standard 39)."""
_WHOLE = re.compile(r"^([+-]?\d+)\.0+$")
_SIGN = re.compile(r"(?<!\w)-(?=\d)|[#%*&]")
"""Punctuation that changes the meaning of a label: -1 and 1, C# and C, 10% and 10."""


@lru_cache(4096)
def spelling_key(name: str) -> SpellingKey:
    """Return a key for labels that are equal to the eye.

    The key ignores letter case, white space, hidden characters and most punctuation.
    """
    name = html.unescape(name).translate(_LOOK_ALIKE)
    # Most labels are ASCII, and looking up the category of each character takes longer than all
    # else.
    if not name.isascii():
        name = "".join(char for char in name if unicodedata.category(char) != "Cf")
    name = _WHOLE.sub(r"\1", name.strip())
    if name == "#N/A":  # Excel's missing value is the label N/A
        name = "N/A"
    return (normalize(name.replace("_", " ")), *_SIGN.findall(name))


def spellings(counts: Counter[str]) -> dict[str, str]:
    """Map each label to its most frequent spelling; the first spelling wins a tie.

    Spellings without hidden characters, HTML entities and look-alike letters come first.
    """
    usual: dict[SpellingKey, str] = {}
    # The sort is stable, so the first spelling wins a tie, and cleaning twice changes nothing.
    for name in sorted(counts, key=lambda name: (not _is_plain(name), -counts[name])):
        usual.setdefault(spelling_key(name), name)
    return {name: chosen for name in counts if (chosen := usual[spelling_key(name)]) != name}


def labels_of(row: Row) -> Iterable[str]:
    """Return the labels of a row, or the entity names in its word tags."""
    if isinstance(row, Labelled):
        return row.labels
    if isinstance(row, TaggedWords):
        return (tag[2:] for tag in row.tags or () if tag != "O")
    return ()


def _count_rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _likely_spelling(name: str, counts: Mapping[str, int]) -> str | None:
    """Return a much more frequent label with a similar spelling. Names with digits have no
    candidates."""
    if len(counts) > MOST_COMPARED or any(character.isdigit() for character in name):
        return None
    frequent = [other for other, count in counts.items() if count >= FREQUENT * counts[name]]
    return nearest_name(name, frequent, cutoff=0.8)
