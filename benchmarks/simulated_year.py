"""A simulated year of a classifier in use: drift alarms, retrainings and promotions.

    python benchmarks/simulated_year.py DATA/banking77 --years 4

Each week has 200 requests of 40 classes, a share of them with the right label as feedback. From
week 27, 30 % of the requests have one of 10 new classes. In control years nothing changes. A drift
alarm prepares a retraining on the rows rated in the last four weeks, by the rules of `luthier live
retrain`: a fifth of the new inputs only judges, new labels need 10 rows, and a significantly better
model is promoted. With ``--canary``, so is a model that is better within chance, whose canary ends
without a difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import luthier
from luthier.evaluation.significance import RowScores, paired_differences
from luthier.gate.row_keys import hash_texts
from luthier.library.folders import is_base_here
from luthier.models import TEXT_ENCODER
from luthier.server.live import drift
from luthier.server.retraining import FRESH_SHARE, LEAST_NEW, LEAST_OF_LABEL

CLASSES, NEW_CLASSES = 40, 10
INITIAL, TESTED = 1500, 400
REQUESTS, SHIFT, WEEKS = 200, 27, 52
NEW_SHARE = 0.3
POOL = 2000
"""Different requests of the known classes."""
Row = dict[str, str]


class Year:
    """Rows of a year, and the models tuned in a folder."""

    def __init__(
        self, rows: Sequence[Row], folder: Path, seed: int, rated: float, canary: bool
    ) -> None:
        self.random, self.folder = np.random.default_rng(seed), folder
        self.rated, self.canary = rated, canary
        names = sorted({row["label"] for row in rows})
        chosen = [names[n] for n in self.random.permutation(len(names))[: CLASSES + NEW_CLASSES]]
        known = self._shuffled([row for row in rows if row["label"] in chosen[:CLASSES]])
        new = self._shuffled([row for row in rows if row["label"] in chosen[CLASSES:]])
        self.initial, known = known[:INITIAL], known[INITIAL:]
        self.old_test, known = known[:TESTED], known[TESTED:]
        count = round(NEW_SHARE * TESTED)
        self.new_test, new = [*known[: TESTED - count], *new[:count]], new[count:]
        self.known, self.new = known[TESTED - count :][:POOL], new
        self.number = 0

    def _shuffled(self, rows: Sequence[Row]) -> list[Row]:
        return [rows[n] for n in self.random.permutation(len(rows))]

    def week(self, shifted: bool) -> list[Row]:
        """Return the requests of a week."""
        count = round(NEW_SHARE * REQUESTS) if shifted else 0
        parts = (self.known, REQUESTS - count), (self.new, count)
        return [rows[n] for rows, size in parts for n in self.random.integers(len(rows), size=size)]

    def write(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        self.number += 1
        path = self.folder / f"{self.number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def tune(self, rows: Sequence[Row]) -> str:
        """Return the id of a new model."""
        name = f"{self.folder.name}-{self.number}".replace("_", "-").lower()
        return luthier.tune(self.write(rows), base="tfidf", name=name).model_id

    def scores(self, model: str, rows: Sequence[Row]) -> RowScores:
        found = luthier.evaluate(model, self.write(rows)).row_scores["accuracy"]
        assert isinstance(found, RowScores)
        return found

    def retrain(self, model: str, old: Sequence[Row], rated: Sequence[Row]) -> tuple[Any, str]:
        """Return the promoted model with its rows, or None; and a sentence."""
        counts = Counter(row["label"] for row in rated)
        known = {row["label"] for row in old}
        rated = [
            row for row in rated if row["label"] in known or counts[row["label"]] >= LEAST_OF_LABEL
        ]
        learned = {row["text"] for row in old}
        unseen = sorted({row["text"] for row in rated} - learned, key=lambda text: hash_texts(text))
        if len(unseen) < LEAST_NEW:
            return None, f"no draft: {len(unseen)} new inputs"
        judged = {*unseen[: round(FRESH_SHARE * len(unseen))]}
        fresh = [row for row in rated if row["text"] in judged]
        rows = [*old, *(row for row in rated if row["text"] not in judged | learned)]
        new = self.tune(rows)
        pair = self.scores(model, fresh), self.scores(new, fresh)
        change = paired_differences({"": pair})[""]
        better = change.value > 0 and (self.canary or change.significant)
        text = (
            f"{pair[0].value:.1%} before, {pair[1].value:.1%} after on {len(fresh)} fresh rows: "
            f"{'promoted' if better else 'kept'}"
        )
        return ((new, rows) if better else None), text


def simulate(year: Year, vectors: Mapping[str, Any], shifts: bool) -> tuple[int, int | None]:
    """Return the number of alarms before the shift, and the weeks until the first alarm after."""
    rows, model = year.initial, None
    recent: list[list[Row]] = []
    early, found, promoted = 0, None, 0
    for week in range(1, WEEKS + 1):
        shifted = shifts and week >= SHIFT
        requests = year.week(shifted)
        recent.append([row for row in requests if year.random.random() < year.rated])
        texts = [*dict.fromkeys(row["text"] for row in requests)]
        sample = [*dict.fromkeys(row["text"] for row in rows)]
        sample = [sample[n] for n in year.random.permutation(len(sample))[: drift.ROWS]]
        auc, error, _ = drift.two_sample_auc(
            *(np.stack([vectors[text] for text in each]) for each in (sample, texts))
        )
        if auc < drift.FLOOR or auc - 1.96 * error <= 0.5:
            continue
        if not shifted:
            early += 1
            print(f"  week {week}: alarm without a shift (AUC {auc:.2f})", flush=True)
            continue
        found = found or week - SHIFT + 1
        model = model or year.tune(year.initial)
        better, text = year.retrain(model, rows, [row for each in recent[-4:] for row in each])
        print(f"  week {week}: AUC {auc:.2f}, {text}", flush=True)
        if better:
            (model, rows), promoted = better, week
    if model is not None:
        rated = [row for each in recent[:promoted] for row in each]
        everything = year.tune([*year.initial, *rated])
        first = year.tune(year.initial)
        for name, test in (("as in the last week", year.new_test), ("old", year.old_test)):
            shown = (year.scores(each, test).value for each in (first, model, everything))
            figures = "first {:.1%}, retrained {:.1%}, on all rows until then {:.1%}".format(*shown)
            print(f"  {len(test)} unseen rows {name}: {figures}", flush=True)
    return early, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--years", type=int, default=4)
    parser.add_argument("--rated", type=float, default=0.5, help="share of rated requests")
    parser.add_argument("--canary", action="store_true", help="promote also within chance")
    arguments = parser.parse_args()
    rows = [
        json.loads(line)
        for path in sorted(arguments.folder.glob("*.jsonl"))
        for line in path.open()
    ]
    features = TEXT_ENCODER if is_base_here(TEXT_ENCODER) else drift.WORDS
    print(f"features: {features}", flush=True)
    vectors = dict[str, Any]()
    alarms = weeks = 0
    delays = []
    for seed in range(arguments.years):
        for shifts in (False, True):
            print(f"{'shift' if shifts else 'control'} year {seed}", flush=True)
            with tempfile.TemporaryDirectory(prefix="year") as folder:
                number = 2 * seed + shifts
                year = Year(rows, Path(folder), number, arguments.rated, arguments.canary)
                used = {row["text"] for row in (*year.initial, *year.known, *year.new)}
                missing = sorted(used - vectors.keys())
                if missing:
                    found = drift.features_of(missing, features)
                    vectors |= zip(missing, found, strict=True)
                early, delay = simulate(year, vectors, shifts)
            alarms, weeks = alarms + early, weeks + (SHIFT - 1 if shifts else WEEKS)
            delays += [delay] if shifts else []
    print(f"false alarms: {alarms} in {weeks} weeks without a shift")
    print(f"weeks until the shift was found: {delays}")


if __name__ == "__main__":
    main()
