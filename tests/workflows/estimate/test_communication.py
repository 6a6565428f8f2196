"""What processes send each other: as predicted, and as the kernel counts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.workflows.estimate.communication import (
    LATENCY,
    StepExchange,
    data_parallel,
    predict_scaling,
)
from test_processes import run_group

SCRIPT = Path(__file__).parents[2] / "plugins" / "counted_bytes.py"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_send_what_was_predicted(
    family_folder: Callable[[str], Path], tmp_path: Path, size: int
) -> None:
    run_group(size, [str(SCRIPT), str(family_folder("llama")), str(tmp_path / "sent")], tmp_path)
    found = json.loads((tmp_path / "sent").read_text())
    assert found.keys() == {"full whole", "full shards", "lora whole", "lora shards"}
    for name, (sent, predicted) in found.items():
        assert sent == pytest.approx(predicted, rel=0.02), (name, found)


def test_rings_send_twice_what_they_reduce_and_once_what_they_gather() -> None:
    whole = data_parallel(1_000_000)
    assert [whole.sent(n) for n in (1, 2, 4)] == [0, 4e6, 6e6]
    shards = StepExchange(reduced=0, gathered=800, scattered=400, reductions=0, halves=3)
    assert shards.sent(4) == 900
    assert shards.seconds(4, 90.0) == pytest.approx(10 + 9 * LATENCY)
    assert data_parallel(50_000_000).reductions == 3  # of 16.8 million numbers at most
    assert data_parallel(0).seconds(8, 1.0) == 0


def test_efficiency_falls_with_processes_and_rises_with_bandwidth() -> None:
    found = predict_scaling(data_parallel(10**9), 0.5, (8, 512), (10.0, 100.0))
    assert [(each.processes, each.bandwidth) for each in found] == [
        (8, 10.0), (8, 100.0), (512, 10.0), (512, 100.0)
    ]  # fmt: skip
    slow, fast, many, many_fast = found
    assert slow.sent == 7e9 and slow.exchange_seconds == pytest.approx(0.7, rel=0.02)
    assert slow.efficiency == pytest.approx(0.5 / 1.2, rel=0.02)
    assert slow.efficiency < fast.efficiency and many.efficiency < slow.efficiency
    assert many_fast.seconds == pytest.approx(0.5 + many_fast.exchange_seconds)
