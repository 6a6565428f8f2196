"""Tests of tool calls and reasoning with shortened templates of thirteen families.

The training tokens start with the served prompt, byte for byte.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.reasoning import ReasoningMarks
from luthier.data.conversations.tools import (
    calls_as_text,
    missing_from,
    parse_calls,
    template_turns,
)
from luthier.errors import RecipeError, RowRefused
from luthier.types import Message, Tool, ToolCall
from tokenizers_of_families import with_kwargs

IM = ("<|im_start|>", "<|im_end|>")
CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}# Tools\n<tools>{% for tool in tools %}\n"
    "{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
QWEN_RESULTS = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
QWEN25 = (
    QWEN_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}" + QWEN_RESULTS + "{% elif "
    "m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}" + QWEN_CALLS + "<|im_end|>\n"
    "{% endif %}{% endfor %}" + CHATML_END
)
QWEN3 = (
    QWEN_TOOLS + "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    + QWEN_RESULTS
    + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}<think>\n"
    "{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}{{ m.content }}"
    + QWEN_CALLS
    + "<|im_end|>\n{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
HERMES = (
    "{% if tools %}<|im_start|>system\nYou may call functions: <tools>{{ tools | tojson }}</tools>"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n"
    '{"name": "{{ m.name }}", "content": {{ m.content | tojson }}}\n</tool_response>'
    "{% else %}{{ m.content }}{% endif %}" + QWEN_CALLS + "<|im_end|>\n{% endfor %}" + CHATML_END
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}" + CHATML_END
)
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA31 = (
    "<|begin_of_text|>{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Environment: ipython\n{% for tool in tools %}{{ tool | tojson }}\n\n{% endfor %}<|eot_id|>"
    "{% endif %}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>"
    "\n\n{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_SPECIAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
MISTRAL = (
    "<s>{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == last %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs have 9 characters!') }}"
    '{% endif %}{"name": "{{ call.function.name }}", "arguments": '
    '{{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{{ ", " if not loop.last }}'
    "{% endfor %}]</s>{% elif m.role == 'assistant' %} {{ m.content }}</s>{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% else %}{{ raise_exception('Only user, assistant and tool roles!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA_SPECIAL = ("<bos>", "<start_of_turn>", "<end_of_turn>")
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|tool_call|>",
               "<|/tool_call|>", "<|tool_response|>", "<|end|>")  # fmt: skip
PHI4_MINI = (
    "{% for m in messages %}{% if loop.first and tools %}<|system|>"
    "{{ m.content if m.role == 'system' }}<|tool|>{{ tools | tojson }}<|/tool|><|end|>{% endif %}"
    "{% if m.role == 'tool' %}<|tool_response|>{{ m.content }}<|end|>"
    "{% elif m.role != 'system' or not tools %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>[{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ ', ' if not loop.last }}{% endfor %}]<|/tool_call|>{% endif %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GRANITE_SPECIAL = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
GRANITE = (
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}"
    "<|end_of_text|>\n{% endif %}{% for m in messages %}<|start_of_role|>"
    "{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<|tool_call|>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
DEEPSEEK_SPECIAL = ("<|User|>", "<|Assistant|>", "<|end▁of▁sentence|>", "<|tool▁calls▁begin|>",
                    "<|tool▁call▁begin|>", "<|tool▁sep|>", "<|tool▁call▁end|>",
                    "<|tool▁calls▁end|>", "<|tool▁output▁begin|>", "<|tool▁output▁end|>")  # fmt: skip
DEEPSEEK = (
    "{% if tools %}## Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% elif m.role == 'tool' %}"
    "<|tool▁output▁begin|>{{ m.content }}<|tool▁output▁end|>{% else %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|Assistant|>{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<|tool▁calls▁begin|>{% for call in m.tool_calls %}<|tool▁call▁begin|>"
    "{{ call.type }}<|tool▁sep|>{{ call.function.name }}\n```json\n"
    "{{ call.function.arguments | tojson }}\n```<|tool▁call▁end|>{% endfor %}"
    "<|tool▁calls▁end|>{% endif %}<|end▁of▁sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|Assistant|>{% endif %}"
)
GLM_SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
GLM45 = (
    "{% if tools %}<|system|>\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "</tools>{% endif %}{% set ns = namespace(asked=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>{% elif m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.index0 > ns.asked %}"
    "\n<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ '\n' + m.content if m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>"
    "{{ call.function.name }}{% for name, value in call.function.arguments | items %}"
    "\n<arg_key>{{ name }}</arg_key>\n<arg_value>"
    "{{ value if value is string else value | tojson }}</arg_value>{% endfor %}\n</tool_call>"
    "{% endfor %}<|endoftext|>{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QWEN3_CODER = (
    QWEN_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}" + QWEN_RESULTS + "{% elif "
    "m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    "<function={{ call.function.name }}>\n"
    "{% for name, value in call.function.arguments | items %}<parameter={{ name }}>\n"
    "{{ value | tojson if value is mapping or (value is sequence and value is not string) else value }}"
    "\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}" + CHATML_END
)
COMMAND_SPECIAL = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>",
                   "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")  # fmt: skip
COMMAND_R = (
    "{% if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>## Available Tools\n{{ tools | tojson }}"
    "<|END_OF_TURN_TOKEN|>{% endif %}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'tool' %}<|SYSTEM_TOKEN|><results>\n{{ m.content }}\n</results>"
    "{% else %}<|{{ {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] }}_TOKEN|>"
    "{{ m.content }}{% if m.tool_calls %}Action: ```json\n[{% for call in m.tool_calls %}"
    '{"tool_name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
    "{{ ', ' if not loop.last }}{% endfor %}]```{% endif %}{% endif %}<|END_OF_TURN_TOKEN|>"
    "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with the names of unsupported conversations."""

    template: str
    special: tuple[str, ...]
    end: str
    refuses: frozenset[str] = frozenset()


