"""Evaluation: prompts, comparisons and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import luthier
from luthier.data.rows import load_rows
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.texts import RawText
from luthier.errors import DataError, GradingFailed, RecipeError, UnknownModel
from luthier.evaluation.evaluate import (
    check,
    check_shapes,
    choose_turns,
    default_graders,
    grade,
    load_graded,
    questions,
)
from luthier.evaluation.significance import standard_error
from luthier.graders import (
    Answer,
    Exact,
    FirstLine,
    Grader,
    Mix,
    Number,
    Regex,
    StringCheck,
    ToolCalls,
)
from luthier.objectives import OBJECTIVES
from luthier.types import Message, Row, ToolCall

PAIR = PromptCompletion("f", 1, prompt="What?", completion="That.")
CHAT = Conversation(
    "f",
    2,
    messages=(
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "1"),
        Message("user", "Two?"),
        Message("assistant", "2"),
    ),
)
TEXT = RawText("data.jsonl", 3, text="raw")


def expected(rows: Sequence[Row]) -> list[str | None]:
    return [Answer.of(row, "").expected for row in rows]


def test_citations_and_declined_questions_have_scores() -> None:
    rows = [
        CitedAnswer("f", 1, "Who?", ("Ann.", "Bob."), "Ann", (1,)),
        CitedAnswer("f", 2, "Who else?", ("Ann.", "Bob."), "Bob", (2,)),
        CitedAnswer("f", 3, "Why?", ("Ann.",), None, ()),
        CitedAnswer("f", 4, "When?", ("Ann.",), None, ()),
    ]
    replies = ["Ann [1][2]", "The documents do not answer it.", rows[2].reply, "Ann"]
    found = grade(rows, replies, default_graders(rows, print)).scores
    assert found == {
        "token_f1": pytest.approx((1 + 0 + 1 + 0) / 4),
        "citation_precision": 1 / 2,
        "citation_recall": 1 / 2,
        "supported": 1 / 2,
        "declined": 1 / 2,
        "declined_wrongly": 1 / 2,
    }


def test_questions_have_all_turns_before_last_reply() -> None:
    asked = questions([PAIR, CHAT])
    assert list(asked[0]) == [Message("user", "What?")]
    assert [turn.content for turn in asked[1]] == ["Be brief.", "One?", "1", "Two?"]
    assert expected([PAIR, CHAT]) == ["That.", "2"]


def test_choose_turns_last_calls_and_all() -> None:
    call = Message("assistant", calls=(ToolCall("a", "weather", {"city": "Rome"}),))
    ask, result, answer = Message("user", "Rome?"), Message("tool", "12", call_id="a"), "Mild."
    agent = Conversation("f", 3, messages=(ask, call, result, Message("assistant", answer)))
    rows = [PAIR, CHAT, agent]
    assert choose_turns(rows, "last") == rows
    (calling,) = choose_turns(rows, "calls")
    assert calling.turns() == (ask, call)
    every = choose_turns([*rows, PromptOnly("f", 4, prompt="Oslo?", expected="Cold.")], "all")
    assert expected(every) == ["That.", "1", "2", calling.expected_reply(), answer, "Cold."]
    open_end = Conversation("f", 5, messages=(*CHAT.messages, ask), expected="Warm.")
    assert expected(choose_turns([open_end], "all")) == ["1", "2", "Warm."]
    silent = Message("assistant", "1", learned=False)
    read_only = Conversation("f", 6, messages=(ask, silent, ask, Message("assistant", "2")))
    assert expected(choose_turns([read_only], "all")) == ["2"]
    with pytest.raises(RecipeError):
        choose_turns([PAIR, CHAT], "calls")
    check([calling], {"tool_calls": ToolCalls()})
    check([PAIR, CHAT], {"tool_calls": ToolCalls()})  # where nothing is to be called, nothing is
    with pytest.raises(RecipeError) as refused:
        check(rows, {"tool_calls": ToolCalls()})
    assert refused.value.rule == "grader.no_calls"


def test_raw_text_has_no_reply() -> None:
    with pytest.raises(DataError) as refused:
        questions([PAIR, TEXT])
    assert refused.value.rule == "row.no_reply"


def test_prompt_rows_need_graders_without_expected_reply(tmp_path: Path) -> None:
    """Templates can name any key of the prompts."""
    data = tmp_path / "rows.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi"}], "name": "Ann"}
    data.write_text(json.dumps(chat) + "\n")
    named = StringCheck(reference="{{item.name}}", operation="like")
    for graders in ([named], [Exact(), Mix(parts={"a": named})]):
        rows = load_graded(data, None, graders)
        assert grade(rows, ["Hi Ann"], {"named": named}).scores == {"named": 1.0}
    for graders in ([Exact()], [named, ToolCalls()]):
        with pytest.raises(DataError) as refused:
            load_graded(data, None, graders)
        assert refused.value.rule == "message.last"
    with pytest.raises(DataError) as refused:
        load_graded(data, None, [named], "all")
    assert refused.value.rule == "message.last"
    data.write_text('{"prompt": "Hi", "completion": "Ho", "name": "Ann"}\n')
    (row,) = load_graded(data, None, [named])
    assert expected([row]) == ["Ho"]
    assert grade([row], ["Ann"], {"named": named, "exact": Exact()}).scores == {
        "named": 1,
        "exact": 0,
    }


def test_bare_prompts_are_graded_as_rewards_are() -> None:
    asks, bare = (
        PromptOnly("f", 1, prompt="1+1?", expected="2"),
        PromptOnly("f", 2, prompt="Write."),
    )
    assert expected([asks, bare]) == ["2", None]
    assert grade([asks], ["= 2"], {"number": Number()}).scores == {"number": 1.0}
    found = grade([bare], ["Dear"], {"regex": Regex(pattern="^Dear$")})
    assert found.scores == {"regex": 1.0} and found.records[0]["expected"] is None
    with pytest.raises(DataError) as refused:
        check([asks, bare], {"exact": Exact()})
    assert refused.value.rule == "grader.no_expected"


def test_scores_are_means_and_records_have_every_answer() -> None:
    rows = [PAIR, CHAT, PromptCompletion("f", 3, prompt="x", completion="A\nB")]
    result = grade(rows, ["That.", "3", "A\nC"], {"exact": Exact(), "first_line": FirstLine()})
    assert result.rows == rows
    assert result.scores == {"exact": pytest.approx(1 / 3), "first_line": pytest.approx(2 / 3)}
    assert [answer["scores"]["exact"] for answer in result.records] == [1.0, 0.0, 0.0]
    assert [answer["prompt"] for answer in result.records] == ["What?", "Two?", "x"]
    assert [answer["reply"] for answer in result.records] == ["That.", "3", "A\nC"]
    assert [answer["expected"] for answer in result.records] == ["That.", "2", "A\nB"]
    assert result.errors == {
        "exact": pytest.approx(standard_error(1 / 3, 3)),
        "first_line": pytest.approx(standard_error(2 / 3, 3)),
    }
    assert result.plain() == {
        "rows": 3,
        "scores": result.scores,
        "errors": result.errors,
        "intervals": result.intervals,
    }
    low, high = result.intervals["exact"]
    assert 0 < low < 1 / 3 < high < 1
    json.dumps(result.plain())


def test_constant_replies_are_remarked() -> None:
    rows = [PromptCompletion("f", n, prompt="x", completion="ab"[n % 2]) for n in range(10)]
    exact = {"exact": Exact()}
    (remark,) = grade(rows, ["a"] * 10, exact).remarks
    assert "10 replies" in remark and "'a'" in remark
    assert not grade(rows, [*["a"] * 9, "b"], exact).remarks
    assert not grade(rows[:9], ["a"] * 9, exact).remarks  # too few to tell
    assert not grade(rows[::2] * 2, ["a"] * 10, exact).remarks  # equal replies are expected here


class Length(Grader):
    method: str = "length"

    def score(self, answer: Answer) -> float:
        return len(answer.reply) / 10


def test_long_replies_are_not_graded_by_the_letter() -> None:
    def rows(words: int) -> list[Row]:
        return [
            PromptCompletion(
                "t", n, prompt=f"q {n}", completion=" ".join(f"w{n}" for _ in range(words))
            )
            for n in range(1, 11)
        ]

    notes: list[str] = []
    assert [*default_graders(rows(12), notes.append)] == ["exact"] and not notes
    chosen = default_graders(rows(13), notes.append)
    assert [*chosen] == ["rouge_l", "rouge_1", "rouge_2"]
    half = [f"{row.expected_reply()} {row.expected_reply()} x" for row in rows(13)]
    assert 0.6 < grade(rows(13), half, chosen).scores["rouge_l"] < 0.7
    # The requested grader grades, with a remark if all scores are zero.
    exact: dict[str, Grader] = {"exact": Exact()}
    (remark,) = grade(rows(13), half, exact).remarks
    assert "rouge_l" in remark
    (remark,) = grade(rows(3), half, exact).remarks
    assert not grade(rows(13), [row.expected_reply() or "" for row in rows(13)], exact).remarks


SENTENCES = {
    "vi": ("Hôm nay trời rất đẹp.", "Tôi muốn uống một cốc cà phê nóng."),
    "fr": ("Il fait très beau aujourd'hui.", "Je voudrais boire une tasse de café chaud."),
    "en": ("The weather is nice today.", "I would like to drink a cup of hot coffee."),
    "label": ("spam", "ham"),
}


@pytest.mark.parametrize(
    ("target", "grader"), [("vi", "chrf"), ("fr", "chrf"), ("en", "exact"), ("label", "exact")]
)
def test_translations_are_graded_by_chrf(target: str, grader: str) -> None:
    pairs = zip(SENTENCES["en"], SENTENCES[target], strict=True)
    rows = [PromptCompletion("t", 1, prompt=one, completion=other) for one, other in [*pairs] * 3]
    notes: list[str] = []
    assert [*default_graders(rows, notes.append)] == [grader]
    assert bool(notes) == (grader == "chrf")


def test_custom_grader_grades() -> None:
    result = grade([PAIR, CHAT], ["abc", ""], {"length": Length()})
    assert result.scores == {"length": pytest.approx(0.15)}
    assert "ungraded" not in result.plain()


def test_ungradable_reply_fails_or_scores_zero() -> None:
    replies = ["x" * 11, "x" * 5]
    with pytest.raises(GradingFailed):
        grade([PAIR, CHAT], replies, {"length": Length()})
    result = grade([PAIR, CHAT], replies, {"length": Length()}, on_error="zero")
    assert result.scores == {"length": pytest.approx(0.25)}
    assert result.plain()["ungraded"] == 1
    assert [problem.line for problem in result.problems] == [1]


def test_check_refuses_rows_unfit_for_grader() -> None:
    check([PAIR, CHAT], {"exact": Exact()})
    with pytest.raises(DataError) as caught:
        check([PAIR, CHAT], {"exact": Exact(), "number": Number()})
    assert caught.value.rule == "grader.no_number"
    assert [problem.line for problem in caught.value.problems] == [1]


def test_missing_reply_is_an_error() -> None:
    with pytest.raises(ValueError):
        grade([PAIR, CHAT], ["one"], {"exact": Exact()})


def test_evaluate_generates_and_grades_replies(tiny_model_folder: Path, tmp_path: Path) -> None:
    """All expected replies but the second are the model's own replies."""
    model = luthier.load(str(tiny_model_folder))
    prompts = ["say fox", "say dog", "say cat"]
    replies = model.generate(prompts, max_tokens=8)
    assert all(reply.strip() for reply in replies)
    expected = [replies[0], "something else", replies[2]]
    data = tmp_path / "held.jsonl"
    lines = [
        json.dumps({"prompt": p, "completion": e}) for p, e in zip(prompts, expected, strict=True)
    ]
    data.write_text("\n".join(lines))
    result = luthier.evaluate(model, data, graders=["exact", "first_line"], max_tokens=8)
    assert result.scores["exact"] == pytest.approx(2 / 3)
    assert [answer["reply"] for answer in result.records] == replies
    by_id = luthier.evaluate(str(tiny_model_folder), data, max_tokens=8)
    assert by_id.scores == {"exact": result.scores["exact"]}
    assert load_rows(data) == result.rows


def test_unknown_grader_model_or_file_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "held.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(RecipeError):
        luthier.evaluate("no model", data, graders=["rouge"])
    with pytest.raises(UnknownModel):
        luthier.evaluate("no model", data)
    with pytest.raises(DataError) as refused:
        luthier.evaluate("no model", tmp_path / "none.jsonl")
    assert refused.value.rule == "file.missing"


@pytest.mark.parametrize("method", ["vae", "gan", "diffusion"])
def test_image_generators_are_not_evaluated_on_rows(method: str) -> None:
    with pytest.raises((RecipeError, DataError)):  # a VAE is evaluated on labelled windows
        check_shapes([TEXT], OBJECTIVES[method].model_validate({}))
