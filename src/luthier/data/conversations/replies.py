"""Rendered assistant turns: the text that a model generates after a served prompt.

Many chat templates write an earlier turn in another way than the last turn. Qwen 3 and DeepSeek R1
drop the reasoning of earlier turns, gpt-oss ends the last turn with another token, and Mistral
moves the system prompt into the last user turn. A conversation is one training sequence as long as
each prompt continues the text before; otherwise a further sequence starts with the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from luthier.data.conversations.reasoning import (
    SWITCHES,
    ReasoningFormat,
    ReasoningMarks,
    split_reply,
)
from luthier.data.conversations.tokenization import SENTINEL
from luthier.data.conversations.tools import missing_from
from luthier.errors import RecipeError, RowRefused
from luthier.types import Message, Tool

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

GENERATION = "\ufdd1"
"""Unicode noncharacter at both ends of a ``{% generation %}`` block in rendered text."""
_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
_REPLY = "a reply"
CALL_FIX = (
    "Write the call into the content in the model's notation, or set `data.chat_template` to a "
    "Jinja file that writes `tool_calls`."
)
SYSTEM_FIX = "Put the system prompt before the text of the first user message."


class Segment(NamedTuple):
    """A piece of a training sequence."""

    text: str
    learns: bool


@dataclass(frozen=True)
class TurnEnd:
    """End of the last reply in a template."""

    dropped: str = ""
    """Text after the end token of a conversation's last reply, such as Phi-3.5's
    ``<|endoftext|>``."""
    added: str = ""
    """End token that the template omits: it opens the next turn (GLM 4), or is missing (Falcon)."""


def find_turn_end(chat: ChatFormat) -> TurnEnd:
    """Return the end of the last reply in the chat template, compared with an earlier reply."""
    turns = (Message("user", "a"), Message("assistant", _REPLY), Message("user", "a"))
    try:
        own, more = (chat.render_turns(each, (), reply=False) for each in (turns[:2], turns))
    except RecipeError:  # the template accepts other conversations only
        return TurnEnd()
    stops = chat.text_encoder.stop_names
    start = own.rfind(_REPLY) + len(_REPLY)
    behind = own[start:]
    if not behind.strip():
        opening = next((name for name in stops if more.startswith(own + name)), "")
        return TurnEnd("", opening) if opening else TurnEnd(behind, next(iter(stops), ""))
    ends = [start + at + len(name) for name in stops if (at := behind.find(name)) >= 0]
    if not ends or more.startswith(own) or not more.startswith(own[: min(ends)]):
        return TurnEnd()
    return TurnEnd(own[min(ends) :])


def find_end_token(chat: ChatFormat) -> int | None:
    """Return the id of the first added token after a reply in the chat template, if any."""
    turns = (Message("user", "a"), Message("assistant", _REPLY))
    behind = chat.render_turns(turns, (), reply=False).rpartition(_REPLY)[2]
    added = {str(token): id_ for id_, token in chat.tokenizer.added_tokens_decoder.items()}
    found = [(behind.find(name), -len(name), id_) for name, id_ in added.items() if name in behind]
    return min(found)[2] if found else None


def find_prompt_end(chat: ChatFormat) -> str:
    """Return the end of prompts that turns do not repeat, such as ``<think>`` of DeepSeek R1."""
    turns = (Message("user", "a"), Message("assistant", _REPLY))
    try:
        prompt = chat.render_turns(turns[:1], (), reply=True)
        header = chat.render_turns(turns, (), reply=False).rpartition(_REPLY)[0]
    except RecipeError:  # the template accepts other conversations only
        return ""
    return prompt[len(header) :] if prompt.startswith(header) else ""


def mark_generation(template: str) -> str:
    """Return a chat template that prints :data:`GENERATION` in place of ``{% generation %}``."""
    # Block tags on both sides, because Jinja trims white space at blocks only.
    return _TAG.sub(rf"{{%\1 if true %}}{GENERATION}{{% endif \2%}}", template)


@dataclass(frozen=True)
class RenderedReply:
    """An assistant turn as generated after a prompt."""

    text: str
    message: Message
    """The turn, with the reasoning in its own field."""
    start: int
    """First learned character of ``text``."""
    end: int
    """Character after the last learned character."""
    is_verbatim: bool
    """True if the template writes the prompt and ``text`` as one conversation."""


def training_sequences(
    chat: ChatFormat, messages: Sequence[Message], context: int, tools: Sequence[Tool]
) -> list[list[Segment]]:
    """Return the training sequences of a conversation.

    Args:
        chat: format with a chat template.
        messages: the conversation.
        context: number of leading messages that are not learned.
        tools: functions that the assistant may call.

    Raises:
        RowRefused: if the template drops a part of a learned turn.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    stops = chat.text_encoder.stop_names
    sequences: list[list[Segment]] = []
    done, has_stop = "", False
    for index in answers:
        before = chat.render_turns(messages[:index], tools, reply=True)
        # A reply must end with a stop token, which the next turn may open with.
        continues = before.startswith(done) and (has_stop or before.startswith(stops, len(done)))
        if not sequences or not continues:
            sequences.append([])
            done = ""
        reply = render_reply(chat, before, messages[: index + 1], tools)
        learns = index >= context and messages[index].learned and reply.start < reply.end
        missing = None
        message = reply.message
        if len(sequences) > 1 or not reply.is_verbatim or message.calls or message.reasoning:
            missing = missing_from(reply.text, message)
        if missing and missing_from(reply.text, Message("", calls=message.calls)):
            raise _dropped_by_template(missing, index, CALL_FIX)
        if missing and learns and index == answers[-1]:
            raise _dropped_by_template(missing, index)
        sequences[-1] += [
            Segment(before[len(done) :] + reply.text[: reply.start], False),
            Segment(reply.text[reply.start : reply.end], learns and not missing),
            Segment(reply.text[reply.end :], False),
        ]
        done = before + reply.text
        has_stop = any(name in reply.text for name in stops)
    done = done.replace(SENTINEL, "")
    for index, message in enumerate(messages[: answers[-1]]):
        if message.role == "system" and not chat.supports_system_prompt:
            raise _dropped_by_template("the system prompt", index, SYSTEM_FIX)
        if message.role == "tool" and (missing := missing_from(done, message)):
            raise _dropped_by_template(missing, index)
    return sequences


