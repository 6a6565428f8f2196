"""Detection of tables without a header, whose first row would be lost as names of columns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice

from luthier.data.files.parsing import NUMBER, Record
from luthier.data.formats import KEYS
from luthier.errors import Location, RowRefused
from luthier.formatting import list_some

_COMPARED = 100
"""Number of rows that are compared with the first row."""
_WORDS = 4
"""Fewest words of a text that is rather a value than a name."""


def reject_missing_header(
    table: Iterator[tuple[int, Record]],
    delimiter: str,
    known: Collection[str],
    may_be_text: bool = False,
) -> Iterator[tuple[int, Record]]:
    """Yield the rows of a table with a header.

    Args:
        table: lines and rows.
        delimiter: character between cells.
        known: names of columns, in addition to luthier's keys.
        may_be_text: True for a file that may be plain text.

    Raises:
        RowRefused: if the header has no known name and resembles the rows. A known name that is a
            value of its column, too, does not count, such as the label ``pos``.
    """
    first = [*islice(table, _COMPARED)]
    # A record lacks the empty cells of optional columns.
    names = [*dict.fromkeys(name for _, record in first for name in record)]
    rows = [[str(record.get(name, "")) for name in names] for _, record in first]
    if len(names) > 1:  # joined files repeat their header
        rows = [row for row in rows if row != names]
    columns = [*zip(*rows, strict=True)]
    is_header = any(
        name in known or (name.lower() in KEYS and (len(names) == 1 or name not in column))
        for name, column in zip(names, columns, strict=False)
    )
    if columns and not is_header and _is_row(names, columns):
        reason = "The first line resembles the rows below"
        raise missing_header(reason, [names, *rows], delimiter, may_be_text)
    yield from chain(first, table)


def missing_header(
    reason: str,
    rows: Sequence[Sequence[str]],
    delimiter: str,
    may_be_text: bool = False,
) -> RowRefused:
    """Return the error for a table whose first row is data, with a command that adds the header.

    Args:
        reason: beginning of the message.
        rows: cells of the first rows.
        delimiter: character between cells.
        may_be_text: True for a file that may be plain text.
    """
    names = _names_for(rows)
    written = delimiter.replace("\t", "\\t").join(names)
    ending = "tsv" if delimiter == "\t" else "csv"
    otherwise = " To learn the lines as plain text, rename the file to .md." if may_be_text else ""
    return RowRefused(
        "table.header",
        f"{reason}, so the file seems to have no header. The columns seem to be "
        f"{list_some(names, 10)}.",
        f"Write the names as the first line: (printf '{written}\\n'; cat OLD) > NEW.{ending}. "
        "If the first line has the names, select columns, as with `data.columns.text=COLUMN`."
        f"{otherwise}",
        Location(line=1),
    )


def _is_row(names: list[str], columns: Sequence[tuple[str, ...]]) -> bool:
    """Return whether the names are cells of another row."""
    if names == [str(number) for number in range(len(names))]:
        return False  # pandas writes the numbers of columns without a name
    if any(name and name in column for name, column in zip(names, columns, strict=True)):
        return True
    telling = any(NUMBER.fullmatch(name) or len(name.split()) >= _WORDS for name in names)
    return telling and all(map(_resembles, names, columns))


def _resembles(name: str, column: Sequence[str]) -> bool:
    if NUMBER.fullmatch(name):
        return all(map(NUMBER.fullmatch, column))
    lengths = [*map(len, column)]
    slack = 1 if len(column) >= _COMPARED // 10 else 2
    return min(lengths) <= slack * len(name) <= slack**2 * max(lengths)


def _names_for(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return luthier's keys for the columns of rows: a text or two, a label or rating, an id."""
    columns = [*zip(*rows, strict=True)]
    names = [f"column{number}" for number in range(1, len(columns) + 1)]
    longest = max(range(len(columns)), key=lambda at: sum(map(len, columns[at])))
    texts = [longest]
    for at, column in enumerate(columns):
        few = 2 * len({*column}) <= len(column)
        if at == longest:
            continue
        if all(map(NUMBER.fullmatch, column)):
            kind = "label" if few else "id" if len(columns) > 2 else "rating"
        elif few or not any(len(cell.split()) > 1 for cell in column):
            kind = "label"
        else:
            texts.append(at)
            continue
        if kind not in names:
            names[at] = kind
    names[longest] = "text"
    if len(texts) == 2 and "label" not in names:
        names[min(texts)], names[max(texts)] = "prompt", "completion"
    return names
