"""Reading and checking of rows, with the shape detected from the keys.

Shapes are defined in ``luthier.data.shapes``; forms of other tools are converted to a shape
(``luthier.data.formats``). Text is never altered. A source with any problem is rejected as a whole,
with all problems.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from luthier.data.character_spans import Tagged, are_spans
from luthier.data.conversations.row_context import is_blank, join_context, parse_turns
from luthier.data.disk_sequence import spool
from luthier.data.field_checks import (
    RENAMES,
    FieldChecker,
    column_fix,
    list_keys,
)
from luthier.data.files.parsing import Record, quote
from luthier.data.files.read import find_container, read_records, source_size
from luthier.data.files.sources import Source, files_of, media_below
from luthier.data.formats import ITEMS, Form, extra_keys, forms_of
from luthier.data.inputs import Media
from luthier.data.nearest_form import nearest_form
from luthier.data.shapes import SHAPES
from luthier.data.shapes.base import Shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.preferences import (
    THUMB_KEYS,
    JudgedAnswers,
    ThumbedReply,
)
from luthier.data.shapes.texts import RawText
from luthier.data.unread import UnreadColumns
from luthier.errors import DataError, Location, Problem, RowRefused, line_text, location_text
from luthier.formatting import list_some, nearest_name
from luthier.types import Row

Columns = Mapping[str, str]
"""Column names of the file by luthier's keys; an empty name ignores the key."""

SPEAKER_COLUMNS = frozenset(
    {"speaker", "speaker_id", "speakerid", "spk", "spk_id", "client_id", "talker", "voice"}
)
"""Lower-case column names for speakers in audio tables."""
ROWS_CHECKED = 1000
"""Rows whose values are checked for ignored columns; of later rows, each set of keys is checked."""

_ASKED = (PromptCompletion, PromptOnly, Conversation)
_VALUES_TELL = frozenset((*THUMB_KEYS, "rating", "score"))
"""Keys whose values decide whether an answer was judged."""
_MOST_KNOWN = 100
MOST_IDS = 1_000_000
"""Most ids per file to check for duplicates, to bound memory."""


