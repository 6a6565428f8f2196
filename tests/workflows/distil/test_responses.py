"""Distillation by responses: requests, training, records, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import start

import luthier
from luthier.engine.metrics import Reporter
from luthier.errors import (
    GradingFailed,
    Interrupted,
    LuthierError,
    RecipeError,
    RefusedInput,
    RunConflict,
)
from luthier.files import luthier_home, read_json, sha256_of
from luthier.inference.reply_log import logged_for
from luthier.library.models import find
from luthier.workflows.distil.questions import prompts_of

PROMPTS = [f"question {n}" for n in range(12)]
QUICK = {
    "training__max_steps": 3, "training__batch_size": 4, "training__threads": 1,
    "training__learning_rate": 0.001, "data__validation_share": 0.0,
}  # fmt: skip


class Notes(Reporter):
    """Stores all notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counts: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: int, total: int, what: str) -> None:
        self.counts.append((done, total))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def folder_of(name: str) -> Path:
    return luthier_home() / "distillations" / "tiny-llama" / name


@pytest.fixture
def distil(endpoint: Any, tiny_model_folder: Path) -> Callable[..., Any]:
    """``luthier.distil`` from the endpoint into the tiny model."""

    def run(path: Path, **fields: Any) -> Any:
        given = {"name": "s", "teacher__retries": 1, **QUICK, **fields}
        return luthier.distil(
            path, teacher=f"{endpoint.url}#big", student=str(tiny_model_folder), **given
        )

    return run


def test_student_is_trained_on_accepted_teacher_replies(
    prompts: Path, distil: Any, endpoint: Any, key: str
) -> None:
    endpoint.actions["question 3"] = ["length"]
    endpoint.answers["question 4"] = "I'm sorry, but I can't help with that."
    reporter = Notes()
    found = distil(prompts, reporter=reporter)
    folder = folder_of("s")
    taught = lines(folder / "train.jsonl")
    assert taught == [
        {"prompt": p, "completion": f"the answer to {p}"}
        for p in PROMPTS if p not in ("question 3", "question 4")
    ]  # fmt: skip
    insights = lines(folder / "insights.jsonl")
    assert [line["line"] for line in insights] == list(range(1, 13))
    assert {line["rule"]: line["prompt"] for line in insights if not line["accepted"]} == {
        "answer.cut": "question 3", "answer.refusal": "question 4",
    }  # fmt: skip
    assert reporter.counts[-1] == (12, 12)
    assert found.result.model_id == "tiny-llama:s" and found.result.rows == 10
    manifest = find("tiny-llama:s").manifest.plain()
    answer = manifest["distillation"]
    assert answer == found.details
    assert answer["teacher"] == {"url": endpoint.url, "model": "big"}
    assert answer["answers_sha256"] == sha256_of(folder / "train.jsonl")
    assert answer["answers_sha256"] in manifest["data"]["sha256"].values()
    assert answer["insights"]["rules"] == {"answer.cut": 1, "answer.refusal": 1}
    assert answer["sampling"]["max_tokens"] == 512
    for path in luthier_home().rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_second_run_reuses_stored_replies(prompts: Path, distil: Any, endpoint: Any) -> None:
    distil(prompts)
    assert endpoint.asked.total() == 12
    distil(prompts, name="t", adaptation__rank=2)
    assert endpoint.asked.total() == 12
    distil(prompts, name="u", sampling__max_tokens=100)
    assert endpoint.asked.total() == 24


def test_conversations_and_copies(tmp_path: Path, distil: Any, endpoint: Any) -> None:
    user, reply = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    more = [{"role": "user", "content": f"And {n}?"} for n in range(10)]
    rows = [{"messages": [user, reply, each, reply]} for each in [*more, more[0]]]
    distil(write(tmp_path / "talk.jsonl", *rows))
    assert endpoint.asked.total() == 10
    first = lines(folder_of("s") / "train.jsonl")[0]
    said = {"role": "assistant", "content": "the answer to And 0?"}
    assert first == {"messages": [user, reply, more[0], said]}
    assert lines(folder_of("s") / "insights.jsonl")[-1]["rule"] == "prompt.duplicate"


