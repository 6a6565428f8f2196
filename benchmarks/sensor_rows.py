"""Write the rows of the use case of sensors: a week of a pump, and a week with ten faults.

    python benchmarks/sensor_rows.py

The load of the pump follows the hours of a working day. Flow, pressure, current, temperature and
vibration follow the load with noise and, for the temperature, with a delay. ``FAULTS`` has kind,
first line and length of each fault. Nothing was changed after the first run of a model.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TARGET = Path(__file__).parent.parent / "src" / "luthier" / "examples" / "sensors"
COLUMNS = ("flow", "pressure", "current", "temperature", "vibration")
LINES = 1_008
"""A week of values, one each ten minutes."""
FAULTS = (
    ("leak", 75, 30),
    ("worn bearing", 190, 45),
    ("blocked filter", 280, 40),
    ("sensor stuck", 380, 35),
    ("overheating", 465, 30),
    ("leak", 550, 25),
    ("cavitation", 635, 20),
    ("worn bearing", 715, 35),
    ("blocked filter", 810, 30),
    ("cavitation", 915, 25),
)
"""Kind, first line and number of lines of each fault of the second week."""

Values = NDArray[np.float64]


def ordinary(random: np.random.Generator) -> dict[str, Values]:
    """Return a week of values without faults."""
    hour_T = np.arange(LINES) / 6 % 24
    day_T = np.arange(LINES) // 144
    work_T = 1 / (1 + np.exp(-2 * (hour_T - 7))) - 1 / (1 + np.exp(-2 * (hour_T - 18)))
    wander_T = np.convolve(random.standard_normal(LINES + 23), np.ones(24) / 24, "valid")
    load_T = 0.45 + 0.4 * work_T * np.where(day_T < 5, 1, 0.35) + 0.2 * wander_T

    def noise(size: float) -> Values:
        return size * random.standard_normal(LINES)

    heat_T = load_T.copy()
    for line in range(1, LINES):
        heat_T[line] = heat_T[line - 1] + 0.08 * (load_T[line] - heat_T[line - 1])
    return {
        "flow": 80 * load_T + noise(1.0),
        "pressure": 6.2 - 1.8 * load_T**2 + noise(0.05),
        "current": 4 + 14 * load_T + noise(0.25),
        "temperature": 32 + 26 * heat_T + noise(0.3),
        "vibration": 1.1 + 0.9 * load_T + np.abs(noise(0.12)),
    }


def add_fault(
    kind: str, part: slice, values: dict[str, Values], random: np.random.Generator
) -> None:
    """Change the values of a part as a fault does."""
    size = part.stop - part.start
    growth_K = np.linspace(0.2, 1, size)
    if kind == "leak":
        values["flow"][part] *= 1 - 0.18 * growth_K
        values["pressure"][part] -= 0.5 * growth_K
    elif kind == "worn bearing":
        values["vibration"][part] += 1.2 * growth_K
        values["temperature"][part] += 4 * growth_K
    elif kind == "blocked filter":
        values["pressure"][part] += 0.7 * growth_K
        values["flow"][part] *= 1 - 0.12 * growth_K
        values["current"][part] += 1.5 * growth_K
    elif kind == "sensor stuck":
        values["temperature"][part] = values["temperature"][part.start]
    elif kind == "overheating":
        values["temperature"][part] += 14 * growth_K
    else:
        values["vibration"][part] += np.abs(0.8 * random.standard_normal(size))
        values["pressure"][part] += 0.35 * random.standard_normal(size)


def write(
    name: str, values: dict[str, Values], label_T: list[str], first: datetime.datetime
) -> None:
    """Write a table."""
    with (TARGET / name).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["time", *COLUMNS, "label"])
        for line in range(LINES):
            time = first + datetime.timedelta(minutes=10 * line)
            numbers = [f"{values[column][line]:.2f}" for column in COLUMNS]
            table.writerow([f"{time:%Y-%m-%d %H:%M}", *numbers, label_T[line]])


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    random = np.random.default_rng(2026)
    write("train.csv", ordinary(random), ["normal"] * LINES, datetime.datetime(2026, 3, 2))
    values, label_T = ordinary(random), ["normal"] * LINES
    for kind, first, size in FAULTS:
        part = slice(first, first + size)
        add_fault(kind, part, values, random)
        label_T[part] = [kind] * size
    write("test.csv", values, label_T, datetime.datetime(2026, 3, 9))


if __name__ == "__main__":
    main()
