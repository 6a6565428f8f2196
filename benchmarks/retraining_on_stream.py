"""Retraining of a classifier or a generator on a stream of dated rows.

    python benchmarks/retraining_on_stream.py DATA/rustsec_stream classifier
    python benchmarks/retraining_on_stream.py DATA/rustsec_stream generator

Security advisories of 2016 to 2021 train the first model. The advisories of each later year arrive
as requests: the drift test compares the year with the training rows. The classifier is retrained
after each year, and the generator, which writes the title of an advisory, after 2024. By the rules of
`luthier live retrain`, a fifth of the new rows only judges.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import luthier
from luthier.evaluation.significance import RowScores, paired_differences
from luthier.gate.row_keys import hash_texts
from luthier.models import TEXT_ENCODER
from luthier.server.live import drift
from luthier.server.retraining import FRESH_SHARE

LONGEST = 800
"""Characters of an advisory in a prompt."""
BASES = {"classifier": "tfidf", "generator": "smollm2-135m-instruct"}
METRICS = {"classifier": "accuracy", "generator": "rouge_l"}
ROUGE_L = {
    "rouge_l": {
        "method": "text_similarity", "evaluation_metric": "rouge_l", "reference": "{{item.expected}}",
    }
}  # fmt: skip
GRADERS = {"classifier": None, "generator": ROUGE_L}
SETTINGS: dict[str, dict[str, Any]] = {
    "classifier": {},
    "generator": {
        "training": {"epochs": 2},
        "adaptation": {"layers_to_transform": list(range(20, 30))},
    },
}
Row = dict[str, str]


def read(folder: Path, name: str, task: str) -> list[tuple[str, Row]]:
    """Return year and row of each advisory with a title and a body."""
    found = []
    for line in (folder / f"{name}.jsonl").open():
        record = json.loads(line)
        title, _, body = record["text"].partition("\n\n")
        row = (
            {"text": record["text"], "label": record["label"]}
            if task == "classifier"
            else {"prompt": f"Write a title:\n\n{body[:LONGEST]}", "completion": title}
        )
        if body.strip():
            found.append((record["date"][:4], row))
    return found


class Models:
    """Models of a task in a folder."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder, self.files = task, folder, 0

    def write(self, rows: Sequence[Row]) -> Path:
        self.files += 1
        path = self.folder / f"{self.files}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def tune(self, rows: Sequence[Row]) -> str:
        """Return the id of a new model."""
        name = f"stream-{self.task}-{self.files}"
        result = luthier.tune(
            self.write(rows), base=BASES[self.task], name=name, **SETTINGS[self.task]
        )
        print(f"  {len(rows)} rows trained in {result.seconds:,.0f} s", flush=True)
        return result.model_id

    def scores(self, model: str, rows: Sequence[Row]) -> RowScores:
        found = luthier.evaluate(model, self.write(rows), graders=GRADERS[self.task])
        scores = found.row_scores[METRICS[self.task]]
        assert isinstance(scores, RowScores)
        return scores


def text_of(row: Row) -> str:
    """Return the input of a row."""
    return row.get("text") or row["prompt"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=BASES)
    arguments = parser.parse_args()
    task = arguments.task
    rows = [row for _, row in read(arguments.folder, "train", task)]
    stream = read(arguments.folder, "stream", task)
    judged = {text_of(row) for row in sorted(rows, key=lambda r: hash_texts(text_of(r)))[:60]}
    old_test = [row for row in rows if text_of(row) in judged]
    rows = [row for row in rows if text_of(row) not in judged]
    years = sorted({year for year, _ in stream})
    with tempfile.TemporaryDirectory(prefix="stream") as folder:
        models = Models(task, Path(folder))
        first = active = models.tune(rows)
        sample = drift.features_of([text_of(row) for row in rows], TEXT_ENCODER)
        learned, kept_out = [*rows], list[Row]()
        for year in years:
            new = [row for each, row in stream if each == year]
            found = drift.drift_of(TEXT_ENCODER, sample, [text_of(row) for row in new])
            print(
                f"{year}: {len(new)} rows, AUC {found.auc:.2f}, alarm: {found.drifted}", flush=True
            )
            if task == "classifier":
                scores = {"first": first, "active": active}
                shown = (
                    f"{name} {models.scores(each, new).value:.1%}" for name, each in scores.items()
                )
                print(f"  accuracy on the year, before its rows are learned: {', '.join(shown)}")
            fresh = sorted(new, key=lambda row: hash_texts(text_of(row)))
            fresh = fresh[: round(FRESH_SHARE * len(new))]
            kept_out += fresh
            learned += [row for row in new if row not in fresh]
            if year == years[-1] or (task == "generator" and year != "2024"):
                continue
            candidate = models.tune(learned)
            tests = {"fresh": kept_out, "old": old_test}
            for name, test in tests.items():
                pair = models.scores(active, test), models.scores(candidate, test)
                change = paired_differences({"": pair})[""]
                print(
                    f"  {len(test)} {name} rows: {pair[0].value:.1%} before, {pair[1].value:.1%} after "
                    f"({change.value:+.1%} \N{PLUS-MINUS SIGN} {change.error:.1%})",
                    flush=True,
                )
            active = candidate
        if task == "generator":
            last = [row for year, row in stream if year > "2024"][:100]
            whole = models.tune([*learned_until(stream, "2024"), *rows])
            for name, each in (("first", first), ("retrained", active), ("all rows", whole)):
                print(f"  {len(last)} later rows, {name}: {models.scores(each, last).value:.1%}")


def learned_until(stream: Sequence[tuple[str, Row]], year: str) -> list[Row]:
    """Return all rows of the stream until a year."""
    return [row for each, row in stream if each <= year]


if __name__ == "__main__":
    main()
