"""Tests of system prompts, histories, tools and marks in separate columns, for all row forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.convert import convert
from luthier.data.prompts import PromptChecker, PromptInputChecker, load_prompts
from luthier.data.rows import Checker, RowReader, load_rows
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.preferences import Preference
from luthier.errors import DataError
from luthier.types import Message, Row

Written = dict[str, Any]
ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BLOCKS = [{"role": each["role"], "content": [{"text": each["content"]}]} for each in (ASKED, SAID)]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
SYSTEM = Message("system", "S")
TURNS = (Message("user", "q"), Message("assistant", "a"))

FORMS: dict[str, Written] = {
    "openai": {"messages": [ASKED, SAID]},
    "converse": {"messages": BLOCKS},
    "converse with schemaVersion": {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": BLOCKS,
    },
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "instruction": {"instruction": "q", "response": "a"},
    "question": {"question": "q", "answer": "a"},
    "query": {"query": "q", "response": "a"},
    "input": {"input": "q", "output": "a"},
    "prompt": {"prompt": "q", "completion": "a"},
}
JUDGED: dict[str, Written] = {
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt as messages": {"prompt": [ASKED], "chosen": SAID, "rejected": OTHER},
    "sharegpt": {
        "conversations": [HUMAN],
        "chosen": GPT,
        "rejected": {"from": "gpt", "value": "b"},
    },
    "whole conversations": {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
    "prompt and whole": {"prompt": "q", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
    "openai": {
        "input": {"messages": [ASKED]},
        "preferred_output": [SAID],
        "non_preferred_output": [OTHER],
    },
    "rated": {"prompt": "q", "completion": "a", "rating": 3},
    "thumb": {"prompt": "q", "completion": "a", "label": True},
    "ranked": {"prompt": "q", "ranked": ["a", "b"]},
}
PROMPTS: dict[str, Written] = {
    "prompt": {"prompt": "q"},
    "messages": {"messages": [ASKED]},
    "converse": {"messages": BLOCKS[:1]},
    "expected": {"prompt": "q", "expected": "a"},
    "reply": {"prompt": "q", "completion": "a"},
    "sharegpt": {"conversations": [HUMAN, GPT]},
}
SYSTEMS: list[Written] = [
    {"system": "S"},
    {"system_prompt": "S"},
    {"System Prompt": "S"},
    {"system": [{"text": "S"}]},
    {"system": {"role": "system", "content": "S"}},
    {"system": "S", "system_prompt": "S"},
]


def read(folder: Path, *records: Written, checker: type[Checker] = Checker) -> RowReader:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return RowReader(path, checker=checker)


def row(folder: Path, record: Written) -> Row:
    return read(folder, record).read_all()[0]


def rule_of(folder: Path, record: Written) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, record).read_all()
    (problem,) = caught.value.problems
    assert problem.line == 1 and problem.advice
    return problem.rule


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
@pytest.mark.parametrize("form", [*FORMS])
def test_system_prompt_key_works_with_every_form(
    tmp_path: Path, form: str, system: Written
) -> None:
    reader = read(tmp_path, FORMS[form] | system, {**FORMS[form], "id": 2})
    first, second = reader.read_all()
    assert isinstance(first, Conversation) and first.messages == (SYSTEM, *TURNS)
    assert second.turns() == TURNS
    assert reader.recognition.unread == ()


@pytest.mark.parametrize("form", [*JUDGED])
def test_system_prompt_key_works_with_preference_rows(tmp_path: Path, form: str) -> None:
    reader = read(tmp_path, JUDGED[form] | {"system_prompt": "S"})
    (found,) = reader.read_all()
    assert found.turns() == (SYSTEM, *TURNS)
    assert reader.recognition.unread == ()


@pytest.mark.parametrize("form", [*PROMPTS])
def test_prompt_row_with_system_key_becomes_conversation(tmp_path: Path, form: str) -> None:
    path = read(tmp_path, PROMPTS[form] | {"system": "S"}, PROMPTS[form]).files[0]
    first, second = load_prompts(path)
    assert isinstance(first, Conversation) and first.messages == (SYSTEM, TURNS[0])
    assert second.turns() == TURNS[:1]
    assert first.expected_reply() == second.expected_reply()


def test_prompt_only_row_keeps_system_prompt(tmp_path: Path) -> None:
    found = row(tmp_path, {"prompt": "q", "system": "S"})
    assert isinstance(found, PromptOnly) and found.turns() == (SYSTEM, TURNS[0])
    assert row(tmp_path, found.record()) == found


@pytest.mark.parametrize("blank", [None, "", "  ", []])
def test_blank_system_prompt_is_ignored(tmp_path: Path, blank: object) -> None:
    found = row(tmp_path, {"prompt": "q", "completion": "a", "system": blank})
    assert isinstance(found, PromptCompletion)


def test_conflicting_system_prompts_are_refused(tmp_path: Path) -> None:
    own = [{"role": "developer", "content": "S"}, ASKED, SAID]
    found = row(tmp_path, {"messages": own, "system": "S"})
    assert found.turns() == (SYSTEM, *TURNS)
    assert rule_of(tmp_path, {"messages": own, "system": "T"}) == "message.order"
    both = {"messages": [ASKED, SAID], "system": "S", "system_prompt": "T"}
    assert rule_of(tmp_path, both) == "row.ambiguous"
    assert rule_of(tmp_path, {"messages": [ASKED, SAID], "system": 3}) == "field.type"
    path = read(tmp_path, {"messages": own, "system": "T"}).files[0]
    assert load_rows(path, {"system": ""})[0].turns() == (SYSTEM, *TURNS)


def test_system_key_of_labelled_text_is_unread(tmp_path: Path) -> None:
    reader = read(tmp_path, {"text": "t", "label": "l", "system": "linux"})
    assert reader.read_all()[0].record() == {"text": "t", "label": "l"}
    assert reader.recognition.unread == ("system",)


def test_a_history_and_tools_next_to_a_prompt(tmp_path: Path) -> None:
    before = {"history": [["q", "a"]], "tools": [FUNCTION]}
    found = row(tmp_path, {"prompt": "q", "completion": "a", **before})
    assert found.turns() == (*TURNS, *TURNS)
    assert [tool.name for tool in found.tools] == ["f"]
    found = row(tmp_path, {**JUDGED["preference"], **before})
    assert isinstance(found, Preference) and found.messages == (*TURNS, TURNS[0])
    assert row(tmp_path, found.record()) == found
    wrong = {"prompt": "q", "completion": "a", "history": "x"}
    assert rule_of(tmp_path, wrong) == "messages.type"


def test_tools_of_openais_preferences(tmp_path: Path) -> None:
    asked = {"messages": [ASKED], "tools": [{"type": "function", "function": FUNCTION}]}
    found = row(tmp_path, {**JUDGED["openai"], "input": asked})
    assert [tool.name for tool in found.tools] == ["f"]
    assert all(side.tools == found.tools for side in found.sides())


# --- marks -----------------------------------------------------------------------------------------

LEFT_OUT: list[tuple[str, object]] = [
    *((key, False) for key in ("loss", "train", "training", "trainable", "learn", "isTrainable")),
    *(("weight", value) for value in (0, 0.0, "0", False, "false", "no")),
    *((key, True) for key in ("masked", "mask")),
    ("loss_mask", 0),
    ("masked", "yes"),
]


@pytest.mark.parametrize(("key", "value"), LEFT_OUT)
def test_a_marked_turn_is_not_learned_in_any_form(tmp_path: Path, key: str, value: object) -> None:
    openai = [ASKED, SAID | {key: value}, ASKED, SAID]
    for record in (
        {"messages": openai},
        {"messages": [BLOCKS[0], BLOCKS[1] | {key: value}, *BLOCKS]},
        {"conversations": [HUMAN, GPT | {key: value}, HUMAN, GPT]},
    ):
        reader = read(tmp_path, record)
        (found,) = reader.read_all()
        assert [turn.learned for turn in found.turns()] == [True, False, True, True]
        assert reader.recognition.unread == ()
    chosen = [SAID | {key: value}, ASKED, SAID]
    found = row(tmp_path, {"prompt": "q", "chosen": chosen, "rejected": "b"})
    assert isinstance(found, Preference)
    assert [turn.learned for turn in found.chosen] == [False, True, True]


@pytest.mark.parametrize(("key", "value"), LEFT_OUT)
def test_row_without_learned_turn_is_refused(tmp_path: Path, key: str, value: object) -> None:
    for record in (
        {"messages": [ASKED, SAID | {key: value}]},
        {"messages": [ASKED, SAID], key: value},
        {"prompt": "q", "completion": "a", key: value},
        {"instruction": "q", "output": "a", key: value},
        {"prompt": "q", "chosen": [SAID | {key: value}], "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", key: value},
    ):
        assert rule_of(tmp_path, record) == "message.weight"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 1),
        ("weight", "1"),
        ("loss", True),
        ("masked", False),
        ("weight", None),
        ("mask", ""),
    ],
)
def test_marks_of_turns_to_learn(tmp_path: Path, key: str, value: object) -> None:
    reader = read(tmp_path, {"messages": [ASKED, SAID | {key: value}]})
    assert reader.read_all()[0].turns() == TURNS
    assert reader.recognition.unread == ()


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0.5},
        {"weight": "0.5"},
        {"weight": -1},
        {"loss": "maybe"},
        {"train": [0, 1]},
        {"weight": 0, "loss": True},
        {"training_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"learn_this": False},
    ],
    ids=str,
)
def test_invalid_loss_marks_are_refused(tmp_path: Path, mark: Written) -> None:
    assert rule_of(tmp_path, {"messages": [ASKED, SAID | mark]}) == "message.weight"
    assert rule_of(tmp_path, {"conversations": [HUMAN, GPT | mark]}) == "message.weight"


def test_unknown_keys_of_turns_are_reported(tmp_path: Path) -> None:
    turn: Written = SAID | {"mood": "glad", "loss_type": "ce", "refusal": None, "tool_calls": []}
    reader = read(tmp_path, {"messages": [ASKED | {"name": "Bo"}, turn]})
    assert reader.read_all()[0].turns() == TURNS
    named = {"messages[].mood", "messages[].loss_type", "messages[].name"}
    assert {*reader.recognition.unread} == named
    reader = read(tmp_path, {"conversations": [HUMAN, GPT | {"mood": "glad"}]})
    reader.read_all()
    assert reader.recognition.unread == ("conversations[].mood",)
    reader = read(tmp_path, {"prompt": "q", "chosen": turn, "rejected": "b"})
    reader.read_all()
    assert {*reader.recognition.unread} == {"chosen[].mood", "chosen[].loss_type"}


@pytest.mark.parametrize("marks", [[0, 0, 0, 1], "[1, 0, 1, 1]", [False, False, True, True]])
@pytest.mark.parametrize("turns", [("messages", ASKED, SAID), ("conversations", HUMAN, GPT)])
def test_a_list_of_marks_next_to_the_turns(tmp_path: Path, marks: object, turns: Any) -> None:
    key, asked, said = turns
    record = {key: [asked, said, asked, said], "system": "S", "loss_mask": marks}
    reader = read(tmp_path, record)
    (found,) = reader.read_all()
    assert [turn.learned for turn in found.turns()] == [True, True, False, True, True]
    assert reader.recognition.unread == ()
    assert rule_of(tmp_path, {**record, "loss_mask": [0, 1]}) == "message.weight"


def test_weights_of_whole_rows_are_named(tmp_path: Path) -> None:
    reader = read(tmp_path, {"messages": [ASKED, SAID], "weight": 0.5, "mask": "User"})
    reader.read_all()
    assert {*reader.recognition.unread} == {"weight", "mask"}


def test_reasoning_is_read_in_every_form(tmp_path: Path) -> None:
    thought = {"reasoning_content": "R"}
    for record in (
        {"messages": [ASKED, SAID | thought]},
        {"conversations": [HUMAN, GPT | thought]},
        {"prompt": "q", "chosen": SAID | thought, "rejected": "b"},
    ):
        found = row(tmp_path, record)
        assert found.turns()[-1] == Message("assistant", "a", reasoning="R")
        assert row(tmp_path, found.record()) == found


def test_call_turn_keeps_loss_mark_and_reasoning(tmp_path: Path) -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    further = {"loss": False, "reasoning_content": "R"}
    result = {"from": "observation", "value": "r"}
    found = row(tmp_path, {"conversations": [HUMAN, call | further, result, GPT]})
    assert [turn.learned for turn in found.turns()] == [True, False, True, True]
    assert found.turns()[1].reasoning == "R"
    # Joining the call with the previous text would lose the mark of the call.
    words = {"conversations": [HUMAN, GPT, call | {"loss": False}, result, GPT]}
    assert rule_of(tmp_path, words) == "message.order"


def test_marks_are_written_again(tmp_path: Path) -> None:
    record = {"conversations": [HUMAN, GPT | {"loss": False}, HUMAN, GPT], "system": "S"}
    path = read(tmp_path, record).files[0]
    convert(path, tmp_path / "chat.jsonl", "chat")
    assert load_rows(tmp_path / "chat.jsonl")[0].turns() == load_rows(path)[0].turns()
    with pytest.raises(DataError):
        convert(path, tmp_path / "alpaca.jsonl", "alpaca", drop_extra_keys=True)


# --- functions, and turns as text ------------------------------------------------------------------

CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "function", "name": "f", "content": "r"}


def test_openais_older_functions_are_tools(tmp_path: Path) -> None:
    messages = [ASKED, CALL, RESULT, SAID]
    reader = read(tmp_path, {"messages": messages, "functions": [FUNCTION]})
    (found,) = reader.read_all()
    assert [tool.name for tool in found.tools] == ["f"]
    assert [call.name for call in found.turns()[1].calls] == ["f"]
    assert reader.recognition.unread == ()
    other = {"messages": messages, "functions": [{**FUNCTION, "name": "g"}]}
    assert rule_of(tmp_path, other) == "message.tool_calls"
    both = {"messages": messages, "functions": [FUNCTION], "tools": [{**FUNCTION, "name": "g"}]}
    assert rule_of(tmp_path, both) == "tools.type"


@pytest.mark.parametrize("turns", [("messages", ASKED, SAID), ("conversations", HUMAN, GPT)])
def test_turns_as_text_are_read(tmp_path: Path, turns: Any) -> None:
    key, *said = turns
    found = row(tmp_path, {key: json.dumps(said), "system": "S"})
    assert found.turns() == (SYSTEM, *TURNS)
    path = read(tmp_path, {"text": json.dumps(said)}).files[0]
    assert load_rows(path, {key: "text"})[0].turns() == TURNS
    wrong = {key: "[{'role': 'user'}]"}
    assert rule_of(tmp_path, wrong) == "messages.type"
    for checker in (PromptChecker, PromptInputChecker):
        reader = read(tmp_path, wrong, checker=checker)
        assert list(reader) == [] and [each.rule for each in reader.problems] == ["messages.type"]


# --- keys of a different task ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"text": "t", "label": "l", "other": "o"}, "other"),
        ({"text": "t", "rating": 1, "text_pair": "o"}, "text_pair"),
        ({"anchor": "q", "positive": "p", "score": 0.5}, "score"),
        ({"text": "t", "entities": [{"label": "x"}]}, "entities"),
        ({"prompt": "q", "completion": "a", "context": "c"}, "context"),
        ({"instruction": "q", "output": "a", "context": "c"}, "context"),
        ({"messages": [ASKED, SAID], "rejected_response": "b"}, "rejected_response"),
    ],
)
def test_ambiguous_key_is_refused_unless_ignored(tmp_path: Path, record: Written, key: str) -> None:
    assert rule_of(tmp_path, record) == "row.ambiguous"
    path = read(tmp_path, record).files[0]
    assert len(load_rows(path, {key: ""})) == 1
    assert row(tmp_path, {**record, key: None}) == load_rows(path)[0]


def test_questions_about_a_passage_are_prompts_or_have_spans(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"question": "q", "context": "c"}).read_all()
    (problem,) = caught.value.problems
    assert problem.rule == "row.unknown_shape"
    assert "answer_start" in problem.advice
    found = row(tmp_path, {"question": "q", "context": "c", "answer": "a"})
    assert found.record() == {"prompt": "q\n\nc", "completion": "a"}


@pytest.mark.parametrize("label", [[[0, 4, "PER"]], [[0, 4, "PER"], [5, 9, "X"]]])
def test_spans_of_doccano_are_no_labels(tmp_path: Path, label: object) -> None:
    first = {"text": "nobody", "label": []}
    with pytest.raises(DataError) as caught:
        read(tmp_path, first, {"text": "Rita sings", "label": label}).read_all()
    (problem,) = caught.value.problems
    assert problem.rule == "label.type"


@pytest.mark.parametrize("rating", ["4,5", "nan", ""])
def test_invalid_rating_message_shows_value(tmp_path: Path, rating: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text,rating\nt,"{rating}"\n')
    with pytest.raises(DataError) as caught:
        load_rows(path)
    (problem,) = caught.value.problems
    assert problem.rule == "rating.type" and (rating or "empty") in problem.message
    assert ("4.5" in problem.advice) is (rating == "4,5")


def test_a_decimal_comma_does_not_turn_ratings_into_examples(tmp_path: Path) -> None:
    assert rule_of(tmp_path, {"prompt": "q", "completion": "a", "rating": "4,5"}) == "rating.type"


def test_prompts_may_have_a_system_prompt_in_some_rows_only(tmp_path: Path) -> None:
    reader = read(tmp_path, {"prompt": "q"}, {"prompt": "q", "system": "S"}, checker=PromptChecker)
    assert [len(each.turns()) for each in reader.read_all()] == [1, 2]


def test_prompt_and_completion_as_lists_of_turns_are_a_conversation(tmp_path: Path) -> None:
    asked = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    found = row(tmp_path, {"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]})
    assert [(turn.role, turn.content, turn.learned) for turn in found.turns()] == [
        ("system", "s", True), ("user", "a", True), ("assistant", "b", False),
        ("user", "c", True), ("assistant", "d", True),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("form", FORMS)
def test_reasoning_next_to_a_reply(tmp_path: Path, form: str, key: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({key: "Hm.", **FORMS[form]}) + "\n")
    reader = RowReader(path)
    (row,) = reader.read_all()
    assert row.turns() == (TURNS[0], Message("assistant", "a", reasoning="Hm."))
    assert reader.recognition.unread == ()
    (prompt,) = load_prompts(path)
    assert prompt.turns() == TURNS[:1] and prompt.expected_reply() == "a"


def test_reasoning_next_to_a_judged_reply(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    record = {"thinking": "Hm.", "prompt": "q", "completion": "a", "label": False}
    path.write_text(json.dumps(record) + "\n")
    (row,) = load_rows(path)
    assert row.turns() == (TURNS[0], Message("assistant", "a", reasoning="Hm."))


def test_two_reasoning_keys_are_ambiguous(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"thinking": "Hm.", "reasoning": "Ha.", **FORMS["prompt"]}) + "\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert [problem.rule for problem in caught.value.problems] == ["row.ambiguous"]


@pytest.mark.parametrize("kind", ["input_text", "output_text"])
def test_parts_of_the_responses_api(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    parts = [{"type": kind, "text": "q", "annotations": []}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, SAID]}) + "\n")
    assert load_rows(path)[0].turns() == TURNS
