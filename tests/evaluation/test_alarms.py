"""Alarms of windows with predictions."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from luthier.data.inputs import Media
from luthier.data.shapes.media import BareWindow
from luthier.errors import DataError
from luthier.evaluation.alarms import Alarm, find_alarms

Pair = tuple[BareWindow, dict[str, object]]


def scored(file: str, line: int, score: float, anomalous: bool | None, time: str = "") -> Pair:
    seconds = datetime.strptime(time, "%H:%M").timestamp() if time else None
    media = Media("window", f"{file}:{line}", array=np.zeros(1), time_text=time, time=seconds)
    return BareWindow(file, line, media), {"score": score, "anomalous": anomalous}


def test_run_ends_at_ordinary_row_and_at_end_of_file() -> None:
    pairs = [
        scored("a.csv", 2, 9, None, "08:00"),
        scored("a.csv", 3, 5, True, "08:01"),
        scored("a.csv", 4, 7, True, "08:02"),
        scored("a.csv", 5, 1, False, "08:03"),
        scored("a.csv", 6, 4, True, "08:04"),
        scored("b.jsonl", 1, 6, True),
        scored("b.jsonl", 2, 5, True),
    ]
    pairs[-2][1]["column"], pairs[-1][1]["column"] = "flow", "level"
    assert find_alarms(pairs) == [
        Alarm("a.csv", "08:01", "08:02", 2, 7),
        Alarm("a.csv", "08:04", "08:04", 1, 4),
        Alarm("b.jsonl", "1", "2", 2, 6, "flow"),
    ]
    assert find_alarms([]) == []


def test_descending_times_of_a_file_are_refused() -> None:
    rising = [scored("b.csv", n, 9, True, f"08:{n:02}") for n in range(20)]
    falling = [scored("a.csv", n, 9, n > 3, f"08:{10 - n:02}") for n in range(6)]
    with pytest.raises(DataError) as caught:
        find_alarms([*rising, *falling])
    (problem,) = caught.value.problems
    assert (problem.rule, problem.location.file) == ("window.reversed", "a.csv")
    set_back = ("02:59", "02:00", "02:01", "02:02")
    assert len(find_alarms([scored("a.csv", 2, 9, True, time) for time in set_back])) == 1
