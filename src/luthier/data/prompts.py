"""Prompts of generative models, and inputs of encoders and media models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from luthier.data.character_spans import label_studio_text
from luthier.data.conversations.row_context import join_context
from luthier.data.field_checks import (
    list_keys,
    read_words,
    rename_fix,
)
from luthier.data.files.parsing import Record
from luthier.data.files.read import find_container, read_records
from luthier.data.files.sources import Source, files_of
from luthier.data.formats import TEXT_PAIRS, forms_of
from luthier.data.inputs import Media, media_kind
from luthier.data.nearest_form import LABEL_NAMES
from luthier.data.rows import Checker, Columns
from luthier.data.shapes.base import Shape
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.media import BARE_MEDIA, BareImage, CaptionedImage
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import (
    QueryDocument,
    RawText,
    TaggedWords,
    TextPair,
    history_text,
)
from luthier.errors import DataError, Location, Problem, RowRefused, line_text
from luthier.types import Row

_REPLY_KEYS = ("completion", "expected", "reference_answer")
MOST_PATH = 4096
"""Most characters of a path, if the input may be a path or text."""
PREDICTED = "predicted"
"""Key of predictions in output rows."""


class PromptChecker(Checker):
    """Checker for prompts."""

    def row(self, line: int, record: Record) -> Row | None:
        """Return the prompt of a row; ``None`` after a reported problem."""
        self.line = line
        own = self.own_record(record)
        if own is None:
            return None
        record = own
        if "prompt" not in record and "messages" not in record:
            fix = rename_fix(record, ("prompt",)) or 'Write {"prompt": "..."} on each line.'
            fix += " Or name the column: `data.columns.prompt=COLUMN`."
            message = (
                f"The row has no prompt and no messages, but the keys {list_keys(self.record)}."
            )
            self.report("prompt.shape", message, fix)
            return None
        key = "prompt" if "prompt" in record else "messages"
        self.first = self.first or (key, line)
        if self.form is None and self.first[0] != key:
            first = line_text(self.first[1], self.file)
            message = f'The row has "{key}", unlike the first row ({first}).'
            self.report("prompt.mixed", message, "Move the row to another file.")
            return None
        try:
            row = self._read_prompt(PromptOnly if key == "prompt" else Conversation, record)
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None
        members = {key: value for key, value in self.record.items() if key != "messages"}
        return row and replace(row, members=members)

    def _read_prompt(self, kind: type[Shape], record: Record) -> Conversation | PromptOnly | None:
        """Return the prompt of a row with its context."""
        kind, record = join_context(kind, record, asks=True)
        if kind is Conversation:
            return self._conversation(record)
        reply = record.get("completion")
        prompt_record = {"expected": reply, **record} if isinstance(reply, str) else record
        return PromptOnly.read(prompt_record, self)

    def _conversation(self, record: Record) -> Conversation | None:
        """Return the turns of a conversation up to the last of the user."""
        images = record.get("images")
        messages = self.messages(record["messages"], answered=False, images=images)
        tools = self.tools(record)
        if not messages:
            return None
        expected: str | None = None
        if messages[-1].role == "assistant":
            messages, expected = messages[:-1], messages[-1].reply_text
        # Bedrock's name in reinforcement fine-tuning, with a value of any type.
        reference = record.get("reference_answer")
        if isinstance(reference, str):
            expected = reference
        if "expected" in record:
            expected = self.text(record, "expected")
        if not messages or messages[-1].role not in ("user", "tool"):
            fix = "Add the user's message, or remove the row."
            text = "The messages have no user turn."
            if any(turn.role == "user" for turn in messages):
                text = "The last turn before the reply is not the user's."
            self.report("prompt.unasked", text, fix)
        return Conversation(self.file, self.line, messages, expected, tools=tools)


class PromptInputChecker(PromptChecker):
    """Checker for prompts at inference, each row by itself.

    Rows may mix prompts and messages; ids and other keys may have any value.
    """

    def own_record(self, record: Record) -> Record | None:
        """Return the record with luthier's keys, without an id and without a reply that is not
        text."""
        self.first = self.form = None  # independent of earlier rows
        own = self._from_form(record)
        return own and {
            key: value
            for key, value in own.items()
            if key != "id"
            and (key not in _REPLY_KEYS or (isinstance(value, str) and value.strip()))
        }


def input_row(text: str, file: str, line: int = 1) -> Row:
    """Return the input row for a text, or for the path of an existing image or audio file."""
    path = Path(text) if len(text) < MOST_PATH and "\0" not in text else Path()
    kind = media_kind(path.name)
    try:
        if kind is None or not path.is_file():
            return RawText(file, line, text)
    except OSError:  # text longer than a file name
        return RawText(file, line, text)
    return BARE_MEDIA[kind](file, line, Media(kind, text, str(path)))


class InputChecker(Checker):
    """Checker for inputs of encoders and media models.

    Accepted are a text, two texts (``text`` and ``other``, or an anchor and a positive), words, a
    prompt with a reply, an image (with an optional text ``other``) and audio. Labels and other keys
    may have any value, except for ``reserved``, the key of predictions.
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
        """Return the input of a row; ``None`` after a reported problem."""
        self.line = line
        own = self._rename_columns(record) if self.columns else record
        if own is None:
            return None
        if self.reserved in record:
            message = f'The row has the field "{self.reserved}", which is reserved for the result.'
            self.report("row.predicted", message, "Rename or remove the field.")
            return None
        # Text forms stay unchanged, because the output row keeps all input fields.
        forms = [form.convert(own)[0] for form in forms_of(own) if form.tag is None]
        own = next((made for made in forms if {*BARE_MEDIA} & made.keys()), own)
        for key, bare in BARE_MEDIA.items():
            if key in own:
                media, other = bare.read(own, self), own.get("other")
                if isinstance(media, BareImage) and isinstance(other, str) and other.strip():
                    return CaptionedImage(self.file, line, media.media, other)
                return media
        text, reply = own.get("text"), own.get("completion")
        for query, document in (*TEXT_PAIRS, ("premise", "hypothesis")):
            if query in own and document in own:
                own = {"query": own[query], "document": own[document]}
        if "document" in own and "query" in own:
            row = QueryDocument.read({**own, "label": 0}, self)
            return row and row.bare()
        pair = own.get("anchor", text), own.get("positive", own.get("other"))
        if all(isinstance(side, str) and side.strip() for side in pair):
            return TextPair(self.file, line, str(pair[0]), str(pair[1]))
        if isinstance(text, str) and text.strip():
            return RawText(self.file, line, text)
        items = own.get("history", own.get("items"))
        if items is not None:
            return self._or_problem(lambda: RawText(self.file, line, history_text(items)))
        if "prompt" in own and isinstance(reply, str):
            prompt = self.text(own, "prompt")
            return PromptCompletion(self.file, line, prompt, reply) if prompt else None
        if {"question", "context"} <= own.keys():
            question, context = self.text(own, "question"), self.text(own, "context")
            asked = AnsweredQuestion(self.file, line, question or "", context or "")
            return asked if question and context else None
        if "tokens" in own:
            return self._or_problem(
                lambda: TaggedWords(self.file, line, read_words(own["tokens"], "tokens"), None)
            )
        task = own
        if isinstance(own.get("data"), dict):  # a task of Label Studio
            return self._or_problem(lambda: RawText(self.file, line, label_studio_text(task)))
        self.text(own, "text")
        return None

    def _or_problem(self, read: Callable[[], Row]) -> Row | None:
        """Return the row; ``None`` after reporting a refusal."""
        try:
            return read()
        except RowRefused as bad:
            self.report(bad.rule, bad.problem.message, bad.problem.advice)
            return None

    def _column_fix(self, record: Record, key: str) -> str:
        # A prediction needs no label, so the advice names the text alone.
        texts = {name: v for name, v in record.items() if name.strip().lower() not in LABEL_NAMES}
        likely = super()._column_fix(texts, key)
        return likely or f"Name the column: `data.columns.{key}=COLUMN`."


