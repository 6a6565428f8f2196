"""Accuracy after labelling the least certain rows, compared with labelling random rows.

    python benchmarks/active_learning.py DATA

A logistic regression on the embeddings of `all-minilm-l6-v2` learns the first random rows. Then as many
rows are labelled again: random rows, the least certain rows (`luthier predict --least-certain`), or the
least certain rows in two rounds. Ten seeds; ± is the standard error of the paired difference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

import luthier
from children import table
from defaults import rows_of
from luthier.evaluation.labels import certainty

SETS = {"banking77": 200, "sms_spam": 60, "sib200_en": 50, "sentiment_sentences": 60}
"""Number of rows of each round, by set."""
POOL, TESTED, SEEDS = 3000, 800, 10


def main(data: Path) -> None:
    """Print a table."""
    lines = []
    for name, count in SETS.items():
        train, test = (rows_of(data / name / f"{part}.jsonl") for part in ("train", "test"))
        train, test = train[:POOL], test[:TESTED]
        encoder = luthier.load("all-minilm-l6-v2")
        train_NH, test_NH = (encoder.embed([row["text"] for row in rows]) for rows in (train, test))
        label_N, expected_N = (np.array([row["label"] for row in r]) for r in (train, test))

        def fit(rows: Any, train_NH: Any = train_NH, label_N: Any = label_N) -> Any:
            return LogisticRegression(C=10, max_iter=300).fit(train_NH[rows], label_N[rows])

        def accuracy(
            rows: Any, fit: Any = fit, test_NH: Any = test_NH, expected_N: Any = expected_N
        ) -> Any:
            return (fit(rows).predict(test_NH) == expected_N).mean()

        def least_certain(
            known: Any, rest: Any, count: int, fit: Any = fit, train_NH: Any = train_NH
        ) -> Any:
            model = fit(known)
            shares = model.predict_proba(train_NH[rest])
            answers = [{"label": "", "scores": dict(enumerate(each))} for each in shares]
            return rest[np.argsort([certainty(each) for each in answers])[:count]]

        found = []
        for seed in range(SEEDS):
            order = np.random.default_rng(seed).permutation(len(train))
            known, rest = order[:count], order[count:]
            chosen = least_certain(known, rest, count)
            half = np.r_[known, chosen[: count // 2]]
            second = least_certain(half, np.setdiff1d(rest, half), count - count // 2)
            parts = known, np.r_[known, rest[:count]], np.r_[known, chosen], np.r_[half, second]
            found.append([accuracy(part) for part in parts])
        figures = 100 * np.array(found)
        gain = figures[:, 2] - figures[:, 1]
        error = gain.std(ddof=1) / SEEDS**0.5
        lines.append(
            [name, f"{count}", *(f"{each:.1f} %" for each in figures.mean(0)),
             f"{gain.mean():+.1f} ± {error:.1f}"]
        )  # fmt: skip
    heads = ["rows", "labels", "before", "random", "least certain", "two rounds", "points"]
    print(table(heads, lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
