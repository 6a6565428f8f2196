"""Tests of preference shapes, rules and pairs from ratings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written_rows import write

from luthier.data.rows import RowReader, load_rows
from luthier.data.rules import PREFERENCE_RULES as RULES
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.preferences import (
    Preference,
    RankedReplies,
    RatedReply,
    ThumbedReply,
    pair_answers,
)
from luthier.errors import DataError, RowRefused
from luthier.objectives import DPO, KTO
from luthier.types import Message, Row
from real_data import FOLDER, needs_data

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
AGAIN = {"role": "user", "content": "Again?"}
AGAIN_OF_ASSISTANT = {"role": "assistant", "content": "Again?"}


def load(folder: Path, *records: object) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(path)


def turns(*records: dict[str, str]) -> tuple[Message, ...]:
    return tuple(Message(record["role"], record["content"]) for record in records)


PAIRS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "texts": (
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        (turns(USER), turns(YES), turns(NO)),
    ),
    "messages": (
        {"prompt": [SYSTEM, USER], "chosen": YES, "rejected": [NO]},
        (turns(SYSTEM, USER), turns(YES), turns(NO)),
    ),
    "texts after messages": (
        {"prompt": [USER, YES, AGAIN], "chosen": "Yes.", "rejected": "No."},
        (turns(USER, YES, AGAIN), turns(YES), turns(NO)),
    ),
    "whole conversations": (
        {"chosen": [USER, YES, AGAIN, YES], "rejected": [USER, YES, AGAIN, NO]},
        (turns(USER, YES, AGAIN), turns(YES), turns(NO)),
    ),
    "conversations that part early": (
        {"chosen": [SYSTEM, USER, YES, AGAIN, YES], "rejected": [SYSTEM, USER, NO]},
        (turns(SYSTEM, USER), turns(YES, AGAIN, YES), turns(NO)),
    ),
    "a beginning of the other": (
        {"chosen": [USER, YES, AGAIN, YES], "rejected": [USER, YES]},
        (turns(USER), turns(YES, AGAIN, YES), turns(YES)),
    ),
    "conversations with their prompt": (
        {"prompt": "Hi", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        (turns(SYSTEM, USER), turns(YES), turns(NO)),
    ),
    "OpenAI's form": (
        {
            "input": {"messages": [USER], "tools": []},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        (turns(USER), turns(YES), turns(NO)),
    ),
    "an empty rejected answer": (
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "", "votes": 3},
        (turns(USER), turns(YES), (Message("assistant", ""),)),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str, tmp_path: Path) -> None:
    record, (prompt, chosen, rejected) = PAIRS[case]
    (row,) = load(tmp_path, record)
    assert row == Preference(row.file, 1, prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("record", "rating", "desirable"),
    [
        ({"rating": 4}, 4.0, None),
        ({"score": 2.5}, 2.5, None),
        ({"rating": 1, "score": 9}, 1.0, None),
        ({"rating": "good", "score": 3}, 3.0, None),
        ({"label": True}, None, True),
        ({"label": False}, None, False),
        ({"thumb": "down"}, None, False),
        ({"label": "thumbs_up"}, None, True),
        ({"label": "refused"}, None, False),
        ({"label": -1}, None, False),
        ({"thumb": True, "rating": 4}, None, True),
        ({"label": 1}, None, True),
        ({"label": 0}, None, False),
        ({"label": "0"}, None, False),
        ({"label": "1.0"}, None, True),
        ({"label": "FALSE"}, None, False),
        ({"label": "bad"}, None, False),
        ({"label": "Good"}, None, True),
        ({"thumb": 1}, None, True),
        ({"kto_tag": False}, None, False),
    ],
)
def test_judged_answers(
    record: dict[str, Any], rating: float | None, desirable: bool | None, tmp_path: Path
) -> None:
    (row,) = load(tmp_path, {"prompt": "Hi", "completion": "Yes.", **record})
    if desirable is None:
        assert row == RatedReply(row.file, 1, turns(USER), turns(YES), rating)  # type: ignore[arg-type]
    else:
        assert row == ThumbedReply(row.file, 1, turns(USER), turns(YES), desirable)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [AGAIN, NO, USER, YES], "label": "bad"},
        {"kto_tag": False, "messages": [AGAIN, NO, USER, YES]},
        {
            "label": 0,
            "conversations": [
                {"from": "human", "value": AGAIN["content"]},
                {"from": "gpt", "value": "No."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
    ],
)
def test_thumb_next_to_a_conversation(record: dict[str, Any], tmp_path: Path) -> None:
    (row,) = load(tmp_path, record)
    assert row == ThumbedReply(row.file, 1, turns(AGAIN, NO, USER), turns(YES), False)


def test_text_label_of_conversation_is_no_thumb(tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"messages": [USER, YES], "label": "billing"})
    assert row.shape == "messages"


@pytest.mark.parametrize("remark", [{"label": "billing"}, {"rating": "4"}, {"rating": None}, {}])
def test_row_without_thumb_is_prompt_completion(remark: dict[str, Any], tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"prompt": "Hi", "completion": "Yes.", **remark})
    assert row == PromptCompletion(row.file, 1, "Hi", "Yes.")


A, B = {"prompt": "Hi", "completion": "Yes."}, {"prompt": "Hi", "completion": "No."}
P = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    # rule, record
    ("preference.missing", {"prompt": "Hi", "chosen": "Yes."}),
    ("preference.missing", {"prompt": "Hi", "rejected": "No."}),
    ("preference.missing", {"preferred_output": [YES]}),
    ("preference.type", {**P, "chosen": 3}),
    ("preference.type", {**P, "rejected": None}),
    ("preference.type", {**P, "prompt": []}),
    ("preference.type", {**P, "chosen": {"role": "assistant"}}),
    ("preference.type", {**P, "chosen": {**YES, "tool_calls": [1]}}),
    ("preference.type", {**P, "chosen": {"role": "assistant", "content": None, "tool_calls": [1]}}),
    ("preference.type", {"input": [USER], "preferred_output": [YES], "non_preferred_output": [NO]}),
    ("preference.empty", {**P, "chosen": " \n"}),
    ("preference.empty", {**P, "prompt": ""}),
    ("preference.empty", {"prompt": "Hi", "completion": "", "rating": 1}),
    ("preference.empty", {"prompt": "Hi", "completion": "", "label": True}),
    ("preference.equal", {**P, "rejected": " Yes.\n"}),
    ("preference.equal", {**P, "chosen": "", "rejected": ""}),
    ("preference.no_beginning", {"chosen": "Yes.", "rejected": "No."}),
    ("preference.no_beginning", {"chosen": [USER, YES], "rejected": [AGAIN, NO]}),
    ("preference.no_beginning", {"prompt": "Hi", "chosen": [USER, YES], "rejected": "No."}),
    ("preference.no_beginning", {"prompt": "Ho", "chosen": [USER, YES], "rejected": [USER, NO]}),
    ("preference.order", {**P, "prompt": [USER, YES]}),
    ("preference.order", {**P, "prompt": [USER, AGAIN]}),
    ("preference.order", {**P, "rejected": [NO, AGAIN]}),
    ("preference.order", {**P, "prompt": [{**USER, "role": "x"}]}),
    ("thumb.type", {**A, "thumb": "sideways"}),
    ("thumb.type", {**A, "thumb": 2}),
    ("preference.type", {"messages": [USER], "label": True}),
    ("preference.order", {"messages": [USER, YES, AGAIN], "label": True}),
]


@pytest.mark.parametrize(("rule", "record"), EXAMPLES)
def test_each_rule(rule: str, record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, record)
    (problem,) = caught.value.problems
    assert (problem.rule, problem.line) == (rule, 1)


def test_chosen_answer_with_the_lower_score_is_a_warning(tmp_path: Path) -> None:
    reader = RowReader(write(tmp_path, {**P, "score_chosen": 3.5, "score_rejected": 8}))
    assert len(list(reader)) == 1 and not reader.problems
    assert [(each.rule, each.line) for each in reader.warnings] == [("preference.scores", 1)]


def test_a_disliked_answer_may_be_empty(tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"prompt": "Hi", "completion": "", "label": False})
    assert row.reply == (Message("assistant", ""),)


def test_ranked_answers(tmp_path: Path) -> None:
    (row,) = load(tmp_path, {"prompt": "Hi", "ranked": ["Yes.", NO, [AGAIN_OF_ASSISTANT]]})
    best, second, third = turns(YES), turns(NO), turns(AGAIN_OF_ASSISTANT)
    assert row == RankedReplies(row.file, 1, turns(USER), (best, second, third))
    assert row.record() == {"prompt": "Hi", "ranked": ["Yes.", "No.", "Again?"]}
    named = [(text.field, text.part) for text in row.texts()]
    assert named == [
        ("messages[1].content", "input"), ("ranked[1][1].content", "target"),
        ("ranked[2][1].content", "other"), ("ranked[3][1].content", "other"),
    ]  # fmt: skip
    other = row.edit_texts(
        lambda field, text: "Never." if field == "ranked[2][1].content" else text
    )
    assert other.answers() == (best, (Message("assistant", "Never."),), third)
    found = [(pair.chosen, pair.rejected) for pair in pair_answers([row])]
    assert found == [(best, second), (best, third), (second, third)]


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"ranked": ["a", "b"]}, "preference.missing"),
        ({"prompt": "Hi", "ranked": "a"}, "preference.type"),
        ({"prompt": "Hi", "ranked": ["a"]}, "preference.type"),
        ({"prompt": "Hi", "ranked": ["a", 4]}, "preference.type"),
        ({"prompt": "Hi", "ranked": ["a", "b", " a "]}, "preference.equal"),
        ({"prompt": "Hi", "ranked": ["", "a"]}, "preference.empty"),
        ({"prompt": "Hi", "ranked": [str(n) for n in range(65)]}, "preference.type"),
        ({"prompt": [USER, YES], "ranked": ["a", "b"]}, "preference.order"),
    ],
)  # fmt: skip
def test_invalid_rankings_are_refused(record: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, record)
    (problem,) = caught.value.problems
    assert problem.rule == rule


def test_shapes_do_not_mix_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, P, {**A, "rating": 3}, A)
    assert [(p.rule, p.line) for p in caught.value.problems] == [
        ("row.mixed_shapes", 2),
        ("row.mixed_shapes", 3),
    ]


def test_every_two_answers_of_different_rating_are_a_pair(tmp_path: Path) -> None:
    ratings = {"a": 5, "b": 3, "c": 3, "d": 1}
    rows = load(
        tmp_path,
        *({"prompt": "Hi", "completion": text, "rating": n} for text, n in ratings.items()),
        {"prompt": "Ho", "completion": "x", "rating": 1},
        {"prompt": "Ho", "completion": "y", "rating": 2},
    )
    pairs = pair_answers(rows)
    found = [(p.line, p.chosen[0].content, p.rejected[0].content) for p in pairs]
    assert found == [
        (1, "a", "b"), (1, "a", "c"), (1, "a", "d"),
        (2, "b", "d"), (3, "c", "d"), (6, "y", "x"),
    ]  # fmt: skip
    assert pair_answers(pairs) == pairs


def test_thumbs_become_pairs_and_pairs_become_thumbs(tmp_path: Path) -> None:
    rows = load(tmp_path, {**A, "label": True}, {**B, "label": False})
    (pair,) = DPO().regroup(rows)
    assert (pair.chosen, pair.rejected) == (turns(YES), turns(NO))
    singles = KTO().regroup([pair])
    assert [(row.reply, row.desirable) for row in singles] == [
        (turns(YES), True),
        (turns(NO), False),
    ]
    assert list(KTO().regroup(rows)) == rows


@pytest.mark.parametrize(
    ("records", "rule", "lines"),
    [
        ([{**A, "rating": 3}, {**B, "rating": 3}], "rating.tied", [1]),
        ([{**A, "rating": 3}, {**B, "rating": 1}, {**A, "prompt": "x", "rating": 2}],
         "rating.single", [3]),
        ([{**A, "rating": 3}, {**A, "rating": 1}], "preference.equal", [1]),
    ],
)  # fmt: skip
def test_incomparable_rated_answers_are_refused(
    records: list[dict[str, Any]], rule: str, lines: list[int], tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        pair_answers(load(tmp_path, *records))
    assert {problem.rule for problem in caught.value.problems} == {rule}
    assert [problem.line for problem in caught.value.problems] == lines


def test_thumbs_of_single_kind_are_refused(tmp_path: Path) -> None:
    rows = load(tmp_path, {**A, "label": False}, {**B, "label": False})
    with pytest.raises(RowRefused) as refused:
        KTO().fit(rows, None)  # type: ignore[arg-type]
    assert refused.value.rule == "thumb.one_kind"


def test_every_rule_is_shown_by_an_example() -> None:
    gathered = {"rating.single", "rating.tied", "thumb.one_kind"}
    assert {rule for rule, *_ in EXAMPLES} | gathered == set(RULES)


@needs_data("dpo_demo")
@pytest.mark.parametrize(("name", "count"), [("pandalm_pref", 766), ("dpo_demo", 300)])
def test_real_files(name: str, count: int) -> None:
    rows = load_rows(FOLDER / name / "train.jsonl")
    assert len(rows) == count and all(row.chosen and row.rejected for row in rows)


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_numbers_of_classes_are_no_thumbs(tmp_path: Path, key: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    reply = {"messages": turns} if key == "messages" else {"prompt": "a", "completion": "b"}
    rows = [{**reply, "label": n % 3} for n in range(2, 20)]
    reader = RowReader(write(tmp_path, *rows))
    assert {row.shape for row in reader} == {"messages" if key == "messages" else "prompt"}
    assert {each.rule for each in reader.unread_problems()} == {"column.unread"}


def test_thumb_next_to_text_label(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "label": "math", "kto_tag": n % 2 == 0} for n in range(4)
    ]
    reader = RowReader(write(tmp_path, *rows))
    assert [row.judgement() for row in reader] == [("True",), ("False",)] * 2