def load_prompts(source: Source, columns: Columns | None = None) -> list[Row]:
    """Read the prompts of a whole source; raise :class:`DataError` with all problems.

    Rows have a ``prompt``, ``messages`` that end with the user, or an equivalent form. A reply in
    the row (``completion`` or a last assistant turn) becomes ``expected``, unless the row has that
    key. In a plain-text file, each non-blank line is a prompt.
    """
    problems: list[Problem] = []
    stream = _stream_lines(source, problems, PromptChecker, columns, "prompt", PromptOnly)
    rows = [row for _, row in stream]
    if problems:
        raise DataError(problems)
    return rows


def stream_prompts(
    source: Source, problems: list[Problem], columns: Columns | None = None
) -> Iterator[tuple[Record, Row]]:
    """Yield each record of a source with its prompt; append problems to ``problems``.

    Like :func:`load_prompts`, but rows may mix shapes and repeat ids.
    """
    return _stream_lines(source, problems, PromptInputChecker, columns, "prompt", PromptOnly)


def load_inputs(
    source: Source, columns: Columns | None = None, reserved: str | None = None
) -> list[tuple[Record, Row]]:
    """Return each record of a source with its input for an encoder or media model.

    Inputs are ``text``, words under ``tokens``, items under ``history`` or ``items``, or ``prompt``
    and ``completion``. In a plain-text file, each non-blank line is a text. No record may have the key
    ``reserved``.

    Raises:
        DataError: with all problems.
    """
    problems: list[Problem] = []
    inputs = [*stream_inputs(source, problems, columns, reserved)]
    if problems:
        raise DataError(problems)
    return inputs


def stream_inputs(
    source: Source,
    problems: list[Problem],
    columns: Columns | None = None,
    reserved: str | None = None,
) -> Iterator[tuple[Record, Row]]:
    """Yield the results of :func:`load_inputs` with constant memory; append problems to
    ``problems``."""
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
    """Yield records and rows; each line of plain text is a row with the text under ``key``."""
    files = files_of(source)
    checker = make_checker(str(files[0]), problems, columns)
    any_row = False
    for path in files:
        checker.begin(str(path))
        container = find_container(path, problems)
        if container is None:
            continue
        for line, record in read_records(
            path, problems, container=container, columns=checker.columns
        ):
            if container.kind == "text":
                for number, each in enumerate(str(record["text"]).split("\n"), 1):
                    if text := each.strip():
                        any_row = True
                        yield {key: text}, shape(str(path), number, text)
            elif row := checker.row(line, record):
                any_row = True
                yield record, row
    checker.end()
    if not any_row and not problems:
        fix = f"Write one {key} per line."
        problems.append(
            Problem("file.empty", f"The file has no {key}s.", fix, Location(str(source)))
        )
