"""Accuracy of messages against rows per intent."""

from __future__ import annotations

from defaults import rows_of, write_rows
from luthier.evaluation.baselines import LINEAR_PROBE, TFIDF, method_name
from pages.bench import (
    ROWS,
    Bench,
    Found,
    Use,
    comparison,
    ends,
    first_rows,
    paint_curve,
    wrong_label,
)

INTENTS = 20
PER_INTENT = (5, 10, 20, 40)


def collect(bench: Bench) -> Found:
    """Measure fewer rows per intent."""
    train = rows_of(bench.folder / "rows" / "train.jsonl")
    (tune,) = (each for each in USE.commands if " tune " in each)
    curve = []
    compared = comparison({"steps": bench.steps})
    for count in reversed(PER_INTENT):
        rows = train[: INTENTS * count]
        if len(rows) < len(train):
            write_rows(rows, bench.folder / "part.jsonl")
            bench.run(f"{tune} --name part{count}".replace("rows/train.jsonl", "part.jsonl"))
            model = f"all-minilm-l6-v2:part{count}"
            compared = bench.run(f"luthier compare rows/test.jsonl --tuned {model}")["result"]
        by_name = {method_name(each["name"]): each for each in compared["contenders"]}
        tuned, _ = ends(compared["contenders"])
        shown = {
            "tuned": tuned,
            "logistic regression on embeddings": by_name[LINEAR_PROBE],
            "TF-IDF": by_name[TFIDF],
        }
        points = {name: [each["score"], *each["interval"]] for name, each in shown.items()}
        curve.append({"rows_per_class": count, **points})
    return {"rows": first_rows(bench), "wrong": wrong_label(bench), "curve": curve[::-1]}


USE = Use(
    "route-messages",
    "Route messages by intent",
    "messages",
    "accuracy",
    "Rows: Banking77 (Casanueva et al. 2020, arXiv:2003.04807), CC BY 4.0; a cut of 20 of 77 "
    "intents.",
    tuple(f"examples/route-messages/{name}" for name in ROWS),
    "Accuracy against training rows per intent, for three methods",
    paint_curve,
    collect,
)
