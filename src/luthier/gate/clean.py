"""Cleaning of a data set: select the rows to drop, then write a new file and a change log.

The source file never changes. Cleaning reads the source once for each run of the gate and once to
write; texts are not kept in memory. Equal source, plan and seed give equal bytes.

Unchanged rows are written as read. For changed rows, the new texts replace the old texts in the
original record, so unknown keys survive. A text may consist of several keys (Alpaca's instruction
and input); the record is then rebuilt. Every changed record is parsed again before writing and must
give the intended row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from luthier.data.convert import format_of
from luthier.data.files.containers import PLAIN_TEXT
from luthier.data.files.parsing import Record
from luthier.data.files.sources import Source
from luthier.data.files.writers import ColumnNames, Writer, check_columns, check_target, writer_of
from luthier.data.formats import TARGETS, Form, extra_keys
from luthier.data.rows import Checker, Columns, RowReader
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import TaggedWords
from luthier.errors import (
    BoundedProblems,
    LuthierError,
    Problem,
    RecipeError,
    RowRefused,
    line_field,
)
from luthier.files import new_file, write_json
from luthier.gate.check import CheckContext, Split
from luthier.gate.checks import all_rules
from luthier.gate.checks.balance import labels_of, spellings
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.edits import Edit, EditContext, RowDraft, edits_for
from luthier.gate.row_selection import Selection, Selector
from luthier.pages import Displayed
from luthier.types import Row, map_texts


@dataclass(repr=False)
class CleaningSummary(Displayed):
    """Result of a cleaning."""

    source: str
    target: str
    changes: str
    """Path of the change log, with a line for each changed or dropped row."""
    form: str = ""
    rows_in: int = 0
    """Rows of the source, readable or not."""
    rows_out: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    """Number of changed rows in the target, by edit."""
    edits: dict[str, dict[str, int]] = field(default_factory=dict)
    """Statistics of each edit over all source rows."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped rows, by rule."""
    passes: int = 0
    """Runs of the gate; the last found nothing more to drop."""
    dry_run: bool = False
    redacts: bool = False
    """True if personal data was replaced, as far as recognized."""

    def summary(self) -> list[str]:
        """Return the number of rows before and after."""
        counts = {**self.dropped, **self.changed}
        return [
            f"{self.rows_in:,} rows in, {self.rows_out:,} rows out: {self.target}",
            ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "no changes",
        ]

    def plain(self) -> dict[str, Any]:
        """The summary for JSON."""
        return asdict(self)


def changes_path(target: Path) -> Path:
    """Return the path of the change log of ``target``."""
    return target.with_name(f"{target.name}.changes.jsonl")


def summary_path(target: Path) -> Path:
    """Return the path of the summary of ``target``."""
    return target.with_name(f"{target.name}.summary.json")


