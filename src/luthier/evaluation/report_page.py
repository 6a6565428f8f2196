"""Evaluation as one HTML page (``templates/report.html``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier import __version__
from luthier.data.shapes import of_shape
from luthier.data.shapes.texts import TaggedWords, entities
from luthier.errors import location_text
from luthier.evaluation.breakdown import Calibration, LabelCounts
from luthier.evaluation.evaluate import Evaluation
from luthier.pages import PAGE, Table, interval_text, render_page, shorten

MOST_CELLS = 25
"""Labels of a confusion matrix; with more labels, only the mistakes are listed."""
MOST_LABELS = 200
MOST_MISTAKES = 20
MOST_WORST = 20
MARKS = "right (blue), missed (struck) and invented (red) entities"


def page(evaluation: Evaluation, model: str, data: str, layout: str = PAGE) -> str:
    """Return the HTML page of ``model`` on the rows of ``data``."""
    counts, calibration = evaluation.label_counts, evaluation.calibration
    return render_page(
        "luthier.evaluation",
        "report.html",
        layout,
        version=__version__,
        model=model,
        data=data,
        facts=list(_facts(evaluation)),
        remarks=evaluation.remarks,
        scores=_score_table(evaluation),
        slices=part_tables(evaluation),
        labels=None if counts is None else label_table(counts),
        mistakes=None if counts is None else _mistake_table(counts),
        matrix=None if counts is None else _matrix_table(counts),
        reliability=None if calibration is None else _reliability_table(calibration),
        worst=_worst_table(evaluation),
        seconds=evaluation.seconds,
    )


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    yield "rows", f"{len(evaluation.rows):,}", _left_out(evaluation)
    for name, score in [*evaluation.scores.items()][:3]:
        interval = evaluation.intervals.get(name)
        yield _words(name), f"{score:.3f}", "" if interval is None else interval_text(interval)


def _left_out(evaluation: Evaluation) -> str:
    counts = {"left out": evaluation.dropped, "cut": evaluation.truncated}
    counts["not graded"] = len(evaluation.problems)
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _score_table(evaluation: Evaluation) -> Table:
    rows = [
        [_words(name), f"{score:.4f}", interval_text(evaluation.intervals[name])
         if name in evaluation.intervals else "–"]
        for name, score in evaluation.scores.items()
    ]  # fmt: skip
    columns = {"score": "name", "value": "number", "95 % interval": "number"}
    return Table.of("Scores", columns, rows)


def part_tables(evaluation: Evaluation) -> list[Table]:
    """Return a table of ways to search, if any, and a table for each kind of slice."""
    return [*_system_tables(evaluation), *_slice_tables(evaluation)]


def _system_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield a table of ways to search, if any."""
    for first in [*evaluation.systems.values()][:1]:
        columns = {"search": "name"} | {_words(name): "number" for name in first}
        rows = [
            [name, *(f"{each.value:.3f} ({interval_text(each.interval)})" for each in of.values())]
            for name, of in evaluation.systems.items()
        ]
        yield Table.of("Searches, with 95 % intervals", columns, rows)


def _slice_tables(evaluation: Evaluation) -> Iterator[Table]:
    first = next(iter(evaluation.scores), "")
    is_share = bool(evaluation.slices) and evaluation.row_scores[first].is_share
    style = ".1%" if is_share else ".3f"
    for by in dict.fromkeys(each.by for each in evaluation.slices):
        own = [each for each in evaluation.slices if each.by == by]
        marked = any(each.stands_out for each in own)
        # Pairs, because the column of the slices may have the name of another column.
        columns = [(by, "name"), ("rows", "number"), (_words(first), "number"), ("95 %", "number")]
        columns += [("other rows", "text")] * marked + [("", "bar")] * is_share
        rows = [
            [
                each.value,
                f"{each.rows:,}",
                f"{each.scores[first]:{style}}",
                f"{each.interval[0]:{style}} to {each.interval[1]:{style}}",
                *["significantly different" if each.stands_out else ""] * marked,
                *[f"{100 * each.scores[first]:.1f}"] * is_share,
            ]
            for each in own
        ]
        yield Table.of(f"By {by}", columns, rows)


def label_table(counts: LabelCounts) -> Table:
    """Return precision, recall and F1 of each label or kind of entity, with 95 % intervals."""
    found = counts.scores()

    def share(scores: Mapping[str, Any], measure: str) -> str:
        if measure not in scores:
            return "–"
        low, high = scores[f"{measure}_interval"]
        return f"{scores[measure]:.1%} ({low:.1%} to {high:.1%})"

    rows = [
        [name, f"{each[counts.unit]:,}", share(each, "precision"), share(each, "recall"),
         f"{each['f1']:.3f}", f"{100 * each['f1']:.1f}"]
        for name, each in [*found.items()][:MOST_LABELS]
    ]  # fmt: skip
    columns = {"label": "name", counts.unit: "number", "precision (95 %)": "number"}
    columns |= {"recall (95 %)": "number", "F1": "number", "": "bar"}
    return Table.of("Labels", columns, rows, max(0, len(found) - MOST_LABELS))


