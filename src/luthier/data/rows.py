"""Sources to checked rows: shapes told apart by their keys, every mistake named.

The shapes are those of ``luthier.data.shapes``; the forms of other tools become one of them
(``luthier.data.formats``). Text is never altered. A source with anything wrong in it is refused as a
whole, with every problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from luthier.data.disk_sequence import spool
from luthier.data.field_checks import (
    RENAMES,
    FieldChecker,
    column_fix,
    list_keys,
    read_words,
    rename_fix,
)
from luthier.data.formats import Form, extra_keys, forms_of
from luthier.data.inputs import Media, media_kind
from luthier.data.parsing import Record, quote
from luthier.data.read import find_container, read_records, source_size
from luthier.data.row_context import is_blank, join_context, parse_turns
from luthier.data.shapes import SHAPES
from luthier.data.shapes.base import Shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.shapes.conversations import (
    Conversation,
    PromptCompletion,
    PromptOnly,
)
from luthier.data.shapes.media import BARE_MEDIA, BareImage, CaptionedImage, MediaRow
from luthier.data.shapes.preferences import JudgedAnswers, Preference
from luthier.data.shapes.texts import RawText, TaggedWords, TextPair
from luthier.data.sources import Source, files_of, media_below
from luthier.errors import DataError, Location, Problem, RowRefused
from luthier.escaping import list_some, nearest_name
from luthier.types import Row

Columns = Mapping[str, str]
"""The file's name for each of our keys; an empty one sets the key aside."""

SPEAKER_COLUMNS = frozenset(
    {"speaker", "speaker_id", "speakerid", "spk", "spk_id", "client_id", "talker", "voice"}
)
"""Names, in lower case, of columns of audio tables that tell speakers apart."""
ROWS_CHECKED = 1000
"""Rows that are looked at for columns that nothing is read from."""

_ALL_SHAPES = ", ".join(
    title
    for kind in SHAPES.values()
    for title in ([kind.title, kind.openai_title] if kind is Preference else [kind.title])
)
_BESIDE_TEXT = ("label", "rating", "tags")
"""What makes another shape of a text: misspelt, it would be left out without a word."""
_ASKED = (PromptCompletion, PromptOnly, Conversation)
_REPLY_KEYS = ("completion", "expected", "reference_answer")
_VALUES_TELL = frozenset(("label", "thumb", "rating", "score"))
"""Keys whose values tell whether an answer was judged."""
_MOST_KNOWN = 100
MOST_IDS = 1_000_000
"""Ids of a file that are remembered: those of one that is larger than memory would not fit either."""
MOST_PATH = 4096
"""Characters that a path may have, where a text could be one."""
PREDICTED = "predicted"
"""The key under which rows get what a model says of them."""


