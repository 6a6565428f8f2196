"""One pass over the source after the other: each reads the rows and edits them anew, in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from luthier.cleaning.edit import Edit, Piece, Setting
from luthier.cleaning.edits import edits_for
from luthier.cleaning.records import further_of, record_of
from luthier.data.parsing import Record
from luthier.data.rows import Columns, RowReader
from luthier.data.sources import Source
from luthier.errors import Problem, RowRefused
from luthier.inspection.inspect import Streaming
from luthier.types import Row


@dataclass(frozen=True)
class Edited:
    """A row that was read, and what the edits made of it."""

    row: Row
    pieces: tuple[Piece, ...]
    done: tuple[tuple[str, str], ...]
    """Edits that did something, and what, in words."""
    given: Record
    reader: RowReader

    def record(self, piece: Piece) -> Record:
        """What is written of ``piece``; :class:`RowRefused` where its form cannot say it."""
        return record_of(piece, self.row, self.given, self.reader.checker.form)


class Pass:
    """Rows of the source in order, and before each what could not be read on the way to it."""

    def __init__(
        self,
        source: Source,
        columns: Columns | None,
        setting: Setting,
        told: Callable[[int, int], None] | None = None,
    ) -> None:
        # A text that is a file is one row: a telephone number may stand across any cut.
        self.reader = RowReader(source, columns, Streaming, whole=True, told=told)
        self.edits: list[Edit] = edits_for(setting)
        self.refused: list[Problem] = []
        """What no edit could mend."""

    def __iter__(self) -> Iterator[Edited | list[Problem]]:
        for row in self.reader:
            bad: list[Problem] = []
            before: list[Problem] = []
            for problem in self._taken():
                same = (problem.file, problem.line) == (row.file, row.line)
                (bad if same else before).append(problem)
            yield from _by_line(before)
            if bad:
                yield from _by_line(bad)
                continue
            try:
                yield self._edited(row)
            except RowRefused as error:
                self.refused.append(error.at(row.file, row.line))
        yield from _by_line(self._taken())

    def _taken(self) -> list[Problem]:
        problems = list(self.reader.problems)
        self.reader.problems.clear()
        return problems

    def _edited(self, row: Row) -> Edited:
        given = self.reader.checker.given
        pieces = [Piece(row, further_of(row, given, self.reader.checker.form))]
        done = []
        for edit in self.edits:
            results = [edit.apply(piece) for piece in pieces]
            words = [said for _, said in results if said]
            if words:
                pieces = [piece for made, _ in results for piece in made]
                done.append((edit.name, "; ".join(words)))
        return Edited(row, tuple(pieces), tuple(done), given, self.reader)


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