def _mistake_table(counts: LabelCounts) -> Table | None:
    mistakes = counts.mistakes()
    rows = [[truth, answer, f"{count:,}"] for truth, answer, count in mistakes[:MOST_MISTAKES]]
    columns = {"label": "text", "answer": "text", "rows": "number"}
    further = max(0, len(mistakes) - MOST_MISTAKES)
    return Table.of("Mistakes", columns, rows, further) if rows else None


def _matrix_table(counts: LabelCounts) -> Table | None:
    """Return the confusion matrix, or None for more labels than a reader can follow."""
    if len(counts.labels) > MOST_CELLS:
        return None
    columns = {"label": "name"} | {f"as {name}": "number" for name in counts.labels}
    rows = [
        [label, *(f"{count:,}" if count else "" for count in row_A)]
        for label, row_A in zip(counts.labels, counts.count_TA.tolist(), strict=True)
    ]
    return Table.of("Confusion matrix", columns, rows)


def _reliability_table(calibration: Calibration) -> Table:
    columns = {"confidence": "number", "accuracy": "number", "rows": "number"}
    rows = [
        [f"{each['confidence']:.1%}", f"{each['accuracy']:.1%}", f"{each['rows']:,}"]
        for each in calibration.bins()
    ]
    return Table.of(f"Calibration (expected error {calibration.error:.3f})", columns, rows)


def worst_answers(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return location, input, expected answer and answer of the worst rows, ready for JSON.

    Answers with probabilities have a ``confidence``.
    """
    found = []
    for number in evaluation.worst(MOST_WORST):
        row, record = evaluation.rows[number], evaluation.records[number]
        said = next((record[key] for key in ("reply", "label", "rating", "tags", "text_read", "text")
                     if key in record and record[key] != row.plain_text()), "")  # fmt: skip
        answer = {
            "row": location_text(row.file, row.line),
            "input": shorten(record.get("prompt") or row.plain_text() or row.excerpt()),
            "expected": shorten(record.get("expected")),
            "answer": shorten(said),
        }
        if evaluation.calibration is not None:
            answer["confidence"] = f"{evaluation.calibration.confidence_R[number]:.1%}"
        found.append(answer)
    return found


def _worst_table(evaluation: Evaluation) -> Table | None:
    worst = evaluation.worst(MOST_WORST)
    columns = {"row": "place", "input": "text", "expected": "text", "answer": "text"}
    columns |= {"confidence": "number"} if evaluation.calibration is not None else {}
    rows: list[list[Any]] = [[*each.values()] for each in worst_answers(evaluation)]
    if pictures := evaluation.pictures:
        columns = {"image": "picture"} | columns
        rows = [[pictures.get(number, ""), *row] for number, row in zip(worst, rows, strict=True)]
    elif tagged := of_shape(TaggedWords, [evaluation.rows[number] for number in worst]):
        columns = {"row": "place", MARKS: "marked"}
        rows = [
            [location_text(row.file, row.line),
             mark_entities(row.tokens, evaluation.records[number]["tags"], row.tags)]
            for number, row in zip(worst, tagged, strict=True)
        ]  # fmt: skip
    return Table.of("Worst answers", columns, rows) if rows else None


def mark_entities(
    tokens: Sequence[str], tags: Sequence[str], wanted: Sequence[str] | None = None
) -> list[tuple[str, str, str]]:
    """Return the parts of a sentence, each with its mark and a kind of entity.

    The mark is ``right``, ``missed``, ``invented`` or empty; without ``wanted``, entities of ``tags``
    are right. A missed entity that overlaps with an invented one is marked after it.
    """
    given = entities(tags)
    truth = given if wanted is None else entities(wanted)
    marks = [(first, last, kind, "right" if (kind, first, last) in truth else "invented")
             for kind, first, last in given]  # fmt: skip
    marks += [(first, last, kind, "missed") for kind, first, last in truth - given]
    parts, place = list[tuple[str, str, str]](), 0
    for first, last, kind, mark in sorted(marks):
        if first > place:
            parts.append((" ".join(tokens[place:first]), "", ""))
        parts.append((" ".join(tokens[first : last + 1]), mark, kind))
        place = max(place, last + 1)
    return [*parts, (" ".join(tokens[place:]), "", "")] if place < len(tokens) else parts
