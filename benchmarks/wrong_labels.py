"""Wrong training labels, measured on clean test rows: logistic regression, and whole runs.

    python benchmarks/wrong_labels.py DATA
    python benchmarks/wrong_labels.py DATA --runs

Compares a fixed penalty with the selected one, and with listed rows kept, left out and relabelled
(`data.label_issues`). With ``--runs``, compares default runs of `luthier tune` with logistic
regression on the base model. A share of the labels is changed at random, for two seeds.
"""

from __future__ import annotations

import json
import random
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import luthier
from luthier.evaluation.label_issues import likely_classes
from luthier.evaluation.linear import LinearModel, fit_logistic

Rows = list[tuple[str, str]]
BASE, FIXED, SHARES, SEEDS = "all-minilm-l6-v2", 0.01, (0, 0.05, 0.12, 0.3), (0, 1)


def rows_of(path: Path) -> Rows:
    return [(row["text"], str(row["label"])) for row in map(json.loads, path.open())]


def intents(folder: Path, count: int, most: int, seed: int) -> tuple[Rows, Rows]:
    """Return up to ``most`` rows of each of ``count`` intents, and all their test rows."""
    train, test = (rows_of(folder / f"{part}.jsonl") for part in ("train", "test"))
    labels = random.Random(seed).sample(sorted({label for _, label in train}), count)
    random.Random(seed).shuffle(train)
    chosen = [row for name in labels for row in [r for r in train if r[1] == name][:most]]
    return chosen, [row for row in test if row[1] in labels]


def whole(folder: Path, count: int = 0) -> tuple[Rows, Rows]:
    train, test = (rows_of(folder / f"{part}.jsonl") for part in ("train", "test"))
    if count:
        random.Random(0).shuffle(train)
    return train[: count or None], test


class Case:
    """States and classes of the rows of a data set."""

    def __init__(self, train: Rows, test: Rows, base: str = BASE) -> None:
        self.train, self.test, self.base = train, test, base
        self.names = sorted({label for _, label in train})
        model = luthier.load(base)
        self.state_NH, self.state_QH = (
            torch.tensor(np.array(model.embed([text for text, _ in rows]))).float()
            for rows in (train, test)
        )
        self.clean_N, self.truth_Q = (
            torch.tensor([self.names.index(label) for _, label in rows]) for rows in (train, test)
        )

    def wrong(self, share: float, seed: int) -> tuple[Tensor, list[int]]:
        """Return the training labels, and the numbers of the rows with a changed label."""
        draw, label_N = np.random.default_rng(seed), self.clean_N.clone()
        wrong = draw.choice(len(label_N), round(share * len(label_N)), replace=False)
        other = torch.from_numpy(draw.integers(1, len(self.names), len(wrong)))
        label_N[wrong] = (label_N[wrong] + other) % len(self.names)
        return label_N, wrong.tolist()

    def accuracy(self, fitted: LinearModel) -> float:
        right_Q = fitted.scores(self.state_QH).argmax(-1) == self.truth_Q
        return 100 * float(right_Q.float().mean())


def regressions(case: Case, share: float) -> list[str]:
    """Return the means over the seeds."""
    found, classes = [], len(case.names)
    for seed in SEEDS:
        label_N, wrong = case.wrong(share, seed)
        issues = likely_classes(case.state_NH, label_N.numpy(), classes)
        kept_N, likely_N = torch.ones(len(label_N), dtype=torch.bool), label_N.clone()
        for row, likely, _ in issues:
            kept_N[row], likely_N[row] = False, likely
        found.append(
            [
                case.accuracy(fit_logistic(case.state_NH, label_N, classes, FIXED)),
                case.accuracy(fit_logistic(case.state_NH, label_N, classes)),
                case.accuracy(fit_logistic(case.state_NH[kept_N], label_N[kept_N], classes)),
                case.accuracy(fit_logistic(case.state_NH, likely_N, classes)),
                len(issues),
                len({row for row, _, _ in issues} & {*wrong}),
            ]
        )
    return [f"{mean:.1f}" for mean in np.mean(found, 0)]


def tuned(case: Case, share: float, seed: int) -> list[str]:
    """Return the accuracy of the regression and of a default run, and the length of the run."""
    label_N, _ = case.wrong(share, seed)
    rows = [
        {"text": text, "label": case.names[label]}
        for (text, _), label in zip(case.train, label_N.tolist(), strict=True)
    ]
    start = time.process_time()
    run = luthier.tune(rows, base=case.base)
    seconds = time.process_time() - start
    predicted = luthier.load(run.model_id).predict([text for text, _ in case.test])
    right = [a["label"] == label for a, (_, label) in zip(predicted, case.test, strict=True)]
    kept = run.verdict.kept_step if run.verdict else run.steps
    regression = case.accuracy(fit_logistic(case.state_NH, label_N, len(case.names)))
    accuracy = 100 * float(np.mean(right))
    return [f"{regression:.1f}", f"{accuracy:.1f}", f"{kept} of {run.steps}", f"{seconds:.0f} s"]


def main() -> None:
    data = Path(sys.argv[1])
    if "--runs" not in sys.argv:
        sets = {
            "sib200_en": whole(data / "sib200_en"),
            "banking77, 12 intents": intents(data / "banking77", 12, 100, 2),
            "sentiment_sentences, 500": whole(data / "sentiment_sentences", 500),
        }
        print("| rows | wrong | fixed | keep | leave_out | relabel | listed | listed and wrong |")
        print("|---|---|---|---|---|---|---|---|")
        for name, rows in sets.items():
            case = Case(*rows)
            for share in SHARES:
                print(f"| {name} | {share:.0%} | {' | '.join(regressions(case, share))} |")
        return
    cases = {
        "banking77, 30 intents": Case(*intents(data / "banking77", 30, 20, 1)),
        "sib200_vi": Case(*whole(data / "sib200_vi"), "fasttext"),
        "sentiment_sentences, 300": Case(*whole(data / "sentiment_sentences", 300)),
    }
    print("| seed | rows | wrong | regression | tuned | stored step | processor |")
    print("|---|---|---|---|---|---|---|")
    for seed, share in product(SEEDS, SHARES):
        for name, case in cases.items():
            cells = tuned(case, share, seed)
            print(f"| {seed} | {name} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
