"""Comparison of a tuned model with the base model: drift and probes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import DataError, RecipeError
from luthier.library.models import find
from luthier.workflows import forgetting
from luthier.workflows.earlier_task import MetricChange
from luthier.workflows.forgetting import Forgetting, load_probes

WORDS = ("fox", "dog", "card", "question", "word", "capital", "brown", "lazy")
FIELDS: dict[str, Any] = {
    "training__epochs": 12,
    "training__batch_size": 8,
    "training__learning_rate": 2e-3,
    "training__precision": "float32",
    "data__validation_share": 0,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(family_folder: Callable[[str], Path]) -> str:
    return str(family_folder("llama"))


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use every sixth prompt and short answers."""
    own = forgetting._own_prompts
    monkeypatch.setattr(forgetting, "_own_prompts", lambda: own()[::6])
    monkeypatch.setattr(forgetting, "SAMPLE_TOKENS", 8)


def tune(base: str, tmp_path: Path, name: str, **fields: Any) -> str:
    rows = [{"prompt": f"the {word}", "completion": "yes"} for word in WORDS]
    data = write(tmp_path / f"{name}.jsonl", rows)
    return luthier.tune(data, base=base, name=name, **{**FIELDS, **fields}).model_id


@pytest.mark.slow
def test_unchanged_model_has_no_drift_and_no_regressions(base: str, tmp_path: Path) -> None:
    same = tune(base, tmp_path, "same", training__learning_rate=1e-12, training__epochs=1)
    found = luthier.forgetting(same)
    assert found.drift.kl.value == pytest.approx(0, abs=1e-6)
    assert found.drift.tuned_perplexity.value == pytest.approx(found.drift.base_perplexity.value)
    assert all(each.value == 0 for each in found.differences.values())
    assert not found.regressions and not found.improvements
    assert [each.name for each in found.changes] == [forgetting.OWN_PROBES]


@pytest.mark.slow
def test_drift_is_the_divergence_over_the_whole_vocabulary(base: str, tmp_path: Path) -> None:
    model_id = tune(base, tmp_path, "moved", adaptation="full")
    found = luthier.forgetting(model_id)
    # Compute the divergence with transformers, row by row.
    stored = find(model_id)
    networks = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (base, stored.folder)
    ]
    from luthier.engine.machine import open_network
    from luthier.inference.generation import Generator

    answers = forgetting._answers(
        Generator(open_network(find(base), precise=True), find(base).chat)
    )
    kl, losses = [], np.zeros(2)
    for each in answers:
        learned_T = each.weight_T[1:] != 0
        with torch.no_grad():
            logps = [
                network(torch.tensor(each.ids_T[None])).logits[0, :-1].log_softmax(-1)[learned_T]
                for network in networks
            ]
        kl += (logps[0].exp() * (logps[0] - logps[1])).sum(-1).tolist()
        target_K1 = torch.tensor(each.ids_T[1:][learned_T])[:, None]
        losses -= [float(logp.gather(-1, target_K1).sum()) for logp in logps]
    assert found.drift.tokens == len(kl)
    assert found.drift.kl.value == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.drift.kl.value > 0.05
    for loss, score in zip(
        losses, (found.drift.base_perplexity, found.drift.tuned_perplexity), strict=True
    ):
        assert score.value == pytest.approx(math.exp(loss / len(kl)), rel=1e-3)
    low, high = found.drift.kl.interval
    assert low < found.drift.kl.value < high


@pytest.mark.slow
def test_ruined_model_has_a_regression(base: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}. the", "choices": ["fox", "Paris"], "answer": 0} for word in WORDS]
    data = [{"text": f"{row['prompt']} fox"} for row in rows] * 4
    knows = luthier.tune(
        write(tmp_path / "texts.jsonl", data), base=base, name="knows", **FIELDS, adaptation="full"
    ).model_id
    ruined = luthier.tune(
        write(tmp_path / "ruin.jsonl", [{"text": f"{w}. the Paris"} for w in WORDS] * 4),
        base=knows, name="ruined", **{**FIELDS, "training__epochs": 25}, adaptation="full",
    ).model_id  # fmt: skip
    probe = write(tmp_path / "probe.jsonl", rows * 3)
    found = luthier.forgetting(ruined, probes=[probe])
    (change,) = [each for each in found.changes if each.name == "probe"]
    assert change.base.value == 1.0 and change.tuned.value < 0.5
    assert change in found.regressions
    back = luthier.forgetting(knows, base=ruined, probes=[probe])
    assert [each.name for each in back.improvements] == ["probe"]


def test_probes_are_grouped_by_task(tmp_path: Path) -> None:
    choice = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
    many = write(tmp_path / "many.jsonl", [{**choice, "task": t} for t in "xyx"])
    cloze = write(tmp_path / "lambada.jsonl", [{"text": "the quick", "target": "fox"}])
    sets = load_probes([many, cloze])
    assert {name: len(rows) for name, rows in sets.items()} == {"x": 2, "y": 1, "lambada": 1}
    assert sets["lambada"][0].choices == ("fox",)
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError):
        load_probes([other])


def test_models_without_a_base_or_without_texts_are_refused(
    base: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError):
        luthier.forgetting(base)
    with pytest.raises(RecipeError):
        luthier.forgetting(base, base=str(family_folder("t5")))
    rows = [{"text": word, "label": "ab"[n % 2]} for n, word in enumerate(WORDS)]
    data = write(tmp_path / "labels.jsonl", rows)
    bert = str(family_folder("bert"))
    model_id = luthier.tune(data, base=bert, name="reads", **FIELDS).model_id
    with pytest.raises(RecipeError):
        luthier.forgetting(model_id)


def test_forgetting_command_prints_stores_and_draws_report(base: str, tmp_path: Path) -> None:
    model_id = tune(base, tmp_path, "m", training__epochs=1)
    page = tmp_path / "page.html"
    runner = CliRunner()
    answer = runner.invoke(app, ["forgetting", model_id, "--html", str(page), "--attach"])
    assert answer.exit_code == 0, answer.output
    assert forgetting.OWN_PROBES in answer.output
    assert "<script" not in page.read_text()
    (report,) = find(model_id).folder.glob("reports/forgetting-*.json")
    answer = runner.invoke(app, ["forgetting", model_id, "--json"])
    plain = json.loads(answer.stdout)
    assert (
        plain["drift"]["kl"]["value"]
        == json.loads(report.read_text())["result"]["drift"]["kl"]["value"]
    )
    assert [each["name"] for each in plain["changes"]] == [forgetting.OWN_PROBES]


def test_forgetting_verdict_is_corrected_for_multiple_measures() -> None:
    drift: Any = None
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        changes = []
        for number in range(6):
            base, tuned = draw.random((2, 100)) < 0.6
            both = [forgetting.RowScores.of(each) for each in (base, tuned)]
            changes.append(MetricChange(str(number), "accuracy", *both))
        found = Forgetting("m", "b", changes, drift=drift)
        wrong += bool(found.regressions or found.improvements)
    assert wrong <= 10
