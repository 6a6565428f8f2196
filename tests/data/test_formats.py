"""Tests of row forms: detection by keys, unchanged text."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from written_rows import row_of

from luthier.data.formats import FORMS, TEXT_PAIRS, forms_of
from luthier.data.prompts import load_inputs, load_prompts
from luthier.data.rows import Columns, Recognition, RowReader, load_rows
from luthier.data.rules import RULES
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.media import BareImage
from luthier.errors import DataError, Problem
from luthier.types import IMAGE_MARK, Message, Row, Tool, ToolCall

AWKWARD = " a\u2028b\r\n\x85 \\ud800 "
CHAT = (Message("user", "q"), Message("assistant", AWKWARD))
SYSTEM = Message("system", "be kind")


def write(folder: Path, *records: dict[str, Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def problems_of(path: Path, columns: dict[str, str] | None = None) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        load_rows(path, columns)
    return list(caught.value.problems)


def block(text: str) -> list[dict[str, str]]:
    return [{"text": text}]


ASKED = {"question": "Why?", "choices": ["no", "yes"], "answer": 1}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "question with choices",
        {"task": "a", **ASKED},
        {"prompts": ("Question: Why?\nAnswer:",), "choices": ("no", "yes"), "answer": 1},
    ),
    (
        "question with choices",
        {"context": "Once.", **ASKED},
        {"prompts": ("Once.\nQuestion: Why?\nAnswer:",), "choices": ("no", "yes"), "answer": 1},
    ),
    (
        "question with choices",
        {"relation": "effect", **ASKED},
        {"prompts": ("Question: Why?\nEffect:",), "choices": ("no", "yes"), "answer": 1},
    ),
    (
        "options with a continuation",
        {"options": ["so Ann", "so Bo"], "continuation": "won.", "answer": 1},
        {"prompts": ("so Ann", "so Bo"), "choices": ("won.", "won."), "answer": 1},
    ),
    # An answer in words is still learned.
    ("question and answer", {**ASKED, "answer": "yes"}, {"prompt": "Why?", "completion": "yes"}),
    (
        "Bedrock conversation",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": block("be kind"),
            "messages": [
                {"role": "user", "content": block("q")},
                {"role": "assistant", "content": block(AWKWARD)},
            ],
        },
        {"messages": (SYSTEM, *CHAT)},
    ),
    ("question and answer", {"question": "q", "answer": ["a"]}, {"prompt": "q", "completion": "a"}),
    (
        "Bedrock input and output",
        {"input": "q", "output": AWKWARD},
        {"prompt": "q", "completion": AWKWARD},
    ),
    ("Bedrock raw text", {"input": AWKWARD, "source": "web"}, {"text": AWKWARD}),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": AWKWARD}]},
        {"messages": CHAT},
    ),
    (
        "ShareGPT",
        {
            "id": "x",
            "system": "be kind",
            "conversations": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": AWKWARD},
            ],
        },
        {"messages": (SYSTEM, *CHAT)},
    ),
    (
        "ShareGPT preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": AWKWARD},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": CHAT[:1], "chosen": CHAT[1:], "rejected": (Message("assistant", "b"),)},
    ),
    ("Alpaca", {"instruction": "q", "output": AWKWARD}, {"prompt": "q", "completion": AWKWARD}),
    (
        "Alpaca",
        {"instruction": "q", "input": " i\n", "output": AWKWARD},
        {"prompt": "q\n\n i\n", "completion": AWKWARD},
    ),
    (
        "Alpaca",
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
    ),
    (
        "Alpaca",
        {"instruction": "q", "input": "", "output": AWKWARD, "system": "be kind", "history": []},
        {"messages": (SYSTEM, *CHAT)},
    ),
    (
        "Alpaca",
        {"instruction": "q", "output": AWKWARD, "history": [["q0", "a0"]]},
        {"messages": (Message("user", "q0"), Message("assistant", "a0"), *CHAT)},
    ),
    (
        "instruction and response",
        {"instruction": "q", "context": "c", "response": AWKWARD, "category": "qa"},
        {"prompt": "q\n\nc", "completion": AWKWARD},
    ),
    (
        "question and answer",
        {"question": "q", "answer": AWKWARD},
        {"prompt": "q", "completion": AWKWARD},
    ),
    (
        "question and answer",
        {"question": "q", "context": "c", "answer": AWKWARD},
        {"prompt": "q\n\nc", "completion": AWKWARD},
    ),
    (
        "question and response",
        {"id": 1, "system_prompt": "be kind", "question": "q", "response": AWKWARD},
        {"messages": (SYSTEM, *CHAT)},
    ),
    ("query and response", {"query": "q", "response": "a"}, {"prompt": "q", "completion": "a"}),
    ("query and positive", {"query": "q", "positive": "p"}, {"text": "q", "positive": "p"}),
    (
        "query and positive",
        {"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"text": "q", "positive": "p", "negatives": ("n", "m")},
    ),
    (
        "FlagEmbedding",
        {"query": "q", "pos": ["p"], "neg": ["n", "m"]},
        {"text": "q", "positive": "p", "negatives": ("n", "m")},
    ),
    (
        '{"anchor", "positive"}',
        {"anchor": "q", "positive": "p", "negatives": []},
        {"text": "q", "positive": "p", "negatives": ()},
    ),
    ("question and positive", {"question": "q", "positive": "p"}, {"text": "q", "positive": "p"}),
    ("sentence pairs", {"sentence1": "q", "sentence2": "p"}, {"text": "q", "positive": "p"}),
    (
        "sentence pairs with scores",
        {"sentence1": "q", "sentence2": "p", "score": 0.5},
        {"text": "q", "document": "p", "label": 0.5},
    ),
    ("premise and hypothesis", {"premise": "q", "hypothesis": "p"}, {"text": "q", "positive": "p"}),
    (
        "premise, hypothesis and class",
        {"premise": "q", "hypothesis": "p", "label": 1},
        {"text": "q\n\np", "label": "1"},
    ),
    *(
        ("labelled pair of texts", {one: "q", other: "p", "label": label}, expected)
        for one, other in TEXT_PAIRS
        for label, expected in (
            (1, {"text": "q", "document": "p", "label": 1.0}),
            ("0", {"text": "q", "document": "p", "label": 0.0}),
            ("Yes", {"text": "q", "document": "p", "label": 1.0}),
            ("FALSE", {"text": "q", "document": "p", "label": 0.0}),
            ("neutral", {"text": "q\n\np", "label": "neutral"}),
        )
    ),
    (
        "question and answer",
        {"question": "q", "answer": [1.5]},
        {"prompt": "q", "completion": "1.5"},
    ),
    (
        '{"prompt", "completion"}',
        {"prompt": "q", "completion": ["a"]},
        {"prompt": "q", "completion": "a"},
    ),
    (
        '{"prompt", "completion"}',
        {"prompt": "q", "completion": ["a", "b", " "]},
        {"prompt": "q", "completion": "a", "other_replies": ("b",)},
    ),
    # OpenAI's parts and its newer name of the system role need no form of their own.
    (
        '{"messages"}',
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "weight": 1,
                    "content": [
                        {"type": "text", "text": " a\u2028"},
                        {"type": "text", "text": AWKWARD[3:]},
                    ],
                },
            ]
        },
        {"messages": (SYSTEM, *CHAT)},
    ),
    (
        '{"input", "preferred_output", "non_preferred_output"}',
        {
            "input": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
            "preferred_output": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
            "non_preferred_output": [{"role": "assistant", "content": "b"}],
        },
        {
            "messages": (Message("user", "q"),),
            "chosen": (Message("assistant", "a"),),
            "rejected": (Message("assistant", "b"),),
        },
    ),
    *(
        (
            f"{name} with preference",
            {"rejected": "b", "system": "be kind", name: "q", "chosen": "a"},
            {
                "messages": (SYSTEM, Message("user", "q")),
                "chosen": (Message("assistant", "a"),),
                "rejected": (Message("assistant", "b"),),
            },
        )
        for name in ("question", "instruction", "query", "input")
    ),
    (
        "instruction with preference",
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
        {
            "messages": (Message("user", "q\n\ni"),),
            "chosen": (Message("assistant", "a"),),
            "rejected": (Message("assistant", "b"),),
        },
    ),
    (
        "thread of a forum",
        {"question": "q", "answers": [{"text": "no", "votes": 9}, {"text": "a", "accepted": True}]},
        {"prompt": "q", "completion": "a"},
    ),
    (
        "thread of a forum",
        {
            "title": "q",
            "body": "i",
            "answers": [{"body": "a", "score": 2}, {"body": "b", "score": 1}],
        },
        {"prompt": "q\n\ni", "completion": "a"},
    ),
    *(
        (
            "xLAM",
            {"answers": answers, "tools": [{"name": "f"}], "query": "q"},
            {
                "messages": (
                    Message("user", "q"),
                    Message("assistant", calls=(ToolCall("call00000", "f", {"a": 1}),)),
                ),
                "tools": (Tool("f"),),
            },
        )
        for answers in (
            '[{"name": "f", "arguments": {"a": 1}}]',
            [{"arguments": {"a": 1}, "name": "f"}],
        )
    ),
]


def recognize(source: Path, columns: Columns | None = None) -> tuple[Sequence[Row], Recognition]:
    reader = RowReader(source, columns)
    return reader.read_all(), reader.recognition


@pytest.mark.parametrize(("form", "record", "fields"), CASES)
def test_form(tmp_path: Path, form: str, record: dict[str, Any], fields: dict[str, Any]) -> None:
    path = write(tmp_path, record, {**record, "id": "other"})
    rows, recognized = recognize(path)
    assert rows == [row_of(str(path), line, **fields) for line in (1, 2)]
    assert recognized.form == form
    assert str(recognized) == f"jsonl, {form}, 2 rows"


_HISTORY = {"history": ["3", "1"], "item": "2"}
HISTORY_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ('{"history", "item"}', {"history": [3, 1], "item": 2}, _HISTORY),
    ("items of a user", {"user": 7, "items": [3, 1, 2]}, _HISTORY),
    ("history and target", {"user": 7, "history": [3, 1], "target": 2}, _HISTORY),
]
WRONG_VALUES: list[Any] = [[], "", None, 5, {}, [5], ["a"], [{}], {"a": 1}, [[]]]
MEDIA_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "Bedrock image and caption",
        {"image-ref": "p/1.png", "caption": AWKWARD},
        {"image": "p/1.png", "caption": AWKWARD},
    ),
    ("Bedrock image and caption", {"image-ref": "p/1.png"}, {"image": "p/1.png"}),
    (
        "Hugging Face image folder",
        {"file_name": "p/1.png", "text": AWKWARD},
        {"image": "p/1.png", "caption": AWKWARD},
    ),
    (
        "Hugging Face image folder",
        {"file_name": "p/1.png", "label": "a", "width": 3},
        {"image": "p/1.png", "label": "a"},
    ),
    (
        "Hugging Face image folder",
        {"file_name": "1.wav", "label": 2},
        {"audio": "1.wav", "label": "2"},
    ),
    (
        '{"image", "caption"}',
        {"image": "p/1.png", "text": "t"},
        {"image": "p/1.png", "caption": "t"},
    ),
    (
        '{"image", "caption"}',
        {"image": "p/1.png", "text": "t", "caption": "c"},
        {"image": "p/1.png", "caption": "c"},
    ),
    (
        '{"image", "label"}',
        {"image": "p/1.png", "text": "t", "label": "a"},
        {"image": "p/1.png", "label": "a"},
    ),
    (
        "paths of media files",
        {"path": "p/1.png", "text": AWKWARD},
        {"image": "p/1.png", "caption": AWKWARD},
    ),
    (
        "paths of media files",
        {"path": "1.wav", "label": "a"},
        {"audio": "1.wav", "label": "a"},
    ),
    (
        "paths of media files",
        {"filename": "1.wav", "label": "a"},
        {"audio": "1.wav", "label": "a"},
    ),
    ("paths of media files", {"file": "p/1.png", "label": "a"}, {"image": "p/1.png", "label": "a"}),
    (
        "tokens and ner_tags",
        {"tokens": ["Rita", "sings"], "ner_tags": ["B-PER", "O"]},
        {"tokens": ["Rita", "sings"], "tags": ["B-PER", "O"]},
    ),
    (
        "text with entities",
        {"text": "Rita sings.", "entities": [[0, 4, "PER"]]},
        {"tokens": ["Rita", "sings", "."], "tags": ["B-PER", "O", "O"]},
    ),
    (
        "text with entities",
        {"text": "Rita", "spans": [{"start": 0, "end": 4, "label": "PER"}]},
        {"tokens": ["Rita"], "tags": ["B-PER"]},
    ),
    (
        "task of Label Studio",
        {
            "data": {"text": "Rita"},
            "annotations": [{"result": [{"value": {"start": 0, "end": 4, "labels": ["PER"]}}]}],
        },
        {"tokens": ["Rita"], "tags": ["B-PER"]},
    ),
    # A file name next to text is metadata.
    ('{"text"}', {"path": "book.md", "text": "t"}, {"text": "t"}),
    ('{"text"}', {"file_name": "book.txt", "text": "t"}, {"text": "t"}),
    ('{"text"}', {"file_name": 3, "text": "t"}, {"text": "t"}),
]


@pytest.mark.parametrize(("form", "record", "fields"), CASES + HISTORY_CASES)
def test_wrong_value_in_a_later_row_is_reported_or_read(
    tmp_path: Path, form: str, record: dict[str, Any], fields: dict[str, Any]
) -> None:
    wrong = [{**record, key: value} for key in record for value in WRONG_VALUES]
    reader = RowReader(write(tmp_path, record, *wrong))
    with suppress(DataError):
        reader.read_all()
    assert reader.recognition.form == form


@pytest.mark.parametrize(("form", "record", "own"), MEDIA_CASES)
def test_form_of_images(
    tmp_path: Path, form: str, record: dict[str, Any], own: dict[str, Any]
) -> None:
    (tmp_path / "p").mkdir()
    for name in ("p/1.png", "1.wav"):
        (tmp_path / name).write_bytes(b"not looked at")
    rows, recognized = recognize(write(tmp_path, record, {**record, "id": "other"}))
    assert [row.record() for row in rows] == [own, own]
    assert recognized.form == form
    if form.startswith(("Hugging", "paths")):
        assert not {"label", "text", "caption"} & {*recognized.unread}


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"image": "1.png", "caption": " "}, "field.empty"),
        ({"image": "1.png", "caption": 3}, "field.type"),
        ({"image-ref": 3, "caption": "c"}, "media.type"),
        ({"image-ref": "../1.png", "caption": "c"}, "media.outside"),
        ({"image": "1.png", "caption": "c", "label": "a"}, "row.ambiguous"),
        ({"image-ref": "1.png", "text": "c"}, "row.ambiguous"),
        ({"file_name": "2.png", "text": "c"}, "media.missing"),
    ],
)
def test_captions_are_checked(tmp_path: Path, record: dict[str, Any], rule: str) -> None:
    (tmp_path / "1.png").write_bytes(b"not looked at")
    assert {problem.rule for problem in problems_of(write(tmp_path, record))} == {rule}


def test_every_form_is_tried_and_the_table_is_sound() -> None:
    names = {name for name, *_ in CASES + MEDIA_CASES + HISTORY_CASES}
    assert {form.name for form in FORMS} <= names
    for form in FORMS:
        assert form.keys and not form.keys & form.without and not form.used & form.without
        record: dict[str, Any] = dict.fromkeys(form.keys, "x.png")
        choices = {"choices": ["x"], "answer": 0} if "choices" in form.keys else {}
        items = {"items": ["x"]} if "items" in form.keys else {}
        thread = {"answers": [{"text": "x", "votes": 1}]} if form.name.startswith("thread") else {}
        spans = {
            key: [[0, 1, "x"]] for key in form.keys - {"text"} if form.name == "text with entities"
        }
        task = {"data": {}, "annotations": []} if "data" in form.keys else {}
        assert forms_of(record | choices | items | thread | spans | task) == [form]


def test_names_of_the_file_are_used_in_messages(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": ""}, {"from": "gpt"}, {"value": "x"}]
    found = problems_of(write(tmp_path, {"conversations": turns}))
    assert [p.message for p in found] == [
        '"value" of message 1 is empty.',
        '"value" of message 2 is missing; the keys are "role".',
        '"from" of message 3 is missing; the keys are "value".',
        '"value" of message 3 is missing; the keys are "value".',
    ]
    found = problems_of(write(tmp_path, {"conversations": "x"}))
    assert found[0].message.startswith('"conversations" must be an array')
    found = problems_of(write(tmp_path, {"instruction": "a", "input": 3, "output": "b"}))
    assert found[0].message == '"instruction" must be a string, but is a number.'


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "f"},
            ]
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "f"}]},
        {"conversations": [{"from": None, "value": "q"}]},
        {"conversations": None},
        {"conversations": [1]},
        {"schemaVersion": "bedrock-conversation-2024", "messages": "x", "system": "s"},
        {
            "schemaVersion": "bedrock-conversation-2024",
            "messages": [{"role": "user", "content": [{"image": {}}]}],
        },
        {"instruction": None, "output": "b"},
        {"instruction": "a", "output": "b", "history": "x", "system": 3},
        {"instruction": "a", "output": "b", "history": [["x"]]},
        {"input": {"messages": []}},
        {"input": 3, "output": []},
        {"premise": "a", "hypothesis": "b", "label": 0.5},
        {"question": "a", "context": "c", "answers": {"text": ["x"]}},
        {"input": "x", "label": "y"},
        {"input": "x", "expected": "y"},
    ],
)
def test_rows_in_broken_forms_are_refused_with_rule(tmp_path: Path, record: dict[str, Any]) -> None:
    for problem in problems_of(write(tmp_path, record)):
        assert problem.rule in RULES
        assert problem.message and problem.advice


def test_a_form_may_have_a_system_prompt_in_some_rows_only(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"instruction": "a", "output": "b", "system": ""},
        {"instruction": "a", "output": "b", "system": "be kind"},
    )
    assert [type(row) for row in load_rows(path)] == [PromptCompletion, Conversation]


def test_rating_next_to_a_form_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a", "answer": "b", "rating": 3})
    assert load_rows(path)[0].record()["rating"] == 3.0


# --- names of columns ------------------------------------------------------------------------------


def test_columns_are_renamed_before_anything_is_recognized(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "x", "text": "whole", "a": "y", "id": 1})
    columns = {"prompt": "q", "completion": "a", "text": ""}
    (row,) = load_rows(path, columns)
    assert row == PromptCompletion(str(path), 1, "x", "y")
    (row,) = load_rows(path, {"text": "q"})
    assert row.record() == {"text": "x"}
    (row,) = load_prompts(path, columns)
    assert row.record() == {"prompt": "x", "expected": "y"}


def test_a_mapping_replaces_the_form(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "1 and 2", "output": "3", "kind": "sum"}
    path = write(tmp_path, alpaca)
    assert recognize(path)[1].unread == ("kind",)
    columns = {"prompt": "instruction", "completion": "output"}
    (problem,) = problems_of(path, columns)
    assert problem.rule == "row.ambiguous"
    assert load_rows(path, {**columns, "input": ""})[0].inputs() == ("add",)
    assert load_rows(path, {"prompt": "input", "completion": "output"})[0].inputs() == ("1 and 2",)


def test_unmapped_columns_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "x", "a": "y", "hint": "z", "id": 1}, {"q": "x", "a": "y", "b": 1})
    _, recognized = recognize(path, {"prompt": "q", "completion": "a"})
    assert recognized.unread == ("hint", "b")


def test_mapping_may_swap_columns_or_accept_standard_names(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "x", "completion": "y"})
    (row,) = load_rows(path, {"prompt": "completion", "completion": "prompt"})
    assert row.record() == {"prompt": "y", "completion": "x"}
    mapped = {"prompt": "question", "completion": "answer"}
    assert load_rows(path, mapped, accepts_own_keys=True) == load_rows(path)
    assert {each.rule for each in problems_of(path, mapped)} == {"column.missing"}


def test_mapped_column_is_missing_although_the_key_exists(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "x", "label": "a", "category": "b"})
    (problem,) = problems_of(path, {"label": "categroy"})
    assert problem.rule == "column.missing"
    assert "`data.columns.label=category`" in problem.advice


@pytest.mark.parametrize("load", [load_rows, load_inputs])
def test_column_to_ignore_must_exist(tmp_path: Path, load: Callable[..., object]) -> None:
    path = write(tmp_path, {"text": "x", "note": "a"}, {"text": "y"})
    assert load(path, {"note": ""})
    with pytest.raises(DataError) as caught:
        load(path, {"notes": ""})
    (problem,) = caught.value.problems
    assert problem.rule == "column.missing" and "`data.columns.note=`" in problem.advice


@pytest.mark.parametrize("load", [load_rows, load_inputs])
def test_column_to_ignore_may_be_in_one_file_of_a_folder(
    tmp_path: Path, load: Callable[..., object]
) -> None:
    (tmp_path / "a.csv").write_text("time,level,note\n1,2,3\n")
    (tmp_path / "b.csv").write_text("time,level\n1,2\n")
    assert load(tmp_path, {"note": ""})
    with pytest.raises(DataError) as caught:
        load(tmp_path, {"notes": ""})
    (problem,) = caught.value.problems
    assert problem.rule == "column.missing" and "`data.columns.note=`" in problem.advice


@pytest.mark.parametrize(("form", "record", "fields"), HISTORY_CASES)
def test_item_ids_are_histories(
    tmp_path: Path, form: str, record: dict[str, Any], fields: dict[str, Any]
) -> None:
    rows, recognized = recognize(write(tmp_path, record))
    assert [row.record() for row in rows] == [fields]
    assert recognized.form == form


def test_pairs_with_numbered_classes(tmp_path: Path) -> None:
    path = write(tmp_path, {"text_a": "x", "text_b": "y", "label": 2})
    (problem,) = problems_of(path)
    assert "`data.columns.premise=COLUMN`" in problem.advice
    (problem,) = problems_of(path, {"text": "text_b"})
    assert problem.rule == "row.ambiguous"
    (row,) = load_rows(path, {"premise": "text_a", "hypothesis": "text_b"})
    assert row.inputs() == ("x\n\ny",) and row.target() == "2"


@pytest.mark.parametrize("names", [*TEXT_PAIRS, ("premise", "hypothesis")])
def test_inputs_of_two_texts(tmp_path: Path, names: tuple[str, str]) -> None:
    one, other = names
    path = write(tmp_path, {one: "x", other: "y"}, {one: "x", other: "y", "label": "neutral"})
    assert [row.plain_text() for _, row in load_inputs(path)] == ["x\n\ny", "x\n\ny"]


def test_two_targets_name_the_settings_to_ignore_one(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "x", "label": "a", "rating": 3})
    (problem,) = problems_of(path)
    assert "`data.columns.rating=`" in problem.advice and "`data.columns.label=`" in problem.advice
    (row,) = load_rows(path, {"rating": ""})
    assert row.target() == "a"


def test_missing_mapped_column_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "x", "completion": "y"}, {"completion": "y"})
    (problem,) = problems_of(path, {"prompt": "q"})
    assert (problem.line, problem.rule) == (2, "column.missing")
    assert "`data.columns.prompt=q`" in problem.advice


def test_misspelt_mapping_key_suggests_correct_key(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "x", "a": "y"})
    (problem,) = problems_of(path, {"promt": "q", "completion": "a"})
    assert "`data.columns.prompt=q`" in problem.advice


def test_messages_contain_name_of_mapped_column(tmp_path: Path) -> None:
    (problem,) = problems_of(
        write(tmp_path, {"q": "", "a": "y"}), {"prompt": "q", "completion": "a"}
    )
    assert problem.message == '"q" is empty.'


# --- several files of one source -------------------------------------------------------------------


def test_files_of_source_share_a_form(tmp_path: Path) -> None:
    write(tmp_path, {"question": "a", "answer": "b", "id": 1}, name="a.jsonl")
    write(tmp_path, {"question": "c", "answer": "d", "id": 1}, name="b.jsonl")
    (tmp_path / "c.csv").write_text("question,answer\ne,f\n")
    rows, recognized = recognize(tmp_path)
    assert [row.inputs() for row in rows] == [("a",), ("c",), ("e",)]
    assert str(recognized) == "jsonl; csv, question and answer, 3 rows in 3 files"
    write(tmp_path, {"prompt": "a", "completion": "b"}, name="b.jsonl")
    (problem,) = problems_of(tmp_path)
    assert problem.file.endswith("b.jsonl") and problem.rule == "row.mixed_shapes"
    assert f"first row ({tmp_path / 'a.jsonl'}:1) is question and answer" in problem.message


def test_plain_text_files_are_a_row_each(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} \u2028\n")
    rows, recognized = recognize(tmp_path)
    assert [row.plain_text() for row in rows] == ["a.txt \u2028\n", "b.txt \u2028\n"]
    assert str(recognized) == 'text, {"text"}, 2 rows in 2 files'


def test_image_inputs_are_read_from_every_key(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "1.png")
    for key, name in (
        ("file_name", "metadata.jsonl"),
        ("image-ref", "a.jsonl"),
        ("image", "b.jsonl"),
        ("path", "c.jsonl"),
    ):
        record = {key: "1.png", "text": "yes"}
        (tmp_path / name).write_text(json.dumps(record) + "\n")
        ((found, row),) = load_inputs(tmp_path if key == "file_name" else tmp_path / name)
        (tmp_path / name).unlink()
        assert found == record and isinstance(row, BareImage)
        assert row.media.path == str(tmp_path / "1.png")


MARKED = [
    {"from": "human", "value": "<image>\nwhat?"},
    {"from": "gpt", "value": "a square"},
]
ASKED_OF_IMAGE = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "a square"},
]
TWO_MARKS = [{"role": "user", "content": "this <image> or <image>?"}, ASKED_OF_IMAGE[1]]


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"image": "1.png", "conversations": MARKED}, f"{IMAGE_MARK}what?"),
        ({"conversations": MARKED, "images": ["1.png"]}, f"{IMAGE_MARK}what?"),
        ({"messages": ASKED_OF_IMAGE, "image": ["1.png"]}, f"{IMAGE_MARK}what?"),
        ({"messages": TWO_MARKS, "image": ["1.png", "1.png"]}, "this {0} or {0}?"),
        ({"image": "1.png", "question": "what?", "answer": "a square"}, f"{IMAGE_MARK}what?"),
        ({"output": "a square", "instruction": "what?", "image": "1.png"}, f"{IMAGE_MARK}what?"),
        ({"prompt": "what? <image>", "completion": "a square", "images": "1.png"}, "what? {0}"),
    ],
)
def test_images_next_to_a_conversation(
    tmp_path: Path, record: dict[str, Any], content: str
) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "1.png")
    (row,), recognized = recognize(write(tmp_path, record))
    asked, reply = row.turns()
    assert asked.content == content.format(IMAGE_MARK)
    assert [media.path for media in row.images] == [str(tmp_path / "1.png")] * content.count(
        "{0}"
    ) or [str(tmp_path / "1.png")]
    assert reply.content == "a square" and recognized.unread == ()
    (prompt,) = load_prompts(tmp_path / "rows.jsonl")
    assert prompt.turns() == (asked,) and prompt.expected_reply() == "a square"


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"image": "2.png", "conversations": MARKED}, "media.missing"),
        ({"image": "2.png", "question": "what?", "answer": "a square"}, "media.missing"),
        ({"images": ["1.png", "1.png"], "conversations": MARKED}, "media.count"),
        ({"images": ["1.png"], "messages": TWO_MARKS}, "media.count"),
    ],
)
def test_missing_or_miscounted_images_are_refused(
    tmp_path: Path, record: dict[str, Any], rule: str
) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "1.png")
    assert {problem.rule for problem in problems_of(write(tmp_path, record))} == {rule}


def test_image_word_in_text_without_images(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path, {"prompt": "What does <image> do?", "completion": "a"}))
    assert row == PromptCompletion(row.file, 1, "What does <image> do?", "a")


def test_a_table_has_images_of_messages_in_a_column(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "1.png")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a square"},
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "images"], [*map(json.dumps, (turns, ["1.png"]))]])
    (row,) = load_rows(path)
    assert [media.path for media in row.images] == [str(tmp_path / "1.png")]
