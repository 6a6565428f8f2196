"""Tests of reasoning marks: detection in templates, incremental splitting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinking_models import ASKS_ITSELF, IS_OPENED
from tokenizers import AddedToken

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.reasoning import (
    CANDIDATES,
    DecodedReply,
    ReasoningFormat,
    ReasoningMarks,
    ReasoningSplitter,
    split_reply,
)
from luthier.types import Message
from tokenizers_of_families import with_kwargs

THINK = ReasoningMarks("<think>", "</think>")
ASK = [Message("user", "Why? <think> </think>")]
TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}CONTENT{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUTS = TURN.replace("CONTENT", "{{ m.content.split('</think>')[-1] }}")
"""Template like DeepSeek-R1's first template, with a closing mark only."""
EMPTY = TURN.replace("CONTENT", "<think>\n\n</think>\n{{ m.content }}")
SWITCH = TURN.replace("CONTENT", "{{ m.content }}").replace(
    "assistant\n{% endif %}",
    "assistant\n{{ '<think>' if thinking else '</think>' }}{% endif %}",
)
"""Template like DeepSeek-V3.1's, with either mark in the prompt."""
BRACKETS = TURN.replace(
    "CONTENT", "{{ '[THINK]' ~ m.reasoning_content ~ '[/THINK]' }}{{ m.content }}"
)
ANY_NAME = CUTS.replace("think", "seed:thoughts")


def format_of(new_tokenizer: Callable[..., Any], template: str) -> ChatFormat:
    return ChatFormat.of(new_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "opening", "close"),
    [
        (ASKS_ITSELF, "<think>", "</think>"),
        (IS_OPENED, "<think>", "</think>"),
        (CUTS, "<think>", "</think>"),
        (EMPTY, "<think>", "</think>"),
        (SWITCH, "<think>", "</think>"),
        (BRACKETS, "[THINK]", "[/THINK]"),
        (ANY_NAME, "<seed:thoughts>", "</seed:thoughts>"),
    ],
)
def test_reasoning_marks_come_from_template(
    template: str, opening: str, close: str, new_tokenizer: Callable[..., Any]
) -> None:
    marks = format_of(new_tokenizer, template).replies.reasoning_marks
    assert marks is not None
    assert (marks.open, marks.close) == (opening, close)


@pytest.mark.parametrize(
    "template",
    [
        TURN.replace("CONTENT", "{{ m.content }}"),
        TURN.replace("CONTENT", "<answer>{{ m.content }}</answer>"),
        TURN.replace("CONTENT", "<answer>{{ m.content }}</answer>").replace(
            "assistant\n{% endif %}", "assistant\n<answer>{% endif %}"
        ),
        TURN.replace("CONTENT", "{{ m.content }}{# it never writes </think> #}"),
        "{{ raise_exception('No </think> for anybody') }}",
        "{% for m in messages %}</think>{% endfor",
        "{{ '</think>' * 200000 }}",
    ],
)
def test_template_without_reasoning_has_no_marks(
    template: str, new_tokenizer: Callable[..., Any]
) -> None:
    assert format_of(new_tokenizer, template).replies.reasoning_marks is None


def test_only_chat_templates_have_marks(new_tokenizer: Callable[..., Any]) -> None:
    chat = format_of(new_tokenizer, ASKS_ITSELF)
    assert chat.with_template("plain").replies.reasoning_marks is None
    many = "".join(f"</x{n}>" for n in range(2 * CANDIDATES))
    assert format_of(new_tokenizer, f"{{# {many} #}}{CUTS}").replies.reasoning_marks is None