def test_exact_grader_rejects_replies_unlike_expected(tmp_path: Path, distil: Any) -> None:
    wanted = ["the answer to question 1", "something else"] * 6
    rows = [{"prompt": p, "expected": w} for p, w in zip(PROMPTS, wanted, strict=True)]
    rows[0]["expected"] = "the answer to question 0"
    path = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(RefusedInput):
        distil(path, insights__grader="exact")
    # The name is free again, and stored replies are reused.
    found = distil(path, insights__grader="exact", insights__threshold=0)
    assert found.details["insights"]["accepted"] == 12


@pytest.mark.slow
def test_judge_grades_replies_concurrently(prompts: Path, distil: Any, endpoint: Any) -> None:
    def answer(asked: str) -> str:
        if "<reply>" in asked:
            return "Score: 2" if "question 7" in asked else "Score: 9"
        return f"the answer to {asked}"

    endpoint.answer, endpoint.delay = answer, 0.03
    notes = Notes()
    judge = {"method": "judge", "model": f"{endpoint.url}#wise"}
    found = distil(prompts, reporter=notes, insights__grader=judge)
    assert found.details["insights"]["rules"] == {"grader.score": 1}
    judge_answer = [body for body in endpoint.bodies if body["model"] == "wise"]
    # A second run reuses the stored verdicts.
    again = distil(prompts, insights__grader=judge, name="again")
    assert again.details["insights"]["rules"] == {"grader.score": 1}
    assert (
        len([body for body in endpoint.bodies if body["model"] == "wise"])
        == len(judge_answer)
        == 13
    )
    assert endpoint.most_at_once > 1
    line = lines(folder_of("s") / "insights.jsonl")[7]
    assert not line["accepted"] and "0.111111" in line["reason"] and "0.5" in line["reason"]


def test_unreachable_judge_loses_no_teacher_reply(
    prompts: Path, distil: Any, endpoint: Any
) -> None:
    judge = {"method": "judge", "model": f"{endpoint.url}#wise", "retries": 0}
    endpoint.answer = lambda asked: "Score: 9" if "<reply>" in asked else f"the answer to {asked}"
    endpoint.models = {"big"}
    with pytest.raises(RecipeError):
        distil(prompts, insights__grader=judge)
    assert not set(PROMPTS) & set(endpoint.asked)  # no request to the teacher was wasted
    endpoint.models = None
    endpoint.action = lambda asked: (
        (500, {}) if "<reply>" in asked and "2 + 2" not in asked else "ok"
    )
    with pytest.raises(GradingFailed) as refused:
        distil(prompts, insights__grader=judge)
    assert refused.value.rule == "judge.failed"
    endpoint.action = lambda asked: "ok"
    found = distil(prompts, insights__grader=judge, resume=True)
    assert found.details["insights"]["accepted"] == 12
    assert {endpoint.asked[prompt] for prompt in PROMPTS} == {1}


def test_too_few_are_refused_before_and_after(prompts: Path, distil: Any, endpoint: Any) -> None:
    with pytest.raises(RecipeError):
        distil(prompts, insights__minimum=13)
    assert not endpoint.asked and not folder_of("s").exists()
    for prompt in PROMPTS[:3]:
        endpoint.actions[prompt] = ["length"]
    with pytest.raises(RefusedInput):
        distil(prompts)
    assert len(lines(folder_of("s") / "insights.jsonl")) == 12
    assert not (luthier_home() / "models" / "custom").exists()


def test_rejection_of_first_replies_stops_the_run(
    tmp_path: Path, distil: Any, endpoint: Any
) -> None:
    path = write(tmp_path / "many.jsonl", *({"prompt": f"question {n}"} for n in range(30)))
    for number in range(10):
        endpoint.actions[f"question {number}"] = ["length"]
    for _ in range(2):  # the second run reads the stored replies
        with pytest.raises(RefusedInput) as refused:
            distil(path, insights__minimum=2)
        assert refused.value.rule == "distil.too_few"
        assert "`sampling.max_tokens`" in str(refused.value)
        assert "insights.minimum" not in str(refused.value)
        assert [endpoint.asked[f"question {n}"] for n in range(30)] == [1] * 10 + [0] * 20
    assert len(lines(folder_of("s") / "insights.jsonl")) == 10


@pytest.mark.slow
def test_different_rules_for_the_first_replies_do_not_stop(
    tmp_path: Path, distil: Any, endpoint: Any
) -> None:
    path = write(tmp_path / "many.jsonl", *({"prompt": f"question {n}"} for n in range(20)))
    for number in range(9):
        endpoint.actions[f"question {number}"] = ["length"]
    endpoint.answers["question 9"] = " "
    assert distil(path, insights__minimum=2).details["insights"]["accepted"] == 10


