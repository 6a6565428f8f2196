"""From a file of preferences to a custom model, and its held-out win rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import DataError, RecipeError
from luthier.evaluation.preferences import Likelihood, pair_scores, thumb_scores

WORDS = ("fox", "dog", "card", "question", "word", "capital", "brown", "lazy")
PAIRS = [{"prompt": f"the {w}", "chosen": "yes", "rejected": "no"} for w in WORDS]
THUMBS = [
    {"prompt": f"the {w}", "completion": c, "label": c == "yes"}
    for w in WORDS
    for c in ("yes", "no")
]
FIELDS: dict[str, Any] = {
    "adaptation": "full",
    "training__epochs": 8,
    "training__batch_size": 4,
    "training__learning_rate": 3e-3,
    "training__precision": "float32",
    "data__validation_share": 0,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(family_folder: Callable[[str], Path]) -> str:
    return str(family_folder("llama"))


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_what_was_chosen_wins_after_training(objective: str, base: str, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    before = luthier.evaluate(base, data).scores
    result = luthier.tune(data, base=base, name="m", objective=objective, **FIELDS)
    scores = luthier.evaluate(result.model_id, data).scores
    assert scores["logp_margin"] > before["logp_margin"] + 1
    assert scores["reward_accuracy"] == scores["logp_accuracy"] == 1.0
    # The reference is the model it was trained from: its margin is what training added.
    added = scores["logp_margin"] - before["logp_margin"]
    assert scores["reward_margin"] == pytest.approx(added, abs=1e-3)
    assert "reward_accuracy" not in before
    (line,) = [
        json.loads(line)
        for line in Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "train" and json.loads(line)["step"] == result.steps
    ]
    assert line["accuracy"] == pytest.approx(1.0) and line["margin"] > 0
    assert {"reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"} <= line.keys()


def test_ratings_choose_dpo_and_thumbs_choose_kto(base: str, tmp_path: Path) -> None:
    rated = [
        {
            "prompt": row["prompt"],
            "completion": row["completion"],
            "rating": 5 if row["label"] else 1,
        }
        for row in THUMBS
    ]
    by_rating = luthier.tune(write(tmp_path / "r.jsonl", rated), base=base, name="r", **FIELDS)
    data = write(tmp_path / "t.jsonl", THUMBS)
    by_thumb = luthier.tune(data, base=base, name="t", **FIELDS)
    manifests = [
        json.loads(Path(each.model_dir, "luthier.json").read_text())["recipe"]["objective"][
            "method"
        ]
        for each in (by_rating, by_thumb)
    ]
    assert manifests == ["dpo", "kto"]
    scores = luthier.evaluate(by_thumb.model_id, data).scores
    assert scores["reward_auc"] == 1.0 and scores["reward_up"] > scores["reward_down"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_reward_model_rewards_what_was_chosen(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    fields = {**FIELDS, "objective": "reward_model"}
    result = luthier.tune(data, base=str(family_folder(family)), name="rm", **fields)
    runner = CliRunner()
    out = runner.invoke(app, ["evaluate", result.model_id, str(data), "--json"])
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert found["scores"]["reward_accuracy"] == 1.0 and found["rows"] == len(PAIRS)
    model = luthier.load(result.model_id)
    yes, no = model.rewards(["the fox"] * 2, ["yes", "no"])
    assert yes > no
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "the fox", "completion": "yes"}])
    out = runner.invoke(app, ["predict", result.model_id, "--input", str(asked)])
    assert json.loads(out.stdout)["reward"] == pytest.approx(yes, rel=1e-5)
    for rows, error in ((THUMBS[:1], "only answer to its"), ([{"text": "x"}], "chosen and")):
        out = runner.invoke(app, ["evaluate", result.model_id, str(write(asked, rows))])
        assert out.exit_code == 2 and error in out.output


def test_the_answers_of_an_evaluation_are_written(base: str, tmp_path: Path) -> None:
    data, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["evaluate", base, str(data), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert "logp_accuracy" in result.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, len(PAIRS) + 1))
    assert lines[0]["chosen"]["tokens"] > 1 and lines[0]["chosen"]["logp"] < 0


def test_pairs_that_do_not_fit_are_named(base: str, tmp_path: Path) -> None:
    rows = [*PAIRS[:2], {"prompt": "yes", "chosen": "no", "rejected": "many " * 1200}]
    data = write(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match=r"long.jsonl:3: \[row.too_long\]"):
        luthier.evaluate(base, data)
    with pytest.raises(DataError, match=r"more than the model's context of 1024") as caught:
        luthier.tune(data, base=base, name="x", objective="dpo", **FIELDS)
    assert [problem.line for problem in caught.value.problems] == [3]
    cut = luthier.tune(data, base=base, name="x", data__long_rows="truncate", **FIELDS)
    assert cut.steps > 0


def test_an_encoder_does_not_write_and_says_so(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(RecipeError, match=r"learns to write.* Use reward_model"):
        luthier.tune(data, base=str(family_folder("bert")), name="x", objective="dpo")
    with pytest.raises(RecipeError, match="cannot be a causal"):
        luthier.tune(data, base=str(family_folder("xlnet")), name="x", objective="dpo")
    # Not asked for by name, what suits the network is chosen.
    result = luthier.tune(data, base=str(family_folder("bert")), name="rm", **FIELDS)
    assert luthier.load(result.model_id).reads


def test_scores_by_hand() -> None:
    def answer(logp: float, tokens: int, reference: float) -> Likelihood:
        return Likelihood(logp, tokens, reference)

    pairs = [
        (answer(-4, 4, -6), answer(-3, 1, -3)),
        (answer(-2, 2, -1), answer(-9, 3, -7)),
        (answer(-5, 5, -5), answer(-5, 5, -5)),
    ]
    found = pair_scores(pairs)
    assert found["logp_accuracy"] == pytest.approx(1 / 3)
    assert found["logp_per_token_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_margin"] == pytest.approx((2 + 1 + 0) / 3)
    found = thumb_scores([side for pair in pairs for side in pair], [True, False] * 3)
    # Rewards of the good are 2, -1, 0; of the bad 0, -2, 0.
    assert found["reward_auc"] == pytest.approx((3 + 1 + 2) / 9)
    assert found["reward_up"] == pytest.approx(1 / 3)