def test_prompt_decides_if_reasoning_is_open(new_tokenizer: Callable[..., Any]) -> None:
    opens, asks = format_of(new_tokenizer, IS_OPENED), format_of(new_tokenizer, ASKS_ITSELF)
    assert asks.replies.reasoning_after(asks.encode_prompt(ASK)) == ReasoningFormat(
        THINK, is_open=False
    )
    assert opens.replies.reasoning_after(opens.encode_prompt(ASK)) == ReasoningFormat(
        THINK, is_open=True
    )
    for chat in (opens, asks):
        quiet = chat.encode_prompt(ASK, (), {"enable_thinking": False})
        assert chat.replies.reasoning_after(quiet) is None
        stored = with_kwargs(chat, {"enable_thinking": False})
        assert stored.replies.reasoning_after(stored.encode_prompt(ASK)) is None
    switched = format_of(new_tokenizer, SWITCH)
    assert switched.replies.reasoning_after(switched.encode_prompt(ASK)) is None
    thinking = switched.encode_prompt(ASK, (), {"thinking": True})
    assert switched.replies.reasoning_after(thinking) == ReasoningFormat(THINK, is_open=True)


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_mark_tokens_survive_decoding(
    special: bool, new_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = new_tokenizer(ASKS_ITSELF)
    tokenizer.add_tokens([AddedToken(m, special=special) for m in ("<think>", "</think>")], special)
    chat = ChatFormat.of(tokenizer)
    marks = chat.replies.reasoning_marks
    assert marks is not None
    assert [marks.open_id, marks.close_id] == tokenizer.convert_tokens_to_ids(
        ["<think>", "</think>"]
    )
    assert len(marks.special) == (2 if special else 0)
    text = "<think>\nhm 日本\n</think>\n\nblue"
    ids = chat.text_tokenizer.tokens(text + "<|im_end|>", first=False).tolist()
    assert chat.replies.decode(ids) == text
    prompt_T = chat.encode_prompt(ASK)
    assert chat.replies.decode_reply(prompt_T, ids) == DecodedReply("hm 日本", "blue")
    assert chat.replies.decode_reply(np.array([], dtype=np.int64), ids).text == "blue"


@pytest.mark.parametrize(
    ("written", "begun", "reasoning", "said"),
    [
        ("<think>\na\n</think>\n\nb", False, "a", "b"),
        ("\n <think>a</think>b", False, "a", "b"),
        ("a\n</think>\n\nb", True, "a", "b"),
        ("<think>\na</think>b", True, "a", "b"),
        ("\n</think>\n\nb", True, "", "b"),
        ("<think></think>b", False, "", "b"),
        ("<think>a</think> \n\n  b\n", False, "a", "  b\n"),
        ("<think>a</think> b", False, "a", " b"),
        ("<think>a</think>b</think><think>c", False, "a", "b</think><think>c"),
        ("<think>a <b> </ think> <think></think>b", False, "a <b> </ think> <think>", "b"),
        ("<think>a", False, "a", ""),
        ("<think>a \n</thi", False, "a \n</thi", ""),
        ("a", True, "a", ""),
        (" \n", True, "", ""),
        ("<think>a</think>\n", False, "a", ""),
        ("b", False, "", "b"),
        (" \n<thin", False, "", " \n<thin"),
        ("\n b <think>a</think>", False, "", "\n b <think>a</think>"),
        ("", False, "", ""),
    ],
)
def test_reasoning_and_answer(written: str, begun: bool, reasoning: str, said: str) -> None:
    way = ReasoningFormat(THINK, begun)
    assert split_reply(way, written) == DecodedReply(reasoning, said)
    assert split_reply(None, written) == DecodedReply("", written)
    splitter = ReasoningSplitter(way)
    for letter in written:
        splitter.feed(letter)
    splitter.end()
    if said:
        assert splitter.answer_start is not None
        assert written[splitter.answer_start :] == said
    else:
        assert splitter.answer_start is None or not written


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["<think>", "</think>", "<", "/think>", "\n", " "]), st.text(max_size=3)
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.booleans())
def test_reasoning_splitter_is_independent_of_piece_boundaries(
    pieces: list[str], begun: bool
) -> None:
    way = ReasoningFormat(THINK, begun)
    whole = split_reply(way, "".join(pieces))
    splitter = ReasoningSplitter(way)
    parts = [*(splitter.feed(piece) for piece in pieces), splitter.end()]
    assert "".join(part[0] for part in parts) == whole.reasoning
    assert "".join(part[1] for part in parts) == whole.text
    said = [place for place, part in enumerate(parts) if part[1]]
    assert not said or not any(part[0] for part in parts[said[0] + 1 :])


def test_splitter_holds_back_only_possible_marks() -> None:
    splitter = ReasoningSplitter(ReasoningFormat(THINK, is_open=False))
    assert splitter.feed("<th") == ("", "")
    assert splitter.feed("ink>one </th") == ("one", "")
    assert splitter.feed("e two") == (" </the two", "")
    assert splitter.feed("</think>three") == ("", "three")
    assert splitter.feed("</think>") == ("", "</think>")
