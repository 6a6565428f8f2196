"""Learning curves: fitted law, coverage of the interval, and real runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.engine.dataset import prepare
from luthier.errors import RecipeError, RunConflict
from luthier.library.models import custom_models, find
from luthier.recipe import DataSpec
from luthier.workflows import learning_curve as module
from luthier.workflows.learning_curve import SHARES, CurvePoint, extrapolate, learning_curve
from luthier.workflows.learning_curve import LearningCurve as Curve

ROWS = 800


def points_of(costs: Sequence[float], measure: str = "accuracy") -> list[CurvePoint]:
    return [
        CurvePoint(share, round(share * ROWS), measure, cost)
        for share, cost in zip(SHARES, costs, strict=True)
    ]


def law(share: float, floor: float = 0.05, scale: float = 0.15, exponent: float = 0.5) -> float:
    return float(floor + scale * share**-exponent)


def test_the_gain_of_a_law_without_noise_is_found() -> None:
    gain, (low, high) = extrapolate(points_of([law(share) for share in SHARES]))
    assert gain == pytest.approx(law(1) - law(2), rel=0.01)
    assert low == pytest.approx(high, abs=1e-3)
    assert extrapolate(points_of([0.2] * 7))[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_interval_contains_the_truth_in_nineteen_of_twenty() -> None:
    draw = np.random.default_rng(1)
    truth, contained, many = law(1) - law(2), 0, 100
    for _ in range(many):
        # All shares have the same 500 held-out rows; the noise differs per run.
        uniform_R = draw.random(500)
        points = []
        for point in points_of([law(share) for share in SHARES]):
            cost = float((uniform_R < point.cost + draw.normal(0, 0.005)).mean())
            points.append(replace(point, cost=cost, error=math.sqrt(cost * (1 - cost) / 500)))
        _, (low, high) = extrapolate(points)
        contained += low <= truth <= high
    assert contained / many >= 0.92


@pytest.mark.parametrize(
    ("measure", "interval", "helps", "sign"),
    [
        ("accuracy", (0.003, 0.02), True, "+"),
        ("accuracy", (0.0, 0.01), False, "+"),
        ("loss", (0.01, 0.09), True, "-"),
        ("cer", (0.005, 0.02), True, "-"),
        ("reward", (0.1, 0.9), True, "+"),
    ],
)
def test_the_verdict_names_rows_and_direction(
    measure: str, interval: tuple[float, float], helps: bool, sign: str
) -> None:
    said = Curve(points_of([0.2] * 7, measure), 0.01, interval, "").verdict()
    assert said.startswith("More rows of the same kind help") == helps
    assert "(1,600)" in said


LABELS = ("late", "lost", "fees")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    words = ("late today", "lost it", "a fee")
    lines = [
        {"text": f"card {n} {words[n % 3]} {'again' * (n % 4)}", "label": LABELS[n % 3]}
        for n in range(96)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_smaller_train_share_is_subset_of_larger_share(labelled: Path, family_folder: Any) -> None:
    chat = find(str(family_folder("bert"))).chat

    def rows_of(share: float | None) -> tuple[Counter[bytes], int]:
        spec = DataSpec(train=str(labelled), validation_share=0.25, train_share=share)
        data = prepare(spec, None, chat, 64, seed=0)
        return Counter(each.ids_T.tobytes() for each in data.train), len(data.validation)

    whole, half, eighth = rows_of(None), rows_of(0.5), rows_of(0.125)
    assert whole[1] == half[1] == eighth[1] == 24
    assert [each[0].total() for each in (whole, half, eighth)] == [72, 36, 9]
    assert eighth[0] <= half[0] <= whole[0]


def test_learning_curve_resumes_and_stores_no_model(
    labelled: Path, family_folder: Any, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        "base": str(family_folder("bert")), "name": "x", "data__validation_share": 0.25,
        "training__max_steps": 4, "training__batch_size": 8, "training__precision": "float32",
        "training__threads": 1, "training__learning_rate": 0.01, "adaptation__method": "full",
    }  # fmt: skip
    trained: list[float] = []
    real = module.rehearse

    def once(recipe: Any, *rest: Any) -> Any:
        if len(trained) == 2:
            trained.append(0.0)
            raise KeyboardInterrupt
        trained.append(recipe.data.train_share)
        return real(recipe, *rest)

    monkeypatch.setattr(module, "rehearse", once)
    shares = [0.2, 0.4, 0.6, 1.0]
    with pytest.raises(KeyboardInterrupt):
        luthier.learning_curve(labelled, shares=shares, **fields)
    with pytest.raises(RunConflict):
        luthier.learning_curve(labelled, shares=shares, **fields)
    with pytest.raises(RunConflict):
        luthier.learning_curve(labelled, shares=[0.3, *shares], resume=True, **fields)
    found = luthier.learning_curve(labelled, shares=shares, resume=True, **fields)
    assert trained == [0.2, 0.4, 0.0, 0.6, 1.0]
    assert [point.rows for point in found.points] == [14, 29, 43, 72]
    assert found.points[0].measure == "accuracy" and all(point.error > 0 for point in found.points)
    assert Path(found.picture).read_bytes().startswith(b"\x89PNG")
    assert custom_models() == [] and not (luthier_home / "runs").exists()
    left = sorted(path.name for path in Path(found.picture).parent.iterdir())
    assert left == [".lock", "curve.png", "points.json", "request.json"]
    found.plain()
    # A finished curve is read from the stored points.
    done = CliRunner().invoke(
        app,
        [
            "learning-curve", str(labelled), "--shares", "0.2,0.4,0.6,1", "--name", "x", "--resume",
            "--base", fields["base"], "--adaptation", "full",
            *(
                part
                for key, value in fields.items()
                if "__" in key and key != "adaptation__method"
                for part in ("--set", f"{key.replace('__', '.')}={value}")
            ),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_invalid_shares_and_too_few_rows_are_refused(labelled: Path, family_folder: Any) -> None:
    base = str(family_folder("bert"))
    for shares, more, rule in (
        ((0.5, 1.0), {}, "curve.shares"),
        ((0.1, 0.2, 0.5, 1.5), {}, "curve.shares"),
        ((0.01, 0.2, 0.5, 1.0), {}, "curve.too_few_rows"),
        (SHARES, {"data__validation_share": 0}, "curve.too_few_rows"),
    ):
        with pytest.raises(RecipeError) as refused:
            luthier.learning_curve(labelled, base=base, shares=shares, **more)
        assert refused.value.rule == rule
    wrong = CliRunner().invoke(app, ["learning-curve", str(labelled), "--shares", "a,b"])
    assert wrong.exit_code == 2
    assert learning_curve is module.learning_curve