def refusing(*names: str) -> frozenset[str]:
    return frozenset(names)


THOUGHTS = ("thought", "thought, then call", "thoughts of two turns")
FAMILIES = {
    "Qwen2.5": Family(QWEN25, IM, "<|im_end|>", refusing(*THOUGHTS)),
    "Qwen3": Family(QWEN3, IM, "<|im_end|>"),
    "Hermes": Family(HERMES, IM, "<|im_end|>", refusing(*THOUGHTS)),
    "SmolLM2": Family(SMOLLM2, IM, "<|im_end|>", refusing(*THOUGHTS)),
    "Llama 3.1": Family(
        LLAMA31, LLAMA_SPECIAL, "<|eot_id|>", refusing(*THOUGHTS, "text and call", "two calls")
    ),
    "Mistral": Family(
        MISTRAL, MISTRAL_SPECIAL, "</s>", refusing(*THOUGHTS, "text and call", "system")
    ),
    "Gemma": Family(
        GEMMA, GEMMA_SPECIAL, "<end_of_turn>",
        refusing(*THOUGHTS, "system", "call", "text and call", "two calls", "call in the middle"),
    ),
    "Phi-4-mini": Family(PHI4_MINI, PHI_SPECIAL, "<|end|>", refusing(*THOUGHTS)),
    "Granite": Family(GRANITE, GRANITE_SPECIAL, "<|end_of_text|>", refusing(*THOUGHTS)),
    "DeepSeek": Family(DEEPSEEK, DEEPSEEK_SPECIAL, "<|end▁of▁sentence|>", refusing(*THOUGHTS)),
    "GLM-4.5": Family(GLM45, GLM_SPECIAL, "<|endoftext|>"),
    "Qwen3-Coder": Family(QWEN3_CODER, IM, "<|im_end|>", refusing(*THOUGHTS)),
    "Command R": Family(COMMAND_R, COMMAND_SPECIAL, "<|END_OF_TURN_TOKEN|>", refusing(*THOUGHTS)),
}  # fmt: skip

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = (Tool("weather", "Tells the weather.", CITY), Tool("clock", "Tells the time.", CITY))
ASK = Message("user", 'What is it like in "Łódź"?')
ROME = ToolCall("tooluse_Zk3", "weather", {"city": 'Łódź "north"', "days": 2})
TIME = ToolCall("tooluse_b81", "clock", {"city": "Rome", "exact": True})
SUN = Message("tool", '{"sky": "clear"}', call_id=ROME.id)
NOON = Message("tool", "12:00", call_id=TIME.id)
ANSWER = Message("assistant", "Clear.")
CONVERSATIONS: dict[str, tuple[tuple[Message, ...], tuple[Tool, ...]]] = {
    "words": ((ASK, ANSWER, Message("user", "Sure?"), Message("assistant", "Yes.")), ()),
    "system": ((Message("system", "Be brief."), ASK, ANSWER), ()),
    "call": ((ASK, Message("assistant", calls=(ROME,))), TOOLS),
    "text and call": ((ASK, Message("assistant", "Let me look.", calls=(ROME,))), TOOLS),
    "two calls": (
        (ASK, Message("assistant", calls=(ROME, TIME)), SUN, NOON, ANSWER), TOOLS,
    ),
    "call in the middle": (
        (ASK, Message("assistant", calls=(ROME,)), SUN, ANSWER, Message("user", "Sure?"),
         Message("assistant", "Yes.")), TOOLS,
    ),
    "thought": ((ASK, Message("assistant", "Clear.", reasoning="It is May.")), ()),
    "thought, then call": (
        (ASK, Message("assistant", calls=(ROME,), reasoning="I must look."), SUN,
         Message("assistant", "Clear.", reasoning="It says so.")), TOOLS,
    ),
    "thoughts of two turns": (
        (ASK, Message("assistant", "Clear.", reasoning="It is May."), Message("user", "Sure?"),
         Message("assistant", "Yes.", reasoning="I looked.")), (),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def chats(new_tokenizer: Callable[..., Any]) -> dict[str, ChatFormat]:
    return {
        name: ChatFormat.of(new_tokenizer(family.template, family.special, family.end))
        for name, family in FAMILIES.items()
    }


def learned_parts(chat: ChatFormat, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> Any:
    """Return the ids of the last sequence, the ids before each learned part, and the parts' text."""
    prompts, texts = [], []
    for encoded in chat.replies.encode(messages, tools=tools):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.learned_T, [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            prompts.append(encoded.ids_T[:start].tolist())
            texts.append(chat.tokenizer.decode(encoded.ids_T[start:end].tolist()))
    return encoded, prompts, texts


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_continues_served_prompts_with_tools(
    family: str, conversation: str, chats: dict[str, ChatFormat]
) -> None:
    chat, (messages, tools) = chats[family], CONVERSATIONS[conversation]
    if conversation in FAMILIES[family].refuses:
        with pytest.raises((RowRefused, RecipeError)) as refused:
            chat.replies.encode_last(messages, tools=tools)
        assert "template" in str(refused.value)
        return
    encoded, before, texts = learned_parts(chat, messages, tools)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    prompts = {
        len(ids): ids.tolist()
        for ids in (chat.encode_prompt(messages[:index], tools) for index in answers)
    }
    assert len(texts) == len(answers)
    for written in before:
        block = re.search(r"<think>\s*</think>\s*$", chat.tokenizer.decode(written))
        if block:  # an empty reasoning block of the template is input, not learned
            written = written[: -len(chat.text_tokenizer.tokens(block[0], first=False))]
        assert prompts[len(written)] == written
    last = messages[answers[-1]]
    assert texts[-1].endswith(FAMILIES[family].end)
    for part in (last.content, last.reasoning, *(call.name for call in last.calls)):
        assert part in texts[-1]
    assert not any(re.search(r"<think>\s*</think>", text) for text in texts)
    whole = chat.tokenizer.decode(encoded.ids_T.tolist())
    assert all(tool.name in whole for tool in tools)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_disabled_thinking_trains_after_empty_reasoning_block(
    conversation: str, chats: dict[str, ChatFormat]
) -> None:
    """Training continues the template's empty block for ``enable_thinking=false``."""
    quiet = with_kwargs(chats["Qwen3"], {"enable_thinking": False})
    messages, tools = CONVERSATIONS[conversation]
    if "thought" in conversation:
        with pytest.raises((RowRefused, RecipeError)) as refused:
            quiet.replies.encode_last(messages, tools=tools)
        assert refused.value.rule in ("row.template", "template.refused", "template.rewrites")
        return
    _, before, texts = learned_parts(quiet, messages, tools)
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt = quiet.encode_prompt(messages[:last], tools)
    assert before[-1] == prompt.tolist()
    assert quiet.tokenizer.decode(prompt.tolist()).endswith("<think>\n\n</think>\n\n")
    assert not any("think>" in text for text in texts)


@pytest.mark.parametrize("answer", ["    return x", "\treturn x", " x", "x"])
def test_empty_reasoning_block_preserves_indentation_of_answer(
    answer: str, chats: dict[str, ChatFormat]
) -> None:
    _, _, texts = learned_parts(chats["Qwen3"], (ASK, Message("assistant", answer)), ())
    assert texts == [f"{answer}<|im_end|>"]


def test_request_template_settings_override_stored_settings(chats: dict[str, ChatFormat]) -> None:
    thinking = chats["Qwen3"]
    quiet = with_kwargs(thinking, {"enable_thinking": False})
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    for chat, kwargs, other in (
        (quiet, on, thinking), (thinking, off, quiet), (with_kwargs(quiet, on), off, quiet)
    ):  # fmt: skip
        ours, theirs = chat.encode_prompt([ASK], TOOLS, kwargs), other.encode_prompt([ASK], TOOLS)
        assert ours.tolist() == theirs.tolist()
    silent = chats["SmolLM2"]
    assert silent.prompt_text([ASK], (), off) == silent.prompt_text([ASK])
    assert thinking.prompt_text([ASK]) == with_kwargs(thinking, {}).prompt_text([ASK])


def test_reasoning_families_have_marks(chats: dict[str, ChatFormat]) -> None:
    marked = {family for family, chat in chats.items() if chat.replies.reasoning_marks is not None}
    assert marked == {"Qwen3", "GLM-4.5"}
    assert {chats[family].replies.reasoning_marks for family in marked} == {
        ReasoningMarks("<think>", "</think>")
    }


@pytest.mark.parametrize("family", ["Qwen3", "GLM-4.5"])
def test_reasoning_in_rendered_template_is_learned(
    family: str, chats: dict[str, ChatFormat]
) -> None:
    _, _, texts = learned_parts(chats[family], *CONVERSATIONS["thought, then call"])
    assert len(texts) == 2
    assert "I must look." in texts[0] and "It says so." in texts[1]
    encoded, _, texts = learned_parts(chats[family], *CONVERSATIONS["thoughts of two turns"])
    assert len(texts) == 2 and "It is May." in texts[0] and "I looked." in texts[1]
    whole = chats[family].tokenizer.decode(encoded.ids_T.tolist())
    assert "It is May." not in whole and "Clear." in whole


@pytest.mark.parametrize(
    "family", ["Qwen2.5", "Qwen3", "Hermes", "SmolLM2", "Llama 3.1", "GLM-4.5", "Qwen3-Coder"]
)
def test_learned_calls_are_parsed_from_text(family: str, chats: dict[str, ChatFormat]) -> None:
    for name in ("call", "text and call", "two calls"):
        if name in FAMILIES[family].refuses:
            continue
        messages, tools = CONVERSATIONS[name]
        _, _, texts = learned_parts(chats[family], messages, tools)
        said = re.sub(r"^<think>\s*</think>\s*", "", texts[0]).replace(FAMILIES[family].end, "")
        found = parse_calls(said, tools, declared_only=True)
        assert [(call.name, call.arguments) for call in found] == [
            (call.name, call.arguments) for call in messages[1].calls
        ]


@pytest.mark.parametrize("family", ["GLM-4.5", "Qwen3-Coder"])
def test_calls_in_xml_have_the_types_of_the_schema(
    family: str, chats: dict[str, ChatFormat]
) -> None:
    kinds: dict[str, Any] = {
        "zip": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
        "where": {"type": "array"}, "unit": {"enum": ["1", "2"]}, "near": {"type": "object"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "odd": {"type": 3, "anyOf": 1},
        "free": {"type": ["string", "null"]},
    }  # fmt: skip
    arguments = {
        "zip": "0123", "days": 2, "exact": True, "where": ["Oslo", 1], "unit": "2",
        "near": {"a": [1.5, None]}, "note": None, "odd": "</x> two\nlines ", "free": " [1] ",
        "unknown": "words",
    }  # fmt: skip
    tool = Tool("weather", "", {"type": "object", "properties": kinds})
    call = Message("assistant", calls=(ToolCall("a", "weather", arguments),))
    _, _, (text,) = learned_parts(chats[family], (ASK, call), (tool,))
    (found,) = parse_calls(text.replace(FAMILIES[family].end, ""), [tool], declared_only=True)
    assert found.arguments == arguments
    assert parse_calls(text.replace("weather", "wea ther"), [tool]) == []


def test_arguments_may_hold_the_tags_of_calls() -> None:
    calls = tuple(
        ToolCall("", "weather", {"city": city})
        for city in ("a</tool_call>b", "<tool_call>", '</tool_call>\n<tool_call>{"name": "x"}')
    )
    written = (Message("assistant", calls=calls), Message("assistant", "Look.", calls=calls[:1]))
    for message in (*written, *(Message("assistant", calls=(call,)) for call in calls)):
        assert parse_calls(message.reply_text, [Tool("weather")], declared_only=True) == [
            *message.calls
        ]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", '"\\ud800"', "[" * 100_000]
)
def test_calls_with_invalid_json_values_are_ignored(value: str) -> None:
    call = f'{{"name": "weather", "arguments": {{"city": {value}}}}}'
    assert parse_calls(call) == parse_calls(f"<tool_call>{call}</tool_call>") == []


def test_call_with_text_after_json_is_ignored() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {}}'
    assert len(parse_calls(f"{call} \n{call}</tool_call> and so on")) == 2
    assert parse_calls(f"{call} so </tool_call>") == []


def test_result_belongs_to_last_call_with_same_id() -> None:
    messages = [Message("user", "Hi")]
    for name in ("a", "b"):
        messages += [
            Message("assistant", calls=(ToolCall("call_0", name, {}),)),
            Message("tool", "1", call_id="call_0"),
        ]
    turns = template_turns(messages)
    assert [turn["tool_calls"][0]["id"] for turn in turns[1::2]] == ["call00000", "call00001"]
    results = [(turn["tool_call_id"], turn["name"]) for turn in turns[2::2]]
    assert results == [("call00000", "a"), ("call00001", "b")]
    words = [turn.content for turn in calls_as_text(messages, ())][2::2]
    assert words == ["Result of a: 1", "Result of b: 1"]


@pytest.mark.parametrize("end", ["", '"', "\\", "é"])
def test_many_arguments_are_looked_for_in_little_time(end: str) -> None:
    arguments = {f"n{number}{end}": f"v{number}{end}" for number in range(20_000)}
    message = Message("assistant", calls=(ToolCall("", "weather", arguments),))
    began = time.process_time()
    assert missing_from(f"{'Hi ' * 999}{message.reply_text}", message) is None
    assert missing_from(message.reply_text.replace("v19999", ""), message)
    assert time.process_time() - began < 5
    mixed = json.dumps(
        {"name": "weather", "arguments": dict(reversed(list(arguments.items())[:9]))}
    )
    few = Message("assistant", calls=(ToolCall("", "weather", dict([*arguments.items()][:9])),))
    assert missing_from(mixed, few) is None


def test_content_dropped_by_template_is_refused(chats: dict[str, ChatFormat]) -> None:
    messages, tools = CONVERSATIONS["text and call"]
    with pytest.raises(RowRefused) as refused:
        chats["Llama 3.1"].replies.encode_last(messages, tools=tools)
    assert refused.value.rule == "row.template"
    with pytest.raises(RecipeError) as refused:
        chats["Llama 3.1"].replies.encode_last(*CONVERSATIONS["two calls"][:1], tools=TOOLS)
    assert refused.value.rule == "template.refused"
    with pytest.raises(RowRefused) as refused:
        chats["SmolLM2"].replies.encode_last(CONVERSATIONS["thought"][0])
    assert refused.value.rule == "row.template"


def test_a_turn_in_openais_form() -> None:
    turn = Message("assistant", "Wait.", calls=(ROME,), reasoning="Hm.").to_dict()
    assert turn["reasoning_content"] == "Hm."
    (call,) = turn["tool_calls"]
    assert call["type"] == "function" and call["id"] == ROME.id
    assert json.loads(call["function"]["arguments"]) == ROME.arguments
    assert SUN.to_dict()["tool_call_id"] == ROME.id
    assert ASK.to_dict() == {"role": "user", "content": ASK.content}
