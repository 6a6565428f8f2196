"""Faults of a machine."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from defaults import rows_of
from pages.bench import Bench, Colours, Found, Use, comparison, ends, percent

SENSORS = {"small-sensor-vae:pump": "network", "z-score:pump": "z-score"}
"""Models of the page, by name in the figure."""


def collect(bench: Bench) -> Found:
    """Collect values, faults and alarms of the test week, and the events of each model."""
    with (bench.folder / "rows" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = dict(zip(SENSORS, ("answers.jsonl", "answers-z.jsonl"), strict=True))
    answers = {model: rows_of(bench.folder / name) for model, name in files.items()}
    alarms = {
        model: [place for place, each in enumerate(found) if each["anomalous"]]
        for model, found in answers.items()
    }
    labels = [row["label"] for row in rows]
    network = alarms["small-sensor-vae:pump"]
    false = next(place for place in network if labels[place] == "normal")
    contenders = comparison({"steps": bench.steps})["contenders"]
    scores = [each["scores"] for each in ends(contenders)]
    events = sum(
        a != b and b != "normal" for a, b in zip(["normal", *labels], labels, strict=False)
    )
    found = [
        f"{name} finds {round(events * each['events_found'])} of {events} events, and "
        f"{percent(each['precision'])} of the alarms are right"
        for each, name in zip(scores, SENSORS.values(), strict=True)
    ]
    fair = equal_alarms(labels, answers["z-score:pump"], network)
    score = answers["small-sensor-vae:pump"][false]["score"]
    return {
        "rows": [json.dumps(rows[place]) for place in (0, labels.index("leak"))],
        "wrong": f"{json.dumps(rows[false])}\nanswer:   anomalous (score {score:.1f})\n"
        "expected: normal",
        "facts": f"The {found[0]}; the {found[1]}. {fair}",
        "labels": labels,
        "values": {
            name: [float(row[name]) for row in rows]
            for name in rows[0]
            if name not in ("time", "label")
        },
        "alarms": alarms,
    }


def equal_alarms(labels: Sequence[str], answers: Sequence[Found], alarms: Sequence[int]) -> str:
    """Return the events that z-scores find with as many false alarms as another model's ``alarms``."""
    score_N = np.array([-np.inf if e["anomalous"] is None else e["score"] for e in answers])
    is_fault_N = np.array([label != "normal" for label in labels])
    false = int((~is_fault_N)[[*alarms]].sum())
    threshold = np.sort(score_N[~is_fault_N])[-1 - false]
    event_N = np.cumsum(np.diff(is_fault_N, prepend=False) & is_fault_N)
    found = {*event_N[is_fault_N & (score_N > threshold)].tolist()}
    return (
        f"With the threshold {threshold:.1f}, z-scores have as many false alarms as the network, "
        f"{false}, and find {len(found)} of {event_N[-1]} events."
    )


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the columns above each other with shaded faults, and a line of alarms per model."""
    places = np.arange(len(found["labels"])) / 144
    faulty = np.array([label != "normal" for label in found["labels"]])
    axes.fill_between(places, -2.6, 5.2, where=faulty, color=colours["point"], alpha=0.3, lw=0)
    names = []
    for height, (name, values) in enumerate(found["values"].items()):
        value_N = np.array(values)
        low, high = np.quantile(value_N, [0.001, 0.999])
        axes.plot(
            places, height + 0.9 * (value_N - low) / (high - low), color=colours["text"],
            linewidth=0.8,
        )  # fmt: skip
        names.append((height + 0.45, name))
    for line, (model, name), colour in zip(
        (-0.6, -1.8), SENSORS.items(), ("front", "right"), strict=True
    ):
        alarms = places[found["alarms"][model]]
        axes.vlines(alarms, line - 0.45, line + 0.45, color=colours[colour], linewidth=1.5)
        names.append((line, f"alarms of\n{name}"))
    axes.set_yticks([height for height, _ in names], [name for _, name in names])
    axes.set(xlabel="days of the test week; shaded: faults", ylim=(-2.6, 5.2), xlim=(0, 7))


USE = Use(
    "sensors",
    "Faults of a machine from its sensors",
    "lines of a week with ten faults",
    "F1",
    "Values: a simulated pump, written for luthier (benchmarks/sensor_rows.py), Apache-2.0.",
    tuple(f"examples/sensors/{name}" for name in ("train.csv", "test.csv", "NOTICE.md")),
    "Five sensors over a week, shaded faults, and the alarms of a network and of z-scores",
    paint,
    collect,
)
