"""Tests of training sequences with templates that rewrite earlier turns.

The templates are our own, with the behaviour of the families' published templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.reasoning import DecodedReply, ReasoningSplitter
from luthier.data.conversations.replies import CALL_FIX
from luthier.data.conversations.tools import describe_tool, parse_calls, template_turns
from luthier.errors import RowRefused
from luthier.inference.constraints import Constraints
from luthier.inference.tool_calls import form_of_calls
from luthier.models.decoding.sampling import Constraint
from luthier.objectives.preferences.pairs import encode_answer
from luthier.types import Message, Tool, ToolCall
from tokenizers_of_families import with_kwargs

_SYSTEM = "{% if messages[0].role == 'system' %}"
_LAST_USER = (
    "{% set ns = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
)
_ARGUMENTS = "{{ m.tool_calls[0].function.arguments | tojson }}"
HARMONY = (
    "<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>{% if tools or "
    "messages[0].role == 'system' %}<|start|>developer<|message|>" + _SYSTEM + "# Instructions\n"
    "{{ messages[0].content }}{% endif %}{% for tool in tools or [] %}\ntype "
    "{{ tool.function.name }} = {{ tool.function.parameters | tojson }}{% endfor %}<|end|>"
    "{% endif %}{% set ns = namespace(name='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% elif m.role == 'assistant' and m.tool_calls %}"
    "{% set ns.name = m.tool_calls[0].function.name %}{% set later = messages[loop.index:] | "
    "rejectattr('tool_calls') | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% if m.thinking and not later %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant to=functions.{{ ns.name }}"
    "<|channel|>commentary json<|message|>" + _ARGUMENTS + "<|call|>"
    "{% elif m.role == 'assistant' %}{% set at_end = loop.last and not add_generation_prompt %}"
    "{% if m.thinking and at_end %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{{ '<|return|>' if at_end else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GEMMA_4 = (
    "<bos>" + _LAST_USER + "{% if tools or messages[0].role == 'system' %}<|turn>system\n"
    + _SYSTEM + "{{ messages[0].content | trim }}{% endif %}{% for tool in tools or [] %}"
    "<|tool>declaration:{{ tool.function.name }}<tool|>{% endfor %}<turn|>\n{% endif %}"
    "{% set ns.before = '' %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|tool_response>response:{{ m.name }}{{ m.content }}<tool_response|>"
    "{% elif m.role != 'system' %}{% if ns.before != 'tool' %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}"
    "{% if m.reasoning_content and loop.index0 > ns.user and m.tool_calls %}"
    "<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
    "{% if m.tool_calls %}<|tool_call>call:{{ m.tool_calls[0].function.name }}" + _ARGUMENTS +
    "<tool_call|>{% else %}{{ m.content.split('<channel|>')[-1] | trim }}<turn|>\n{% endif %}"
    "{% endif %}{% set ns.before = m.role %}{% endfor %}"
    "{% if add_generation_prompt and ns.before != 'tool' %}<|turn>model\n"
    "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}"
    "{% endif %}"
)  # fmt: skip
GLM_4 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% elif m.tool_calls %}<|assistant|>{{ m.tool_calls[0].function.name }}\n" + _ARGUMENTS +
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # fmt: skip
GLM_45 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n<tools>{{ tools | tojson }}</tools>{% endif %}"
    + _LAST_USER + "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% elif m.role == 'assistant' %}"
    "<|assistant|>\n{% if loop.index0 > ns.user and m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}"
    "{{ '\n' + m.content if m.content }}{% if m.tool_calls %}\n<tool_call>"
    "{{ m.tool_calls[0].function.name }}{% for k, v in m.tool_calls[0].function.arguments | items %}"
    "\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>"
    "{% endfor %}\n</tool_call>{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)  # fmt: skip
FALCON = (
    "{% for m in messages %}{{ '\n' if not loop.first }}"
    "{{ {'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[m.role] }}: {{ m.content }}"
    "{% endfor %}{{ '\nFalcon:' if add_generation_prompt }}"
)
MISTRAL_3 = (
    "<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    + _LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}{% if loop.index0 == ns.user "
    "and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]"
    "{{ system + '\n\n' if system and loop.index0 == ns.user }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{\"name\": \"{{ m.tool_calls[0].function.name }}\", "
    '"arguments": ' + _ARGUMENTS + ', "id": "{{ m.tool_calls[0].id }}"}]</s>'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | tojson }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)  # fmt: skip
MISTRAL_7B = MISTRAL_3.replace(
    "system and loop.index0 == ns.user", "system and loop.last and m.role == 'user'"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI_35 = PHI_3.removesuffix("{% endif %}") + "{% else %}<|endoftext|>{% endif %}"
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + _LAST_USER +
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.user and "
    "(loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% if m.tool_calls %}<tool_call>\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "arguments": ' + _ARGUMENTS +
    "}\n</tool_call>{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' if enable_thinking is defined "
    "and not enable_thinking }}{% endif %}"
)  # fmt: skip
QWQ = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DEEPSEEK_R1 = (
    "<|begin▁of▁sentence|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end▁of▁sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its special tokens, stop tokens first."""

    template: str
    special: tuple[str, ...]
    stops: int = 1
    tools: bool = True
    thoughts: bool = True
    """True if the template or its prompt has a place for reasoning."""
    one: bool = False
    """True if a conversation of plain turns is one training sequence."""


