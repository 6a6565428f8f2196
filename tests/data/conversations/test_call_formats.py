"""Tests of tool calls in the notations of model families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from luthier.data.conversations.call_formats import ARGUMENTS, FORMATS, MARKS, NAME
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.tools import parse_calls, split_cut_calls
from luthier.inference.constraints import Constraints
from luthier.inference.tool_calls import CallSplitter, form_of_calls
from luthier.types import Tool

TOOLS = [Tool("weather"), Tool("geo.find")]
OSLO = {"city": "Oslo", "days": 3}
JSON = '{"city": "Oslo", "days": 3}'
REPLIES = {
    "LFM2": "<|tool_call_start|>[weather(city='Oslo', days=3)]<|tool_call_end|>",
    "Gemma 4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>',
    "FunctionGemma": (
        "<start_function_call>call:weather{city:<escape>Oslo<escape>,days:3}<end_function_call>"
    ),
    "gpt-oss": f" to=functions.weather<|channel|>commentary json<|message|>{JSON}",
    "Mistral": f"[TOOL_CALLS]weather[ARGS]{JSON}",
    "Granite and Phi-4": f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]<|/tool_call|>',
    "DeepSeek V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "Kimi K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>"
    ),
}
VARIANTS = {
    "two of LFM2": "<|tool_call_start|>[weather(city='Oslo', days=3), geo.find()]<|tool_call_end|>",
    "LFM2 in JSON": (
        f'<|tool_call_start|>[{{"name": "weather", "arguments": {JSON}}}]<|tool_call_end|>Wait.'
    ),
    "gpt-oss after reasoning": (
        "<|start|>assistant<|channel|>commentary to=functions.weather json<|message|>" + JSON
    ),
    "gpt-oss with a preamble": (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.weather <|constrain|>json<|message|>" + JSON
    ),
    "list of Mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}, "id": "a"}}]',
    "Mistral with an id": f"[TOOL_CALLS]weather[CALL_ID]a1b2[ARGS]{JSON}",
    "DeepSeek V3.1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
    ),
}


def test_each_format_has_a_reply() -> None:
    assert REPLIES.keys() == FORMATS.keys()


@pytest.mark.parametrize("text", [*REPLIES.values(), *VARIANTS.values()])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_streamed_calls(text: str, size: int) -> None:
    splitter = CallSplitter(TOOLS)
    said = f"I look.{text}" if text.startswith("<") else text
    shown = "".join(splitter.feed(said[at : at + size]) for at in range(0, len(said), size))
    left, calls = splitter.end()
    words = "Wait." if "Wait." in text else "I look." if "I look." in text else ""
    assert shown + left == said.removesuffix(text) + words
    assert (calls[0].name, calls[0].arguments) == ("weather", OSLO)
    assert [call.name for call in calls[1:]] == ["geo.find"] * ("geo" in text)


@pytest.mark.parametrize("name", REPLIES)
def test_cut_calls_are_not_run(name: str) -> None:
    text = REPLIES[name]
    for end in range(text.index("Oslo"), text.index("3") + 1):
        assert split_cut_calls(text[:end], TOOLS) == ([], "", True)
        assert parse_calls(text[:end], TOOLS, declared_only=True) == []
    calls, words, is_cut = split_cut_calls(text, TOOLS)
    assert (len(calls), words.strip(), is_cut) == (1, "", False)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<|tool_call_start|>[weather(a=True, b=None, c=[1.5, {'x': true}])]", [True, None, 1.5]),
        ('<|tool_call>call:weather{a:true,b:None,c:[1.5,{x:true}]}<tool_call|>', [True, None, 1.5]),
        (
            '<|tool_call>call:weather{a:<|"|>x: {"y", None<|"|>,b:{d e:1},c:[<|"|>,z:<|"|>]}',
            ['x: {"y", None', {"d e": 1}, ",z:"],
        ),
        ('<|tool_call_start|>[weather(a="it\'s (so)", b=-1, c=["]"])]', ["it's (so)", -1, "]"]),
    ],
)  # fmt: skip
def test_values_of_arguments(text: str, arguments: list[Any]) -> None:
    (call,) = parse_calls(text, TOOLS)
    assert [call.arguments["a"], call.arguments["b"], call.arguments["c"][0]] == arguments


@pytest.mark.parametrize(
    "call",
    ["weather('Oslo')", "weather(a=b'x')", "weather(a=f())", "weather(**x)", "weather", "1("],
)
def test_python_expression_without_call_is_text(call: str) -> None:
    assert parse_calls(f"<|tool_call_start|>[{call}]<|tool_call_end|>", TOOLS) == []


def test_deeply_nested_python_is_text() -> None:
    for opening in ("(" * 50_000, "[" * 50_000, "-" * 50_000):
        assert parse_calls(f"<|tool_call_start|>[weather(a={opening})]", TOOLS) == []


@pytest.mark.parametrize("name", REPLIES)
def test_forced_call_in_form_of_family(name: str, new_tokenizer: Callable[..., Any]) -> None:
    special = ("<|end|>", *(mark for mark in sorted(MARKS) if mark.startswith(("<", "["))))
    opens = FORMATS[name].opens[0]
    template = (
        "{{ tools }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{# " + opens + " #}"
    )
    tokenizer = new_tokenizer(template, special, "<|end|>")
    chat = ChatFormat.of(tokenizer)
    form = form_of_calls(chat)
    cities = Tool("geo.find", "", {"type": "object", "properties": {"city": {"type": "string"}}})
    for tool in (*TOOLS[:1], cities):
        written = form.replace(NAME, tool.name).replace(ARGUMENTS, '{"city": "Oslo"}')
        matcher = Constraints(chat, len(tokenizer)).calls([TOOLS[0], cities], form)
        ids = tokenizer.encode(written, add_special_tokens=False)
        for token in ids:
            assert matcher.allowed_mask(len(tokenizer))[token]
            matcher.accept_token(token)
        splitter = CallSplitter([TOOLS[0], cities], forced=True)
        assert splitter.feed(chat.replies.decode(ids)) == ""
        left, (call,) = splitter.end()
        assert (left.strip(), call.name, call.arguments) == ("", tool.name, {"city": "Oslo"})


@pytest.mark.parametrize("name", REPLIES)
def test_marks_stay_in_decoded_replies(name: str, new_tokenizer: Callable[..., Any]) -> None:
    special = ("<|end|>", *(mark for mark in sorted(MARKS) if mark in REPLIES[name]))
    template = "{{ tools }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    chat = ChatFormat.of(new_tokenizer(template, special, "<|end|>"))
    ids = chat.tokenizer.encode(REPLIES[name] + "<|end|>", add_special_tokens=False)
    assert chat.replies.decode(ids) == REPLIES[name]
    plain = ChatFormat.of(new_tokenizer(template.replace("tools", "x"), special, "<|end|>"))
    assert not any(mark in plain.replies.decode(ids) for mark in special)