@pytest.mark.slow
def test_low_scores_of_the_first_replies_do_not_stop(tmp_path: Path, distil: Any) -> None:
    rows = [
        {"prompt": f"question {n}", "expected": "x" if n < 10 else f"the answer to question {n}"}
        for n in range(20)
    ]
    path = write(tmp_path / "scored.jsonl", *rows)
    found = distil(path, insights__minimum=2, insights__grader="exact")
    assert found.details["insights"]["accepted"] == 10


def test_message_for_clients_leaves_paths_and_settings_out(
    prompts: Path, distil: Any, endpoint: Any
) -> None:
    for prompt in PROMPTS:
        endpoint.answers[prompt] = "I'm sorry, but I can't help with that."
    with logged_for("123456789012", "job-1"), pytest.raises(RefusedInput) as refused:
        distil(prompts)
    text = str(refused.value)
    assert "12 answer.refusal" in text
    assert "distillations" not in text and "insights." not in text


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "causal_lm"},
        {"adaptation": {"method": "lora", "targets": ["nothing"]}},
        {"insights__grader": "vibes"},
    ],
)
def test_untrainable_recipe_is_refused_before_teacher_requests(
    prompts: Path, distil: Any, endpoint: Any, fields: Mapping[str, Any]
) -> None:
    with pytest.raises(RefusedInput):
        distil(prompts, **fields)
    assert not endpoint.asked and not folder_of("s").exists()


def test_an_answer_too_long_for_the_student_is_rejected(
    prompts: Path, distil: Any, endpoint: Any
) -> None:
    endpoint.answers["question 0"] = "long " * 2000
    distil(prompts)
    first = lines(folder_of("s") / "insights.jsonl")[0]
    assert first["rule"] == "answer.context"


def test_run_resumes_after_teacher_outage(prompts: Path, distil: Any, endpoint: Any) -> None:
    for prompt in PROMPTS[6:]:
        endpoint.actions[prompt] = [(503, {})] * 2
    with pytest.raises(LuthierError) as caught:
        distil(prompts, teacher__retries=0, teacher__concurrency=1)
    assert caught.value.exit_code == 1
    answered = {prompt for prompt in PROMPTS if endpoint.asked[prompt]} & set(PROMPTS[:6])
    with pytest.raises(RunConflict):
        distil(prompts)
    with pytest.raises(RunConflict):
        distil(prompts, sampling__max_tokens=99, resume=True)
    endpoint.actions.clear()
    found = distil(prompts, resume=True, teacher__concurrency=3)
    assert found.details["insights"]["accepted"] == 12
    assert {endpoint.asked[prompt] for prompt in answered} == {1}


def test_interrupted_training_resumes_without_teacher_requests(
    prompts: Path, distil: Any, endpoint: Any
) -> None:
    class Stops(Reporter):
        def metrics(self, line: Mapping[str, Any], steps: int) -> None:
            if line["event"] == "train":
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        distil(prompts, reporter=Stops())
    reporter = Notes()
    found = distil(prompts, resume=True, reporter=reporter)
    assert found.result.steps == 3
    assert any(note.startswith("resuming from step") for note in reporter.notes)
    assert set(endpoint.asked.values()) == {1}
    again = distil(prompts, resume=True)
    assert again.result == found.result


