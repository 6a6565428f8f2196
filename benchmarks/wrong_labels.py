"""Logistic regression with wrong training labels, on clean test rows.

    python benchmarks/wrong_labels.py DATA

Compares a fixed penalty with the selected one, and with listed rows kept, left out and relabelled
(`data.label_issues`). A share of the labels is changed at random, for two seeds.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

import luthier
from luthier.evaluation.label_issues import likely_classes
from luthier.evaluation.linear import LinearModel, fit_logistic

Rows = list[tuple[str, str]]
BASE, FIXED, SHARES, SEEDS = "all-minilm-l6-v2", 0.01, (0, 0.05, 0.12, 0.3), (0, 1)


def rows_of(path: Path) -> Rows:
    return [(row["text"], str(row["label"])) for row in map(json.loads, path.open())]


def intents(folder: Path) -> tuple[Rows, Rows]:
    """Return up to 100 rows of each of 12 intents, and all their test rows."""
    train, test = (rows_of(folder / f"{part}.jsonl") for part in ("train", "test"))
    labels = random.Random(2).sample(sorted({label for _, label in train}), 12)
    random.Random(2).shuffle(train)
    chosen = [row for name in labels for row in [r for r in train if r[1] == name][:100]]
    return chosen, [row for row in test if row[1] in labels]


def whole(folder: Path, count: int = 0) -> tuple[Rows, Rows]:
    train, test = (rows_of(folder / f"{part}.jsonl") for part in ("train", "test"))
    if count:
        random.Random(0).shuffle(train)
    return train[: count or None], test


def main() -> None:
    data = Path(sys.argv[1])
    model = luthier.load(BASE)
    sets = {
        "sib200_en": whole(data / "sib200_en"),
        "banking77, 12 intents": intents(data / "banking77"),
        "sentiment_sentences, 500": whole(data / "sentiment_sentences", 500),
    }
    print("| rows | wrong | fixed | keep | leave_out | relabel | listed | listed and wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (train, test) in sets.items():
        labels = sorted({label for _, label in train})
        classes = len(labels)
        state_NH, state_QH = (
            torch.tensor(np.array(model.embed([text for text, _ in rows]))).float()
            for rows in (train, test)
        )
        clean_N, truth_Q = (
            torch.tensor([labels.index(label) for _, label in rows]) for rows in (train, test)
        )

        def accuracy(fitted: LinearModel) -> float:
            right_Q = fitted.scores(state_QH).argmax(-1) == truth_Q  # noqa: B023
            return 100 * float(right_Q.float().mean())

        for share in SHARES:
            found = []
            for seed in SEEDS:
                draw, label_N = np.random.default_rng(seed), clean_N.clone()
                wrong = draw.choice(len(train), round(share * len(train)), replace=False)
                other = torch.from_numpy(draw.integers(1, classes, len(wrong)))
                label_N[wrong] = (label_N[wrong] + other) % classes
                issues = likely_classes(state_NH, label_N.numpy(), classes)
                kept_N, likely_N = torch.ones(len(train), dtype=torch.bool), label_N.clone()
                for row, likely, _ in issues:
                    kept_N[row], likely_N[row] = False, likely
                found.append(
                    [
                        accuracy(fit_logistic(state_NH, label_N, classes, FIXED)),
                        accuracy(fit_logistic(state_NH, label_N, classes)),
                        accuracy(fit_logistic(state_NH[kept_N], label_N[kept_N], classes)),
                        accuracy(fit_logistic(state_NH, likely_N, classes)),
                        len(issues),
                        len({row for row, _, _ in issues} & {*wrong.tolist()}),
                    ]
                )
            cells = [name, f"{share:.0%}", *(f"{mean:.1f}" for mean in np.mean(found, 0))]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
