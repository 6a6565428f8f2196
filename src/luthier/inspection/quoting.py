"""How rows begin that findings are about, where the checks kept numbers only.

Copies, leaks and contradictions are found after the last row, when no text is left. The rows that a
report names are read once more, as far as the first ones of a source; what is personal or secret in
them is masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from luthier.data.rows import RowReader
from luthier.inspection.findings import Findings, Place
from luthier.inspection.pii import Finder, masked
from luthier.inspection.texts import excerpt_of

GROUPS = (
    "duplicate.",
    "leakage.",
    "split.overlap",
    "label.contradiction",
    "preference.contradiction",
    "answer.",
)
"""Rules, by how their ids begin, whose findings quote no text."""
ROWS = 200_000
"""Rows of each source that are read again at most."""


def quote(findings: Findings, readers: Iterable[RowReader]) -> None:
    """Add the beginnings of their rows to findings of :data:`GROUPS` that are about single rows."""
    rules = [rule for rule in findings.kept if rule.startswith(GROUPS)]
    wanted = {each.place for rule in rules for each in findings.kept[rule] if each.place.line}
    begins: dict[Place, str] = {}
    finder = Finder()
    for reader in readers:
        names = {str(path) for path in reader.files}
        left = {place for place in wanted if place.file in names}
        for row in islice(reader, ROWS) if left else ():
            place = Place(row.file, row.line)
            if place in left:
                text = excerpt_of(row)
                begins[place] = masked(text, finder.find(text))
                left.discard(place)
                if not left:
                    break
    for rule in rules:
        findings.kept[rule] = [
            replace(each, excerpt=begins[each.place]) if each.place in begins else each
            for each in findings.kept[rule]
        ]
