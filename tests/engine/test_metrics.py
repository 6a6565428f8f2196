"""The metrics file and the loss curve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest

from luthier.engine.metrics import (
    OPTIMIZER,
    MetricsFile,
    best_measurement,
    clipped_share,
    cost_of,
    curve_pictures,
    deciding_measure,
    draw_curves,
    is_hollow,
    is_within_chance,
    smooth,
)


def line(step: int, loss: float, event: str = "train") -> dict[str, Any]:
    return {"event": event, "step": step, "loss": loss}


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_each_record_is_a_json_line(metrics: MetricsFile) -> None:
    assert [metrics.append(line(step, 1 / step)) for step in (1, 2, 3)] == [1, 2, 3]
    text = metrics.path.read_text()
    assert text.endswith("\n")
    assert [json.loads(part) for part in text.splitlines()] == metrics.read()
    assert metrics.read()[2] == {"event": "train", "step": 3, "loss": 1 / 3}


def test_line_ends_in_text_are_escaped(metrics: MetricsFile) -> None:
    metrics.append({"note": "a\nb\u2028c\x85d"})
    metrics.append({"note": "e"})
    assert [record["note"] for record in metrics.read()] == ["a\nb\u2028c\x85d", "e"]
    metrics.truncate(1)
    assert [record["note"] for record in metrics.read()] == ["a\nb\u2028c\x85d"]


def test_no_records_without_file(metrics: MetricsFile) -> None:
    assert metrics.read() == []


def test_truncate_keeps_first_lines_and_step_count(metrics: MetricsFile) -> None:
    for step in range(1, 6):
        metrics.append(line(step, 1.0))
    metrics.truncate(2)
    assert [record["step"] for record in metrics.read()] == [1, 2]
    assert metrics.append(line(3, 0.5)) == 3
    assert [record["loss"] for record in metrics.read()] == [1.0, 1.0, 0.5]


def test_new_process_counts_from_stored_records(metrics: MetricsFile) -> None:
    for step in range(1, 4):
        metrics.append(line(step, 1.0))
    again = MetricsFile(metrics.path)
    again.truncate(3)
    assert again.append(line(4, 1.0)) == 4


def test_missing_file_can_be_cut(metrics: MetricsFile) -> None:
    metrics.truncate(0)
    assert metrics.read() == []


def test_truncated_last_line_is_skipped(metrics: MetricsFile) -> None:
    metrics.append(line(1, 1.0))
    with metrics.path.open("a") as file:
        file.write('{"event": "train", "st')
    assert [record["step"] for record in metrics.read()] == [1]
    metrics.truncate(1)
    metrics.append(line(2, 0.5))
    assert [record["step"] for record in metrics.read()] == [1, 2]


def test_training_and_validation_share_a_figure(tmp_path: Path) -> None:
    """The lines have the format of the loop: each line names the measure."""
    lines = [line(step, 3.0 / step) for step in range(1, 20)]
    lines += [line(step, 4.0 / step, "validation") for step in (5, 10, 19)]
    lines = [{**each, "measure": "loss"} for each in lines]
    assert draw_curves(lines, tmp_path, "base:my-model") == ["loss.svg", "loss.png"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ElementTree.parse(tmp_path / "loss.svg")
    assert svg.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    shown = words_of(tmp_path / "loss.svg")
    assert {"base:my-model", "kept 0.211", "optimizer step", "training, smoothed"} <= shown
    assert "validation" in shown and "accuracy" not in shown


def test_a_score_is_drawn_below_the_loss(tmp_path: Path) -> None:
    lines = [{**line(step, 1 / step), "accuracy": step / 10} for step in range(1, 9)]
    lines.append({**line(8, 0.25, "validation"), "accuracy": 0.875})
    draw_curves(lines, tmp_path, "t")
    assert {"accuracy", "kept 0.250", "kept 0.875"} <= words_of(tmp_path / "loss.svg")


def test_rewards_are_not_points_of_loss_curve(tmp_path: Path) -> None:
    lines = [{**line(step, 0.01), "reward": step / 10} for step in range(1, 9)]
    held = {**line(8, -0.75, "validation"), "reward": 0.75, "measure": "reward"}
    assert draw_curves([*lines, held], tmp_path, "t")[2:] == ["reward.svg", "reward.png"]
    assert "validation" not in words_of(tmp_path / "loss.svg")
    assert {"validation", "mean reward", "kept 0.750"} <= words_of(tmp_path / "reward.svg")


def test_a_curve_without_validation_marks_no_step(tmp_path: Path) -> None:
    draw_curves([line(1, 2.0)], tmp_path, "t")
    shown = words_of(tmp_path / "loss.svg")
    assert "training, smoothed" in shown
    assert "validation" not in shown and not any(word.startswith("kept") for word in shown)


@pytest.mark.slow
def test_rates_of_layers_and_clipped_steps_are_drawn(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {
            **line(step, 1.0),
            "learning_rate": 0.1,
            "gradient_norm": 2.0,
            "gradient_clipped": step % 4 == 0,
        }
        for step in range(1, 9)
    ]
    assert clipped_share(lines) == 0.25 and clipped_share([line(1, 1.0)]) is None
    assert draw_curves(lines, tmp_path, "t")[2:] == [OPTIMIZER]
    shown = words_of(tmp_path / OPTIMIZER)
    assert {"learning rate", "gradient norm", "share of clipped steps"} <= shown
    for each in lines:
        each["rates"] = {"all layers": 0.1, "head": 1.0}
    draw_curves(lines, tmp_path, "t")
    assert {"all layers", "head"} <= words_of(tmp_path / OPTIMIZER)
    assert len(curve_pictures(lines, "t")) == 2


def test_parts_of_the_loss_of_a_vae_have_panels(tmp_path: Path) -> None:
    lines = [{**line(step, 3.0), "reconstruction": 2.0, "kl": 1.0} for step in range(1, 4)]
    draw_curves(lines, tmp_path, "t")
    assert {"reconstruction (nats)", "KL divergence (nats)"} <= words_of(tmp_path / "loss.svg")
    draw_curves([{**each, "reward": 1.0} for each in lines], tmp_path, "t")
    assert "KL divergence (nats)" not in words_of(tmp_path / "loss.svg")


def test_start_of_a_refit_in_the_curve(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [line(step, 1 / step) for step in range(1, 9)]
    draw_curves(lines, tmp_path, "t")
    assert "refit on all 1,200 rows" not in words_of(tmp_path / "loss.svg")
    draw_curves(
        [*lines, {"event": "refit", "step": 8, "row_count": 1200}, line(9, 1.0)], tmp_path, "t"
    )
    assert "refit on all 1,200 rows" in words_of(tmp_path / "loss.svg")


def words_of(picture: Path) -> set[str]:
    """Return the text in an SVG, from matplotlib's comments."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text()))