def clean(
    source: Source,
    target: Path,
    plan: CleaningPlan,
    held: Mapping[Split, Source] | None = None,
    columns: Columns | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CleaningSummary:
    """Apply ``plan`` to the rows of ``source`` and write ``target``, a change log and a summary.

    Args:
        source: a file, a folder, a glob pattern or an address.
        target: the new file. The extension selects the format; ``.gz`` or ``.zst`` adds
            compression.
        plan: the fixes.
        held: sources of held-out splits, for ``leakage.*``.
        columns: the source's name of each luthier column.
        overwrite: replace existing files.
        dry_run: compute the summary without writing.
        on_stage: called with the name of each slow step.
        on_progress: called with the processed bytes and the total bytes of a pass.

    Raises:
        RecipeError: invalid plan or target.
        DataError: rows that are neither fixed nor dropped and cannot be written.
        UnknownModel, DownloadError: the base model is unavailable.
    """
    held = dict(held or {})
    if plan.needs_held_out and not held:
        raise RecipeError(
            "`--drop leakage.*` needs held-out rows; set `--validation` or `--test`",
            rule="clean.no_held_out",
        )
    kind = "text" if target.suffix.lower() in PLAIN_TEXT else format_of(target)
    beside = changes_path(target), summary_path(target)
    check_target(target, beside, [source, *held.values()], overwrite or dry_run)
    labels: Mapping[str, str] = {}
    if plan.merge_labels:
        # Of all splits, as `inspect` counts them: each is cleaned by itself, and all in one way.
        rows = chain(RowReader(source, columns), *map(RowReader, held.values()))
        labels = spellings(Counter(name for row in rows for name in {*labels_of(row)}))
    context = EditContext(plan, _load_context(plan, on_stage), labels)
    work = _Cleaning(source, target.parent, columns, context, on_progress)
    summary = CleaningSummary(str(source), str(target), str(changes_path(target)), dry_run=dry_run,
                              redacts=bool(plan.redact))  # fmt: skip
    selection = Selection()
    if plan.dropped_rules:
        splits = {split: _rows_reader(each) for split, each in held.items()}
        # The selection is complete before a byte is written, because a row is dropped for what
        # stands in other rows.
        selector = Selector(plan, context.known, work.rows, splits)
        selection = selector.select()
        summary.passes = selector.passes
    # A table needs all columns in its first line, so the rows are read once more.
    names = work.names(selection) if kind not in ("jsonl", "text") else []
    with ExitStack() as stack:
        if dry_run:
            work.write(_DryWriter(names), None, selection, summary)
            return summary
        # The log is entered first and thus renamed last: a target without a log cannot be
        # explained, a log without a target is harmless.
        log = stack.enter_context(new_file(changes_path(target)))
        writer = stack.enter_context(writer_of(kind, target, names))
        work.write(writer, log, selection, summary)
    write_json(summary_path(target), summary.plain())
    return summary


class _DryWriter:
    """Refuses rows without a column of the table, and writes none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def write(self, record: Record) -> None:
        check_columns(record, self.names)


class _Cleaning:
    """Repeated passes over the source."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        columns: Columns | None,
        context: EditContext,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.folder, self.columns, self.context = source, folder, columns, context
        self.on_progress = on_progress
        self.left_out = context.plan.refused_rules
        self.rules = all_rules()

    def rows(self) -> Iterator[Row]:
        """Yield all edited rows.

        Raises:
            DataError: a row cannot be read, fixed or dropped.
        """
        for each in self._rows_left(self._pass()):
            yield each.draft.row

    def names(self, selection: Selection) -> list[str]:
        """Return the columns of the records to write, in order of appearance."""
        found, problems = ColumnNames(), BoundedProblems()
        for number, each in enumerate(self._rows_left(self._pass())):
            if number not in selection.drops:
                self._write_draft(each, found, problems)
        problems.refuse()
        return [*found.names]

    def write(
        self,
        writer: Writer,
        log: BinaryIO | None,
        selection: Selection,
        summary: CleaningSummary,
    ) -> None:
        """Run the last pass, which writes the target."""
        book = _ChangeLog(log)
        done = self._pass()
        number, problems = 0, BoundedProblems()
        for number, each in enumerate(self._rows_left(done, book), 1):
            book.rows += 1
            if drop := selection.drops.get(number - 1):
                # The text of the rule, because the finding may quote the row.
                about = self.rules[drop.rule].about + (f" See {drop.other}." if drop.other else "")
                book.log_drop(each.row.file, each.row.line, drop.rule, about)
            else:
                book.log_change(each)
                self._write_draft(each, writer, problems)
                summary.rows_out += 1
        problems.refuse()
        self._check_end(number, selection, summary, book)
        summary.form = str(done.reader.recognition.form)
        summary.rows_in = book.rows
        summary.changed, summary.dropped = dict(book.changes), dict(book.drops)
        summary.edits = {edit.name: dict(edit.counts) for edit in done.edits if edit.counts}

    def _check_end(
        self, number: int, selection: Selection, summary: CleaningSummary, book: _ChangeLog
    ) -> None:
        """Reject a source that changed during the cleaning, and an empty target."""
        # The passes read the source again, and drops are row numbers: another number of rows would
        # drop other rows.
        if selection.rows not in (0, number):
            raise LuthierError(f"{self.source} changed during the cleaning", rule="source.changed")
        if not summary.rows_out:
            went = ", ".join(f"{rule} {count:,}" for rule, count in book.drops.items())
            text = f"{self.source}: all rows would be dropped ({went}); drop fewer rules"
            raise RecipeError(text, rule="clean.nothing_left")

    def _pass(self) -> EditPass:
        return EditPass(self.source, self.columns, self.context, self.on_progress)

    def _rows_left(self, done: EditPass, book: _ChangeLog | None = None) -> Iterator[EditedRow]:
        """Yield the readable rows, and log the unreadable rows that the plan drops."""
        for each in done:
            if isinstance(each, EditedRow):
                if not done.refused:
                    yield each
                continue
            refused = [p for p in each if not p.line or p.rule not in self.left_out]
            for problem in refused:
                done.refused.append(problem)
            if not refused and book is not None:
                first = each[0]
                book.rows += 1
                book.log_drop(first.file, first.line, first.rule, self.rules[first.rule].about)
        done.refused.refuse()

    def _write_draft(self, each: EditedRow, writer: Writer, problems: list[Problem]) -> None:
        """Write the record of an edited row, or add a problem."""
        try:
            record = write_back(each.draft, each.row, each.given, each.reader.checker.form)
            if isinstance(each.row, MediaRow):
                record = each.row.relocate(record, self.folder)
            writer.write(record)
        except RowRefused as bad:
            problems.append(bad.at(each.row.file, each.row.line))


class _ChangeLog:
    """Writer of the change log, with counts."""

    def __init__(self, log: BinaryIO | None) -> None:
        self.log = log
        self.rows = 0
        self.changes: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()

    def log_change(self, each: EditedRow) -> None:
        """Log a row that is written, with the effect of each edit."""
        for name, detail in each.done:
            self.changes[name] += 1
            self._line(each.row.file, each.row.line, "changed", name, detail)

    def log_drop(self, file: str, line: int, rule: str, detail: str) -> None:
        """Log a dropped row."""
        self.drops[rule] += 1
        self._line(file, line, "dropped", rule, detail)

    def _line(self, file: str, line: int, action: str, rule: str, detail: str) -> None:
        if self.log is not None:
            entry = {"file": file, **line_field(line), "action": action}
            entry |= {"rule": rule, "detail": detail}
            self.log.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())


