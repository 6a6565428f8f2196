"""Training with a judge: an endpoint or a local model, the number of calls, and missing verdicts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.engine.metrics import Reporter
from luthier.errors import GradingFailed, LuthierError, RecipeError, UnknownModel
from luthier.graders import Judge
from luthier.objectives import GRPO, PPO
from luthier.objectives.base import RunStart
from luthier.objectives.reinforcement.rollout_checks import PROMPTS

WORDS = ("yes", "no", "fox", "dog", "card", "Paris", "lazy", "quick")
FIELDS: dict[str, Any] = {
    "adaptation": "full", "training__learning_rate": 1e-3, "training__max_steps": 2,
    "training__batch_size": 2, "training__precision": "float32", "training__threads": 1,
    "objective__max_completion_tokens": 8,
}  # fmt: skip


class Notes(Reporter):
    """Reporter with all notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        self.lines.append(dict(line))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {word}"}) + "\n" for word in WORDS))
    return path


@pytest.fixture
def tuned(tiny_model_folder: Path, rows: Path, luthier_home: Path) -> Callable[..., Any]:
    """``luthier.tune`` with GRPO and a judge."""

    def run(judge: Mapping[str, Any], reporter: Reporter | None = None, **fields: Any) -> Any:
        given = {
            "base": str(tiny_model_folder), "name": "custom", "data__validation": rows,
            "data__severity": {"leakage.many": "note"}, **FIELDS,
            "objective__method": "grpo", "objective__grader": {"method": "judge", **judge},
        }  # fmt: skip
        given |= fields
        if given["objective__method"] == "grpo":
            given["objective__num_generations"] = 4
        return luthier.tune(rows, reporter=reporter, **given)

    return run


def score_of(asked: str) -> int:
    """More for a reply with more letters e."""
    reply = asked.rpartition("<reply>\n")[2].removesuffix("\n</reply>")
    return min(10, 1 + 2 * reply.count("e"))


@pytest.mark.slow
def test_grpo_learns_from_an_endpoint(tuned: Any, endpoint: Any, key: str) -> None:
    endpoint.answer = lambda asked: f"Score: {score_of(asked)}"
    notes = Notes()
    result = tuned({"model": f"{endpoint.url}#big"}, notes)
    samples = [
        json.loads(x) for x in (Path(result.run_dir) / "samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 2 * 2 * 4
    for sample in samples:
        wanted = (min(10, 1 + 2 * sample["completion"].count("e")) - 1) / 9
        assert sample["reward"] == pytest.approx(wanted)
    assert len({sample["reward"] for sample in samples}) > 1
    # No request is repeated: a trial, the first look, steps, measurements.
    assert set(endpoint.asked.values()) == {1}
    measured = sum(line["event"] == "validation" for line in notes.lines) * len(WORDS)
    most = 1 + PROMPTS * 4 + 2 * 2 * 4 + measured
    numbers = [re.findall(r"\d[\d,]*", note) for note in notes.notes]
    assert [str(most), str(1 + PROMPTS * 4)] in numbers
    assert endpoint.asked.total() <= most
    assert sum("concurrent requests" in note for note in notes.notes) == 1
    kept = (
        "".join(path.read_text() for path in Path(result.run_dir).parent.parent.rglob("*.json*"))
        + (Path(result.model_dir) / "luthier.json").read_text()
    )
    assert '"key_env": "OPENAI_API_KEY"' in kept and key not in kept


@pytest.mark.slow
def test_ppo_learns_from_a_model_of_this_machine(
    tuned: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an untrained judge writes has no score, so that is stood in for; all else is as it is.
    texts: list[str] = []

    def parsed(text: str) -> int:
        texts.append(text)
        return 1 + len(text) % 10

    monkeypatch.setattr("luthier.graders.judge.parse_verdict", parsed)
    judge = {"model": str(tiny_model_folder), "rubric": "x", "sampling": {"max_tokens": 5}}
    notes = Notes()
    result = tuned(judge, notes, objective__method="ppo")
    manifest = json.loads((Path(result.model_dir) / "luthier.json").read_text())
    assert manifest["others"] == {str(tiny_model_folder): str(tiny_model_folder)}
    assert len(set(texts)) > 1


@pytest.mark.slow
def test_silent_judge_follows_error_policy(tuned: Any, endpoint: Any) -> None:
    first = 1 + PROMPTS * 4 + len(WORDS)  # a trial, the first look, the measurement before step 1
    endpoint.answer = lambda asked: f"Score: {score_of(asked)}"
    endpoint.action = lambda asked: "ok" if len(endpoint.asked) <= first // 2 else (500, {})
    judge = {"model": f"{endpoint.url}#big", "retries": 0}
    with pytest.raises(GradingFailed) as refused:
        tuned(judge)
    assert refused.value.rule == "judge.failed"
    endpoint.asked.clear()
    notes = Notes()
    tuned(judge, notes, objective__on_error="zero", name="zero")
    assert sum(line.get("ungraded", 0) for line in notes.lines) > 0


def test_unusable_judge_is_refused_before_training(
    tuned: Any, endpoint: Any, key: str, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"model": f"{endpoint.url}#big", "retries": 0}
    zero = {
        "objective__on_error": "zero"
    }  # no row is to blame, so the policy for rows does not count
    endpoint.models = {"other"}
    with pytest.raises(RecipeError) as refused:
        tuned(judge, **zero)
    assert refused.value.rule == "endpoint.model"
    endpoint.models, endpoint.known = None, {key}
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RecipeError) as refused:
        tuned(judge, **zero)
    assert refused.value.rule == "endpoint.key"
    endpoint.server.server_close()
    with pytest.raises(LuthierError) as refused:
        tuned(judge, **zero)
    assert refused.value.rule == "judge.no_verdict"
    shutil.rmtree(luthier_home / "runs")  # the previous run has this name
    with pytest.raises(UnknownModel) as refused:
        tuned({"model": "nobody:knows"})
    assert refused.value.rule == "model.unknown"
    with pytest.raises(RecipeError) as refused:
        tuned({})
    assert refused.value.setting == "model"
    assert not list(luthier_home.glob("models/custom/**/luthier.json"))


def test_costs_are_counted_for_every_judge_and_every_row() -> None:
    network: Any = None
    start = RunStart(network, [], 0, False, 100, 30, 5, print)
    judge = Judge(model="m")
    assert GRPO(grader=judge, num_generations=8).verdicts(start) == (105 * 8 + 30 + 65, 65)
    assert PPO(grader=judge).verdicts(start) == (105 + 30 + 33, 33)
    mix = {"method": "mix", "parts": {"a": judge, "b": judge, "c": "exact"}}
    assert GRPO(grader=mix).verdicts(start) == (1870, 130)
    assert GRPO().verdicts(start) == (0, 0)