def test_smoothing_is_a_bias_corrected_moving_average() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0]) == pytest.approx([1.0, (0.8 * 0.2 * 1 + 0.2 * 3) / 0.36])


@pytest.mark.parametrize(
    ("scores", "losses", "kept"),
    [
        ((0.10, 0.80, 0.79, 0.70), (1.0, 0.9, 0.8, 0.7), 2),  # 0.70 is clearly lower
        ((0.10, 0.80, 0.74, 0.78), (1.0, 0.9, 0.8, 0.7), 3),
        ((0.10, 0.80, 0.79, 0.82), (1.0, 0.3, 0.5, 0.9), 1),  # the last loss is higher
        ((0.90, 0.80, 0.85, 0.89), (1.0, 0.9, 0.8, 0.7), 3),
        ((0.90, 0.91, 0.92, 0.91), (0.2, 0.3, 0.4, 0.5), 0),
        ((0.00, 0.00, 0.00, 0.00), (1.0, 0.9, 0.8, 0.7), 3),
        ((0.50, 1.00, 1.00, 0.90), (1.0, 0.9, 0.8, 0.7), 2),
    ],
)
def test_lowest_loss_among_scores_within_chance(
    scores: tuple[float, ...], losses: tuple[float, ...], kept: int
) -> None:
    lines = [
        {"loss": loss, "accuracy": score, "accuracy_error": (score * (1 - score) / 70) ** 0.5}
        for loss, score in zip(losses, scores, strict=True)
    ]
    assert best_measurement(lines, "accuracy") is lines[kept]
    assert best_measurement(lines, "loss") is min(lines, key=lambda line: line["loss"])


