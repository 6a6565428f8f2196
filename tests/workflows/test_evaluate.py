"""Evaluation: held-out win rates, and graders with models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import DataError, RecipeError
from luthier.evaluation.preferences import Likelihood, pair_scores, thumb_scores
from luthier.evaluation.significance import standard_error, values
from luthier.graders import Answer, Judge
from luthier.types import Message, Row

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


@pytest.mark.parametrize("objective", ["dpo", pytest.param("orpo", marks=pytest.mark.slow)])
def test_preference_training_raises_reward_accuracy(
    objective: str, base: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    before = luthier.evaluate(base, data).scores
    result = luthier.tune(data, base=base, name="m", objective=objective, **FIELDS)
    scores = luthier.evaluate(result.model_id, data).scores
    assert scores["logp_margin"] > before["logp_margin"] + 1
    assert scores["reward_accuracy"] == scores["logp_accuracy"] == 1.0
    # The reference is the base model, so the reward margin is the margin added by training.
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


@pytest.mark.slow
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


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_reward_model_prefers_chosen_replies(
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
    assert found["errors"]["reward_accuracy"] == pytest.approx(standard_error(1.0, len(PAIRS)))
    low, high = found["intervals"]["reward_margin"]
    assert low < found["scores"]["reward_margin"] < high
    model = luthier.load(result.model_id)
    yes, no = model.rewards(["the fox"] * 2, ["yes", "no"])
    assert yes > no
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "the fox", "completion": "yes"}])
    out = runner.invoke(app, ["predict", result.model_id, "--input", str(asked)])
    assert json.loads(out.stdout)["predicted"]["reward"] == pytest.approx(yes, rel=1e-5)
    for rows, rule in ((THUMBS[:1], "rating.single"), ([{"text": "x"}], "row.objective")):
        out = runner.invoke(app, ["evaluate", result.model_id, str(write(asked, rows)), "--json"])
        (problem,) = json.loads(out.stdout)["error"]["problems"]
        assert (out.exit_code, problem["rule"]) == (2, rule)
    write(asked, [{"text": "x", "intent": "a"}])
    out = runner.invoke(app, ["evaluate", result.model_id, str(asked), "--json"])
    unread, unsupported = json.loads(out.stdout)["error"]["problems"]
    assert (unread["rule"], unsupported["rule"]) == ("column.unread", "row.objective")
    assert "data.columns.label=intent" in unread["advice"]


def test_the_answers_of_an_evaluation_are_written(base: str, tmp_path: Path) -> None:
    data, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["evaluate", base, str(data), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert "logp_accuracy" in result.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, len(PAIRS) + 1))
    assert lines[0]["chosen"]["tokens"] > 1 and lines[0]["chosen"]["logp"] < 0


@pytest.mark.slow
def test_pairs_longer_than_context_are_refused(base: str, tmp_path: Path) -> None:
    rows = [*PAIRS[:2], {"prompt": "yes", "chosen": "no", "rejected": "many " * 1200}]
    data = write(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match=r"long.jsonl:3: \[row.too_long\]"):
        luthier.evaluate(base, data)
    with pytest.raises(DataError) as caught:
        luthier.tune(data, base=base, name="x", objective="dpo", **FIELDS)
    assert [problem.line for problem in caught.value.problems] == [3]
    cut = luthier.tune(data, base=base, name="x", data__long_rows="truncate", **FIELDS)
    assert cut.steps > 0


def test_masked_language_model_is_scored_on_raw_text(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    text = "the quick brown fox jumps over the lazy dog"
    data = write(tmp_path / "text.jsonl", [{"text": text}])
    folder, fields = family_folder("bert"), FIELDS | {"training__epochs": 1}
    result = luthier.tune(data, base=str(folder), name="m", objective="masked_lm", **fields)
    found = luthier.evaluate(result.model_id, data)
    assert found.scores.keys() == {"loss", "pseudo_perplexity"}

    exported = luthier.export(result.model_id, tmp_path / "exported", merged=True).folder
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForMaskedLM.from_pretrained(exported, dtype=torch.float32).eval()
    (ids,) = tokenizer(text, return_tensors="pt")["input_ids"]
    inner = range(1, len(ids) - 1)
    hidden = ids.repeat(len(inner), 1)
    hidden[range(len(inner)), inner] = tokenizer.mask_token_id
    with torch.no_grad():
        logp = model(hidden).logits.log_softmax(-1)
    loss = -logp[range(len(inner)), inner, ids[inner]].mean()
    assert found.scores["pseudo_perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)


def test_embedding_model_is_scored_on_labelled_pairs(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pairs = [
        {"text_a": f"the {one}", "text_b": f"the {other}", "label": int(one == other)}
        for one in WORDS[:4]
        for other in WORDS[:4]
    ]
    base = str(family_folder("bert"))
    found = luthier.evaluate(base, write(tmp_path / "pairs.jsonl", pairs))
    assert found.scores == {"auc": 1.0}
    assert found.records[0]["score"] == pytest.approx(1)
    alike = write(tmp_path / "alike.jsonl", [each for each in pairs if each["label"]])
    with pytest.raises(DataError, match="same label"):
        luthier.evaluate(base, alike)


def test_dpo_on_encoder_is_refused(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(RecipeError):
        luthier.tune(data, base=str(family_folder("bert")), name="x", objective="dpo")
    with pytest.raises(RecipeError):
        luthier.tune(data, base=str(family_folder("xlnet")), name="x", objective="dpo")
    # Without a named objective, the default suits the network.
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
    found = values(pair_scores(pairs))
    assert found["logp_accuracy"] == pytest.approx(1 / 3)
    assert found["logp_per_token_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_margin"] == pytest.approx((2 + 1 + 0) / 3)
    found = values(thumb_scores([side for pair in pairs for side in pair], [True, False] * 3))
    # Rewards of the good are 2, -1, 0; of the bad 0, -2, 0.
    assert found["reward_auc"] == pytest.approx((3 + 1 + 2) / 9)
    assert found["reward_up"] == pytest.approx(1 / 3)


WANTED = ("yes", "no", "fox", "dog", "card")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "held.jsonl"
    lines = [{"prompt": f"Say {word}", "completion": word} for word in WANTED]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def verdict(asked: str) -> str:
    """Return 9 for the row about a fox, else 4."""
    return "Reasons.\nScore: 9" if "<reference>\nfox" in asked else "Score: 4"


@pytest.fixture
def judged(tiny_model_folder: Path, rows: Path, luthier_home: Path) -> Callable[..., Any]:
    """``luthier evaluate --grader judge`` on the tiny model, with fields of the judge."""

    def run(*options: str, **fields: Any) -> Any:
        command = ["evaluate", str(tiny_model_folder), str(rows), "--grader", "judge"]
        for name, value in fields.items():
            command += ["--set", f"judge.{name}={value}"]
        return CliRunner().invoke(app, [*command, "--max-tokens", "4", *options])

    return run


def test_an_endpoint_judges(judged: Any, endpoint: Any, key: str, tmp_path: Path) -> None:
    endpoint.answer, endpoint.delay = verdict, 0.05
    target = tmp_path / "answers.jsonl"
    done = judged("--json", "--output", str(target), model=f"{endpoint.url}#big", concurrency=5)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"]["judge"] == pytest.approx((8 / 9 + 4 * 3 / 9) / 5)
    assert done.stderr.count("concurrent requests") == 1
    assert set(endpoint.asked.values()) == {1} and endpoint.asked.total() == 6
    assert 1 < endpoint.most_at_once <= 5
    assert endpoint.keys == {f"Bearer {key}"} and key not in done.output
    assert endpoint.bodies[0]["model"] == "big" and endpoint.bodies[0]["max_tokens"] == 512
    assert [json.loads(line)["scores"]["judge"] for line in target.read_text().splitlines()] == [
        pytest.approx(8 / 9 if word == "fox" else 3 / 9) for word in WANTED
    ]


@pytest.mark.parametrize("given", [None, "wrong"])
def test_invalid_judge_key_is_refused_before_generation(
    given: str | None, judged: Any, endpoint: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.known = {key}
    monkeypatch.delenv("OPENAI_API_KEY")
    if given:
        monkeypatch.setenv("JUDGE_KEY", given)
    done = judged(model="big", url=endpoint.url, key_env="JUDGE_KEY")
    assert done.exit_code == 2
    assert ("JUDGE_KEY is not set" in done.stderr) == (given is None)
    assert endpoint.asked.total() == 1  # the trial
    assert "evaluate" not in done.stdout and key not in done.output


def test_verdicts_without_a_score_follow_the_policy(judged: Any, endpoint: Any) -> None:
    def down(asked: str) -> str:
        return "Score: 10" if "2 + 2" in asked else "I would rather not say."

    endpoint.answer = down
    model = f"{endpoint.url}#big"
    done = judged(model=model, retries=0)
    assert done.exit_code == 1
    done = judged("--on-grader-error", "zero", "--json", model=model, retries=0)
    report = json.loads(done.stdout)
    assert report["scores"]["judge"] == 0 and report["ungraded"] == 5


def test_judge_endpoint_failure_stops_or_scores_zero(judged: Any, endpoint: Any) -> None:
    def action(asked: str) -> Any:
        return (500, {}) if "<reference>\nfox" in asked else "ok"

    endpoint.action, endpoint.answer = action, lambda asked: "Score: 10"
    done = judged(model=f"{endpoint.url}#big", retries=0)
    assert done.exit_code == 1
    done = judged("--on-grader-error", "zero", "--json", model=f"{endpoint.url}#big", retries=0)
    assert json.loads(done.stdout)["scores"]["judge"] == pytest.approx(0.8)


@pytest.fixture
def local_judge(tiny_model_folder: Path, tmp_path: Path, luthier_home: Path) -> Callable[[], str]:
    """Return a function that trains a tiny model to reply ``Score: 7``."""

    def made() -> str:
        talks = []
        for reply in ("yes", "no", "a dog", "Paris", "", "the fox"):
            answer = Answer((Message("user", "Say yes"),), reply, None, Row("f", 1))
            turns = [*Judge(rubric="x").question(answer), Message("assistant", "Score: 7")]
            talks.append({"messages": [asdict(turn) for turn in turns]})
        path = tmp_path / "talks.jsonl"
        path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
        training = {"max_steps": 40, "learning_rate": 8e-3, "threads": 1, "batch_size": 3}
        return luthier.tune(
            path,
            base=str(tiny_model_folder),
            name="judge",
            adaptation="full",
            training=training,
            data__validation_share=0.0,
        ).model_id

    return made


@pytest.mark.slow
def test_a_model_of_this_machine_judges(judged: Any, local_judge: Callable[[], str]) -> None:
    model = local_judge()
    options = {"model": model, "rubric": "x", "use_expected": "false", "sampling.max_tokens": 12}
    done = judged("--json", "--on-grader-error", "zero", **options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"]["judge"] == pytest.approx(6 / 9), done.output


def test_unknown_model_or_encoder_as_judge_is_refused(
    judged: Any, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done = judged(model="nobody:knows")
    assert done.exit_code == 2 and "nobody" in done.stderr
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(f'{{"text": "{w}", "label": "{i % 2}"}}\n' for i, w in enumerate(WANTED * 2))
    )
    reader = luthier.tune(
        labels, base=str(family_folder("bert")), name="reader", training={"max_steps": 1}
    )
    done = judged(model=reader.model_id)
    assert done.exit_code == 2


def test_judge_prompt_longer_than_context_fails(judged: Any, tiny_model_folder: Path) -> None:
    options = {"model": str(tiny_model_folder), "rubric": "x " * 900}
    done = judged(**options)
    assert done.exit_code == 1
