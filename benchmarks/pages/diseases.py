"""Names of diseases in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from defaults import rows_of
from pages.bench import PACKED, Bench, Colours, Found, Use, first_rows, paint_words


def spans(tags: Sequence[str]) -> set[tuple[int, int]]:
    """Return first and last word of each entity of BIO tags."""
    found, begin = set[tuple[int, int]](), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and not tag.startswith("I-"):
            found.add((begin, place - 1))
            begin = None
        if tag != "O" and begin is None:
            begin = place
    return found


def names(chosen: set[tuple[int, int]], row: dict[str, Any]) -> list[str]:
    """Return the text of the spans ``chosen``."""
    return [" ".join(row["tokens"][first : last + 1]) for first, last in sorted(chosen)]


def collect(bench: Bench) -> Found:
    """Select the sentence with right, missed and invented entities, and a wrong sentence."""
    rows = rows_of(bench.folder / "rows" / "test.jsonl")
    answers = rows_of(bench.folder / "answers.jsonl")
    marked = list[tuple[Found, set[Any], set[Any]]]()
    for row, answer in zip(rows, answers, strict=True):
        marked.append((row, spans(row["tags"]), spans(answer["tags"])))
    kinds = [
        (bool(true & given) + bool(true - given) + bool(given - true), -len(row["tokens"]), place)
        for place, (row, true, given) in enumerate(marked)
    ]
    row, true, given = marked[max(kinds)[2]]
    wrong, expected, found = next(each for each in marked if each[1] and not each[1] & each[2])
    return {
        "rows": first_rows(bench),
        "wrong": f"{' '.join(wrong['tokens'])}\nanswer:   {names(found, wrong)}\n"
        f"expected: {names(expected, wrong)}",
        "sentence": {
            "tokens": row["tokens"], "right": sorted(true & given),
            "missed": sorted(true - given), "invented": sorted(given - true),
        },
    }  # fmt: skip


ENTITY_COLOURS = {"right": "right", "missed": "point", "invented": "front"}


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Write a sentence with right, missed and invented entities in colour."""
    marked = found["sentence"]
    words = [(word, "text") for word in marked["tokens"]]
    for kind, colour in ENTITY_COLOURS.items():
        for first, last in marked[kind]:
            for place in range(first, last + 1):
                words[place] = (words[place][0], colour)
    paint_words(axes, colours, [words, [*ENTITY_COLOURS.items()]])


USE = Use(
    "diseases",
    "Diseases in medical records",
    "sentences",
    "entity F1",
    "Rows: NCBI disease corpus (Doğan et al. 2014; Crichton et al. 2017), CC BY 4.0; a cut.",
    tuple(f"examples/diseases/{name}" for name in PACKED),
    "A sentence with right, missed and invented names of diseases",
    paint,
    collect,
)
