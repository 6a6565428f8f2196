"""Tools in prompts, with and without template support, and tool calls in replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from luthier.data.conversations.call_formats import call_form
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.tools import parse_calls, supports_tools
from luthier.inference.constraints import Constraints
from luthier.inference.inference import Chat, InferenceRefused
from luthier.inference.tool_calls import CallSplitter, encode, form_of_calls
from luthier.types import Message, Tool, ToolCall

WEATHER = Tool("weather", "Tells it.", {"type": "object", "properties": {"city": {}}})
CALL = ToolCall("tooluse_1", "weather", {"city": "Róma"})
TALK = (
    Message("system", "Be kind."),
    Message("user", "And in Rome?"),
    Message("assistant", calls=(CALL,)),
    Message("tool", "sun", call_id="tooluse_1"),
    Message("user", "Sure?"),
)
HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.name }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


def text(chat: ChatFormat, asked: Chat) -> str:
    return str(chat.tokenizer.decode(encode(chat, asked).tolist()))


def test_template_with_tools_renders_tool_list(new_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat.of(new_tokenizer(HERMES, SPECIAL, "<|im_end|>"))
    assert supports_tools(chat.template.text) and form_of_calls(chat).startswith("<tool_call>")
    found = text(chat, Chat(TALK, (WEATHER,)))
    listed = found[len("<tools>") : found.index("</tools>")]
    function = json.loads(listed)[0]["function"]
    assert (function["name"], function["description"]) == ("weather", "Tells it.")
    assert function["parameters"] == dict(WEATHER.parameters)
    assert '<tool_call>weather{"city": "R' in found
    assert "sun(weather)" in found
    assert "<tools>" not in text(chat, Chat(TALK[:2], (WEATHER,), "none"))


def test_template_without_tools_gets_tools_as_text(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    assert not supports_tools(chat.template.text)
    found = text(chat, Chat(TALK, (WEATHER,)))
    assert found.count("<|im_start|>system\n") == 1
    assert (
        json.dumps({"name": "weather", "arguments": {"city": "Róma"}}, ensure_ascii=False) in found
    )


def test_prompt_without_tools_matches_training_prompt(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    messages = [Message("system", "Be kind."), Message("user", "Hi")]
    turns = (Message("system", "Be kind."), Message("user", "Hi"))
    assert encode(chat, Chat(turns)).tolist() == chat.encode_prompt(messages).tolist()
    plain = ChatFormat.of(tokenizer, "plain")
    assert encode(plain, Chat(turns[1:])).tolist() == plain.encode_prompt(messages[1:]).tolist()
    for wrong in (Chat(turns), Chat(())):
        with pytest.raises(InferenceRefused):
            encode(plain, wrong)


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', 1),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', 1),
        ('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>' * 2, 2),
        ('[{"name": "weather", "arguments": {}}]', 1),
        (
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
            1,
        ),
        ("<tool_call>weather</tool_call><tool_call>other</tool_call>", 0),
        ("<tool_call>\n<function=weather>\n</function>\n</tool_call>", 1),
        ("<tool_call><function=weather><parameter=city>\nOslo</function></tool_call>", 0),
        ("<tool_call>weather<arg_key>city</arg_key>Oslo</tool_call>", 0),
        ("<tool_call>weather" + "<arg_key>" * 50_000, 0),
        ('{"name": "other", "arguments": {}}', 0),
        ('{"name": "weather", "arguments": 3}', 0),
        ('{"name": "weather", "argu', 0),
        ('{"answer": 42}', 0),
        ("It is sunny.", 0),
        ("A list: [1] and {x}", 0),
    ],
)
def test_calls_and_text_are_separated(written: str, calls: int) -> None:
    for size in (1, 3, 1000):
        splitter = CallSplitter([WEATHER])
        shown = ""
        for start in range(0, len(written), size):
            shown += splitter.feed(written[start : start + size])
        left, found = splitter.end()
        assert len(found) == calls == len(parse_calls(written, [WEATHER], declared_only=True))
        assert shown + left == ("" if calls else written)
        assert len({call.id for call in found}) == calls


ONE = '{"name": "weather", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("written", "calls", "incomplete"),
    [
        (ONE[:-1], 0, True),
        (ONE[:30], 0, True),
        (ONE[:12], 0, True),
        (ONE[:4], 0, True),
        ("{", 0, True),
        (ONE, 1, False),
        (f"[{ONE}]", 1, False),
        (f"[{ONE}", 1, True),
        (f"[{ONE}, ", 1, True),
        (f"[{ONE}, {ONE[:20]}", 1, True),
        (f"<tool_call>{ONE}", 1, False),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE[:9]}", 1, True),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>", 1, True),
        (f"[so] <tool_call>{ONE}</tool_call>", 1, False),
        ("<tool_call>", 0, True),
        ("<tool_call>weather", 0, True),
        ("<tool_call>weather</tool_call>", 1, False),
        ("<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>", 0, True),
        ('{"name": "Oslo", "is', 0, False),
        ('{"answer": 4', 0, False),
        ('{"answ', 0, False),
        ("[1, 2", 0, False),
        ("[", 0, False),
        (f"{ONE} and", 0, False),
        (f"[{ONE}] and", 0, False),
        ('{"name": "other", "arguments": {}}', 0, False),
        ("It is <tool", 0, False),
        ("{" * 100_000, 0, False),
        ("[" * 100_000, 0, False),
        ('{"arguments":' * 100_000, 0, False),
    ],
)
def test_call_cut_by_token_limit_is_not_shown(written: str, calls: int, incomplete: bool) -> None:
    """A complete call is a call, and text without a call is text."""
    for size in (1, 7, 1_000_000):
        if len(written) // size > 10_000:
            continue
        splitter = CallSplitter([WEATHER])
        shown = ""
        for start in range(0, len(written), size):
            shown += splitter.feed(written[start : start + size])
        left, found = splitter.end(cut=True)
        assert (len(found), splitter.incomplete) == (calls, incomplete)
        words = "[so] " if written.startswith("[so]") else ""
        assert shown + left == (words if calls or incomplete else written)


def test_cut_forced_call_gives_no_text() -> None:
    for written in ("", "<", "<tool_c", '{"', ONE[:-3]):
        splitter = CallSplitter([WEATHER], forced=True)
        assert splitter.feed(written) + splitter.end(cut=True)[0] == ""
        assert splitter.incomplete


def test_cut_schema_json_is_text() -> None:
    splitter = CallSplitter([WEATHER], structured=True)
    assert splitter.feed(ONE[:30]) + splitter.end(cut=True)[0] == ONE[:30]
    assert not splitter.incomplete


def test_text_before_call_is_streamed() -> None:
    splitter = CallSplitter([WEATHER])
    assert splitter.feed("Let me see. <tool") == "Let me see. "
    assert splitter.feed('_call>{"name": "weather", "arguments": {}}</tool_call>') == ""
    left, calls = splitter.end()
    assert (left, calls[0].name) == ("", "weather")


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("written", "words"),
    [
        (f"<tool_call>{ONE}</tool_call> I look.", " I look."),
        (f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>\n", ""),
        (f"[1] <tool_call>{ONE}</tool_call>And<tool_call>{ONE}</tool_call>so.", "[1] Andso."),
        ("Hm.<tool_call><function=weather></function></tool_call> Wait.", "Hm. Wait."),
        (f"<tool_call>{ONE}\n<tool_call>{ONE}</tool_call>End", "End"),
    ],
)
def test_text_next_to_calls_is_shown(written: str, words: str, cut: bool) -> None:
    for size in (1, 7, 1000):
        splitter = CallSplitter([WEATHER])
        pieces = [written[start : start + size] for start in range(0, len(written), size)]
        shown = "".join(map(splitter.feed, pieces))
        left, calls = splitter.end(cut)
        assert len(calls) == written.count("<tool_call>") and not splitter.incomplete
        assert shown + left == words


def test_grammar_of_a_call_between_tags(tokenizer: Any) -> None:
    chat = ChatFormat.of(tokenizer)
    form = call_form("<tool_call>")
    constraints = Constraints(chat, len(tokenizer))
    matcher = constraints.calls([WEATHER], form)
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": 3}}\n</tool_call>'
    for token in tokenizer.encode(written, add_special_tokens=False):
        assert matcher.allowed_mask(len(tokenizer))[token]
        matcher.accept_token(token)
    assert matcher.is_finished
    first = constraints.calls([WEATHER], form).copy().allowed_mask(len(tokenizer))
    assert first.sum() >= 1
    assert not first[tokenizer.encode("x")[0]]