@pytest.mark.parametrize(("lowest", "untrained", "kept"), [
    (0.7, True, 1), (0.9, True, 0), (0.7, False, 0),
])  # fmt: skip
def test_untrained_head_is_not_stored_if_the_loss_fell_by_a_fifth(
    lowest: float, untrained: bool, kept: int
) -> None:
    scores = ((1.0, 0.5), (lowest, 0.1), (0.95, 0.1))
    lines = [{"loss": loss, "span_f1": score, "span_f1_error": 0.05} for loss, score in scores]
    lines[0] |= {"untrained_head": untrained}
    assert best_measurement(lines, "span_f1") is lines[kept]


def test_an_error_rate_is_to_be_low() -> None:
    rates, losses = (1.0, 1.2, 0.30, 0.08, 0.07, 0.09), (5.0, 4.0, 2.0, 1.0, 1.1, 0.9)
    lines = [
        {"loss": loss, "cer": rate, "cer_error": 0.004}
        for rate, loss in zip(rates, losses, strict=True)
    ]
    assert best_measurement(lines, "cer") is lines[4]
    # Both first scores are 0, so the loss decides.
    assert best_measurement(lines[:2], "cer") is lines[1]
    assert deciding_measure(lines[:2], "cer") == "loss"
    assert deciding_measure(lines, "cer") == "cer"
    measured = {"cer": 1.2, "loss": -3.0, "reward": 3.0, "accuracy": 0.9}
    costs = [cost_of(measured, name) for name in measured]
    assert costs == pytest.approx([1.0, -3.0, -3.0, 0.1])


def test_insignificant_loss_is_not_best() -> None:
    """Identical embeddings have the chance loss, which may be below the initial loss."""
    first = {
        "loss": 4.02,
        "accuracy": 0.9,
        "chance_loss": 3.0,
        "rows": {"accuracy": {"parts": [1] * 18 + [0] * 2}},
    }
    alike = {**first, "loss": 2.99, "accuracy": 0.85}
    fallen = {
        **first,
        "loss": 2.0,
        "accuracy": 0.4,
        "rows": {"accuracy": {"parts": [1] * 8 + [0] * 12}},
    }
    better = {
        **first,
        "loss": 2.5,
        "rows": {"accuracy": {"parts": [1] * 17 + [0] * 3}},
        "accuracy": 0.85,
    }
    assert [is_hollow(line, first) for line in (alike, fallen, better)] == [True, True, False]
    assert best_measurement([first, alike, fallen], "loss") is first
    assert best_measurement([first, better, fallen, alike], "loss") is better


@pytest.mark.parametrize(
    ("rises", "repeats", "alike"),
    [
        ((0.4, -0.1, 0.3, -0.2), 1, True),  # 0.10 ± 0.15
        ((0.1, 0.1, 0.2, 0.12), 1, False),
        ((0.4, -0.1, 0.3, -0.2), 10, False),  # many rows
    ],
)
def test_losses_of_few_rows_within_chance(
    rises: tuple[float, ...], repeats: int, alike: bool
) -> None:
    count = len(rises) * repeats
    first, line = [
        {"loss": fmean(parts), "rows": {"loss": {"parts": parts, "is_share": False}}}
        for parts in ([0.7] * count, [0.7 + rise for rise in rises * repeats])
    ]
    assert is_within_chance(line, first, "loss") is alike
    assert best_measurement([first, line], "loss") is first


def test_row_records_are_read_on_request(metrics: MetricsFile) -> None:
    full = {"event": "validation", "step": 0, "loss": 1.0, "rows": {"accuracy": {"parts": [1.0]}}}
    metrics.append(full)
    assert metrics.read(rows=True) == [full]
    assert metrics.read() == [{"event": "validation", "step": 0, "loss": 1.0}]