_PHI = ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
_GLM = ("<|user|>", "<|observation|>", "<|endoftext|>", "<|assistant|>", "<|system|>")
_IM = ("<|im_end|>", "<|im_start|>")
FAMILIES = {
    "gpt-oss": Family(
        HARMONY, ("<|return|>", "<|call|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"), 2
    ),
    "Gemma 4": Family(
        GEMMA_4,
        ("<turn|>", "<tool_call|>", "<|turn>", "<|channel>", "<channel|>", "<bos>", "<|tool_call>"),
        2, thoughts=False,
    ),
    "GLM 4": Family(GLM_4, _GLM, 3, thoughts=False, one=True),
    "GLM 4.5": Family(GLM_45, _GLM, 3, one=True),
    "Falcon": Family(FALCON, ("<|endoftext|>",), tools=False, thoughts=False),
    "Mistral v3": Family(
        MISTRAL_3, ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), thoughts=False, one=True
    ),
    "Mistral 7B v0.3": Family(
        MISTRAL_7B, ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), thoughts=False, one=True
    ),
    "Phi-3": Family(PHI_3, _PHI, 2, tools=False, thoughts=False, one=True),
    "Phi-3.5": Family(PHI_35, _PHI, 2, tools=False, thoughts=False, one=True),
    "Qwen 3": Family(QWEN_3, _IM),
    "QwQ": Family(QWQ, _IM, tools=False),
    "DeepSeek R1": Family(
        DEEPSEEK_R1, ("<|end▁of▁sentence|>", "<|User|>", "<|Assistant|>", "<|begin▁of▁sentence|>"),
        tools=False,
    ),
}  # fmt: skip
TOOLS = (Tool("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}}),)
CALL = Message("assistant", calls=(ToolCall("1", "weather", {"city": "Rome"}),))
RESULT = Message("tool", "sunny", call_id="1")


def turns(*texts: str, thought: str = "") -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(texts)
    return tuple(
        Message(role, text, reasoning=f"{thought} {text}" if thought and role != "user" else "")
        for role, text in zip(roles, texts, strict=False)
    )


SYSTEM = (Message("system", "Be brief."),)
CONVERSATIONS: dict[str, tuple[tuple[Message, ...], tuple[Tool, ...]]] = {
    "several turns": (turns("What?", "A dog .", "Why?", "It is open .", "And?", "A key ."), ()),
    "system": (SYSTEM + turns("What?", "A dog .", "Why?", "It is open ."), ()),
    "tools": ((*turns("What?", "A dog .", "Rome?"), CALL, RESULT, *turns("", "Sun.")[1:]), TOOLS),
    "reasoning": (turns("What?", "A dog .", "Why?", "It is open .", thought="I see"), ()),
}


@pytest.fixture(scope="module")
def chats(new_tokenizer: Callable[..., Any]) -> dict[str, ChatFormat]:
    made: dict[str, ChatFormat] = {}
    for name, family in FAMILIES.items():
        tokenizer = new_tokenizer(family.template, family.special, family.special[0])
        stops = tokenizer.convert_tokens_to_ids([*family.special[: family.stops]])
        made[name] = ChatFormat.of(tokenizer, stop_ids=stops)
    return made


def learned(
    chat: ChatFormat, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> list[tuple[list[int], list[int]]]:
    """Return the ids before each learned part, and the learned ids."""
    parts: list[tuple[list[int], list[int]]] = []
    for encoded in chat.replies.encode(messages, tools=tools):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.learned_T, [0]])))
        ids = encoded.ids_T.tolist()
        parts += [(ids[:a], ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return parts


def rendered_ids(chat: ChatFormat, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Return transformers' ids of the prompt for the next reply."""
    ids: list[int] = chat.tokenizer.apply_chat_template(
        template_turns(messages),
        tools=[describe_tool(tool) for tool in tools] or None,
        add_generation_prompt=True,
        return_dict=False,
    )
    return ids


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_reply_is_learned_after_served_prompt(
    family: str, conversation: str, chats: dict[str, ChatFormat]
) -> None:
    chat, (messages, tools) = chats[family], CONVERSATIONS[conversation]
    kind = FAMILIES[family]
    if (tools and not kind.tools) or (conversation == "reasoning" and not kind.thoughts):
        return
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    parts = learned(chat, messages, tools)
    assert len(parts) == len(answers)
    for index, (before, reply) in zip(answers, parts, strict=True):
        prompt = rendered_ids(chat, messages[:index], tools)
        assert chat.encode_prompt(messages[:index], tools).tolist() == prompt
        block = chat.tokenizer.decode(before[len(prompt) :])
        assert before[: len(prompt)] == prompt and block.split() in ([], ["<think>", "</think>"])
        text, message = chat.tokenizer.decode(reply), messages[index]
        assert reply[-1] in chat.stop_ids
        assert not {*reply[:-1]} & {*chat.stop_ids}
        for part in (message.content, message.reasoning, *(call.name for call in message.calls)):
            assert part in text
        decoded = chat.replies.decode_reply(chat.encode_prompt(messages[:index], tools), reply)
        assert decoded.reasoning == message.reasoning
        if message.calls and family != "GLM 4":
            (call,) = parse_calls(decoded.text, tools)
            assert (call.name, call.arguments) == ("weather", {"city": "Rome"})
        elif not message.calls:
            assert decoded.text.strip() == message.content
    if conversation == "several turns":
        assert (len(chat.replies.encode(messages)) == 1) == kind.one


def test_reasoning_in_row_with_disabled_thinking_is_refused(chats: dict[str, ChatFormat]) -> None:
    messages = CONVERSATIONS["reasoning"][0]
    for family in ("Gemma 4", "Qwen 3", "GLM 4.5"):
        chat = with_kwargs(chats[family], {"enable_thinking": False})
        with pytest.raises(RowRefused) as refused:
            chat.replies.encode(messages)
        assert refused.value.rule == "row.template"
        parts = learned(chat, turns("What?", "A dog .", "Why?", "It is open ."))
        assert [before for before, _ in parts] == [
            chat.encode_prompt(messages[:index]).tolist() for index in (1, 3)
        ]


@pytest.mark.parametrize(
    "thought", ["", "<|channel|>analysis<|message|>I see<|end|><|start|>assistant"]
)
def test_forced_replies_of_channels(thought: str, chats: dict[str, ChatFormat]) -> None:
    chat = chats["gpt-oss"]
    size = len(chat.tokenizer)
    constraints = Constraints(chat, size)
    prompt = chat.encode_prompt(turns("What?")[:1], TOOLS)
    reasoning = chat.replies.reasoning_after(prompt)
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}'
    schema = Constraint("schema", {"type": "object", "additionalProperties": False})
    for matcher, answer in (
        (constraints.calls(TOOLS, form_of_calls(chat), reasoning), call),
        (constraints.matcher(schema, reasoning), "<|channel|>final<|message|>{}"),
    ):
        ids = chat.text_tokenizer.tokens(thought + answer, first=False).tolist()
        for token in ids:
            assert matcher.allowed_mask(size)[token], chat.tokenizer.decode(token)
            matcher.accept_token(token)
        assert matcher.is_finished
        decoded = chat.replies.decode_reply(prompt, ids)
        assert decoded.reasoning == ("I see" if thought else "")
        assert decoded.text.endswith(answer.rpartition("<|message|>")[2])


NEMOTRON_3 = (
    "{% set thinks = enable_thinking if enable_thinking is defined else true %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% else %}<think></think>{% endif %}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n' if thinks else '<think></think>' }}{% endif %}"
)


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_fix_for_rows_without_reasoning_names_switch_of_template(
    switch: str, new_tokenizer: Callable[..., Any]
) -> None:
    template = NEMOTRON_3.replace("enable_thinking", switch)
    chat = ChatFormat.of(new_tokenizer(template, _IM, _IM[0]))
    messages = SYSTEM + turns("What?", "A dog .")
    with pytest.raises(RowRefused) as refused:
        chat.replies.encode(messages)
    assert f"chat_template_kwargs.{switch}=false" in refused.value.problem.advice
    off = with_kwargs(chat, {switch: False})
    ((before, reply),) = learned(off, messages)
    assert off.tokenizer.decode(before).endswith("assistant\n<think></think>")
    assert off.tokenizer.decode(reply) == "A dog .<|im_end|>"
    ((before, _),) = learned(chat, SYSTEM + turns("What?", "A dog .", thought="I see"))
    assert before == chat.encode_prompt(messages[:2]).tolist()


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("is_learned", [True, False])
def test_call_dropped_by_template_is_refused(
    is_last: bool, is_learned: bool, new_tokenizer: Callable[..., Any]
) -> None:
    """LFM2 and Falcon-H1 list the tools and write the content of turns only."""
    template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    chat = ChatFormat.of(new_tokenizer(template, _IM, _IM[0]))
    call = replace(CALL, content="I look .", learned=is_learned or is_last)
    messages = (*turns("Rome?"), call, RESULT, *turns("", "Sun.")[1:])
    with pytest.raises(RowRefused) as refused:
        chat.replies.encode(messages[: 2 if is_last else 4], tools=TOOLS)
    assert (refused.value.rule, refused.value.problem.advice) == ("row.template", CALL_FIX)
    assert learned(chat, (messages[0], messages[3]), TOOLS)


@pytest.mark.parametrize("family", ["QwQ", "DeepSeek R1"])
def test_reply_closes_reasoning_opened_by_prompt(family: str, chats: dict[str, ChatFormat]) -> None:
    """The reply closes the reasoning, even if the content contains the reasoning."""
    chat, stop = chats[family], FAMILIES[family].special[0]
    for content, reasoning in (
        ("Yes.", "I see"), ("Yes.", ""), ("I see\n</think>\n\nYes.", ""),
        ("<think>\nI see\n</think>\n\nYes.", ""),
    ):  # fmt: skip
        message = Message("assistant", content, reasoning=reasoning)
        ((_, reply),) = learned(chat, (Message("user", "Sure?"), message))
        thought = "I see" if "I see" in content + reasoning else ""
        assert chat.tokenizer.decode(reply).replace(stop, "") == f"{thought}\n</think>\n\nYes."
        prompt_T = chat.encode_prompt((Message("user", "Sure?"),))
        decoded = chat.replies.decode_reply(prompt_T, reply)
        assert (decoded.reasoning, decoded.text) == (thought, "Yes.")


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("dash", ["", "-"])
def test_generation_blocks_decide_the_learned_text(
    closes: bool, dash: str, new_tokenizer: Callable[..., Any]
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{{ 'Note: ' }}{%d generation d%}\n{{ m.content }}"
        "END\n{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    end = ("{{ '<|im_end|>' }}", "{%d endgeneration d%}")
    template = template.replace("END", "".join(end if closes else end[::-1]))
    template = template.replace("d%}", f"{dash}%}}").replace("{%d", f"{{%{dash}")
    chat = ChatFormat.of(new_tokenizer(template, _IM, "<|im_end|>"))
    messages = turns("What?", "A dog .", "Why?", "It is open .")
    (encoded,) = chat.replies.encode(messages)
    theirs = chat.tokenizer.apply_chat_template(
        template_turns(messages), return_assistant_tokens_mask=True, return_dict=True
    )
    size = len(encoded.ids_T)
    assert encoded.ids_T.tolist() == theirs["input_ids"][:size]
    if closes:  # a block without the end token would not teach the end
        assert encoded.learned_T.tolist() == [bool(n) for n in theirs["assistant_masks"][:size]]
    assert [chat.tokenizer.decode(ids) for _, ids in learned(chat, messages)] == [
        "A dog .<|im_end|>", "It is open .<|im_end|>"
    ]  # fmt: skip


def test_channels_of_replies_are_not_in_their_text(chats: dict[str, ChatFormat]) -> None:
    chat = chats["gpt-oss"]
    ((_, with_thought),) = learned(chat, CONVERSATIONS["reasoning"][0][:2])
    ((_, without),) = learned(chat, turns("What?", "A dog ."))
    prompt_T = chat.encode_prompt(turns("What?"))
    reasoning = chat.replies.reasoning_after(prompt_T)
    for ids, expected in ((with_thought, "I see A dog ."), (without, "")):
        text = chat.replies.decode(ids)
        for size in range(1, len(text) + 1):  # streamed in two pieces
            splitter = ReasoningSplitter(reasoning)
            parts = [splitter.feed(text[:size]), splitter.feed(text[size:]), splitter.end()]
            assert ["".join(side) for side in zip(*parts, strict=True)] == [expected, "A dog ."]
            assert splitter.answer_start == len(text) - len("A dog .")
    thinking = with_kwargs(chats["Gemma 4"], {"enable_thinking": True})
    prompt_T = thinking.encode_prompt(turns("What?"))
    ids = thinking.text_tokenizer.tokens(
        "<|channel>thought\nI see\n<channel|>Yes.<turn|>", first=False
    )
    assert thinking.replies.decode_reply(prompt_T, ids.tolist()) == DecodedReply("I see", "Yes.")
    messages = (*turns("What?"), Message("assistant", "Yes.", reasoning="I see"))
    assert learned(thinking, messages) == [(prompt_T.tolist(), ids.tolist())]


@pytest.mark.parametrize("family", FAMILIES)
def test_preferred_answers_follow_the_served_prompt(
    family: str, chats: dict[str, ChatFormat]
) -> None:
    chat, prompt = chats[family], turns("What?", "A dog .", "Why?")
    for answer in ("It is open .", "A key ."):
        example = encode_answer(prompt, (Message("assistant", answer),), 0, chat)
        assert not example.sides[1:] and example.weight == pytest.approx(1)
        start = int(np.argmax(example.weight_T))
        served = chat.encode_prompt(prompt).tolist()
        block = chat.tokenizer.decode(example.ids_T[len(served) : start].tolist())
        assert example.ids_T[: len(served)].tolist() == served
        assert block.split() in ([], ["<think>", "</think>"])
        decoded = chat.replies.decode_reply(example.ids_T[:start], example.ids_T[start:].tolist())
        assert decoded.text.strip() == answer


@pytest.mark.parametrize("family", ["GLM 4", "GLM 4.5"])
def test_final_call_ends_like_intermediate_call(family: str, chats: dict[str, ChatFormat]) -> None:
    chat, (messages, tools) = chats[family], CONVERSATIONS["tools"]
    middle, end = learned(chat, messages, tools)[1], learned(chat, messages[:4], tools)[1]
    assert middle == end
    assert end[1][-1] == chat.tokenizer.convert_tokens_to_ids("<|observation|>")