class Checker(FieldChecker):
    """Checks the rows of a source in order; what it has seen is its state.

    Args:
        file: the file in hand.
        problems: what is wrong is appended here.
        columns: the file's names of our keys, by ours; an empty one sets the key aside.
    """

    other_keys = frozenset(
        ("id", "expected", "tags", *(key for kind in SHAPES.values() for key in kind.keys))
    ) - {"text"}

    def __init__(self, file: str, problems: list[Problem], columns: Columns | None = None) -> None:
        super().__init__(file, problems)
        self.columns = columns or {}
        self.first: tuple[str, int] | None = None
        self.first_file = file
        self.form: Form | None = None
        """Of the first row, where it is none of our own shapes."""
        self.names = self._names_of({})
        self.known: dict[tuple[str, ...], type[Shape]] = {}
        """Shapes by the keys of rows of our own shapes, in their order."""
        self.given: Record = {}
        """The record in hand, its columns renamed."""
        self.line_of_id: dict[str | int, int] = {}

    def begin(self, file: str) -> None:
        """Go on with another file of the same source: its rows are like those before."""
        self.file = file
        self.line_of_id = {}

    @property
    def form_name(self) -> str | None:
        """What the rows are, for people; ``None`` before the first one."""
        if self.form is not None:
            return self.form.name
        return self.first[0] if self.first else None

    def row(self, line: int, record: Record) -> Row | None:
        """Return the row; None only when a problem was reported."""
        self.line = line
        keys = tuple(record)
        known = self.known.get(keys)
        if known is not None:
            self.given = record
            if "id" in record:
                self.check_id(record["id"])
            return self._read(known, record)
        own = self.own_record(record)
        if own is None:
            return None
        kind = self.shape_of(own)
        if kind is None:
            return None
        # Where the keys alone tell the shape, the next row with the same ones need not be asked. Of an
        # answer with a label or a rating it is the value that tells whether it is a judgement.
        values_tell = "completion" in own and _VALUES_TELL & own.keys()
        if (
            own is record
            and own is self.given
            and not values_tell
            and len(self.known) < _MOST_KNOWN
        ):
            self.known[keys] = kind
        return self._read(kind, own)

    def _read(self, kind: type[Shape], record: Record) -> Row | None:
        try:
            joined_kind, joined = join_context(kind, record)
            row = joined_kind.read(joined, self)
            if row is not None:  # what is missing has a clearer fix
                self._check_meaning(kind)
            return row
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None

    def _check_meaning(self, kind: type[Shape]) -> None:
        """Refuse a row with a key that makes it another task than its shape has.

        Raises:
            RowRefused: naming the key.
        """
        if kind.other_tasks.keys().isdisjoint(self.given):
            return
        read = self.form.keys | self.form.used if self.form else frozenset[str]()
        for key in kind.other_tasks.keys() & self.given.keys() - read:
            if not is_blank(self.given[key]) and self.given[key] != []:
                raise RowRefused(
                    "row.ambiguous",
                    f"The row is read as {kind.words}, and {quote(key)} would be left out.",
                    f"{kind.other_tasks[key]} Or set {quote(key)} aside by `data.columns.{key}=` "
                    f"(empty).",
                )

    def own_record(self, record: Record) -> Record | None:
        """The record in our own keys, its id checked; None only when a problem was reported."""
        own = self._from_form(record)
        if own is not None and "id" in own:
            self.check_id(own["id"])
        return own

    def _from_form(self, record: Record) -> Record | None:
        """The record in one of our shapes, from its form; None when a problem was reported."""
        columns = self._columns_beside_form(record) if self.columns else {}
        mapped = self._rename_columns(record, columns) if columns else record
        if mapped is None:
            return None
        try:
            self.given = mapped = parse_turns(mapped)
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None
        found = forms_of(mapped)
        used = frozenset().union(*(form.used for form in found))
        generic = [f'"{key}"' for key in ("text", "prompt") if key in mapped and key not in used]
        if len(found) > 1 or (found and generic):
            names = [*(form.name for form in found), *generic]
            message = f"The row can be read as {' or as '.join(names)}."
            fix = "Set aside the columns that are not meant, as with `data.columns.text=` (empty)."
            self.report("row.ambiguous", message, fix)
            return None
        form = found[0] if found else None
        if form is None and self.form is not None and self.form.keys & mapped.keys():
            form = self.form if not any(key in mapped for key in ("prompt", "messages")) else None
        if self.first is None:
            self.form = form
        elif form is not self.form:
            self._report_mixed(form.name if form else "of another form")
            return None
        if form is None:
            return mapped
        made, theirs = form.convert(mapped)
        self.names = self._names_of(theirs)
        return made

    def _columns_beside_form(self, record: Record) -> Columns:
        """The mapping without what a form gives anyhow.

        A form reads more columns than a mapping names (an Alpaca row's ``input``): where a mapping says
        of an instruction and its output what their form says too, the row stays in its form.
        """
        left = {key: value for key, value in record.items() if self.columns.get(key) != ""}
        found = forms_of(left)
        if len(found) != 1:
            return self.columns
        _, names = found[0].convert(dict(left))
        beside = {
            ours: theirs
            for ours, theirs in self.columns.items()
            if not theirs or names.get(ours) != theirs
        }
        keys = found[0].keys | found[0].used
        clash = any(theirs in keys or ours in names for ours, theirs in beside.items() if theirs)
        return self.columns if clash or len(beside) == len(self.columns) else beside

    def _rename_columns(self, record: Record, columns: Columns) -> Record | None:
        """The record with ``columns`` renamed as asked; None when one is not there."""
        taken = {*columns.values(), *columns}
        made = {key: value for key, value in record.items() if key not in taken}
        for ours, theirs in columns.items():
            # A validation file may have our names already.
            source = ours if theirs and theirs not in record else theirs
            if source and source not in record:
                message = (
                    f"The column {quote(theirs)} is not there; the keys are {list_keys(record)}."
                )
                near = nearest_name(theirs, record)
                fix = f"Mend `data.columns.{ours}={theirs}`, or mend the row."
                self.report("column.missing", message, column_fix(ours, near) if near else fix)
                return None
            if source:
                made[ours] = record[source]
        return made

    def _names_of(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """What the file calls our keys, through form and mapping."""
        return {
            **self.columns,
            **{ours: self.columns.get(own) or own for ours, own in names.items()},
        }

    def _report_mixed(self, what: str) -> None:
        """Report a row that is not what the first row was."""
        assert self.first is not None
        first = self.form.name if self.form else self.first[0]
        line = self.first[1]
        where = f"line {line}" if self.first_file == self.file else f"{self.first_file}:{line}"
        message = f"The row is {what}, but the first row ({where}) is {first}."
        fix = f"Rewrite the row as {first}, or move it to a file of its own shape."
        self.report("row.mixed_shapes", message, fix)

    def check_id(self, value: object) -> None:
        """Report an id that an earlier row has: one of the first :data:`MOST_IDS` of the file."""
        # By exact type: True is an int in Python and would collide with 1.
        if type(value) is not str and type(value) is not int:
            return
        if len(self.line_of_id) >= MOST_IDS and value not in self.line_of_id:
            return
        first = self.line_of_id.setdefault(value, self.line)
        if first != self.line:
            name = quote(str(value))
            message = f"The id {name} was already used on line {first}."
            self.report("id.duplicate", message, "Give each row its own id, or remove the copy.")

    def shape_of(self, record: Record) -> type[Shape] | None:
        """The shape by the record's keys, or report why there is not exactly one."""
        found: list[type[Shape]] = [k for k in SHAPES.values() if k.matches(record)]
        if judged := next((kind for kind in found if issubclass(kind, JudgedAnswers)), None):
            found = [judged]  # what people judged is more than what they wrote
        if MultipleChoice in found:
            found = [MultipleChoice]  # a prompt alone is less
        if PromptOnly in found:
            found.remove(PromptCompletion if self._only_asks(record) else PromptOnly)
        if any(kind in found for kind in _ASKED):
            # What else the row says of itself, its tags or rating, is no shape of its own.
            found = [kind for kind in found if kind in (*_ASKED, RawText)]
        elif len(found) > 1 and RawText in found:
            found.remove(RawText)  # the text of what is labelled
        if not found:
            self._report_unknown(record)
            return None
        if len(found) > 1:
            keys = list_keys(key for kind in found for key in kind.keys if key in record)
            message = f"The row mixes {len(found)} shapes: it has the keys {keys}."
            fix = f"Keep the keys of one shape and remove or rename the others: {_ALL_SHAPES}."
            self.report("row.ambiguous", message, fix)
            return None
        kind = found[0]
        if kind is RawText and (misspelt := self._misspelt(record)):
            key, meant = misspelt
            message = f"{quote(key)} is not a known key. Did you mean {quote(meant)}?"
            fix = (
                f"Rename the key, or say `data.columns.{meant}={key}`; "
                f"`data.columns.{meant}=` (empty) learns the text alone."
            )
            self.report("row.ambiguous", message, fix)
            return None
        title = kind.title_of(record)
        if self.first is None:
            self.first, self.first_file = (title, self.line), self.file
        # A form may give rows with a system prompt as messages, and others as prompt and completion.
        if self.form is None and title != self.first[0]:
            self._report_mixed(title)
            return None
        return kind

    def _misspelt(self, record: Record) -> tuple[str, str] | None:
        """A key beside a text that looks like one of ours, and that one, unless it was set aside."""
        for key in record:
            # "grading" is close to "rating" as well, but starts otherwise.
            able = [each for each in _BESIDE_TEXT if each[0] == key.strip()[:1].lower()]
            near = nearest_name(key.strip().lower(), able, cutoff=0.8)
            if near and near not in (key, *self.columns):
                return key, near
        return None

    def _only_asks(self, record: Record) -> bool:
        """Whether a row with a prompt is meant without a reply: none is there, misnamed or lost."""
        if "completion" in record or (self.first and self.first[0] == PromptCompletion.title):
            return False
        misnamed = any(RENAMES.get(key.strip().lower()) == "completion" for key in record)
        return "expected" in record or not misnamed

    def _report_unknown(self, record: Record) -> None:
        """Report keys that make no shape, with what to rename."""
        has = f"it has the keys {list_keys(record)}" if record else "it has no keys"
        message = f"The row is of no known shape: {has}."
        wanted = (("messages",), ("prompt", "completion"), ("text",))
        renamed = next(filter(None, (rename_fix(record, keys) for keys in wanted)), "")
        if {"question", "context"} <= record.keys():  # as in SQuAD
            renamed = 'Write each question as {"question": …, "context": …, "answer": …}.'
        fix = (
            "say which column is what: `data.columns.text=COLUMN` (or `image`, `audio`) and "
            "`data.columns.label=COLUMN` to classify, `data.columns.prompt=COLUMN` and "
            "`data.columns.completion=COLUMN` to write."
        )
        fix = f"{renamed} Or {fix}" if renamed else f"{fix[:1].upper()}{fix[1:]}"
        self.report("row.unknown_shape", message, f"{fix} The shapes are {_ALL_SHAPES}.")


class PromptChecker(Checker):
    """Checks rows for what they ask."""

    def row(self, line: int, record: Record) -> Row | None:
        """Return what is asked; None only when a problem was reported."""
        self.line = line
        own = self.own_record(record)
        if own is None:
            return None
        record = own
        if "prompt" not in record and "messages" not in record:
            fix = rename_fix(record, ("prompt",)) or 'Write {"prompt": "..."} on each line.'
            fix += " Or say which column asks: `data.columns.prompt=COLUMN`."
            message = (
                f"The row has neither a prompt nor messages: its keys are {list_keys(self.given)}."
            )
            self.report("prompt.shape", message, fix)
            return None
        key = "prompt" if "prompt" in record else "messages"
        self.first = self.first or (key, line)
        if self.form is None and self.first[0] != key:
            message = f'The row has "{key}", but the first row (line {self.first[1]}) has not.'
            self.report("prompt.mixed", message, "Move the row to a file of its own kind.")
            return None
        try:
            row = self._read_prompt(PromptOnly if key == "prompt" else Conversation, record)
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None
        members = {key: value for key, value in self.given.items() if key != "messages"}
        return row and replace(row, members=members)

    def _read_prompt(self, kind: type[Shape], record: Record) -> Conversation | PromptOnly | None:
        """Return the prompt of a row, with the context that stands next to it."""
        kind, record = join_context(kind, record, asks=True)
        if kind is Conversation:
            return self._conversation(record)
        reply = record.get("completion")
        asked = {"expected": reply, **record} if isinstance(reply, str) else record
        return PromptOnly.read(asked, self)

    def _conversation(self, record: Record) -> Conversation | None:
        """Return the turns of a conversation up to the last of the user."""
        messages, tools = self.messages(record["messages"], answered=False), self.tools(record)
        if not messages:
            return None
        expected: str | None = None
        if messages[-1].role == "assistant":
            messages, expected = messages[:-1], messages[-1].reply_text
        # What Bedrock's rows for reinforcement fine-tuning call it; there it may be of any type.
        reference = record.get("reference_answer")
        if isinstance(reference, str):
            expected = reference
        if "expected" in record:
            expected = self.text(record, "expected")
        if not messages or messages[-1].role not in ("user", "tool"):
            fix = "Add the user's message, or remove the row."
            text = "The messages hold no turn of the user to answer."
            if any(turn.role == "user" for turn in messages):
                text = "Without a reply at their end, the messages do not end with the user's."
            self.report("prompt.unasked", text, fix)
        return Conversation(self.file, self.line, messages, expected, tools=tools)


class PromptInputChecker(PromptChecker):
    """Checks rows for what models that write are asked, each row by itself.

    Rows may ask by prompts and by messages; ids and all other keys may be anything.
    """

    def own_record(self, record: Record) -> Record | None:
        """The record in our own keys, without id, and without a reply that is no text."""
        self.first = self.form = None  # what the rows before it were does not matter
        own = self._from_form(record)
        return own and {
            key: value
            for key, value in own.items()
            if key != "id"
            and (key not in _REPLY_KEYS or (isinstance(value, str) and value.strip()))
        }


def input_row(given: str, file: str, line: int = 1) -> Row:
    """What a model that reads is asked about: a text, or the image or sound that it is the path of."""
    path = Path(given) if len(given) < MOST_PATH and "\0" not in given else Path()
    kind = media_kind(path.name)
    try:
        if kind is None or not path.is_file():
            return RawText(file, line, given)
    except OSError:  # a text longer than a name can be
        return RawText(file, line, given)
    return BARE_MEDIA[kind](file, line, Media(kind, given, str(path)))


class InputChecker(Checker):
    """Checks rows for what models that read take of them: a text, two texts (``text`` and ``other``, or
    an anchor and a positive), words, a prompt with its reply, an image (and ``other``, a text) or a
    sound.

    Labels and all other keys may be anything but ``reserved``, under which an answer is written.
    """

    def __init__(
        self,
        file: str,
        problems: list[Problem],
        columns: Columns | None = None,
        reserved: str | None = None,
    ) -> None:
        super().__init__(file, problems, columns)
        self.reserved = reserved

    def row(self, line: int, record: Record) -> Row | None:
        """Return what is read; None only when a problem was reported."""
        self.line = line
        own = self._rename_columns(record, self.columns) if self.columns else record
        if own is None:
            return None
        if self.reserved in record:
            message = f'The row has a field "{self.reserved}", where the answer is to stand.'
            self.report("row.predicted", message, "Rename or remove that field.")
            return None
        # Forms of texts are left as they are: a row keeps its fields beside the answer.
        forms = [form.convert(own)[0] for form in forms_of(own)]
        own = next((made for made in forms if {*BARE_MEDIA} & made.keys()), own)
        for key, bare in BARE_MEDIA.items():
            if key in own:
                media, other = bare.read(own, self), own.get("other")
                if isinstance(media, BareImage) and isinstance(other, str) and other.strip():
                    return CaptionedImage(self.file, line, media.media, other)
                return media
        text, reply = own.get("text"), own.get("completion")
        pair = own.get("anchor", text), own.get("positive", own.get("other"))
        if all(isinstance(side, str) and side.strip() for side in pair):
            return TextPair(self.file, line, *map(str, pair))
        if isinstance(text, str) and text.strip():
            return RawText(self.file, line, text)
        if "prompt" in own and isinstance(reply, str):
            prompt = self.text(own, "prompt")
            return PromptCompletion(self.file, line, prompt, reply) if prompt else None
        if "tokens" in own:
            try:
                return TaggedWords(self.file, line, read_words(own["tokens"], "tokens"), None)
            except RowRefused as bad:
                self.report(bad.rule, bad.problem.message, bad.problem.advice)
                return None
        self.text(own, "text")
        return None

    def _column_fix(self, record: Record, key: str) -> str:
        likely = super()._column_fix(record, key)
        return likely or f"Say which column has it: `data.columns.{key}=COLUMN`."


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a source was taken for."""

    containers: tuple[str, ...]
    """What its files are made of, each kind once."""
    form: str
    """Form or shape of the rows."""
    rows: int
    files: int
    unread: tuple[str, ...] = ()
    """Columns that nothing was read from: of all rows where the caller said what columns are called,
    else of the first ones."""

    def __str__(self) -> str:
        files = f" in {self.files:,} files" if self.files > 1 else ""
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        return f"{'; '.join(self.containers)}, {self.form}, {rows}{files}"


class RowReader:
    """Rows of a source, one after the other, never all in memory.

    What was found (``recognition``) and how far reading is (``done`` of ``size`` bytes) can be asked at
    any time. Problems are in ``problems``, complete when the iterator is exhausted.

    Args:
        source: a file, a folder, a pattern, ``file://`` or ``s3://``.
        columns: the file's name for each of our keys.
        checker: what checks records and makes rows.
        whole: read plain text as one row; otherwise as pieces that follow each other.
        on_progress: now and then given ``done`` and ``size``.
        group_column: the column, as the file calls it, whose values become ``group_of``.
        problems: what is wrong is appended here.

    Raises:
        DataError: where the source names nothing that can be read.
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
    ) -> None:
        self.files = files_of(source)
        self.problems = [] if problems is None else problems
        self.doubts: list[Problem] = []
        """Warnings about rows that are likely read wrongly."""
        self.checker = checker(str(self.files[0]), self.problems, columns)
        self.whole = whole
        self.on_progress = on_progress
        self.done = 0
        self.rows = 0
        self.group_column = group_column
        self.group_of: dict[tuple[str, int], str] = {}
        """What the column for groups has in each row, by file and line."""
        self._first: list[Row] = []
        self._rest: Iterator[Row] | None = None
        self._containers: list[str] = []
        self._unread: dict[str, None] = {}
        self._folder = Path(str(source))
        self._unnamed: set[str] = set()
        if self._folder.is_dir() and self.files != [self._folder]:
            names = media_below(self._folder)
            self._unnamed = {os.path.realpath(self._folder / name) for name in names}

    @cached_property
    def size(self) -> int:
        """Bytes of all files; of a folder of images, of what is below it."""
        return sum(map(source_size, self.files))

    @property
    def recognition(self) -> Recognition:
        """What the rows that were read so far are."""
        form = self.checker.form_name or ("raw text" if self.rows else "nothing")
        containers = tuple(self._containers)
        unread = tuple(self._unread | self.checker.unread_of_turns)
        return Recognition(containers, form, self.rows, len(self.files), unread)

    def first(self, count: int) -> list[Row]:
        """Return the first ``count`` rows, which the next iteration yields without reading again."""
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
            in_pieces = not self.whole and container.kind == "text"
            rows, on_progress = self.rows, self._offset_progress(self.done)
            for line, record in read_records(
                path,
                self.problems,
                self.whole,
                container=container,
                on_progress=on_progress,
                doubts=self.doubts,
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
                self.checker.row(1, {"text": " "})  # refused, as nothing else is there
        if self._unnamed and self.rows:
            some = list_some(sorted(os.path.relpath(p, self._folder) for p in self._unnamed), 3)
            message = f"No row names {len(self._unnamed):,} of the files, such as {some}."
            fix = "Add a row for each file, or move the files."
            self.doubts.append(Problem("media.unnamed", message, fix, Location(str(self._folder))))
            self._unnamed = set()

    def _add_unread(self, row: Row) -> None:
        """Remember the columns that nothing of the row was read from, where that is asked."""
        given, columns = self.checker.given, self.checker.columns
        looked_at = not self.problems and self.rows <= ROWS_CHECKED
        # Both columns of a time series are read.
        looked_at &= not isinstance(given.get("window"), Media)
        if row.members is None and (columns or looked_at):
            unread = extra_keys(row, given, self.checker.form).keys()
            new = dict.fromkeys(sorted(unread - {"id", "schemaVersion", self.group_column}))
            if isinstance(row, MediaRow) and row.media.kind == "audio" and not self.group_column:
                self._doubt_speakers(row, new)
            self._unread |= new

    def _doubt_speakers(self, row: Row, unread: Iterable[str]) -> None:
        """Add a warning for a column of speakers that no one has named as the group column."""
        for name in unread:
            if name.lower() in SPEAKER_COLUMNS and name not in self._unread:
                message = (
                    f"The column {quote(name)} names speakers, and rows are held out at random."
                )
                fix = f"Keep speakers apart by `data.group_column={name}`."
                self.doubts.append(Problem("column.speaker", message, fix, Location(row.file)))

    def _add_group(self, row: Row, record: Record, column: str) -> None:
        value = record.get(column)
        if value is not None and str(value).strip():
            self.group_of[row.file, row.line] = str(value)
            return
        problem = f"The column {quote(column)} is {'empty' if column in record else 'not there'}"
        fix = "Name a column that each row has by `data.group_column`, or fill it in."
        if {*record} <= {"image", "audio", "window", "label"}:
            fix += " Of files in folders and archives, write a table with their paths."
        message = f"{problem}; the keys are {list_keys(record)}."
        self.problems.append(Problem("column.missing", message, fix, row.location))

    def read_all(self) -> Sequence[Row]:
        """All rows, on disk where they are many; ``DataError`` with every problem if there is any."""
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
    source: Source, columns: Columns | None = None, checker: type[Checker] = Checker
) -> Sequence[Row]:
    """Read and check a whole source; raise ``DataError`` with every problem if there is any."""
    return RowReader(source, columns, checker).read_all()


