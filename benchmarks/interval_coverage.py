"""How often 95 % intervals of scores hold the truth, in simulated data.

Shares, entity-like F1 and mean errors know how sure they are by a formula, macro-F1, correlations and
areas under a curve by the bootstrap. The truth of the latter is the mean of large samples.

    python benchmarks/interval_coverage.py --trials 400
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import erf

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.texts import LabelledText, RatedText
from luthier.evaluation.labels import scores
from luthier.evaluation.preferences import Likelihood, thumb_scores
from luthier.evaluation.significance import RowScores, Score

Draw = Callable[[np.random.Generator], Score]


def share(right: float, rows: int) -> Draw:
    return lambda draw: RowScores.of(draw.random(rows) < right)


def error(rows: int) -> Draw:
    return lambda draw: RowScores.of(draw.exponential(1, rows), is_share=False)


def ratio(rows: int) -> Draw:
    """As an entity F1: rows hold up to six, of which each is right with a chance of 0.8."""

    def score(draw: np.random.Generator) -> Score:
        wholes = draw.integers(0, 7, rows)
        return RowScores.of(draw.binomial(wholes, 0.8), wholes)

    return score


def macro_f1(right: float, classes: int, rows: int) -> Draw:
    def score(draw: np.random.Generator) -> Score:
        truth = draw.integers(classes, size=rows)
        answers = np.where(draw.random(rows) < right, truth, draw.integers(classes, size=rows))
        labelled = [LabelledText("f", 1, text="x", label=str(each)) for each in truth]
        return scores(labelled, [{"label": str(each)} for each in answers])["macro_f1"]

    return score


def pearson(rho: float, rows: int) -> Draw:
    def score(draw: np.random.Generator) -> Score:
        truth: NDArray[np.float64] = draw.standard_normal(rows)
        answers = rho * truth + (1 - rho**2) ** 0.5 * draw.standard_normal(rows)
        rated = [RatedText("f", 1, text="x", rating=float(each)) for each in truth]
        return scores(rated, [{"rating": float(each)} for each in answers])["pearson"]

    return score


def auc(apart: float, rows: int) -> Draw:
    def score(draw: np.random.Generator) -> Score:
        up = [True, False, *(draw.random(rows - 2) < 0.3)]
        logp = draw.standard_normal(rows) + apart * np.array(up)
        return thumb_scores([Likelihood(float(each), 1) for each in logp], up)["logp_per_token_auc"]

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    trials = parser.parse_args().trials
    cases: list[tuple[str, Draw, float | Callable[[int], Draw]]] = [
        *((f"accuracy {right}, {rows} rows", share(right, rows), right)
          for right in (0.5, 0.8, 0.95) for rows in (30, 100, 500)),
        *((f"mean absolute error, {rows} rows", error(rows), 1.0) for rows in (30, 100, 500)),
        *((f"entity F1 0.8, {rows} rows", ratio(rows), 0.8) for rows in (30, 100, 500)),
        *((f"macro-F1 of {classes} classes, {rows} rows", macro_f1(0.8, classes, rows),
           lambda many, classes=classes: macro_f1(0.8, classes, many))
          for classes, rows in ((3, 50), (7, 100), (7, 700), (77, 300), (77, 1500))),
        *((f"Pearson {rho}, {rows} rows", pearson(rho, rows), rho)
          for rho, rows in ((0.3, 100), (0.8, 30), (0.8, 100), (0.9, 500))),
        *((f"AUC, {rows} rows", auc(1.0, rows), 0.5 * (1 + erf(0.5))) for rows in (40, 100, 400)),
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    for name, one, truth in cases:
        known = truth if isinstance(truth, float) else truth(200_000)(draw).value
        held = 0
        for _ in range(trials):
            low, high = one(draw).interval
            held += low <= known <= high
        print(f"{name}: {held / trials:.1%}", flush=True)


if __name__ == "__main__":
    main()
