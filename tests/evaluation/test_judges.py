"""Agreement of a judge with people: preferences, order and length bias."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.preferences import Preference
from luthier.errors import DataError, LuthierError, RecipeError
from luthier.evaluation.judges import check_pairs, measure_agreement
from luthier.graders import Exact, Ruler
from luthier.graders.ruler import judge_pairs
from luthier.types import Message

Conversations = Sequence[Sequence[Message]]


def replies(conversation: Sequence[Message]) -> list[str]:
    return re.findall(r"<reply \d>\n(.*?)\n</reply \d>", conversation[1].content, re.DOTALL)


def by(score: Callable[[str, int], int]) -> Ruler:
    """Return a judge that scores a reply by content and position."""

    def writer(conversations: Conversations) -> list[str]:
        return [
            "\n".join(f"Reply {n}: {score(text, n)}" for n, text in enumerate(replies(each), 1))
            for each in conversations
        ]

    return Ruler(writer=writer)


def rows(pairs: Sequence[tuple[str, str]]) -> list[Preference]:
    prompt = (Message("user", "Which?"),)
    return [
        Preference("f", n, prompt, (Message("assistant", one),), (Message("assistant", other),))
        for n, (one, other) in enumerate(pairs, 1)
    ]


PAIRS = rows([("good", "bad"), ("good, and long", "bad"), ("good", "bad and long")] * 10)


def test_agreement_of_fair_and_biased_judges() -> None:
    pairs = check_pairs(PAIRS)
    fair = measure_agreement(by(lambda text, place: 90 if "good" in text else 20), pairs)
    assert fair.agreement.value == fair.consistency.value == 1 and not len(fair.first)
    first = measure_agreement(by(lambda text, place: 100 - place), pairs)
    assert (first.agreement.value, first.consistency.value, first.first.value) == (0.5, 0, 1)
    second = measure_agreement(by(lambda text, place: place), pairs)
    assert second.first.value == 0
    long = measure_agreement(by(lambda text, place: len(text)), pairs)
    assert long.agreement.value == pytest.approx(2 / 3)
    assert (long.longer.value, long.people_longer.value) == (1, pytest.approx(2 / 3))
    assert long.plain()["scores"]["prefers_longer"] == 1


def test_equal_or_unscored_replies_are_a_tie() -> None:
    asked: list[Sequence[Message]] = []

    def writer(conversations: Conversations) -> list[str]:
        asked.extend(conversations)
        half = len(conversations) // 2  # the second half has the reversed order
        return ["Reply 1: 9\nReply 2: 3"] * half + ["no idea"] * half

    (answers, same) = check_pairs(rows([("a", "b"), ("c", "d")]))
    found = judge_pairs(Ruler(writer=writer), [answers, (same[0], same[0])])
    assert len(asked) == 2 and [verdict.win for verdict in found] == [0.5, 0.5]
    assert [verdict.unread for verdict in found] == [1, 0]
    assert [verdict.is_consistent for verdict in found] == [None, None]
    # Without decisions, no order or length preference is reported, even if people prefer long replies.
    long = check_pairs(rows([("a longer reply", "b")] * 10))
    silent = measure_agreement(Ruler(writer=writer), long)
    assert not len(silent.consistency) and not len(silent.first) and not len(silent.longer)
    assert "order" not in silent.verdict()
    mute = Ruler(model="m", writer=lambda asked: ["hm"] * len(asked))
    with pytest.raises(LuthierError):
        judge_pairs(mute, [answers])
    with pytest.raises(LuthierError):  # from the first two of thirty pairs
        measure_agreement(mute, check_pairs(PAIRS))


def test_length_preference_needs_replies_of_different_length() -> None:
    same = check_pairs(rows([("good", "evil")] * 20))
    wrong = measure_agreement(by(lambda text, place: 90 if text == "evil" else 20), same)
    assert wrong.agreement.value == 0 and not len(wrong.longer)


def test_rows_without_preference_are_refused() -> None:
    with pytest.raises(DataError) as refused:
        check_pairs([*PAIRS[:1], PromptCompletion("f", 2, prompt="x", completion="y")])
    assert [problem.line for problem in refused.value.problems] == [2]
    with pytest.raises(DataError):
        check_pairs([])


@pytest.mark.slow
def test_endpoint_judge_in_agreement_and_comparison(
    endpoint: Any, key: str, tiny_model_folder: Path, tmp_path: Path, luthier_home: Path
) -> None:
    def answer(asked: str) -> str:
        if "2 + 2" in asked:
            return "Reply 1: 90\nReply 2: 10"
        given = re.findall(r"<reply \d>\n(.*?)\n</reply \d>", asked, re.DOTALL)
        return "\n".join(f"Reply {n}: {'fox' in text:d}" for n, text in enumerate(given, 1))

    endpoint.answer = answer
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"the {n}", "chosen": "a fox", "rejected": "a dog"} for n in range(4)]
    data.write_text("".join(json.dumps(each) + "\n" for each in pairs))
    asked = ["judge", str(data), f"{endpoint.url}#big", "--human", "chosen"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["scores"]["agreement"] == 1
    calls = endpoint.asked.total()
    CliRunner().invoke(app, asked)
    assert endpoint.asked.total() == calls, "the judge was asked twice"
    with pytest.raises(RecipeError):
        luthier.judge(data, Exact())
    named = [{"prompt": f"the {n}", "best": "a fox", "worst": "a dog"} for n in range(4)]
    data.write_text("".join(json.dumps(each) + "\n" for each in named))
    renamed = luthier.judge(
        data, f"{endpoint.url}#big", human="best", columns={"rejected": "worst"}
    )
    assert renamed.agreement.value == 1
    # In a comparison, the copied training answer has the word, and the tiny model's replies do not.
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text('{"prompt": "Say it now", "completion": "the fox"}\n' * 4)
    held.write_text("".join(
        json.dumps({"prompt": f"Say it {n}", "completion": "x"}) + "\n" for n in range(3)
    ))  # fmt: skip
    tuned = luthier.tune(
        train,
        base=str(tiny_model_folder),
        name="x",
        training__max_steps=1,
        data__validation_share=0,
    ).model_id
    found = luthier.compare(held, [tuned], max_tokens=3, judge=f"{endpoint.url}#big")
    assert found.measure == "win_rate"
    by_name = {each.name: each.score.value for each in found.contenders}
    assert by_name["the nearest row by words"] == 1 and by_name[str(tiny_model_folder)] == 0.5
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(RecipeError):
        luthier.compare(labels, [tuned], judge=f"{endpoint.url}#big")
