"""Results of studies: significance, choice, limits, pictures and page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from luthier.engine.metrics import THEMES
from luthier.evaluation.significance import RowScores
from luthier.workflows.figures import draw_bars
from luthier.workflows.study.cells import CellResult
from luthier.workflows.study.figures import draw_study
from luthier.workflows.study.grid import Configuration, Dimension
from luthier.workflows.study.results import Study, StudyRow, columns_of

HELD_OUT = 400


def outcome(
    right: int, seconds: float = 10.0, start: float | None = 0.5, **fields: Any
) -> CellResult:
    """An outcome with the first ``right`` of 400 rows right."""
    scores = RowScores.of(np.arange(HELD_OUT) < right)
    return CellResult(
        measure="accuracy", value=scores.value, error=scores.error, rows=scores.plain(),
        start=start, seconds=seconds, processor_seconds=seconds, peak_memory_bytes=10**9,
        trained_weights=1000, saved_bytes=2 * 10**6, training_rows=100,
        **{"order": "x", "steps": 10, **fields},
    )  # fmt: skip


def study_of(
    rows: Mapping[Any, Sequence[CellResult]], key: str = "adaptation.method", **fields: Any
) -> Study:
    studied = [
        StudyRow(Configuration({key: name}), each, next((o.reason for o in each if o.reason), ""))
        for name, each in rows.items()
    ]
    return Study("s", "folder", studied, [Dimension(key, tuple(rows))], HELD_OUT, **fields)


def chosen_name(rows: Mapping[Any, Sequence[CellResult]], **limits: float) -> str | None:
    chosen = study_of(rows, limits=limits).chosen
    return None if chosen is None else chosen.name


def test_best_is_decided_only_beyond_chance_of_all_others() -> None:
    clear = study_of({"a": [outcome(380)], "b": [outcome(300)], "c": [outcome(290)]})
    assert clear.is_decided
    near = study_of({"a": [outcome(380)], "b": [outcome(378)], "c": [outcome(290)]})
    assert not near.is_decided
    assert [near.is_within_chance(row) for row in near.measured] == [True, True, False]


def test_correction_grows_with_the_number_of_configurations() -> None:
    # 380 and 370 of 400 with ten different rows: p = 0.004 alone.
    two = study_of({"a": [outcome(380)], "b": [outcome(370)]})
    assert two.apart["b"].significant
    rows = {f"m{number}": [outcome(370)] for number in range(30)}
    many = study_of({"a": [outcome(380)], **rows})
    assert not any(each.significant for each in many.apart.values())
    assert (many.smallest_difference or 0) > (two.smallest_difference or 0)


def test_students_keep_a_share_of_the_score_of_the_teacher() -> None:
    found = study_of({"teacher": [outcome(360)], "student": [outcome(324)]})
    assert [found.kept(row) for row in found.rows] == [None, 0.9]
    assert columns_of(found)["kept"] == ["", "90.0%"]
    assert any("90.0%" in line for line in found.remarks())
    assert "kept" not in columns_of(study_of({"a": [outcome(360)], "b": [outcome(324)]}))


def test_choice_is_the_cheapest_within_chance_and_the_limits() -> None:
    rows = {
        "slow": [outcome(380, 100, milliseconds=50.0)],
        "quick": [outcome(378, 10, milliseconds=30.0)],
        "poor": [outcome(200, 1, milliseconds=1.0)],
    }
    assert chosen_name(rows) == "quick"
    assert chosen_name(rows, ms=20.0) == "poor"
    assert chosen_name(rows, ms=0.5) is None
    keeps = {"earlier": -0.01, "earlier_is_share": True}
    forgets = {**keeps, "earlier": -0.1}
    rows = {"a": [outcome(380, 10, **forgets)], "b": [outcome(300, 20, **keeps)]}
    assert (chosen_name(rows, earlier=2.0), chosen_name(rows, earlier=0.5)) == ("b", None)


def test_seeds_that_differ_widen_the_error() -> None:
    same = study_of({"a": [outcome(380)] * 2, "b": [outcome(340)] * 2})
    apart = study_of({"a": [outcome(400), outcome(360)], "b": [outcome(340)] * 2})
    assert apart.best.value == same.best.value
    assert apart.apart["b"].error > same.apart["b"].error
    assert apart.best.interval[1] == 1.0


def test_equal_configurations_differ_significantly_in_one_study_of_twenty() -> None:
    draw, studies, count = np.random.default_rng(0), 200, 0
    for _ in range(studies):
        rows = {}
        for name in "abcde":
            # Each seed has a different true accuracy.
            outcomes = []
            for share in 0.8 + 0.02 * draw.standard_normal(3):
                scores = RowScores.of(draw.random(HELD_OUT) < share)
                plain = scores.plain()
                outcomes.append(
                    CellResult(measure="accuracy", value=scores.value, rows=plain, order="x")
                )
            rows[name] = outcomes
        count += any(each.significant for each in study_of(rows).apart.values())
    assert count <= 0.1 * studies


def test_rows_in_different_orders_are_not_paired() -> None:
    paired = study_of({"a": [outcome(380)], "b": [outcome(370)]})
    apart = study_of({"a": [outcome(380)], "b": [outcome(370, order="y")]})
    assert apart.apart["b"].error > paired.apart["b"].error


def test_limit_excludes_a_configuration_without_the_figure() -> None:
    rows = {"a": [outcome(380)], "b": [outcome(300, milliseconds=3.0)]}
    assert chosen_name(rows, ms=5.0) == "b"


def test_lower_loss_is_better_and_a_gain() -> None:
    rows = {name: [CellResult(value=value, start=2.0)] for name, value in (("a", 1.5), ("b", 1.0))}
    found = study_of(rows)
    # A difference without a known error is not significant.
    assert found.is_within_chance(found.measured[1])
    assert found.smallest_difference is None
    assert found.best.name == "b"
    assert found.best.gain == 1.0
    assert found.best.relative_gain == 0.5


def test_failed_row_keeps_its_reason() -> None:
    found = study_of({"a": [outcome(380)], "b": [outcome(370), CellResult(reason="diverged")]})
    assert [row["name"] for row in found.plain()["rows"] if "reason" in row] == ["b"]
    assert found.chosen is found.best
    assert json.loads(json.dumps(found.plain()))["chosen"] == "a"


def test_columns_without_a_figure_are_left_out() -> None:
    found = study_of({"a": [outcome(380, start=None)], "b": [CellResult(reason="diverged")]})
    columns = columns_of(found)
    assert "gain" not in columns and "drift" not in columns
    assert columns["MB"] == ["2.0", ""]


def test_pictures_are_drawn_in_both_themes_and_shown_on_the_page(tmp_path: Path) -> None:
    rows = {
        rate: [outcome(200 + 100 * number, milliseconds=3.0, forgotten=0.1 * number)]
        for number, rate in enumerate((0.001, 0.01))
    }
    found = study_of(rows, key="training.learning_rate")
    paths = draw_study(found, tmp_path)
    names = [Path(path).name for path in paths]
    assert names == [
        f"{name}{theme}.svg" for name in ("cost", "forgotten", "line") for theme in ("", "-dark")
    ]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in paths)
    shown = study_of(rows, key="training.learning_rate", pictures=paths)
    page = replace(shown, name="<rows>").html()
    assert page.count("data:image/svg+xml;base64,") == len(paths)
    assert "<rows>" not in page and shown.verdict() in page


def test_bars_reach_the_score_and_intervals_surround_it(tmp_path: Path) -> None:
    paths = draw_bars(tmp_path / "bars.svg", "accuracy", [("a", 0.5, (0.4, 0.6), True)])
    assert [Path(path).name for path in paths] == ["bars.svg", "bars-dark.svg"]
    light, dark = (Path(path).read_text() for path in paths)
    assert THEMES[""]["front"] in light and THEMES["-dark"]["front"] in dark


def test_nothing_measured_has_a_verdict_and_no_choice() -> None:
    found = study_of({"a": [CellResult(reason="x")], "b": [CellResult(reason="y")]})
    assert found.verdict()
    assert found.measured == []
    assert found.smallest_difference is None
    assert found.chosen is None


def test_four_numbers_of_rows_predict_the_effect_of_more() -> None:
    rights = {0.125: 300, 0.25: 330, 0.5: 363, 1.0: 365}
    rows = {
        share: [replace(outcome(right, 100 * share), training_rows=round(800 * share))]
        for share, right in rights.items()
    }
    found = study_of(rows, key="data.train_share")
    assert found.more_rows is not None and found.more_rows.rows == 1600
    assert found.more_rows.gain > 0
    assert (found.verdict(), found.chosen) == (found.more_rows.verdict(), found.best)
    other = study_of(rows, key="training.epochs")
    assert other.more_rows is None and other.chosen is not other.best
    losses = {
        share: [CellResult(value=1 + 0.5 * share**-0.5, training_rows=round(800 * share))]
        for share in rights
    }
    falling = study_of(losses, key="data.train_share").more_rows
    assert falling is not None and falling.gain > 0
    three = {share: rows[share] for share in (0.25, 0.5, 1.0)}
    assert study_of(three, key="data.train_share").more_rows is None


def test_change_of_an_earlier_task_has_an_error_by_rows_and_seeds() -> None:
    changes = [outcome(300, earlier=value, earlier_error=0.02) for value in (-0.1, -0.2)]
    found = study_of({"a": changes, "b": [outcome(300, earlier=0.0)]})
    row = found.rows[0]
    assert row.error_of("earlier") == pytest.approx(np.hypot(0.02, 0.05))
    assert columns_of(found)["earlier ±"] == ["-0.150 0.054", "+0.000 *"]
    told = outcome(300, earlier=-0.01, earlier_error=0.02, earlier_start=0.9, earlier_is_share=True)
    assert columns_of(study_of({"a": [told]}))["earlier ±"] == ["90.0% -1.0% 2.0% *"]
    stored = [outcome(300, steps=40, kept_step=step) for step in (0, 0)]
    assert columns_of(study_of({"a": stored}))["steps"] == ["0 of 40"]
    assert found.rows[0].error_of("seconds") == 0


def test_difference_between_rows_that_are_not_the_best() -> None:
    found = study_of({"a": [outcome(380)], "b": [outcome(300)], "c": [outcome(280)]})
    _, middle, last = found.rows
    value, error, p_value = found.difference(last, middle)
    assert value == pytest.approx(-0.05) and error < 0.02 and p_value < 0.001


def test_columns_without_a_measured_row() -> None:
    found = study_of({"a": [CellResult(reason="over the limit")]})
    assert columns_of(found) == {"score ±": [""]}


def test_study_without_an_improved_start_compares_nothing() -> None:
    rows = {name: [replace(outcome(380), kept_step=0)] for name in ("full", "lora")}
    found = study_of(rows)
    assert found.is_untrained and "full" not in found.verdict()
    rows["lora"] = [replace(outcome(385), kept_step=8)]
    assert not study_of(rows).is_untrained
    assert not study_of({name: [outcome(380)] for name in ("full", "lora")}).is_untrained
