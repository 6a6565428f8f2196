"""Check of the encoded rows: tokens, loss mask and length.

The objective and the model's own format encode the rows as in training, so the report shows exactly
the training input.

Objectives that derive their classes or their rating range from the rows reject data with only one
class or rating, and held-out rows of an unknown class. One row per label or tag, and two different
ratings, suffice for this test.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import Any, ClassVar, Self

import numpy as np

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.preferences import RatedReply, ThumbedReply
from luthier.data.shapes.texts import (
    LabelledText,
    QueryDocument,
    RatedText,
    RawText,
    TaggedWords,
    TextRow,
)
from luthier.errors import DataError, Problem, RecipeError, RowRefused, line_field
from luthier.gate.batch_text import Spot, SpotCheck, excerpt_of, mask_pieces, private_items
from luthier.gate.check import BatchLines, CheckContext, Places, RowBatch
from luthier.gate.encode import RowEncoder, single_row_error
from luthier.gate.histogram import Histogram
from luthier.gate.rules import (
    ENCODING_RULES,
    MOSTLY_TRUNCATED,
    NOTHING_LEARNED,
    TOO_FEW,
    TRUNCATED,
    Finding,
    Findings,
    Place,
    Rule,
    mostly_truncated,
    rule_of,
)
from luthier.objectives import Objective
from luthier.objectives.base import RunModels
from luthier.objectives.by_shape import objective_for
from luthier.types import Example, IntArray, Row

WHOLE = 20_000
"""Number of rows at the start of a file that are all encoded, before one in :data:`EVERY`."""
EVERY = 16
LONGEST = 10
"""Number of longest rows per split in the summary."""


ShownRow = dict[str, Any]
"""A row for the report: ``file``, ``line``, ``source`` and ``tokens`` as text, the loss mask
``learned``, and ``taught``, the target of the whole row. Personal data and secrets are masked."""


def rows_represented(row: Row, context: int) -> int:
    """Return the weight of a row in the token counts; 0 if the row is not encoded.

    A token has at least one byte, so a row with fewer bytes than the context has tokens fits. Rows
    that may be too long are always encoded. A quarter of the context is reserved for the template.
    """
    if row.line <= WHOLE:
        return 1
    if zlib.crc32(b"%d" % row.line) % EVERY == 0:
        return EVERY
    return int(sum(len(text.content.encode()) for text in row.texts()) > 0.75 * context)


@dataclass(frozen=True)
class EncodedBatch:
    """Token counts and faults of a batch."""

    tokens_N: IntArray
    learned_N: IntArray
    times_N: IntArray
    """Weight of each row (:func:`rows_represented`)."""
    spots: tuple[Spot, ...]
    shown: tuple[ShownRow, ...] = ()
    longest: tuple[dict[str, Any], ...] = ()
    """File, line, tokens, learned tokens and excerpt of the longest rows."""
    kinds: Mapping[RowKind, Witness] = field(default_factory=dict)
    """A row of each class."""
    waiting: tuple[Row, ...] = ()
    """Rows that the objective combines with further rows of the file."""


def _neighbours(row: Row) -> list[Row]:
    """Rows of the same shape with other labels, ratings, thumbs or tags than ``row``."""
    match row:
        case TaggedWords():
            return [replace(row, tokens=("a", "b"), tags=("O", "B-another"))]
        case RatedText() | RatedReply():
            return [replace(row, rating=row.rating + 1)]
        case ThumbedReply():
            return [replace(row, desirable=not row.desirable)]
        case Labelled():
            other = "another" if isinstance(row.label, str) else ("another", "more")
            return [replace(row, label=other), row.bare()]  # type: ignore[call-arg]
        case RawText():
            return [LabelledText(row.file, row.line, row.text, "another"), row]
    return [row]


class Learning(SpotCheck):
    """Encodes every row for a model and an objective."""

    name: ClassVar[str] = "learning"
    of_targets: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (*ENCODING_RULES.values(), TRUNCATED, MOSTLY_TRUNCATED)
    needs_model: ClassVar[bool] = True
    in_jobs: ClassVar[bool] = False
    measures_with: ClassVar[tuple[str, ...]] = ("objective", "chat", "context", "kept", "every")

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check for the base model."""
        assert context.chat is not None
        return cls(context.objective, context.chat, context.context, context.shown, context.every)

    def __init__(
        self,
        objective: Objective | None,
        chat: ChatFormat,
        context: int,
        kept: int = 5,
        every: bool = False,
    ) -> None:
        super().__init__()
        self.objective, self.chat, self.context, self.kept = objective, chat, context, kept
        self.every = every
        self.lengths: dict[str, Histogram] = {}
        self.learned: dict[str, int] = {}
        self.sampled = False
        self.shown: dict[str, list[ShownRow]] = {}
        self.longest: dict[str, list[dict[str, Any]]] = {}
        self.fitting = ObjectiveFit()
        self.waiting: dict[tuple[str, str], list[Row]] = {}
        """Rows stored until the end by split and file, because the rows to combine with may come
        last."""

    def begin(self, batch: RowBatch, rows: int = 0) -> None:
        """Choose the objective by the first row, if the user names no objective."""
        if self.objective is None:
            with suppress(DataError):
                self.objective = objective_for(batch.rows[0], self.chat)
                self.objective.bind(RunModels(self.chat))

    def measure(self, batch: RowBatch) -> EncodedBatch:
        """Encode the rows."""
        tokens_N, learned_N, times_N = np.zeros((3, len(batch)), np.int64)
        spots: list[Spot] = []

        def refuse(index: int, bad: Problem) -> None:
            start = excerpt_of(batch.rows[index])
            spots.append(Spot(index, bad.rule, bad.message, start, bad.advice))

        try:
            objective = self.objective or objective_for(batch.rows[0], self.chat)
        except DataError as error:
            for index, row in enumerate(batch.rows):
                if row.shape == batch.rows[0].shape:
                    refuse(index, error.problem)
            return EncodedBatch(tokens_N, learned_N, times_N, tuple(spots))
        encoder = RowEncoder(objective, self.chat)
        gathered: list[tuple[int, Row]] = []
        waiting: list[Row] = []
        for index, row in enumerate(batch.rows):
            try:
                encoder.check_shape(row)
                if objective.needs_other_rows(row):
                    waiting.append(row)
                    continue
                gathered += [(index, each) for each in objective.regroup([row])]
            except RowRefused as bad:
                refuse(index, bad.problem)
            except DataError:
                waiting.append(row)
        fitted = self._fit(objective, [row for _, row in gathered])
        encoder = RowEncoder(fitted, self.chat)
        shown: list[ShownRow] = []
        for index, row in gathered:
            # Large files are sampled, because encoding takes most of the time of an inspection.
            # Each encoded row then counts for several rows.
            times = 1 if self.every else rows_represented(row, self.context)
            if not times:
                continue
            try:
                example = encoder.encode(row, index)
            except RowRefused as bad:
                refuse(index, bad.problem)
                continue
            views = fitted.views([example])
            room = fitted.task.row_limit(encoder.format, self.context)
            learned = int(sum(np.count_nonzero(view.weight_T) for view in views))
            if too_long := fitted.length_problem(example, room):
                # The same fact, but not an error: training cuts the row, as classifiers do by
                # default.
                truncated = Problem(TRUNCATED.id, too_long.problem.message, TRUNCATED.fix)
                refuse(index, truncated if fitted.long_rows() == "truncate" else too_long.problem)
            if not learned and fitted.same_each_epoch:
                nothing = "no token of the row is learned."
                refuse(index, Problem(NOTHING_LEARNED.id, nothing, NOTHING_LEARNED.fix))
            times_N[index] = times
            tokens_N[index] += sum(view.tokens for view in views)
            learned_N[index] += learned
            if len(shown) < self.kept and (one := self._show(fitted, example, row)):
                shown.append(one)
        # Only the longest rows of each batch travel to the main process: the longest rows of all
        # are among them.
        most = np.argsort(-tokens_N, kind="stable")[:LONGEST].tolist()
        return EncodedBatch(
            tokens_N,
            learned_N,
            times_N,
            tuple(spots),
            tuple(shown),
            tuple(
                {
                    "file": batch.file,
                    **line_field(batch.rows[i].line),
                    "tokens": int(tokens_N[i]),
                    "learned": int(learned_N[i]),
                    "begins": excerpt_of(batch.rows[i]),
                }
                for i in most
                if tokens_N[i]
            ),
            find_witnesses([row for _, row in gathered]),
            tuple(waiting),
        )

    def _fit(self, objective: Objective, rows: list[Row]) -> Objective:
        """Fit the objective to a batch. The fit does not change lengths.

        A batch may have only one class or rating although the data has several, so rows with other
        targets are added if necessary.
        """
        for known in (rows, [*rows, *_neighbours(rows[0])]) if rows else ():
            try:
                return objective.fit(known, self.chat)
            except (RowRefused, RecipeError):
                continue
        return objective

    def _show(self, objective: Objective, example: Example, row: Row) -> ShownRow | None:
        """Return the row for the report; ``None`` if masking personal data is impossible."""
        private = private_items(text.content for text in row.texts())
        if private and not objective.same_each_epoch:
            return None  # random changes may stand in the middle of a number
        views = objective.views([example])
        first = (
            views[0]
            if objective.same_each_epoch
            else (objective.views([example], "fixed") or views)[0]
        )
        # A target for each token; that of one token, an image or a sound, is of the row.
        whole = first.target is None or len(first.target) == len(first) > 1
        taught = objective.describe(example)
        source = [] if first.source_T is None else self.chat.pieces(first.source_T.tolist())
        return {
            "file": row.file,
            **line_field(row.line),
            "source": list(mask_pieces(source, private)),
            "tokens": list(mask_pieces(self.chat.pieces(first.ids_T.tolist()), private)),
            "learned": [bool(weight) and whole for weight in first.weight_T.tolist()],
            "taught": mask_pieces([taught], private_items([taught]))[0],
        }

    def collect(self, where: BatchLines, measured: EncodedBatch, findings: Findings) -> None:
        """Add the counts and the findings of a batch."""
        self.add_spots(where, measured.spots, findings)
        self.fitting.collect(where, measured.kinds)
        if measured.waiting:
            self.waiting.setdefault((where.split, where.file), []).extend(measured.waiting)
        lengths = self.lengths.setdefault(where.split, Histogram())
        lengths.add(measured.tokens_N, measured.times_N)
        learned = int(measured.learned_N @ measured.times_N)
        self.learned[where.split] = self.learned.get(where.split, 0) + learned
        self.sampled |= bool(np.any(measured.times_N > 1))
        kept = self.shown.setdefault(where.split, [])
        kept += measured.shown[: self.kept - len(kept)]
        longest = self.longest.setdefault(where.split, [])
        longest += measured.longest
        self.longest[where.split] = nlargest(LONGEST, longest, key=lambda row: row["tokens"])

    def finish(self, places: Places, findings: Findings) -> None:
        """Report the faults that the objective finds in all rows together."""
        if self.objective is None:
            return
        # Rated replies become pairs only with other replies to the same prompt, which may stand
        # anywhere in the file.
        for (split, file), rows in self.waiting.items():
            try:
                pairs = list(self.objective.regroup(rows))
            except DataError as error:
                for bad in error.problems:
                    place = Place(bad.file, bad.line)
                    findings.add(Finding(rule_of(bad.rule), place, bad.message, bad.advice))
                continue
            lines_N = np.array([row.line for row in pairs], np.int64)
            measured = self.measure(RowBatch(split, file, pairs))
            where = BatchLines(split, file, lines_N, -1, type(rows[0].line))
            self.collect(where, measured, findings)
        for finding, count in self.fitting.judge(self.objective, self.chat):
            findings.add(finding, count)
        truncated = findings.counts[TRUNCATED.id]
        count = sum(lengths.count for lengths in self.lengths.values())
        if mostly_truncated(truncated, count):
            place = findings.examples[TRUNCATED.id][0].place
            message = f"{truncated:,} of {count:,} rows have more than {self.context:,} tokens."
            findings.add(Finding(MOSTLY_TRUNCATED, replace(place, line=0), message))

    def summary(self) -> Mapping[str, Any]:
        """Tokens and learned tokens of each split, lengths, the longest rows and the first.

        ``sampled`` says that the counts of large files are scaled up from every 16th row.
        """
        return {
            "objective": self.objective.method if self.objective else None,
            "several_labels": self.fitting.several_labels,
            "context": self.context,
            "sampled": self.sampled,
            "splits": {
                split: {
                    "tokens": lengths.sum,
                    "learned_tokens": self.learned[split],
                    "lengths": lengths.plain(),
                    "longest": self.longest[split],
                    "shown": self.shown[split],
                }
                for split, lengths in self.lengths.items()
            },
        }


