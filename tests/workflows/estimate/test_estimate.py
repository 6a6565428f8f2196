"""Real jobs on tiny networks: estimated, run, and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from luthier.cli.app import app
from luthier.engine.checkpoints import FIRST_BYTES_PER_SECOND, Checkpoints
from luthier.engine.metrics import Reporter
from luthier.engine.timings import ACTUAL, PARTS, estimates_folder
from luthier.engine.train import train
from luthier.errors import DataError
from luthier.files import read_json
from luthier.recipe import Recipe
from luthier.workflows.estimate.estimate import (
    FittedLine,
    PredictionInterval,
    _checkpoints,
    estimate,
    measurements,
)
from luthier.workflows.estimate.trial import TRIAL_BATCHES

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "my", "card"]


def said(index: int) -> str:
    return " ".join(WORDS[(index * 7 + k) % len(WORDS)] for k in range(2 + index % 9))


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sft": lambda n: {"prompt": f"say {said(n)}", "completion": said(n).upper()},
    "classification": lambda n: {"text": said(n), "label": f"class {n % 3}"},
    "masked_lm": lambda n: {"text": said(n)},
    "contrastive": lambda n: {"anchor": said(n), "positive": said(n + 1)},
    "dpo": lambda n: {"prompt": said(n), "chosen": said(n + 1), "rejected": said(n + 2)},
    "grpo": lambda n: {"prompt": said(n), "expected": "a"},
    "logit_distillation": lambda n: {"prompt": said(n), "completion": said(n + 3)},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {
        "num_generations": 2,
        "max_completion_tokens": 4,
        "force": True,
        "grader": {"method": "regex", "pattern": "[a-l]"},
    },
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, family_folder: Callable[[str], Path]) -> Callable[..., Recipe]:
    def make(method: str = "sft", family: str = "llama", count: int = 60, **fields: Any) -> Recipe:
        data = write_rows(tmp_path / f"{method}.jsonl", [ROWS[method](n) for n in range(count)])
        folder = str(family_folder(family))
        asked = {"teacher": folder} if method.endswith("distillation") else {}
        training = {
            "batch_size": 4,
            "precision": "float32",
            "threads": 1,
            "epochs": 2,
            "patience": 0,
        }
        return Recipe.parse(
            {
                "base": folder,
                "name": "x",
                "data": {"train": str(data)},
                "objective": {"method": method, **asked, **SETTINGS.get(method, {})},
                "adaptation": fields.pop("adaptation", "lora"),
                "training": {**training, **fields},
            }
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family", "adaptation"),
    [
        ("sft", "llama", "lora"),
        ("classification", "bert", "feature_extraction"),
        ("grpo", "llama", "lora"),
        pytest.param("masked_lm", "bert", "full", marks=pytest.mark.slow),
        pytest.param("contrastive", "bert", "lora", marks=pytest.mark.slow),
        pytest.param("dpo", "llama", "lora", marks=pytest.mark.slow),
        pytest.param("logit_distillation", "llama", "freeze", marks=pytest.mark.slow),
        pytest.param("sft", "t5", "full", marks=pytest.mark.slow),
    ],
)
def test_estimate_approximates_training_and_stores_only_record(
    method: str,
    family: str,
    adaptation: str,
    recipe: Callable[..., Recipe],
    luthier_home: Path,
) -> None:
    job = recipe(method, family, adaptation=adaptation, refit=False)
    found = estimate(job)
    left = sorted(path.relative_to(luthier_home) for path in luthier_home.rglob("*"))
    left = [path for path in left if path.parts[0] not in ("cache", "probes")]
    assert [str(path) for path in left] == ["estimates", f"estimates/{found.key}.json"]
    assert found.parts.keys() == PARTS.keys()
    assert 3 <= len(found.tried) <= 2 * TRIAL_BATCHES

    result = train(job)
    actual = read_json(Path(result.run_dir) / ACTUAL)
    assert actual["estimate"] == read_json(estimates_folder() / f"{found.key}.json")
    assert actual["steps"] == found.steps and not found.refit_steps
    if method == "grpo":  # the number of generated tokens is unknown in advance
        assert found.tokens.low <= actual["tokens"] <= found.tokens.high
    else:
        # Batches of contrastive rows have no row twice, and may leave out the last rows.
        assert found.tokens.value == pytest.approx(actual["tokens"], rel=0.01)
    assert found.disk.low * 0.8 < actual["disk_bytes"] < found.disk.high * 1.2
    assert actual["parts"].keys() == PARTS.keys() and not actual["resumed"]
    # The parts add up to nearly the whole run.
    assert sum(actual["parts"].values()) == pytest.approx(actual["seconds"], rel=0.15, abs=0.5)
    # Steps take milliseconds on a busy machine: compare the order of magnitude.
    assert found.parts["steps"].value == pytest.approx(actual["parts"]["steps"], rel=3, abs=2)
    assert found.memory.value == pytest.approx(actual["peak_memory_bytes"], rel=0.2)


@pytest.mark.slow
def test_a_refit_is_estimated_as_a_second_training(recipe: Callable[..., Recipe]) -> None:
    once = estimate(recipe("classification", "bert", refit=False))
    both = estimate(recipe("classification", "bert"))
    assert (once.steps, once.refit_steps) == (both.steps, 0)
    assert (both.steps, both.refit_steps) == (28, 30)  # 54 and 60 rows, by 4, twice
    assert both.tokens.low == once.tokens.low == once.tokens.value
    assert both.tokens.value == pytest.approx(once.tokens.value * 58 / 28)
    steps = both.parts["steps"]
    assert steps.low < steps.value / (58 / 28) < steps.value < steps.high
    result = train(recipe("classification", "bert"))
    spent = result.refit.steps if result.refit else 0
    assert result.steps == 28 + spent
    assert both.tokens.low <= result.tokens <= 1.05 * both.tokens.value


@pytest.mark.slow
def test_estimate_key_depends_on_settings_without_name(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    first = estimate(recipe())
    assert estimate(recipe().model_copy(update={"name": None})).key == first.key
    assert estimate(recipe(learning_rate=1e-3)).key != first.key
    assert estimate(recipe(count=61)).key != first.key


@pytest.mark.slow
def test_steps_and_tokens_are_independent_of_trial_batches(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows.estimate import trial as benchmark

    whole = estimate(recipe())
    monkeypatch.setattr(benchmark, "TRIAL_BATCHES", 2)
    less = estimate(recipe())
    assert (less.steps, less.tokens, less.learned) == (whole.steps, whole.tokens, whole.learned)
    assert len(less.tried) == 4


def test_trial_uses_only_batches_of_the_run(recipe: Callable[..., Recipe]) -> None:
    from luthier.engine.job import prepare_job
    from luthier.engine.machine import choose_machine
    from luthier.library.models import find
    from luthier.workflows.estimate.trial import order_of, representative

    asked = recipe(max_steps=3)
    job = prepare_job(asked, find(asked.base), choose_machine("float32", 1), Reporter())
    own = [order_of(job).batch(step) for step in range(3)]
    assert sorted(representative(job, TRIAL_BATCHES)) == sorted(own)
    longer = prepare_job(recipe(), find(asked.base), choose_machine("float32", 1), Reporter())
    chosen, order = representative(longer, TRIAL_BATCHES), order_of(longer)

    def tokens(batch: list[int]) -> int:
        return sum(longer.data.train[row].tokens for row in batch)

    every = [order.batch(step) for step in range(order.steps_per_epoch)]
    whole = [batch for batch in every if len(batch) == 4]
    assert len(chosen) == TRIAL_BATCHES and all(batch in whole for batch in chosen)
    assert max(map(tokens, chosen)) == max(map(tokens, whole))


def test_estimate_refuses_invalid_rows(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    job = recipe()
    write_rows(tmp_path / "sft.jsonl", [{"prompt": "", "completion": ""}] * 4)
    with pytest.raises(DataError):
        estimate(job)


def test_number_of_measurements_matches_training_loop() -> None:
    for steps in range(1, 40):
        for every in (None, 1, 3, 7, 40):
            made = 1
            for step in range(1, steps + 1):
                made += step == steps or step % (every or steps) == 0
            assert measurements(steps, every) == made


@pytest.mark.parametrize(("seconds", "steps"), [(5, 5), (30, 100), (100, 4), (1000, 310)])
@pytest.mark.parametrize("cost", [0.05, 1.0, 6.0])
def test_checkpoints_are_counted_by_the_rules_of_the_engine(
    seconds: float, steps: int, cost: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("luthier.engine.checkpoints.time.monotonic", lambda: now)
    kept = Checkpoints(tmp_path)
    written, size = 0, int(cost * FIRST_BYTES_PER_SECOND)
    for step in range(1, steps + 1):
        now += seconds / steps
        if kept.due(step, size):
            written += 1
            kept._cost, kept._last = cost, now
    assert abs(_checkpoints(seconds, steps, cost) - written) <= 1 + 0.05 * written


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_line_estimates_and_runs(
    recipe: Callable[..., Recipe], luthier_home: Path, family_folder: Callable[[str], Path]
) -> None:
    job = recipe()
    given = [str(job.data.train), "--base", job.base, "--epochs", "1", "--batch-size", "4"]
    given += ["--set", "training.threads=1", "--set", "training.precision=float32"]
    luthier_home.mkdir()
    (luthier_home / "prices.toml").write_text('currency = "CHF"\nper_hour = 3.6')
    body = json.loads(invoke("estimate", *given, "--within", "1s", "--json").stdout)
    assert body["cost"]["currency"] == "CHF"
    assert body["cost"]["value"] == pytest.approx(body["seconds"]["value"] / 1000)
    assert body["plan"]["fits"] == (body["seconds"]["high"] <= 1)

    shown = invoke("estimate", *given, "--within", "9h").stdout
    assert "peak memory" in shown and "CHF" in shown
    refused = invoke("tune", *given, "--max-minutes", "0.0001", "--json")
    assert refused.exit_code == 2
    assert not (luthier_home / "runs").exists() and not (luthier_home / "models").exists()


def test_command_refuses_invalid_limits_before_trial_steps(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(recipe().data.train)
    monkeypatch.setattr(
        "luthier.workflows.estimate.estimate.estimate", lambda *_: pytest.fail("steps were tried")
    )
    for wrong in (
        [],
        [data, "--within", "soon"],
        [data, "--finish-by", "noon"],
        [data, "--within", "1h", "--finish-by", "18:00"],
        [data, "--prices", "none.toml"],
        [data, "--bandwidth", "0"],
        [data, "--processes", "1"],
    ):
        assert invoke("estimate", *wrong).exit_code == 2


def test_independent_errors_add_in_quadrature() -> None:
    total = PredictionInterval(10.0, 7.0, 13.0) + PredictionInterval(20.0, 16.0, 24.0)
    assert total == PredictionInterval(30.0, 25.0, 35.0)
    assert PredictionInterval.exactly(5.0) + PredictionInterval(
        1.0, 0.0, 3.0
    ) == PredictionInterval(6.0, 5.0, 8.0)
    assert PredictionInterval.around(10.0, 0.1, 0.2).times(3) == PredictionInterval(
        30.0, 27.0, 36.0
    )
    wide = PredictionInterval(10.0, 7.0, 13.0).widen(0.4, 0.4)
    assert (wide.low, wide.high) == (5.0, 15.0)


def test_a_line_through_exact_points_gives_the_exact_total() -> None:
    tokens = [100.0, 200.0, 400.0, 700.0]
    line = FittedLine.through(tokens, [0.5 + 0.01 * x for x in tokens])
    run = [150.0, 250.0, 1000.0]
    total = line.total(run, 3)
    assert total.value == pytest.approx(sum(0.5 + 0.01 * x for x in run))
    assert total.high == pytest.approx(total.value)
    assert line.total(run, 30).value == pytest.approx(10 * total.value)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        ([100.0, 100.0, 100.0], [1.0, 1.2, 1.1]),  # no spread
        ([100.0, 200.0, 300.0], [3.0, 2.0, 1.0]),  # faster the more there is
        ([100.0, 200.0, 300.0], [0.5, 2.0, 3.5]),  # less than nothing without tokens
        ([100.0], [1.0]),
    ],
)
def test_fitted_line_is_non_negative_and_near_mean(
    tokens: list[float], seconds: list[float]
) -> None:
    line = FittedLine.through(tokens, seconds)
    assert line.slope >= 0 and line.intercept >= 0
    value = line.total(tokens, len(tokens))
    assert value.value == pytest.approx(sum(seconds), rel=0.15)
    assert 0 <= value.low < value.value < value.high


def test_nine_of_ten_runs_are_inside_the_interval() -> None:
    draw = np.random.default_rng(0)
    inside = trials = 0
    for _ in range(400):
        tokens = draw.uniform(200, 1200, 60)
        seconds = 0.2 + 0.002 * tokens + draw.normal(0, 0.15, 60)
        tried = draw.choice(60, 5, replace=False)
        total = FittedLine.through(tokens[tried].tolist(), seconds[tried].tolist()).total(
            tokens.tolist(), 60
        )
        inside += total.low <= seconds.sum() <= total.high
        trials += 1
    # Five points are few, and lines are kept from being negative; 4 standard errors of 400 draws.
    assert abs(inside / trials - 0.9) < 4 * math.sqrt(0.09 / trials) + 0.02
