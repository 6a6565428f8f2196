"""What is asked: the prompts of a file, for whoever answers them; their own replies stand aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from luthier.data.checker import Checker
from luthier.data.parsing import Record
from luthier.data.read import read_records
from luthier.data.renames import listed, rename_fix
from luthier.data.rows import Columns, is_text
from luthier.data.sources import Source, files_of
from luthier.errors import DataError, Problem
from luthier.types import Message, Row

RULES: Mapping[str, str] = {
    "prompt.shape": "Prompts are asked for, and the row has neither a prompt nor messages.",
    "prompt.mixed": "Some rows are prompts and others conversations.",
    "grader.no_reference": "A grader is to compare with the row's own reply, and there is none.",
    "prompt.unasked": "Without its last assistant turn, a conversation asks nothing.",
}
"""Rules of prompts; those of reading and of the texts themselves are in ``data.rows``."""


def load_prompts(source: Source, columns: Columns | None = None) -> list[Row]:
    """Read a whole source for what it asks; raise ``DataError`` with every problem if there is any.

    Rows are of the shape ``{"prompt"}``, or ``messages`` that end with the user's turn, or of a form
    that becomes one of these. A row's own reply, its ``completion`` or the assistant's turn at the end
    of ``messages``, is no part of what is asked: it becomes ``expected``, unless the row has that key
    itself. In a plain-text file each line that is not blank is a prompt.
    """
    problems: list[Problem] = []
    files = files_of(source)
    checker = PromptChecker(str(files[0]), problems, columns)
    rows: list[Row | None] = []
    for path in files:
        checker.begin(str(path))
        text = is_text(path)
        for line, record in read_records(path, problems):
            if text:
                lines = enumerate(str(record["text"]).split("\n"), 1)
                rows += [
                    Row(str(path), n, prompt=each.strip()) for n, each in lines if each.strip()
                ]
            else:
                rows.append(checker.row(line, record))
    if not rows and not problems:
        fix = "Write one prompt on each line."
        problems.append(Problem(str(source), 0, "file.empty", "The file holds no prompts.", fix))
    if problems:
        raise DataError(problems)
    return [row for row in rows if row is not None]


def messages_of(row: Row) -> tuple[Message, ...]:
    """The turns that a reply to ``row`` follows."""
    return row.messages or (Message("user", row.prompt or ""),)


class PromptChecker(Checker):
    """Checks rows for what they ask."""

    def row(self, line: int, record: Record) -> Row | None:
        """Return what is asked; None only when a problem was reported."""
        self.line = line
        own = self.identified(record)
        if own is None:
            return None
        record = own
        if "prompt" not in record and "messages" not in record:
            fix = rename_fix(record, ("prompt",)) or 'Write {"prompt": "..."} on each line.'
            message = f"The row has neither a prompt nor messages: its keys are {listed(record)}."
            self.report("prompt.shape", message, fix)
            return None
        key = "prompt" if "prompt" in record else "messages"
        self.first = self.first or (key, line)
        if self.form is None and self.first[0] != key:
            message = f'The row has "{key}", but the first row (line {self.first[1]}) has not.'
            self.report("prompt.mixed", message, "Move the row to a file of its own kind.")
            return None
        if key == "messages":
            row = self.turns(record)
        else:
            reply = record.get("completion")
            row = self.prompt({"expected": reply, **record} if isinstance(reply, str) else record)
        members = {key: value for key, value in self.given.items() if key != "messages"}
        return row and replace(row, members=members)

    def turns(self, record: Record) -> Row | None:
        """The turns of a conversation up to the last of the user."""
        row = self.chat(record["messages"], answered=False)
        if row is None or not row.messages:
            return row
        messages: tuple[Message, ...] = row.messages
        expected: str | None = None
        if messages[-1].role == "assistant":
            messages, expected = messages[:-1], messages[-1].content
        # What Bedrock's rows for reinforcement fine-tuning call it; there it may be of any type.
        reference = record.get("reference_answer")
        if isinstance(reference, str):
            expected = reference
        if "expected" in record:
            expected = self.text(record, "expected")
        if not messages or messages[-1].role != "user":
            fix = "Add the user's message, or remove the row."
            self.report("prompt.unasked", "The messages hold no turn of the user to answer.", fix)
        return replace(row, messages=messages, expected=expected)