RowKind = tuple[str, ...]


@dataclass
class Witness:
    """The first row of a kind, without the text, and the number of rows of the kind."""

    row: Row
    index: int
    """Index in the batch."""
    count: int


def find_witnesses(rows: Sequence[Row]) -> dict[RowKind, Witness]:
    """Return a row of each kind in a batch."""
    found: dict[RowKind, Witness] = {}
    for index, row in enumerate(rows):
        for kind in _kinds(row):
            if kind in found:
                found[kind].count += 1
            else:
                found[kind] = Witness(_shorten(row), index, 1)
    return found


def _kinds(row: Row) -> Iterable[RowKind]:
    match row:
        case TaggedWords():
            return {("tag", tag) for tag in row.tags or ()}
        case Labelled():
            # Whether rows have several labels is decided by all three.
            kind = (
                "label"
                if isinstance(row.label, str)
                else "array"
                if row.has_one_label
                else "labels"
            )
            return [(kind, name) for name in dict.fromkeys(row.labels or ("",))]
        case ThumbedReply():
            return [("thumb", repr(row.desirable))]
    number = row.target()
    return [("rating", repr(number)) if isinstance(number, int | float) else ("row", row.shape)]


def _shorten(row: Row) -> Row:
    """Replace the text of the row with a letter, so that any number of rows fits in memory."""
    if isinstance(row, TaggedWords):
        return replace(row, tokens=("a",) * len(row.tokens))
    return replace(row, text="a") if isinstance(row, TextRow) else row


