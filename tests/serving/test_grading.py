"""Evaluating with a judge from the command line: behind an endpoint, or a tiny one of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.graders import Answer, Judge
from luthier.types import Message, Row

WORDS = ("yes", "no", "fox", "dog", "card")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "held.jsonl"
    lines = [{"prompt": f"Say {word}", "completion": word} for word in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def verdict(asked: str) -> str:
    """9 for the row that wants a fox, and 4 elsewhere."""
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
    assert "asked for 6 verdicts at most" in done.stderr  # five, and a trial
    assert "the key of OPENAI_API_KEY is sent" in done.stderr
    assert done.stderr.count("requests at once") == 1
    assert set(endpoint.asked.values()) == {1} and endpoint.asked.total() == 6
    assert 1 < endpoint.most_at_once <= 5
    assert endpoint.keys == {f"Bearer {key}"} and key not in done.output
    assert endpoint.bodies[0]["model"] == "big" and endpoint.bodies[0]["max_tokens"] == 512
    assert [json.loads(line)["scores"]["judge"] for line in target.read_text().splitlines()] == [
        pytest.approx(8 / 9 if word == "fox" else 3 / 9) for word in WORDS
    ]


def test_what_fails_in_passing_is_asked_again_as_a_teacher_is(judged: Any, endpoint: Any) -> None:
    endpoint.action = lambda asked: (503, {}) if endpoint.asked[asked] == 1 else "ok"
    endpoint.answer = lambda asked: "Score: 4"
    done = judged("--json", model=f"{endpoint.url}#big")
    assert done.exit_code == 0 and json.loads(done.stdout)["scores"]["judge"] == 3 / 9


@pytest.mark.parametrize("given", [None, "wrong"])
def test_without_a_valid_key_nothing_is_answered_first(
    given: str | None, judged: Any, endpoint: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.known = {key}
    monkeypatch.delenv("OPENAI_API_KEY")
    if given:
        monkeypatch.setenv("JUDGE_KEY", given)
    done = judged(model="big", url=endpoint.url, key_env="JUDGE_KEY")
    assert done.exit_code == 2
    assert "refuses the key of JUDGE_KEY (HTTP 401)" in done.stderr
    assert ("JUDGE_KEY is not set" in done.stderr) == (given is None)
    assert endpoint.asked.total() == 1  # the trial
    assert "evaluate" not in done.stdout and key not in done.output


def test_an_unknown_model_of_the_endpoint_is_refused(judged: Any, endpoint: Any) -> None:
    endpoint.models = {"big"}
    done = judged("--on-grader-error", "zero", model=f"{endpoint.url}#bigger")
    assert done.exit_code == 2 and "has no model 'bigger'" in done.stderr


def test_an_endpoint_that_is_down_is_said_before_the_model_answers(
    judged: Any, endpoint: Any
) -> None:
    endpoint.server.server_close()  # nobody listens any more
    done = judged("--on-grader-error", "zero", model=f"{endpoint.url}#big", retries=0)
    assert done.exit_code == 1
    assert re.search(r"the judge big gives no verdict: .* cannot be reached", done.stderr)


def test_verdicts_without_a_score_follow_the_policy(judged: Any, endpoint: Any) -> None:
    def down(asked: str) -> str:
        return "Score: 10" if "2 + 2" in asked else "I would rather not say."

    endpoint.answer = down
    model = f"{endpoint.url}#big"
    done = judged(model=model, retries=0)
    assert done.exit_code == 1
    assert re.search(r"held\.jsonl:1: \[grader\.verdict\].*rather not say", done.stderr)
    done = judged("--on-grader-error", "zero", "--json", model=model, retries=0)
    report = json.loads(done.stdout)
    assert report["scores"]["judge"] == 0 and report["ungraded"] == 5


def test_a_row_that_the_endpoint_fails_on_is_named(judged: Any, endpoint: Any) -> None:
    def action(asked: str) -> Any:
        return (500, {}) if "<reference>\nfox" in asked else "ok"

    endpoint.action, endpoint.answer = action, lambda asked: "Score: 10"
    done = judged(model=f"{endpoint.url}#big", retries=0)
    assert done.exit_code == 1
    assert re.search(r"1 answer could not .*\n.*held\.jsonl:3: \[judge\.failed\].*500", done.stderr)
    done = judged("--on-grader-error", "zero", "--json", model=f"{endpoint.url}#big", retries=0)
    assert json.loads(done.stdout)["scores"]["judge"] == pytest.approx(0.8)


@pytest.fixture
def local_judge(tiny_model_folder: Path, tmp_path: Path, luthier_home: Path) -> Callable[[], str]:
    """Id of a tiny model that was tuned to say ``Score: 7`` to whatever it is to judge."""

    def made() -> str:
        talks = []
        for reply in ("yes", "no", "a dog", "Paris", "", "the fox"):
            answer = Answer((Message("user", "Say yes"),), reply, None, Row("f", 1))
            turns = [*Judge(rubric="x").asked(answer), Message("assistant", "Score: 7")]
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


def test_a_model_of_this_machine_judges(judged: Any, local_judge: Callable[[], str]) -> None:
    model = local_judge()
    options = {"model": model, "rubric": "x", "use_expected": "false", "sampling.max_tokens": 12}
    done = judged("--json", "--on-grader-error", "zero", **options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"]["judge"] == pytest.approx(6 / 9), done.output


def test_models_that_cannot_judge_are_refused(
    judged: Any, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done = judged(model="nobody:knows")
    assert done.exit_code == 2 and "nobody" in done.stderr
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(f'{{"text": "{w}", "label": "{i % 2}"}}\n' for i, w in enumerate(WORDS * 2))
    )
    reader = luthier.tune(
        labels, base=str(family_folder("bert")), name="reader", training={"max_steps": 1}
    )
    done = judged(model=reader.model_id)
    assert done.exit_code == 2
    assert "was trained for classification and does not write text" in done.stderr


def test_an_answer_longer_than_the_judge_reads_is_named(
    judged: Any, tiny_model_folder: Path
) -> None:
    options = {"model": str(tiny_model_folder), "rubric": "x " * 900}
    done = judged(**options)
    assert done.exit_code == 1
    assert re.search(r"no verdict: [0-9,]+ tokens are more than the judge's context", done.stderr)