class Checker(FieldChecker):
    """Checker for the rows of a source, in order.

    Args:
        file: the current file.
        problems: list for the problems.
        columns: column names of the file by luthier's keys; an empty name ignores the key.
    """

    other_keys = frozenset(
        ("id", "expected", "tags", *(key for kind in SHAPES.values() for key in kind.keys))
    ) - {"text"}

    def __init__(self, file: str, problems: list[Problem], columns: Columns | None = None) -> None:
        super().__init__(file, problems)
        self.columns = columns or {}
        self._never_seen = {key for key, column in self.columns.items() if not column}
        """Columns to ignore that no row has so far."""
        self._seen_keys: set[str] = set()
        self.first: tuple[str, int] | None = None
        self.first_file = file
        self._first_keys = frozenset[str]()
        """Keys of the first row that its shape needs."""
        self.form: Form | None = None
        """Form of the first row; ``None`` for a luthier shape."""
        self.names = self._names_of({})
        self.known: dict[tuple[str, ...], type[Shape]] = {}
        """Shapes by the keys of rows of our own shapes, in their order."""
        self.record: Record = {}
        """Current record with renamed columns."""
        self.line_of_id: dict[str | int, int] = {}
        self.single_items = 0
        """Users with one item, which are left out."""
        self.entities = 0
        """Number of entities by characters."""
        self.cut_entities = 0
        """Number of entities with an edge inside a word."""
        self.first_cut: Problem | None = None
        """The first of them."""
        self.accepts_own_keys = False
        """True if rows may have luthier's keys in place of the mapped columns, as held-out rows."""

    def begin(self, file: str) -> None:
        """Continue with the next file of the same source; the rows must match the rows so far."""
        self.file = file
        self.line_of_id = {}

    @property
    def form_name(self) -> str | None:
        """Name of the rows' form or shape for messages; ``None`` before the first row."""
        if self.form is not None:
            return self.form.name
        return self.first[0] if self.first else None

    def row(self, line: int, record: Record) -> Row | None:
        """Return the row; None only when a problem was reported."""
        self.line = line
        keys = tuple(record)
        # Detecting the shape takes several times as long as parsing a short row.
        known = self.known.get(keys)
        if known is not None:
            self.record = record
            if "id" in record:
                self.check_id(record["id"])
            return self._read(known, record)
        own = self.own_record(record)
        if own is None:
            return None
        kind = self.shape_of(own)
        if kind is None:
            return None
        # Cache the shape by keys, unless the shape depends on values: a label or rating of an answer
        # is a judgement only for some values.
        values_tell = own.keys() & {"completion", "messages"} and _VALUES_TELL & own.keys()
        if (
            own is record
            and own is self.record
            and not values_tell
            and len(self.known) < _MOST_KNOWN
        ):
            self.known[keys] = kind
        return self._read(kind, own)

    def _read(self, kind: type[Shape], record: Record) -> Row | None:
        try:
            joined_kind, joined = join_context(kind, record)
            row = joined_kind.read(joined, self)
            if row is not None:  # a missing value has a clearer fix
                self._check_meaning(kind)
            return row
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None

    def _check_meaning(self, kind: type[Shape]) -> None:
        """Reject a row with a key of another task.

        Raises:
            RowRefused: with the key.
        """
        if kind.other_tasks.keys().isdisjoint(self.record):
            return
        read = self.form.keys | self.form.used if self.form else frozenset[str]()
        for key in kind.other_tasks.keys() & self.record.keys() - read:
            if not is_blank(self.record[key]) and self.record[key] != []:
                raise RowRefused(
                    "row.ambiguous",
                    f"The row is read as {kind.noun}, so {quote(key)} would be ignored.",
                    f"{kind.other_tasks[key]} Or ignore the column with `data.columns.{key}=`.",
                )

    def own_record(self, record: Record) -> Record | None:
        """Return the record with luthier's keys after the id check; ``None`` after a reported
        problem."""
        own = self._from_form(record)
        if own is not None and "id" in own:
            self.check_id(own["id"])
        return own

    def _from_form(self, record: Record) -> Record | None:
        """Return the record in a luthier shape; ``None`` after a reported problem."""
        mapped = self._rename_columns(record) if self.columns else record
        if mapped is None:
            return None
        try:
            self.record = mapped = parse_turns(mapped)
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None
        forms = forms_of(mapped)
        used = frozenset().union(*(form.used for form in forms))
        generic = [f'"{key}"' for key in ("text", "prompt") if key in mapped and key not in used]
        if len(forms) > 1 or (forms and generic):
            names = [*(form.name for form in forms), *generic]
            message = f"The row matches several formats: {' and '.join(names)}."
            fix = "Ignore the other columns, as with `data.columns.text=`."
            self.report("row.ambiguous", message, fix)
            return None
        form = forms[0] if forms else None
        # A row of the file's form without one of its keys: the form's own message names the missing
        # key.
        if form is None and self.form is not None and self.form.keys & mapped.keys():
            form = self.form if not any(key in mapped for key in ("prompt", "messages")) else None
        if self.first is None:
            self.form = form
        elif form is not self.form:
            if form is not None and form.tag:
                (key,) = form.keys - {"text", "data"}
                message = f"The row has entities, and the first row has no {quote(key)}."
                self.report("row.mixed_shapes", message, f"Set `data.columns.entities={key}`.")
            else:
                self._report_mixed(form.name if form else "of another format")
            return None
        if form is None:
            key = next((key for key, each in mapped.items() if each and are_spans(each)), "")
            if key and "text" in mapped and key not in self.columns.values():
                message = f"The entities in {quote(key)} would be ignored."
                fix = f"Set `data.columns.entities={key}`, or ignore the column with "
                self.report("row.ambiguous", message, f"{fix}`data.columns.{key}=`.")
                return None
            return mapped
        if form is ITEMS and isinstance(mapped["items"], list) and len(mapped["items"]) == 1:
            self.single_items += 1
            return None
        try:
            if form.tag is not None:
                mapped = {**mapped, **self._count_cuts(form.tag(mapped))}
            converted, column_names = form.convert(mapped)
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None
        except KeyError as missing:
            name = quote(str(missing.args[0]))
            self.report("field.missing", f"{name} is missing.", f"Add {name}, or remove the row.")
            return None
        self.names = self._names_of(column_names)
        return converted

    def _count_cuts(self, tagged: Tagged) -> Record:
        """Count the entities and those with an edge inside a word; return words and tags."""
        self.entities += tagged.entities
        self.cut_entities += len(tagged.cut)
        if tagged.cut and self.first_cut is None:
            place = Location(self.file, self.line)
            self.first_cut = Problem("tags.cut", quote(tagged.cut[0]), "", place)
        return {"tokens": tagged.tokens, "tags": tagged.tags}

    def _rename_columns(self, record: Record) -> Record | None:
        """Return the record with renamed columns; ``None`` if a column is missing."""
        self._never_seen -= record.keys()
        if len(self._seen_keys) < _MOST_KNOWN:
            self._seen_keys |= record.keys()
        mapped = {*self.columns.values(), *self.columns}
        renamed = {key: value for key, value in record.items() if key not in mapped}
        for key, column in self.columns.items():
            own = self.accepts_own_keys and column and column not in record
            source = key if own else column
            if key == "entities" and source and source not in record:
                renamed[key] = []  # Label Studio leaves the key out
                continue
            if source and source not in record:
                message = (
                    f"The column {quote(column)} is missing; the keys are {list_keys(record)}."
                )
                near = nearest_name(source, record)
                fix = f"Fix `data.columns.{key}={column}` or the row."
                self.report("column.missing", message, column_fix(key, near) if near else fix)
                return None
            if source:
                renamed[key] = record[source]
        return renamed

    def end(self) -> None:
        """Report the columns to ignore that no row has, after the last row."""
        if self.accepts_own_keys or not self._seen_keys:
            return
        keys = sorted(self._seen_keys)
        for column in sorted(self._never_seen):
            message = f"The column {quote(column)} is missing; the keys are {list_keys(keys)}."
            near = nearest_name(column, keys)
            fix = f"Remove `data.columns.{column}=`."
            if near:
                fix = f"Did you mean {quote(near)}? Set `data.columns.{near}=`."
            self.problems.append(Problem("column.missing", message, fix, Location(self.first_file)))

    def _names_of(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """Return the file's names for luthier's keys, after form and mapping."""
        return {
            **self.columns,
            **{key: self.columns.get(form_key) or form_key for key, form_key in names.items()},
        }

    def _report_mixed(self, what: str, keys: frozenset[str] = frozenset()) -> None:
        """Report a row that differs from the first row.

        Args:
            what: form or shape of the row.
            keys: keys of the row that the shape needs.
        """
        assert self.first is not None
        first = self.form.name if self.form else self.first[0]
        line = self.first[1]
        same = self.first_file == self.file
        where = line_text(line, self.file) if same else location_text(self.first_file, line)
        message = f"The row is {what}, but the first row ({where}) is {first}."
        fix = f"Rewrite the row as {first}, or move the row to another file."
        absent = list_keys(self.names.get(key) or key for key in sorted(keys ^ self._first_keys))
        if keys and keys < self._first_keys:
            message = f"{absent} is missing or empty, unlike in the first row ({where})."
            fix = f"Add {absent}, or remove the row."
        elif self._first_keys and self._first_keys < keys:
            message = (
                f"{absent} is missing or empty in the first row ({where}), unlike in this row."
            )
            fix = f"Add {absent} to the first row, or remove the first row."
        self.report("row.mixed_shapes", message, fix)

    def check_id(self, value: object) -> None:
        """Report a repeated id, among the first :data:`MOST_IDS` ids of the file."""
        # Exact types, because True is an int in Python and would equal 1.
        if type(value) is not str and type(value) is not int:
            return
        if len(self.line_of_id) >= MOST_IDS and value not in self.line_of_id:
            return
        first = self.line_of_id.setdefault(value, self.line)
        if first != self.line:
            name = quote(str(value))
            message = f"The id {name} is already used on {line_text(first, self.file)}."
            self.report("id.duplicate", message, "Use unique ids, or remove the copy.")

    def shape_of(self, record: Record) -> type[Shape] | None:
        """Return the shape for the keys of a record; report a problem unless exactly one shape
        fits."""
        shapes: list[type[Shape]] = [k for k in SHAPES.values() if k.matches(record)]
        judged = next((kind for kind in shapes if issubclass(kind, JudgedAnswers)), None)
        if self.first and not isinstance(record.get("label"), bool | None):
            # Words and numbers can be classes or thumbs: the first row decides for all rows.
            if self.first[0] == ThumbedReply.title:
                judged = ThumbedReply
            elif judged is ThumbedReply and record.keys().isdisjoint(("thumb", "kto_tag")):
                judged = None
                shapes.remove(ThumbedReply)
        if judged:
            shapes = [judged]  # a judged answer is more specific than an answer
        if MultipleChoice in shapes:
            shapes = [MultipleChoice]  # more specific than a prompt
        if PromptOnly in shapes:
            shapes.remove(PromptCompletion if self._only_asks(record) else PromptOnly)
        if any(kind in shapes for kind in _ASKED):
            # Tags or a rating next to a conversation are metadata, not a shape.
            shapes = [kind for kind in shapes if kind in (*_ASKED, RawText)]
        elif len(shapes) > 1 and RawText in shapes:
            shapes.remove(RawText)  # the labelled text
        if not shapes:
            self._report_unknown(record)
            return None
        if len(shapes) > 1:
            keys = list_keys(key for kind in shapes for key in kind.keys if key in record)
            message = f"The row mixes {len(shapes)} shapes: it has the keys {keys}."
            fix = " ".join(_ignore_fix(kind, shapes, record) for kind in shapes)
            self.report("row.ambiguous", message, fix)
            return None
        kind = shapes[0]
        title = kind.title_of(record)
        needed = frozenset(kind.keys).union(*kind.complete) & record.keys()
        if self.first is None:
            self.first, self.first_file = (title, self.line), self.file
            self._first_keys = needed
        # A form may convert rows with a system prompt to messages and other rows to pairs.
        if self.form is None and title != self.first[0]:
            self._report_mixed(title, needed)
            return None
        return kind

    def _only_asks(self, record: Record) -> bool:
        """Return whether a row with a prompt has no reply on purpose, not misnamed or lost."""
        if "completion" in record or (self.first and self.first[0] == PromptCompletion.title):
            return False
        misnamed = any(RENAMES.get(key.strip().lower()) == "completion" for key in record)
        return "expected" in record or not misnamed

    def _report_unknown(self, record: Record) -> None:
        """Report a record without a known shape, with the nearest form in the file's own names."""
        if not record:
            self.report("row.unknown_shape", "The row has no keys.", 'Write {"text": "..."}.')
            return
        message = f"The keys {list_keys(record)} are those of no known row format."
        self.report("row.unknown_shape", message, nearest_form(record))

    def _column_fix(self, record: Record, key: str) -> str:
        likely = super()._column_fix(record, key)
        return likely or (nearest_form(record) if key == "text" else "")


def _ignore_fix(kind: type[Shape], shapes: Sequence[type[Shape]], record: Record) -> str:
    """Return the advice to read a record of several shapes as ``kind``."""
    present = {key for shape in shapes for key in shape.keys if key in record}
    others = sorted(present - kind.source_keys())
    settings = " and ".join(f"`data.columns.{key}=`" for key in others)
    return f"For {kind.noun}, set {settings}."


@dataclass(frozen=True, slots=True)
class Recognition:
    """Detected format of a source."""

    containers: tuple[str, ...]
    """Distinct file formats."""
    form: str
    """Form or shape of the rows."""
    rows: int
    files: int
    unread: tuple[str, ...] = ()
    """Ignored columns of the first rows."""

    def __str__(self) -> str:
        files = f" in {self.files:,} files" if self.files > 1 else ""
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        return f"{'; '.join(self.containers)}, {self.form}, {rows}{files}"


class RowReader:
    """Iterator over the rows of a source with constant memory.

    ``recognition`` (the detected format) and the progress (``done`` of ``size`` bytes) are valid at
    any time. ``problems`` is complete when the iterator is exhausted.

    Args:
        source: a file, a folder, a pattern, ``file://`` or ``s3://``.
        columns: column names of the file by luthier's keys.
        checker: class that checks records and creates rows.
        whole: read plain text as one row, otherwise as consecutive pieces.
        on_progress: called with ``done`` and ``size``.
        group_column: column of the file with the values for ``group_of``.
        problems: list for the problems.
        accepts_own_keys: accept luthier's keys in place of the mapped columns, as in held-out rows.

    Raises:
        DataError: if the source has no readable file.
    """

    def __init__(
        self,
        source: Source,
        columns: Columns | None = None,
        checker: type[Checker] = Checker,
        whole: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
        group_column: str | None = None,
        problems: list[Problem] | None = None,
        accepts_own_keys: bool = False,
    ) -> None:
        self.files = files_of(source)
        self.problems = [] if problems is None else problems
        self.warnings: list[Problem] = []
        """Warnings about rows that are probably parsed incorrectly."""
        self.checker = checker(str(self.files[0]), self.problems, columns)
        self.checker.accepts_own_keys = accepts_own_keys
        self.checker.warnings = self.warnings
        self.whole = whole
        self.on_progress = on_progress
        self.done = 0
        self.rows = 0
        self.group_column = group_column
        self.group_of: dict[tuple[str, int], str] = {}
        """Value of the group column by file and line."""
        self._first: list[Row] = []
        self._rest: Iterator[Row] | None = None
        self._containers: list[str] = []
        self.unread = UnreadColumns(columns or {})
        self._checked_keys: set[tuple[str, ...]] = set()
        self._folder = Path(str(source))
        self._unnamed: set[str] = set()
        if self._folder.is_dir() and self.files != [self._folder]:
            names = media_below(self._folder)
            # Real paths, because a row may name a file by a link or with `..`.
            self._unnamed = {os.path.realpath(self._folder / name) for name in names}

    @cached_property
    def size(self) -> int:
        """Bytes of all files and media folders."""
        return sum(map(source_size, self.files))

    @property
    def recognition(self) -> Recognition:
        """Detected format of the rows so far."""
        form = self.checker.form_name or ("raw text" if self.rows else "nothing")
        containers = tuple(self._containers)
        unread = (*self.unread.values, *self.checker.unread_of_turns)
        return Recognition(containers, form, self.rows, len(self.files), unread)

    def first(self, count: int) -> list[Row]:
        """Return the first ``count`` rows; the next iteration yields these rows without a second
        read."""
        # One pass over the source: a pipe cannot be read twice, and an object in S3 is downloaded
        # for each pass.
        self._rest = self._rest or self._read()
        self._first += islice(self._rest, max(0, count - len(self._first)))
        return self._first[:count]

    def __iter__(self) -> Iterator[Row]:
        first, rest = self._first, self._rest or self._read()
        self._first, self._rest = [], None
        yield from first
        yield from rest

    def _read(self) -> Iterator[Row]:
        for path in self.files:
            container = find_container(path, self.problems)
            if container is None:
                continue
            if str(container) not in self._containers:
                self._containers.append(str(container))
            self.checker.begin(str(path))
            # Continued pre-training reads files of many gigabytes, which must not be one row.
            in_pieces = not self.whole and container.kind == "text"
            rows, on_progress = self.rows, self._offset_progress(self.done)
            for line, record in read_records(
                path,
                self.problems,
                self.whole,
                container=container,
                on_progress=on_progress,
                warnings=self.warnings,
                columns=self.checker.columns,
            ):
                row = _piece(path, record) if in_pieces else self.checker.row(line, record)
                if row is None:
                    continue
                self.rows += 1
                if self.group_column is not None:
                    self._add_group(row, record, self.group_column)
                self._add_unread(row)
                if self._unnamed and isinstance(row, MediaRow) and row.media.path:
                    self._unnamed.discard(os.path.realpath(row.media.path))
                yield row
            if in_pieces and rows == self.rows:
                self.checker.row(1, {"text": " "})  # reports a file without text
        self.checker.end()
        self.warnings += self.unread_problems()
        if not self.group_column:
            self._warn_about_speakers()
        if self._unnamed and self.rows:
            some = list_some(sorted(os.path.relpath(p, self._folder) for p in self._unnamed), 3)
            message = f"{len(self._unnamed):,} files belong to no row, such as {some}."
            fix = "Add a row for each file, or move the files."
            self.warnings.append(
                Problem("media.unnamed", message, fix, Location(str(self._folder)))
            )
            self._unnamed = set()
        if (first := self.checker.first_cut) is not None:
            count, cut = self.checker.entities, self.checker.cut_entities
            message = f"{cut:,} of {count:,} entities begin or end inside a word, such as "
            message += f"{first.message}; words are learned whole, and once."
            fix = "Count characters from 0; the end is exclusive."
            self.warnings.append(Problem("tags.cut", message, fix, first.location))
            self.checker.entities, self.checker.cut_entities, self.checker.first_cut = 0, 0, None
        if single := self.checker.single_items:
            message = f"{single:,} users have one item, so no next item, and are left out."
            self.warnings.append(
                Problem("history.single", message, "", Location(str(self.files[0])))
            )

    def _add_unread(self, row: Row) -> None:
        """Record the ignored columns of a row."""
        record = self.checker.record
        # Both columns of a time series are read.
        if row.members is not None or isinstance(record.get("window"), Media):
            return
        new: Iterable[str] = ()
        named = tuple(record)
        # Keys of all rows are compared only at the start; later, only rows with keys that were not
        # seen before.
        if self.rows <= ROWS_CHECKED or (
            named not in self._checked_keys and len(self._checked_keys) < _MOST_KNOWN
        ):
            self._checked_keys.add(named)
            keys = extra_keys(row, record, self.checker.form).keys()
            new = sorted(keys - {"id", "schemaVersion", self.group_column})
        self.unread.add(row.shape, new, record)

    def unread_problems(self) -> list[Problem]:
        """Return the problems of the columns that no row so far reads."""
        return self.unread.problems(Location(str(self.files[0])), self.checker.unread_of_turns)

    def _warn_about_speakers(self) -> None:
        """Warn about a speaker column that is not the group column."""
        for name, values in self.unread.values.items():
            if name.lower() in SPEAKER_COLUMNS and values.kind.reads == "audio":
                message = f"{quote(name)} names speakers, but held-out rows are random."
                fix = f"Keep speakers apart with `data.group_column={name}`."
                location = Location(str(self.files[0]))
                self.warnings.append(Problem("column.speaker", message, fix, location))

    def _add_group(self, row: Row, record: Record, column: str) -> None:
        value = record.get(column)
        if value is not None and str(value).strip():
            self.group_of[row.file, row.line] = str(value)
            return
        problem = f"The column {quote(column)} is {'empty' if column in record else 'not there'}"
        fix = "Fill in the column, or name another with `data.group_column`."
        if {*record} <= {"image", "audio", "window", "label"}:
            fix += " For files in folders and archives, write a table with their paths."
        message = f"{problem}; the keys are {list_keys(record)}."
        self.problems.append(Problem("column.missing", message, fix, row.location))

    def read_all(self) -> Sequence[Row]:
        """Return all rows, on disk if large; raise :class:`DataError` with all problems."""
        rows = spool(self)
        if self.problems:
            raise DataError(self.problems)
        return rows

    def _offset_progress(self, before: int) -> Callable[[int], None]:
        def on_progress(done: int) -> None:
            self.done = before + done
            if self.on_progress is not None:
                self.on_progress(self.done, self.size)

        return on_progress


def _piece(path: Path, record: Record) -> Row | None:
    """A part of a plain text; white space alone is none."""
    text = str(record["text"])
    return None if text.isspace() else RawText(str(path), 1, text)


def load_rows(
    source: Source,
    columns: Columns | None = None,
    checker: type[Checker] = Checker,
    accepts_own_keys: bool = False,
) -> Sequence[Row]:
    """Read and check a whole source; raise :class:`DataError` with all problems."""
    return RowReader(source, columns, checker, accepts_own_keys=accepts_own_keys).read_all()


_NO_DOCUMENT = ("file.binary", "file.empty", "file.unknown_format", "file.directory")
_DOCUMENT_FIX = (
    "Documents are plain text (.txt, .md, .text), or rows with text as JSON Lines, JSON, CSV, TSV or "
    "Parquet. Convert or omit this file."
)


def load_documents(sources: Iterable[Source]) -> list[str]:
    """Return the documents of ``sources``: one text per row or plain-text file.

    Raises:
        DataError: with every file without text.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            documents = [(row, row.plain_text()) for row in load_rows(source)]
        except DataError as error:
            problems += [
                replace(each, advice=_DOCUMENT_FIX) if each.rule in _NO_DOCUMENT else each
                for each in error.problems
            ]
            continue
        texts += [text for _, text in documents if text.strip()]
        for row, text in documents:
            if not text.strip():
                message = "The document has no text."
                problems.append(Problem("file.empty", message, _DOCUMENT_FIX, row.location))
    if problems:
        raise DataError(problems)
    return texts


def stream_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[Row, bool]]:
    """Yield the rows of a file with an ends-document flag, with constant memory.

    A plain-text file is one document in several rows (see ``read_records``). Checks are those of
    :func:`load_rows`, except for repeated ids, which need memory.
    """
    container = find_container(path, problems)
    if container is None:
        return
    checker = Checker(str(path), problems)
    in_pieces, blank = container.kind == "text", True
    for line, record in read_records(path, problems, whole=False, container=container):
        if in_pieces:
            text = str(record["text"])
            blank = blank and text.isspace()
            yield RawText(str(path), line, text), False
            continue
        # Repeated ids would need all ids in memory, and a corpus has hundreds of millions of rows.
        record.pop("id", None)
        row = checker.row(line, record)
        if row is not None:
            yield row, True
    if in_pieces and blank and not problems:
        checker.line = 1
        checker.text({"text": " "}, "text", target=True)
    if in_pieces:
        yield RawText(str(path), 1, ""), True