class ObjectiveFit:
    """Collects the witnesses of all batches, and fits the objective at the end."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[RowKind, tuple[Place, Witness]]] = {}
        self._lines: Counter[str] = Counter()
        self.several_labels = False
        """True if the fitted objective gives a row several labels."""

    def collect(self, where: BatchLines, found: Mapping[RowKind, Witness]) -> None:
        """Add the witnesses of a batch."""
        self._lines[where.split] += len(where.lines_N)
        kept = self._kept.setdefault(where.split, {})
        ratings = sum(kind[0] == "rating" for kind in kept)
        for kind, witness in found.items():
            if kind in kept:
                kept[kind][1].count += witness.count
            # Two different ratings show that a regression can be fitted. A file can have a million
            # ratings.
            elif kind[0] != "rating" or ratings < 2:
                kept[kind] = (where.place(witness.index), witness)
                ratings += kind[0] == "rating"

    def judge(self, objective: Objective, chat: ChatFormat) -> list[tuple[Finding, int]]:
        """Return the rejections of the objective and the number of affected rows.

        Raises:
            RecipeError: the objective cannot learn rows of this shape.
        """
        train = self._kept.get("train", {})
        allowed = objective.shapes | objective.further_shapes
        rows = [w.row for _, w in train.values() if w.row.shape in allowed]
        if not rows:
            return []
        file = next(iter(train.values()))[0].file
        if self._lines["train"] == 1 and (bad := single_row_error(rows[0])):
            return [(Finding(TOO_FEW, Place(file, rows[0].line), bad.problem.message), 1)]
        try:
            fitted = objective.fit(rows, chat)
        except RowRefused as bad:
            message = bad.problem.message if len(train) > 1 else _describe_single_class(rows[0])
            return [(Finding(rule_of(bad.rule), Place(file, 0), message, bad.problem.advice), 1)]
        except RecipeError:
            if objective.mixed_shapes:  # it needs a second file, which only a job names
                return []
            raise
        self.several_labels = bool(getattr(fitted, "multi_label", False))
        return [
            (found, count)
            for split, kept in self._kept.items()
            if split != "train"
            for found, count in self._unseen(kept, fitted, chat)
        ]

    def _unseen(
        self, kept: dict[RowKind, tuple[Place, Witness]], fitted: Objective, chat: ChatFormat
    ) -> Iterable[tuple[Finding, int]]:
        for place, witness in kept.values():
            try:
                fitted.encode(witness.row, 0, chat)
            except RowRefused as bad:
                # Only labels: the text of a witness is a letter, so other refusals say nothing
                # about the row.
                if bad.rule.startswith("label."):
                    yield (
                        Finding(rule_of(bad.rule), place, bad.problem.message, bad.problem.advice),
                        witness.count,
                    )
            except RecipeError:
                continue


def _describe_single_class(row: Row) -> str:
    """Describe a single class without a row count, because only one row of each class is known."""
    match row:
        case RatedText() | RatedReply():
            return f"all rows have the rating {row.rating:g}."
        case QueryDocument(label=float(label)):
            return f"all rows have the label {label:g}."
        case TaggedWords():
            return "all words have the tag O."
        case ThumbedReply():
            return f"all answers have a thumb {'up' if row.desirable else 'down'}."
        case Labelled() if row.labels:
            return f"all rows have the label {row.labels[0]!r}."
    return "no row has a label."
