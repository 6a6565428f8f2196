"""Anomalies of time series: a VAE of windows against a rolling z-score, on series of NAB.

Both learn from the first 15 % of each series, which NAB calls probationary and which has no
anomaly. An anomaly is found if a value in NAB's window is above the threshold. A false alarm is a
value above the threshold outside all windows. Each detector has two thresholds: its own, from the
first part with a budget of 1 %, and the threshold at a given false-alarm rate outside the windows,
for a comparison at equal alarms.

    python benchmarks/nab.py DATA_FOLDER
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import luthier
from luthier.data.inputs import LONGEST_WINDOW

Scores = NDArray[np.float64]
PROBATION = 0.15
BUDGET = 0.01
ALARMS = (0.001, 0.005, 0.01)
WIDTH = 24
"""Number of previous values for the rolling z-score."""


@dataclass
class Series:
    name: str
    times: list[str]
    values: Scores
    windows: list[tuple[str, str]]

    @property
    def learned(self) -> int:
        return int(PROBATION * len(self.values))

    def masks(self) -> list[NDArray[np.bool_]]:
        times = np.array(self.times)
        return [(times >= start[:19]) & (times <= stop[:19]) for start, stop in self.windows]


def read(folder: Path) -> list[Series]:
    labels = json.loads((folder / "labels.json").read_text())
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        times, values = [row["timestamp"] for row in rows], [float(row["value"]) for row in rows]
        windows = labels[path.name]["windows"]
        found.append(Series(path.stem.split("__")[-1], times, np.array(values), windows))
    return found


def z_scores(series: Series) -> Scores:
    """Return the distance of each value from the mean of the previous values, in standard
    deviations."""
    first = np.full(WIDTH, series.values[0])
    before = np.lib.stride_tricks.sliding_window_view(np.r_[first, series.values], WIDTH)[:-1]
    floor = 1e-6 * np.abs(series.values).max()
    scores: Scores = np.abs(series.values - before.mean(1)) / (before.std(1) + floor)
    return scores


def vae_scores(series: Series, folder: Path, seed: int) -> tuple[Scores, float, float]:
    """Return the scores of the model, its threshold, and the seconds of training."""
    path = folder / f"{series.name}.csv"
    rows = zip(series.times[: series.learned], series.values.tolist(), strict=False)
    path.write_text("timestamp,value\n" + "".join(f"{t},{value!r}\n" for t, value in rows))
    started = time.monotonic()
    result = luthier.tune(
        str(path),
        name=f"nab-{seed}-{time.time_ns()}",
        objective={"method": "vae", "false_alarms": BUDGET},
        training__seed=seed,
    )
    seconds = time.monotonic() - started
    model = luthier.load(result.model_id)
    values = series.values.tolist()
    asked = [{"window": values[max(0, n + 1 - LONGEST_WINDOW) : n + 1]} for n in range(len(values))]
    answers = [each["predicted"] for each in model.predict(asked)]
    scores = np.array([each["score"] for each in answers])
    ordinary = scores[[each["anomalous"] is False for each in answers]]
    return scores, float(ordinary.max(initial=-np.inf)), seconds


def measure(series: Series, scores: Scores, threshold: float) -> tuple[int, float, list[int]]:
    masks = series.masks()
    outside = ~np.any([np.zeros(len(scores), bool), *masks], axis=0)
    outside[: series.learned] = False
    found = sum(bool((scores[mask] > threshold).any()) for mask in masks)
    equal = [
        sum(bool((scores[mask] > np.quantile(scores[outside], 1 - share)).any()) for mask in masks)
        for share in ALARMS
    ]
    return found, float((scores[outside] > threshold).mean()), equal


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    equal = "  ".join(f"at {share:.1%}" for share in ALARMS)
    print(f"{'series':36} {'anomalies':>9}  detector  own threshold: found, alarms   {equal}")
    totals = {"z-score": np.zeros(len(ALARMS) + 1, int), "vae": np.zeros(len(ALARMS) + 1, int)}
    anomalies = 0
    for series in read(options.folder):
        rolling = z_scores(series)
        own = float(np.quantile(rolling[: series.learned], 1 - BUDGET))
        with tempfile.TemporaryDirectory() as folder:
            learned, threshold, seconds = vae_scores(series, Path(folder), options.seed)
        anomalies += len(series.windows)
        for name, scores, above in (("z-score", rolling, own), ("vae", learned, threshold)):
            found, alarms, at = measure(series, scores, above)
            totals[name] += [found, *at]
            beside = "  ".join(f"{each:7}" for each in at)
            took = f"   {seconds:.0f} s" if name == "vae" else ""
            text = f"{series.name:36} {len(series.windows):9}  {name:8}  {found:20}, {alarms:6.2%}"
            print(f"{text}   {beside}{took}", flush=True)
    for name, counts in totals.items():
        print(f"{name}: {counts[0]} of {anomalies}; at equal alarms {counts[1:].tolist()}")


if __name__ == "__main__":
    main()