def test_a_local_teacher(
    prompts: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.inference.generation import Generator
    from luthier.models.decoding.sampling import Sampling

    given = {
        **QUICK, "name": "self", "sampling__max_tokens": 5, "sampling__temperature": 1.0,
        "teacher__batch_size": 5, "insights__minimum": 2,
    }  # fmt: skip
    folder = str(tiny_model_folder)
    with pytest.raises(RefusedInput, match=r"answer\.cut"):
        luthier.distil(prompts, teacher=folder, student=folder, **given)
    insights = lines(folder_of("self") / "insights.jsonl")
    found = {line["prompt"]: (line["answer"], line["rule"]) for line in insights}
    generator, sampling = Generator.open(find(folder)), Sampling(max_tokens=5, temperature=1.0)
    longest_first = [*PROMPTS[10:], *PROMPTS[:10]]
    for first in (0, 5, 10):
        batch = longest_first[first : first + 5]
        for prompt, answer in zip(batch, generator.answers(batch, sampling), strict=True):
            assert answer.finished or found[prompt] == (answer.text.strip(), "answer.cut")
            assert not answer.finished or found[prompt][1] != "answer.cut"

    def never(*_: Any) -> Any:
        raise AssertionError("a teacher whose answers are all known is loaded")

    monkeypatch.setattr(Generator, "open", never)
    with pytest.raises(RefusedInput, match=r"answer\.cut"):
        luthier.distil(prompts, teacher=folder, student=folder, **given)


def test_encoder_as_teacher_is_refused(prompts: Path, family_folder: Any) -> None:
    with pytest.raises(RefusedInput):
        luthier.distil(
            prompts, teacher=str(family_folder("bert")), student=str(family_folder("bert"))
        )


@pytest.mark.slow
def test_killed_distillation_resumes_with_stored_replies(
    prompts: Path, endpoint: Any, tiny_model_folder: Path, luthier_home: Path
) -> None:
    """The endpoint is slow, limits the rate and drops connections."""
    endpoint.delay = 0.3
    endpoint.actions[PROMPTS[0]] = ["drop"]
    endpoint.actions[PROMPTS[1]] = [(429, {"retry-after": "1"})]
    command = [
        "distil", str(prompts), "--teacher", f"{endpoint.url}#big",
        "--student", str(tiny_model_folder), "--name", "s", "--set", "teacher.concurrency=2",
        "--set", "training.max_steps=2", "--set", "training.threads=1",
    ]  # fmt: skip
    process = start(luthier_home, *command, "--json")
    reply_log_folder = luthier_home / "teachers"
    deadline = time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in reply_log_folder.glob("*.jsonl")) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    journal = next(reply_log_folder.glob("*.jsonl"))
    kept = [line["text"].removeprefix("the answer to ") for line in lines(journal)]
    assert 4 <= len(kept) < 12
    before = dict(endpoint.asked)
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')  # a kill during a write leaves an incomplete line
    process = start(luthier_home, *command, "--resume", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for prompt in kept:
        assert endpoint.asked[prompt] == before[prompt]
    # Only requests in progress at the kill are repeated, at most two.
    failed = {PROMPTS[0]: 1, PROMPTS[1]: 1}
    extra = {p: endpoint.asked[p] - failed.get(p, 0) - 1 for p in PROMPTS}
    assert set(extra.values()) <= {0, 1} and sum(extra.values()) <= 2
    found = json.loads(out)
    assert found["model_id"] == "tiny-llama:s" and found["rows"] >= 11
    assert found["distillation"]["insights"]["accepted"] == 12
    assert len(lines(journal)) == 12
    assert read_json(Path(found["model_dir"]) / "luthier.json")["distillation"]


def test_questions_about_documents_are_checked_and_cite_their_passage(
    tmp_path: Path, endpoint: Any, tiny_model_folder: Path
) -> None:
    """Each passage has a right question, an answer from elsewhere, and a question about nothing."""
    parts = []
    for number in range(6):
        words = " ".join(f"w{number}x{k}" for k in range(20))
        parts.append(f"# Part {number}\n\n{words}")
    (tmp_path / "handbook.md").write_text("\n\n".join(parts))
    for each in prompts_of(["\n\n".join(parts)]):
        word = each["passage"].split()[-1]
        endpoint.answers[each["prompt"]] = (
            f"**Question 1:** Where is {word}?\n**Answer:** {word}\n\nQuestion: Why?\nAnswer: elsewhere"
        )
    reporter, quick = Notes(), dict[str, Any](QUICK)
    luthier.distil(
        documents=[tmp_path / "handbook.md"], name="s", teacher=f"{endpoint.url}#big",
        student=str(tiny_model_folder), reporter=reporter, **quick,
    )  # fmt: skip
    rows = lines(folder_of("s") / "train.jsonl")
    assert len(rows) == 6 and any(note.startswith("6 of 12 questions") for note in reporter.notes)
    for row in rows:
        assert row["answer"] in row["passages"][row["cited"][0] - 1]
        assert sum(row["answer"] in text for text in row["passages"]) == 1
    with pytest.raises(RecipeError):
        luthier.distil(teacher="x", student=str(tiny_model_folder))
