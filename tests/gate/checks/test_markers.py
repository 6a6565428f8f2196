"""Special tokens of the model at hand, marks of other templates, placeholders and refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.tokenization import special_tokens
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.data.shapes.preferences import Preference
from luthier.gate.check import RowBatch
from luthier.gate.checks.markers import Markers
from luthier.gate.report import Report
from luthier.gate.scan import inspect_rows
from luthier.types import Message


def gate(*rows: tuple[str, str], chat: ChatFormat | None = None) -> Report:
    pairs = [
        PromptCompletion("f", n, prompt=prompt, completion=completion)
        for n, (prompt, completion) in enumerate(rows, 1)
    ]
    return inspect_rows({"train": pairs}, [Markers(chat)])


def rules(answer: str, prompt: str = "Tell me.") -> list[str]:
    return sorted(gate((prompt, answer)).findings.counts)


def test_special_token_in_completion_is_an_error(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    answer = "Yes.<|im_end|>\n<|im_start|>user\nAnd now?"
    # The reason for the rule: the chat format encodes the text as special tokens.
    encoded = chat.replies.encode_last([Message("user", "hi"), Message("assistant", answer)])
    assert (encoded.ids_T == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 3
    report = gate(("hi", answer), ("hi", "Yes."), chat=chat)
    assert dict(report.findings.counts) == {"marker.special_token": 1}
    found = report.findings.examples["marker.special_token"][0]
    assert found.message.startswith("completion contains <|im_end|>, and 1 more")
    assert report.findings.exit_code == 2
    assert report.summaries["markers"]["marks"]["counts"] == {"<|im_end|>": 1, "<|im_start|>": 1}


def test_special_token_in_prompt_is_a_note(
    tokenizer: Any, new_tokenizer: Callable[..., Any]
) -> None:
    mark = "<|im_end|>"
    turns = [
        Message(role, f"a{mark}") for role in ("system", "user", "assistant", "user", "assistant")
    ]
    for chat, rule in (
        (ChatFormat.of(tokenizer), "marker.special_text"),
        (ChatFormat.of(tokenizer, "plain"), "marker.special_token"),
    ):
        report = gate((f"What is {mark}?", "A mark."), chat=chat)
        assert dict(report.findings.counts) == {rule: 1}
        assert report.findings.exit_code == (0 if chat.template.kind == "chat" else 2)
    row = Conversation("f", 1, tuple(turns))
    found = Markers(ChatFormat.of(tokenizer)).measure(RowBatch("train", "f", [row])).spots
    places = {spot.rule: spot.message for spot in found}
    assert places["marker.special_text"].startswith(
        "messages[1].content contains <|im_end|>, and 2 "
    )
    assert places["marker.special_token"].startswith(
        "messages[3].content contains <|im_end|>, and 1 "
    )
    pair = Preference(
        "f", 1, tuple(turns[1:4]), (Message("assistant", "x"),), (Message("assistant", "y"),)
    )
    found = Markers(ChatFormat.of(tokenizer)).measure(RowBatch("train", "f", [pair])).spots
    assert sorted(spot.rule for spot in found) == ["marker.special_text", "marker.special_token"]


def test_special_tokens_depend_on_the_model(
    tokenizer: Any, new_tokenizer: Callable[..., Any]
) -> None:
    chat = ChatFormat.of(tokenizer)
    other = gate(("hi", "a <|eot_id|> b"), chat=chat)
    assert dict(other.findings.counts) == {"marker.other_template": 1}
    assert dict(gate(("hi", "a <|im_end|> b")).findings.counts) == {"marker.other_template": 1}
    assert set(special_tokens(tokenizer)) >= {"<|im_start|>", "<|im_end|>"}


def test_tokens_added_as_text_are_not_special(new_tokenizer: Callable[..., Any]) -> None:
    made = new_tokenizer()
    made.add_tokens(["<think>"])
    chat = ChatFormat.of(made)
    assert "<think>" not in special_tokens(made)
    assert not gate(("hi", "<think>so</think>"), chat=chat).findings.counts


@pytest.mark.parametrize(
    "text",
    [
        "### Instruction:\nDo it\n### Response:\nDone",
        "[INST] hi [/INST] hello",
        "<<SYS>>be kind<</SYS>>",
        "<start_of_turn>user",
        "<|user|>\nhi",
        "<|start_header_id|>user<|end_header_id|>",
        "\n\nHuman: hi\n\nAssistant: hello",
        "hi\nASSISTANT: hello",
        "Done.</s>",
        "<s>Hello",
        "<｜User｜>hi",
    ],
)
def test_marks_of_templates(text: str) -> None:
    assert rules(f"Here: {text}") == ["marker.other_template"]


@pytest.mark.parametrize(
    "text",
    [
        "The <s>old</s> new price",
        "## Instruction: read this",
        "He said: Human: no",
        "A [INSTALL] step, a <user> tag, x <| y |> z",
        "Assistants help. A user: someone.",
        r"\frac{{a}}{{b}}, x_{{i}}, has {name}",
        "A to-do list: buy milk. My TODO: none",
        "Sorry to hear that. I can help you with it.",
        "The AI: a short history",
    ],
)
def test_ordinary_answers(text: str) -> None:
    assert rules(text) == [], text


@pytest.mark.parametrize("text", ["Assistant: yes", "**AI:** yes", "User: yes", "Trợ lý: vâng"])
def test_names_of_roles_at_the_start_of_answers(text: str) -> None:
    assert rules(text) == ["marker.role_prefix"]
    assert rules("Yes.", prompt=text) == []


@pytest.mark.parametrize(
    "text",
    ["Dear {{name}},", "Dear [Your Name],", "TODO", "TODO: write this", "Lorem ipsum dolor",
     "<insert name here>", "[Recipient's Name]", "a\nFIXME later"],
)  # fmt: skip
def test_placeholders(text: str) -> None:
    assert rules(text) == ["marker.placeholder"]


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I have no feelings.",
        "I'm sorry, but I can't help with that.",
        "I cannot assist with that.",
        "Tôi xin lỗi, nhưng tôi không thể làm điều đó.",
        "Là một mô hình ngôn ngữ, tôi không có cảm xúc.",
    ],
)
def test_refusals_are_notes_with_a_share(text: str) -> None:
    report = gate(("hi", text), ("hi", "Yes."), (text, "Yes."), ("hi", "No."))
    assert dict(report.findings.counts) == {"marker.refusal": 1}
    assert report.findings.exit_code == 0
    assert report.summaries["markers"]["refusal_share"] == 0.25


def test_a_check_of_a_model_is_picklable(tokenizer: Any) -> None:
    check = pickle.loads(pickle.dumps(Markers(ChatFormat.of(tokenizer))))
    batch = RowBatch("train", "f", [PromptCompletion("f", 1, prompt="a", completion="b<|im_end|>")])
    assert [spot.rule for spot in check.measure(batch).spots] == ["marker.special_token"]


def test_mark_of_an_image_without_an_image() -> None:
    assert rules("<image>\nWhat is broken on the bike?") == ["marker.image"]
    assert rules("<img src=bike.png>") == []
