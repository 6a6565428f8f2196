"""Rows back to records of the form they were read from.

What did not change is written as it was read. Of what changed, the record is kept and its texts are
replaced, so that whatever else it holds stays; where a text is put together of several (Alpaca's
instruction and input), the record is written anew. Either way it is read again before it is written,
and must give the row that was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from luthier.cleaning.edit import Piece, mapped
from luthier.data.checker import Checker
from luthier.data.forms import Form
from luthier.data.parsing import Record
from luthier.data.targets import TARGETS, used_keys
from luthier.errors import Problem, RowRefused
from luthier.inspection.texts import texts
from luthier.types import Row

_BACK: Mapping[str, str] = {
    "Bedrock conversation": "bedrock-conversation",
    "ShareGPT": "sharegpt",
    "Alpaca": "alpaca",
    "Bedrock raw text": "bedrock",
}
"""The target that writes a form; others can only have their texts replaced."""


def further_of(row: Row, given: Record, form: Form | None) -> Record:
    """Keys that stand beside what the row was made of."""
    used = used_keys(row, form)
    return {key: value for key, value in given.items() if key not in used}


def record_of(piece: Piece, row: Row, given: Record, form: Form | None) -> Record:
    """The record of ``piece``, which was made of ``row``, which was read from ``given``.

    Raises:
        RowRefused: where the form cannot say what became of the row.
    """
    if piece.row == row:
        return _beside(given, piece)
    for made in (_replaced(piece, row, given), _anew(piece, given, form)):
        if made is not None and _reads(made, piece.row):
            return made
    name = form.name if form else "its own"
    raise RowRefused(
        "convert.form",
        f"The row was changed and cannot be written in the form {name} again.",
        "Write the data in luthier's own form first: luthier convert SOURCE rows.jsonl.",
    )


def _beside(given: Record, piece: Piece) -> Record:
    return {key: piece.further.get(key, value) for key, value in given.items()}


def _replaced(piece: Piece, row: Row, given: Record) -> Record:
    """The record as it was, with the new texts in the places of the old ones."""
    new = {text.field: text.content for text in texts(piece.row)}
    changed = {text.content: new[text.field] for text in texts(row) if text.field in new}
    made = {
        key: piece.further[key]
        if key in piece.further
        else mapped(value, lambda text: changed.get(text, text))
        for key, value in given.items()
    }
    if piece.row.tokens is not None:
        made["tokens"] = list(piece.row.tokens)
        if "tags" in made:
            made["tags"] = list(piece.row.tags or ())
    return made


def _anew(piece: Piece, given: Record, form: Form | None) -> Record | None:
    if form is not None and form.name not in _BACK:
        return None
    target = _BACK[form.name] if form else "openai" if "preferred_output" in given else "rows"
    try:
        made = TARGETS[target](piece.row)
    except RowRefused:
        return None
    return made if piece.further.keys() & made.keys() else {**made, **piece.further}


def _reads(record: Record, row: Row) -> bool:
    """Whether the record is read as the row; ids are no part of it."""
    problems: list[Problem] = []
    read = Checker(row.file, problems).row(row.line, record)
    return not problems and read is not None and replace(read, line=row.line) == row
