"""An evaluation as one HTML page: scores, slices, labels, certainty, and the rows answered worst.

What is shown is chosen here; how it is written stands in ``templates/report.html``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luthier import __version__
from luthier.evaluation.breakdown import Calibration, LabelCounts
from luthier.evaluation.evaluate import Evaluation
from luthier.pages import Table, interval_text, render_page, shorten

MOST_CELLS = 25
"""Labels of a confusion matrix that is drawn; of more the mistakes are listed alone."""
MOST_LABELS = 200
MOST_MISTAKES = 20
MOST_WORST = 20
SIDE = 300
"""Pixels of a side of the reliability diagram."""


def page(evaluation: Evaluation, model: str, data: str) -> str:
    """The whole page, of ``model`` on the rows of ``data``."""
    counts, calibration = evaluation.label_counts, evaluation.calibration
    return render_page(
        "luthier.evaluation",
        "report.html",
        version=__version__,
        model=model,
        data=data,
        facts=list(_facts(evaluation)),
        remarks=evaluation.remarks,
        scores=_score_table(evaluation),
        slices=list(_slice_tables(evaluation)),
        labels=None if counts is None else _label_table(counts),
        mistakes=None if counts is None else _mistake_table(counts),
        matrix=None if counts is None else draw_matrix(counts),
        reliability=None if calibration is None else draw_reliability(calibration),
        calibration_error=None if calibration is None else f"{calibration.error:.3f}",
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
    columns = {"score": "name", "value": "number", "with 95 % confidence": "number"}
    return Table.of("Scores", columns, rows)


def _slice_tables(evaluation: Evaluation) -> Iterator[Table]:
    first = next(iter(evaluation.scores), "")
    is_share = bool(evaluation.slices) and evaluation.row_scores[first].is_share
    for by in dict.fromkeys(each.by for each in evaluation.slices):
        own = [each for each in evaluation.slices if each.by == by]
        columns = {by: "name", "rows": "number", _words(first): "number", "95 %": "number"}
        columns |= {"beside the others": "text"} if any(each.stands_out for each in own) else {}
        columns |= {"": "bar"} if is_share else {}
        rows = [
            {
                by: each.value,
                "rows": f"{each.rows:,}",
                _words(first): f"{each.scores[first]:.3f}",
                "95 %": interval_text(each.interval),
                "beside the others": "differs by more than chance" if each.stands_out else "",
                "": f"{100 * each.scores[first]:.1f}",
            }
            for each in own
        ]
        yield Table.of(f"By {by}", columns, [[row[name] for name in columns] for row in rows])


def _label_table(counts: LabelCounts) -> Table:
    found = counts.scores()
    rows = [
        [name, f"{each['rows']:,}", *(f"{each[key]:.3f}" if key in each else "–"
         for key in ("precision", "recall", "f1")), f"{100 * each['f1']:.1f}"]
        for name, each in [*found.items()][:MOST_LABELS]
    ]  # fmt: skip
    columns = {"label": "name", "rows": "number", "precision": "number", "recall": "number"}
    columns |= {"F1": "number", "": "bar"}
    return Table.of("Labels", columns, rows, max(0, len(found) - MOST_LABELS))


def _mistake_table(counts: LabelCounts) -> Table | None:
    mistakes = counts.mistakes()
    rows = [[truth, answer, f"{count:,}"] for truth, answer, count in mistakes[:MOST_MISTAKES]]
    columns = {"right is": "text", "answered was": "text", "rows": "number"}
    further = max(0, len(mistakes) - MOST_MISTAKES)
    return Table.of("Labels that are mistaken", columns, rows, further) if rows else None


def draw_matrix(counts: LabelCounts) -> dict[str, Any] | None:
    """Where the cells of a confusion matrix stand; ``None`` for more labels than can be read.

    A cell is as dark as the share of the rows of its label that it has.
    """
    labels, cell, top = counts.labels, 30, 24
    if len(labels) > MOST_CELLS:
        return None
    left = 12 + 7 * min(20, max(len(name) for name in labels))
    cells = []
    for truth, row_A in enumerate(counts.count_TA.tolist()):
        for answer, count in enumerate(row_A):
            share = count / max(1, sum(row_A))
            cells.append(
                {
                    "x": left + cell * answer,
                    "y": top + cell * truth,
                    "count": count,
                    "kind": "bar" if truth == answer else "wrong",
                    "opacity": f"{share:.2f}",
                    "dark": share > 0.55,
                    "title": f"{labels[truth]} answered {labels[answer]}: {count:,} rows",
                }
            )
    names = [
        {"place": place, "name": name if len(name) <= 20 else f"{name[:19]}…",
         "middle": top + cell * place + cell // 2 + 4, "x": left + cell * place + cell // 2}
        for place, name in enumerate(labels)
    ]  # fmt: skip
    side = cell * len(labels)
    return {"width": left + side + 1, "height": top + side + 1, "cell": cell, "left": left,
            "cells": cells, "names": names}  # fmt: skip


def draw_reliability(calibration: Calibration) -> dict[str, Any]:
    """Where the points of a reliability diagram stand: accuracy by confidence, as large as bins are."""
    bins, left, top = calibration.bins(), 34, 8
    most = max(each["rows"] for each in bins)
    points = [
        {
            "x": f"{left + SIDE * each['confidence']:.1f}",
            "y": f"{top + SIDE * (1 - each['accuracy']):.1f}",
            "radius": f"{3 + 7 * (each['rows'] / most) ** 0.5:.1f}",
            "title": f"{each['rows']:,} rows: {each['confidence']:.1%} sure, "
            f"{each['accuracy']:.1%} right",
        }
        for each in bins
    ]
    ticks = [
        {"at": share, "x": left + SIDE * share, "y": top + SIDE * (1 - share)}
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return {"left": left, "top": top, "side": SIDE, "points": points, "ticks": ticks}


def _worst_table(evaluation: Evaluation) -> Table | None:
    """The rows that are answered worst, with what was asked, right and said."""
    rows = []
    for number in evaluation.worst(MOST_WORST):
        row, record = evaluation.rows[number], evaluation.records[number]
        said = next((record[key] for key in ("reply", "label", "rating", "tags", "text_read", "text")
                     if key in record and record[key] != row.plain_text()), "")  # fmt: skip
        asked = record.get("prompt") or row.plain_text() or row.excerpt()
        sure = ""
        if evaluation.calibration is not None:
            sure = f"{evaluation.calibration.confidence_R[number]:.1%}"
        rows.append(
            [f"{row.file}:{row.line}", *map(shorten, (asked, record.get("expected"), said)), sure]
        )
    columns = {"place": "place", "asked": "text", "right is": "text", "answered was": "text"}
    columns |= {"sure by": "number"} if evaluation.calibration is not None else {}
    drawn = [row[: len(columns)] for row in rows]
    return Table.of("Rows that are answered worst", columns, drawn) if rows else None