def _rows_reader(source: Source) -> Callable[[], Iterable[Row]]:
    """Return a reader of held-out rows that raises :class:`DataError` for unreadable rows."""

    def rows() -> Iterator[Row]:
        problems = BoundedProblems()
        yield from RowReader(source, problems=problems)
        problems.refuse()

    return rows


def _load_context(plan: CleaningPlan, on_stage: Callable[[str], None]) -> CheckContext:
    if plan.base is None:
        return CheckContext()
    from luthier.gate.inspect import load_context

    return replace(load_context(plan.base, plan.objective, 0, on_stage), every=True)


@dataclass(frozen=True)
class EditedRow:
    """A source row and the result of the edits."""

    row: Row
    draft: RowDraft
    done: tuple[tuple[str, str], ...]
    """Name and effect of each edit that changed the row."""
    given: Record
    reader: RowReader


class EditPass:
    """Iterator over the edited rows and the problems of reading, in the order of the source."""

    def __init__(
        self,
        source: Source,
        columns: Columns | None,
        context: EditContext,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # A text that is a file is one row: a telephone number may stand across any cut.
        self.reader = RowReader(source, columns, whole=True, on_progress=on_progress)
        self.edits: list[Edit] = edits_for(context)
        self.refused = BoundedProblems()
        """Problems that end the cleaning."""

    def __iter__(self) -> Iterator[EditedRow | list[Problem]]:
        for row in self.reader:
            bad: list[Problem] = []
            before: list[Problem] = []
            for problem in self._take_problems():
                same = (problem.file, problem.line) == (row.file, row.line)
                (bad if same else before).append(problem)
            yield from _by_line(before)
            if bad:
                yield from _by_line(bad)
                continue
            yield self._edit(row)
        yield from _by_line(self._take_problems())

    def _take_problems(self) -> list[Problem]:
        problems = list(self.reader.problems)
        self.reader.problems.clear()
        return problems

    def _edit(self, row: Row) -> EditedRow:
        given = self.reader.checker.record
        draft = RowDraft(row, extra_keys(row, given, self.reader.checker.form))
        done = []
        for edit in self.edits:
            draft, words = edit.apply(draft)
            if words:
                done.append((edit.name, words))
        return EditedRow(row, draft, tuple(done), given, self.reader)


def _by_line(problems: list[Problem]) -> Iterator[list[Problem]]:
    """Problems of the same line together."""
    held: list[Problem] = []
    for problem in problems:
        if held and (held[0].file, held[0].line) != (problem.file, problem.line):
            yield held
            held = []
        held.append(problem)
    if held:
        yield held


_BACK: Mapping[str, str] = {
    "Bedrock conversation": "bedrock-conversation",
    "ShareGPT": "sharegpt",
    "Alpaca": "alpaca",
    "Bedrock raw text": "bedrock",
}
"""Writer for each form that is rebuilt from a row. All other forms only allow replaced texts."""


def write_back(draft: RowDraft, row: Row, given: Record, form: Form | None) -> Record:
    """Return the record of ``draft``.

    Args:
        draft: the edited row.
        row: the row before the edits.
        given: the record of the source.
        form: the form of the source.

    Raises:
        RowRefused: the form cannot express the edited row.
    """
    if draft.row == row:
        return {key: draft.further.get(key, value) for key, value in given.items()}
    # The first way keeps the record as it is, and the second way rebuilds the record from the row.
    # Either counts only if the result is read as the edited row.
    for made in (_replace_texts(draft, row, given), _rebuild(draft, given, form)):
        if made is not None and _reads_as(made, draft.row):
            return made
    name = form.name if form else "its own"
    raise RowRefused(
        "convert.form",
        f"the form {name} cannot express the changed row.",
        "Convert the data first: `luthier convert SOURCE rows.jsonl`.",
    )


def _replace_texts(draft: RowDraft, row: Row, given: Record) -> Record:
    """Replace the old texts with the new texts in the original record."""
    new = {text.field: text.content for text in draft.row.texts()}
    # By content, because a form of another tool has other keys and nesting for the same text.
    changed = {text.content: new[text.field] for text in row.texts() if text.field in new}
    made = {
        key: draft.further[key]
        if key in draft.further
        else map_texts(value, lambda text: changed.get(text, text))
        for key, value in given.items()
    }
    if isinstance(draft.row, Labelled) and isinstance(row, Labelled):
        made |= draft.row.label_record() if draft.row.label != row.label else {}
    if isinstance(draft.row, AnsweredQuestion):
        made |= {"answers": draft.row.record()["answers"]}
    if isinstance(draft.row, CitedAnswer):
        made["passages"] = list(draft.row.passages)
    if isinstance(draft.row, TaggedWords):
        made["tokens"] = list(draft.row.tokens)
        if "tags" in made:
            made["tags"] = list(draft.row.tags or ())
    return made


def _rebuild(draft: RowDraft, given: Record, form: Form | None) -> Record | None:
    if form is not None and form.name not in _BACK:
        return None
    target = _BACK[form.name] if form else "openai" if "preferred_output" in given else "rows"
    try:
        made = TARGETS[target](draft.row)
    except RowRefused:
        return None
    # Keys that luthier does not read stay, unless a rebuilt key has the same name.
    return made if draft.further.keys() & made.keys() else {**made, **draft.further}


def _reads_as(record: Record, row: Row) -> bool:
    """Return True if the record parses to the row. Line numbers are ignored."""
    problems: list[Problem] = []
    read = Checker(row.file, problems).row(row.line, record)
    return not problems and read is not None and replace(read, line=row.line) == row
