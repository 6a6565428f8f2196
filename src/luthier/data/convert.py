"""Conversion of a source to a file in a different row form or container, as a stream.

Keys outside of the row's form (an id, a category) are kept, or dropped on request. A row that the
target form or container cannot represent is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.data.conversations.tool_forms import REASONING_KEYS
from luthier.data.conversations.turn_marks import mark_sense
from luthier.data.files.containers import JSON_LINES, unpacked_name
from luthier.data.files.parsing import Record, quote
from luthier.data.files.sources import Source
from luthier.data.files.writers import ColumnNames, Writer, check_target, writer_of
from luthier.data.formats import FORMS_WITH_TOOLS, TARGETS, extra_keys
from luthier.data.rows import Columns, Recognition, RowReader
from luthier.data.shapes.media import MediaRow
from luthier.errors import BoundedProblems, DataError, RecipeError, RowRefused
from luthier.formatting import did_you_mean
from luthier.types import Row

Format = Literal["jsonl", "json", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "json", "csv", "tsv", "parquet")

_BESIDE_TEXT = frozenset({"role", "content", "from", "value"})
_BESIDE_CALLS = frozenset({"tool_calls", "tool_call_id", "function_call", *REASONING_KEYS})


@dataclass(frozen=True, slots=True)
class Conversion:
    """Result of a conversion."""

    recognized: Recognition
    rows: int
    form: str
    format: Format
    kept: tuple[str, ...]
    """Keys outside of the form that were written."""
    left_out: tuple[str, ...]
    """Keys outside of the form that were dropped."""


def format_of(target: Path) -> Format:
    """Return the container for a file ending; :class:`RecipeError` for an unknown ending."""
    suffix = Path(unpacked_name(target.name)).suffix
    if suffix in JSON_LINES:
        return "jsonl"
    if suffix[1:] in FORMATS:
        return suffix[1:]  # type: ignore[return-value]
    raise RecipeError(
        f"{target} has no known ending; add --format with one of {', '.join(FORMATS)}",
        setting="format",
    )


def convert(
    source: Source,
    target: Path,
    form: str = "rows",
    format_: Format | None = None,
    columns: Columns | None = None,
    drop_extra_keys: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the rows of ``source`` to ``target``, completely or not at all.

    Args:
        source: a file, a folder, a pattern or an address.
        target: the new file. Its ending gives the format; ``.gz`` and ``.zst`` compress.
        form: one of ``TARGETS``.
        format_: the container, if the ending does not give the container.
        columns: column names of the source by luthier's keys.
        drop_extra_keys: drop keys outside of the form.
        overwrite: replace an existing file.
        on_progress: called with the bytes read so far and in total.

    Raises:
        RecipeError: for an invalid form, format or target.
        DataError: with every row that cannot be read or written, up to
            :data:`~luthier.errors.MOST_PROBLEMS`.
    """
    if form not in TARGETS:
        hint = did_you_mean(form, TARGETS, f"there are {', '.join(TARGETS)}")
        raise RecipeError(f"unknown form {form!r}; {hint}", setting="form", value=form)
    kind = format_ or format_of(target)
    check_target(target, (), [source], overwrite)
    work = _Conversion(source, target.parent, form, columns, drop_extra_keys, on_progress)
    # A table needs all column names before the first row, so a first pass collects and checks them.
    columns_writer = ColumnNames()
    if kind not in ("jsonl", "json"):
        work.write(columns_writer)
    try:
        with writer_of(kind, target, [*columns_writer.names]) as writer:
            reader = work.write(writer)
    except RowRefused as bad:  # rows of the current batch
        raise DataError([bad.at(str(source), 0)]) from bad
    return Conversion(
        reader.recognition, reader.rows, form, kind, tuple(work.kept), tuple(work.left_out)
    )


class _Conversion:
    """Several passes over one source."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        form: str,
        columns: Columns | None,
        drop_extra_keys: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.folder, self.columns, self.form = source, folder, columns, form
        self.drop_extra_keys, self.on_progress = drop_extra_keys, on_progress
        self.first = ""
        self.kept: dict[str, None] = {}
        self.left_out: dict[str, None] = {}

    def write(self, writer: Writer) -> RowReader:
        """Write every row; raise :class:`DataError` if any row is rejected."""
        problems = BoundedProblems()
        reader = RowReader(
            self.source, self.columns, on_progress=self.on_progress, problems=problems
        )
        for row in reader:
            try:
                writer.write(self._record(row, reader))
            except RowRefused as bad:
                problems.append(bad.at(row.file, row.line))
        problems.refuse()
        return reader

    def _record(self, row: Row, reader: RowReader) -> Record:
        source_record = reader.checker.record
        record = TARGETS[self.form](row)
        if isinstance(row, MediaRow) and record.get(row.key()) == row.media.name:
            record = row.relocate(record, self.folder)
        if not self.drop_extra_keys:
            _reject_lost_keys(source_record, self.form in FORMS_WITH_TOOLS)
        kind = "messages" if "messages" in record else "others"
        self.first = self.first or kind
        if kind != self.first:
            raise RowRefused(
                "convert.form",
                "Some rows are conversations, other rows a prompt and a reply.",
                "Write all rows as conversations: --to chat.",
            )
        for key, value in extra_keys(row, source_record, reader.checker.form).items():
            if self.drop_extra_keys:
                self.left_out[key] = None
                continue
            if key in record:
                raise RowRefused(
                    "convert.key",
                    f"The extra key {quote(key)} collides with a key of the written form.",
                    "Drop extra keys with --drop-extra-keys, or ignore the column with --map.",
                )
            self.kept[key] = None
            record[key] = value
        return record


def _reject_lost_keys(record: Record, keeps_tools: bool) -> None:
    """Reject messages with keys that the target form cannot represent."""
    written = _BESIDE_TEXT | (_BESIDE_CALLS if keeps_tools else frozenset())
    for key in ("messages", "conversations"):
        turns = record.get(key)
        for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
            more = [
                key
                for key, value in turn.items()
                if key not in written
                and value is not None
                and not (keeps_tools and mark_sense(key) is not None)  # written as "weight"
            ]
            if more:
                raise RowRefused(
                    "convert.message",
                    f"Message {number} has the key {quote(more[0])}, which would be lost.",
                    "Drop extra keys with --drop-extra-keys.",
                )
