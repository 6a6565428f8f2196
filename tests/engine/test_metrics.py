"""The metrics file and the loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from luthier.engine.metrics import MetricsFile, draw_loss_curve, learned_nothing, smooth


def line(step: int, loss: float, event: str = "train") -> dict[str, Any]:
    return {"event": event, "step": step, "loss": loss}


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_each_record_is_one_line_of_json(metrics: MetricsFile) -> None:
    assert [metrics.append(line(step, 1 / step)) for step in (1, 2, 3)] == [1, 2, 3]
    text = metrics.path.read_text()
    assert text.endswith("\n")
    assert [json.loads(part) for part in text.splitlines()] == metrics.read()
    assert metrics.read()[2] == {"event": "train", "step": 3, "loss": 1 / 3}


def test_text_that_holds_line_ends_stays_on_one_line(metrics: MetricsFile) -> None:
    metrics.append({"note": "a\nb\u2028c\x85d"})
    metrics.append({"note": "e"})
    assert [record["note"] for record in metrics.read()] == ["a\nb\u2028c\x85d", "e"]
    metrics.cut(1)
    assert [record["note"] for record in metrics.read()] == ["a\nb\u2028c\x85d"]


def test_there_are_no_records_before_the_first(metrics: MetricsFile) -> None:
    assert metrics.read() == []


def test_cutting_keeps_the_first_lines_and_goes_on_counting(metrics: MetricsFile) -> None:
    for step in range(1, 6):
        metrics.append(line(step, 1.0))
    metrics.cut(2)
    assert [record["step"] for record in metrics.read()] == [1, 2]
    assert metrics.append(line(3, 0.5)) == 3
    assert [record["loss"] for record in metrics.read()] == [1.0, 1.0, 0.5]


def test_a_new_process_counts_from_what_it_keeps(metrics: MetricsFile) -> None:
    for step in range(1, 4):
        metrics.append(line(step, 1.0))
    again = MetricsFile(metrics.path)
    again.cut(3)
    assert again.append(line(4, 1.0)) == 4


def test_a_file_that_is_not_there_can_be_cut(metrics: MetricsFile) -> None:
    metrics.cut(0)
    assert metrics.read() == []


def test_a_line_that_a_kill_cut_short_is_not_read(metrics: MetricsFile) -> None:
    metrics.append(line(1, 1.0))
    with metrics.path.open("a") as file:
        file.write('{"event": "train", "st')
    assert [record["step"] for record in metrics.read()] == [1]
    metrics.cut(1)
    metrics.append(line(2, 0.5))
    assert [record["step"] for record in metrics.read()] == [1, 2]


@pytest.mark.parametrize(
    ("held", "silent"),
    [
        ((2.0, 1.5), True),
        ((2.0, 1.5, 2.5), True),
        ((2.0, 1.97, 1.99), False),
        ((2.0, 2.3), False),
        ((-2.0, -2.5), True),
        ((-2.0, -2.01), False),
        ((), True),  # nothing to measure on
    ],
)
def test_a_validation_loss_that_hardly_falls_is_told(held: tuple[float, ...], silent: bool) -> None:
    lines = [line(step, 5.0 - step) for step in range(4)]
    lines += [line(step, loss, "validation") for step, loss in enumerate(held)]
    said = learned_nothing(lines, 2e-3)
    assert (said is None) is silent
    if said:
        assert f"{held[0]:.4f} before" in said and f"{min(held):.4f} at" in said
        assert "`training.learning_rate=5.0e-04`" in said and "luthier search" in said


def test_the_curve_is_drawn_as_svg_and_png(tmp_path: Path) -> None:
    lines = [line(step, 3.0 / step) for step in range(1, 20)]
    lines += [line(step, 4.0 / step, "validation") for step in (5, 10, 19)]
    draw_loss_curve(lines, tmp_path, "base:my-model")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ElementTree.parse(tmp_path / "loss.svg")
    assert svg.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "loss.svg").read_text()
    for words in ("base:my-model", "best 0.211", "optimizer step", "validation"):
        assert f"<!-- {words} -->" in text, words


def test_a_curve_without_validation_has_no_best(tmp_path: Path) -> None:
    draw_loss_curve([line(1, 2.0)], tmp_path, "t")
    text = (tmp_path / "loss.svg").read_text()
    assert "<!-- training, smoothed -->" in text
    assert "validation" not in text and "best" not in text


def test_smoothing_is_a_moving_average_without_a_start_from_zero() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0]) == pytest.approx([1.0, (0.8 * 0.2 * 1 + 0.2 * 3) / 0.36])