_NO_DOCUMENT = ("file.binary", "file.empty", "file.unknown_format", "file.directory")
_DOCUMENT_FIX = (
    "Documents are plain text (.txt, .md, .text), or rows with text as JSON Lines, JSON, CSV, TSV or "
    "Parquet. Convert this one, or leave it away."
)


def load_documents(sources: Iterable[Source]) -> list[str]:
    """Texts of ``sources``, one for each row or plain-text file.

    Raises:
        DataError: naming every file that holds no text.
    """
    texts: list[str] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            found = [(row, row.plain_text()) for row in load_rows(source)]
        except DataError as error:
            problems += [
                replace(each, advice=_DOCUMENT_FIX) if each.rule in _NO_DOCUMENT else each
                for each in error.problems
            ]
            continue
        texts += [text for _, text in found if text.strip()]
        for row, text in found:
            if not text.strip():
                message = "The document has no text."
                problems.append(Problem("file.empty", message, _DOCUMENT_FIX, row.location))
    if problems:
        raise DataError(problems)
    return texts


def stream_rows(path: Path, problems: list[Problem]) -> Iterator[tuple[Row, bool]]:
    """Rows of a file one after the other, never all in memory, and whether each ends a document.

    A plain-text file is one document and comes as many rows (see ``read_records``). Checked is all
    that :func:`load_rows` checks but for repeated ids, which would have to be remembered.
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
        record.pop("id", None)
        row = checker.row(line, record)
        if row is not None:
            yield row, True
    if in_pieces and blank and not problems:
        checker.line = 1
        checker.text({"text": " "}, "text", target=True)
    if in_pieces:
        yield RawText(str(path), 1, ""), True


def load_prompts(source: Source, columns: Columns | None = None) -> list[Row]:
    """Read a whole source for what it asks; raise ``DataError`` with every problem if there is any.

    Rows are of the shape ``{"prompt"}``, or ``messages`` that end with the user's turn, or of a form
    that becomes one of these. A row's own reply, its ``completion`` or the assistant's turn at the end
    of ``messages``, is no part of what is asked: it becomes ``expected``, unless the row has that key
    itself. In a plain-text file each line that is not blank is a prompt.
    """
    problems: list[Problem] = []
    found = _stream_lines(source, problems, PromptChecker, columns, "prompt", PromptOnly)
    rows = [row for _, row in found]
    if problems:
        raise DataError(problems)
    return rows


def stream_prompts(
    source: Source, problems: list[Problem], columns: Columns | None = None
) -> Iterator[tuple[Record, Row]]:
    """Each record of a source, and what it asks a model that writes, one after the other.

    As of :func:`load_prompts`, but rows may ask in different ways, and ids may repeat. Records are as
    in the file; what is wrong is appended to ``problems``.
    """
    return _stream_lines(source, problems, PromptInputChecker, columns, "prompt", PromptOnly)


def load_inputs(
    source: Source, columns: Columns | None = None, reserved: str | None = None
) -> list[tuple[Record, Row]]:
    """Read a whole source for what models that read take of it: each record, and what is read of it.

    That is a ``text``, the words under ``tokens``, or a ``prompt`` and its ``completion``; in a
    plain-text file each line that is not blank is a text. Records are as in the file; none may have the
    field ``reserved``.

    Raises:
        DataError: with every problem if there is any.
    """
    problems: list[Problem] = []
    found = [*stream_inputs(source, problems, columns, reserved)]
    if problems:
        raise DataError(problems)
    return found


def stream_inputs(
    source: Source,
    problems: list[Problem],
    columns: Columns | None = None,
    reserved: str | None = None,
) -> Iterator[tuple[Record, Row]]:
    """The same one after the other, never all in memory; what is wrong is appended to ``problems``."""
    checker = partial(InputChecker, reserved=reserved)
    return _stream_lines(source, problems, checker, columns, "text", RawText)


def _stream_lines(
    source: Source,
    problems: list[Problem],
    make_checker: Callable[[str, list[Problem], Columns | None], Checker],
    columns: Columns | None,
    key: str,
    shape: Callable[[str, int, str], Row],
) -> Iterator[tuple[Record, Row]]:
    """Records and their rows; of plain text each line is one, with its text under ``key``."""
    files = files_of(source)
    checker = make_checker(str(files[0]), problems, columns)
    any_row = False
    for path in files:
        checker.begin(str(path))
        container = find_container(path, problems)
        if container is None:
            continue
        for line, record in read_records(path, problems, container=container):
            if container.kind == "text":
                for number, each in enumerate(str(record["text"]).split("\n"), 1):
                    if text := each.strip():
                        any_row = True
                        yield {key: text}, shape(str(path), number, text)
            elif row := checker.row(line, record):
                any_row = True
                yield record, row
    if not any_row and not problems:
        fix = f"Write one {key} on each line."
        problems.append(
            Problem("file.empty", f"The file holds no {key}s.", fix, Location(str(source)))
        )