def _dropped_by_template(missing: str, index: int, fix: str = "") -> RowRefused:
    return RowRefused(
        "row.template",
        f"The model's chat template drops {missing} (message {index + 1}).",
        fix or "Write the text into the content, use another base model, or remove the row.",
    )


def render_reply(
    chat: ChatFormat, before: str, messages: Sequence[Message], tools: Sequence[Tool]
) -> RenderedReply:
    """Return the last turn as the model generates the turn after the prompt ``before``.

    Raises:
        RowRefused: for reasoning after a prompt that closes the reasoning.
        RecipeError: if the template writes the turn in a way that no prompt continues.
    """
    message, stem = messages[-1], before
    after = chat.marked.render_turns(messages, tools, reply=False)
    pieces = after.split(GENERATION)
    after = "".join(pieces).removesuffix(chat.turn_end.dropped)
    if not after.startswith(before):
        stem = before.removesuffix(chat.prompt_end)
    marks = chat.reasoning_marks
    is_open = marks is not None and before.rstrip().endswith(marks.open)
    if not after.startswith(stem) or (stem != before and not is_open and message.reasoning):
        if message.reasoning:
            raise RowRefused(
                "row.template",
                f"Message {len(messages)} has reasoning, and the prompt turns reasoning off.",
                "Remove the reasoning, or set `data.chat_template_kwargs.enable_thinking=true`.",
            )
        if is_open and (switch := next(iter(chat.read_kwargs(dict.fromkeys(SWITCHES, False))), "")):
            raise RowRefused(
                "row.template",
                f"The prompt opens the reasoning, and message {len(messages)} has no reasoning.",
                f"Set `data.chat_template_kwargs.{switch}=false`, or add `reasoning_content`.",
            )
        if messages[0].role == "system":
            # Mistral 7B v0.3 and Nemo write the system prompt into the last turn of a prompt, and
            # nowhere else. The reply does not depend on the system prompt.
            prompt = chat.render_turns(messages[1:-1], tools, reply=True)
            reply = render_reply(chat, prompt, messages[1:], tools)
            return replace(reply, is_verbatim=False)
        raise RecipeError(
            "the chat template renders the start of an answer in two ways, so the learned "
            "tokens are ambiguous. Use single-turn rows or template=plain.",
            rule="template.rewrites",
        )
    stops = chat.text_encoder.stop_names
    if (
        message.calls
        and chat.turn_end.added
        and not any(name in after[len(stem) :] for name in stops)
    ):
        # GLM 4 ends a call with the token that opens the turn of the result.
        results = [Message("tool", "a", call_id=call.id) for call in message.calls]
        more = chat.render_turns((*messages, *results), tools, reply=False)
        after += next((name for name in stops if more.startswith(after + name)), "")
    text = after[len(stem) :]
    if marks is not None and (
        (stem != before and is_open)
        or (message.reasoning and missing_from(text, Message("", reasoning=message.reasoning)))
    ):
        message = _split_message(message, ReasoningFormat(marks, is_open))
        text = _with_reasoning(text, message, marks, before)
        return RenderedReply(text, message, 0, len(text), False)
    start, end = _generated_range(pieces, len(stem)) if len(pieces) > 1 else (0, len(text))
    # A block without the end token would not teach the model to stop.
    end += max((len(name) for name in stops if text.startswith(name, end)), default=0)
    # Templates write an empty reasoning block for turns without reasoning.
    if marks and not message.reasoning and (block := marks.empty_block.match(text)):
        start = max(start, block.end())
    return RenderedReply(text, message, start, end, stem == before)


def _generated_range(pieces: Sequence[str], skipped: int) -> tuple[int, int]:
    """Return the first and last learned character of a text in marked blocks.

    ``pieces`` are alternately outside and inside a block; the first ``skipped`` characters are the
    prompt.
    """
    bounds = [0, *(size - skipped for size in accumulate(map(len, pieces)))]
    inside = [place for place in range(1, len(pieces), 2) if bounds[place + 1] > 0]
    return (max(0, bounds[inside[0]]), bounds[inside[-1] + 1]) if inside else (0, 0)


def _with_reasoning(text: str, message: Message, marks: ReasoningMarks, before: str) -> str:
    """Return a turn that the template writes without reasoning, with the turn's reasoning."""
    if marks.close in text:
        text = text.partition(marks.close)[2]
    # Marks with a line break, such as Gemma 4's, are written without further line breaks.
    line = "" if marks.open.endswith("\n") else "\n"
    opening = "" if before.rstrip().endswith(marks.open) else marks.open + line
    return f"{opening}{message.reasoning}\n{marks.close}{line * 2}" + text.lstrip("\n")


def _split_message(message: Message, reasoning: ReasoningFormat) -> Message:
    """Return a turn with the reasoning moved from the content to a separate field."""
    if message.reasoning or reasoning.marks.close not in message.content:
        return message
    decoded = split_reply(reasoning, message.content)
    return replace(message, reasoning=decoded.reasoning, content=decoded.text)
