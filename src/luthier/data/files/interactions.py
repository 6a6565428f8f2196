"""Logs of interactions: a table of users and items becomes the items of each user.

A table is a log if its columns name a user and an item, and all other columns of the first line
have numbers or times. ``--map user=COLUMN --map items=COLUMN`` names the columns of other tables.
The items of a user are in the order of the times, or of the lines in a table without times. Of an
item chosen again, the first time counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain

from luthier.data.files.containers import TIME_COLUMNS
from luthier.data.files.parsing import Record, quote
from luthier.data.files.times import is_date, parse_number, parse_times
from luthier.errors import Location, Problem

USER_COLUMNS = frozenset(
    f"{name}{end}"
    for name in ("user", "customer", "visitor", "session", "client", "member")
    for end in ("", "id")
)
"""Names of the user, in lower case and without separators."""
ITEM_COLUMNS = frozenset(
    f"{name}{end}"
    for name in ("item", "product", "article", "movie", "book", "song", "sku", "stockcode")
    for end in ("", "id")
)
"""Names of the item, in lower case and without separators."""
TIMES = (*TIME_COLUMNS, "ts")
"""Names of the time, in lower case and without separators."""


def read_interactions(
    records: Iterator[tuple[int, Record]],
    file: str,
    problems: list[Problem],
    columns: Mapping[str, str],
) -> Iterator[tuple[int, Record]]:
    """Return the records of a table. A log has a record for each user, with the items as an array."""
    first = next(records, None)
    if first is None:
        return iter(())
    table = chain([first], records)
    read = [name for name in first[1] if columns.get(name) != ""]
    if {"user", "item"} <= columns.keys() and "history" not in columns:
        message = "A log has many items for each user."
        fix = f"Set `data.columns.items={columns['item']}`."
        problems.append(Problem("column.missing", message, fix, Location(file, first[0])))
        return iter(())
    user = columns.get("user") or find_name(read, USER_COLUMNS)
    item = columns.get("items") or find_name(read, ITEM_COLUMNS)
    others = [name for name in read if name not in (user, item)]
    time = columns.get("timestamp") or _find_time(others, first[1])
    if any(source and key not in ("user", "items", "timestamp") for key, source in columns.items()):
        return table  # another task
    if not {user, item, *([time] if time else [])} <= first[1].keys():
        return table
    is_named = "user" in columns and "items" in columns
    if not is_named and not all(_is_number_or_time(first[1][name]) for name in others):
        return table
    key = item if "items" in columns else "items"
    used = {item} if "timestamp" in columns else {item, time}
    return _items_of_users(table, user, item, time, key, used, file, problems)


def find_name(names: Iterable[str], wanted: Collection[str]) -> str:
    """Return the first of ``names`` that is ``wanted``; empty if none is."""
    return next((each for each in names if _plain(each) in wanted), "")


def _find_time(names: Sequence[str], first: Record) -> str:
    """Return the column of times by its name, or by the date of the first line; empty without one."""
    dates = [name for name in names if is_date(str(first[name]))]
    ends = [name for name in names if _plain(name).endswith(("time", "date", "timestamp"))]
    return find_name(names, TIMES) or (*dates, *ends, "")[0]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _is_number_or_time(value: object) -> bool:
    text = str(value).strip()
    return not text or parse_number(text) is not None or is_date(text)


def _items_of_users(
    records: Iterator[tuple[int, Record]],
    user: str,
    item: str,
    time: str,
    key: str,
    used: Set[str],
    file: str,
    problems: list[Problem],
) -> Iterator[tuple[int, Record]]:
    """Yield a record for each user, at the line of the latest item.

    Args:
        user, item, time: columns; without times, ``time`` is empty.
        key: key of the items in the records.
        used: columns to leave out.
    """
    lines = [*records]
    moments = (
        parse_times([str(record[time]) for _, record in lines]) if time else [0.0] * len(lines)
    )
    found: dict[str, list[tuple[float, int, Record]]] = {}
    for (line, record), moment in zip(lines, moments, strict=True):
        if empty := [name for name in (user, item) if _is_empty(record[name])]:
            rule, message = "column.missing", f"The column {quote(empty[0])} is empty."
            fix = "Write the value, or remove the line."
        elif math.isnan(moment):
            rule, message = "history.time", f"{quote(str(record[time]))} is no time."
            fix = f"Write 2026-12-01 14:05, or sort the lines and set `data.columns.{time}=`."
        else:
            found.setdefault(str(record[user]).strip(), []).append((moment, line, record))
            continue
        problems.append(Problem(rule, message, fix, Location(file, line)))
    for chosen in found.values():
        chosen.sort(key=lambda each: each[:2])
        _, line, latest = chosen[-1]
        others = {name: value for name, value in latest.items() if name not in used}
        yield line, {**others, key: [*dict.fromkeys(record[item] for *_, record in chosen)]}


def _is_empty(value: object) -> bool:
    return value is None or not str(value).strip()
