"""Tokens of assistant turns: the tokens that are learned, and the text that they stand for.

Many chat templates write an earlier turn in another way than the last turn. Qwen 3 and DeepSeek R1
drop the reasoning of earlier turns, gpt-oss ends the last turn with another token, and Mistral
moves the system prompt into the last user turn. A conversation is one training sequence as long as
each prompt continues the text before; otherwise a further sequence starts with the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversations.call_formats import MARKS as CALL_MARKS
from luthier.data.conversations.chat_template import (
    REPLY,
    SYSTEM_FIX,
    TEMPLATE_FIX,
    ChatTemplate,
    images_of,
)
from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID
from luthier.data.conversations.reasoning import (
    SWITCHES,
    TAIL,
    DecodedReply,
    ReasoningFormat,
    ReasoningMarks,
    find_marks,
    split_reply,
)
from luthier.data.conversations.tokenization import SENTINEL, TextTokenizer, special_tokens
from luthier.data.conversations.tools import calls_as_text, missing_from, supports_tools
from luthier.data.inputs import Media
from luthier.errors import RecipeError, RowRefused
from luthier.types import IntArray, Message, Tool

GENERATION = "\ufdd1"
"""Unicode noncharacter at both ends of a ``{% generation %}`` block in rendered text."""
_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
CALL_FIX = (
    "Write the call into the content in the model's notation, or set `data.chat_template` to a "
    "Jinja file that writes `tool_calls`."
)


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


@dataclass(frozen=True)
class EncodedReply:
    """Token ids of one row with a mark on each learned token."""

    ids_T: IntArray
    learned_T: NDArray[np.bool_]
    source_T: IntArray | None = None
    """Token ids for the encoder, if any; ``ids_T`` then has the decoder's tokens only."""
    images: tuple[Media, ...] = ()
    """Images of the image tokens in ``ids_T``."""


@dataclass(frozen=True)
class DecoderFrame:
    """Tokens around a reply in the decoder of an encoder-decoder."""

    start_id: int
    """First token of the decoder."""
    opening_ids: tuple[int, ...] = ()
    """Ids between ``start_id`` and a reply, such as BART's ``<s>`` or a target language."""
    closing_ids: tuple[int, ...] = ()
    """Tokens after a reply; the end-of-text token if empty."""
    problem: str = ""
    """Reason why ``opening_ids`` are unknown; empty if they are known."""

    def check(self) -> None:
        """Raise :class:`RecipeError` for a decoder without the required target language."""
        if self.problem:
            raise RecipeError(self.problem, rule="tokenizer.language")

    @property
    def opening(self) -> IntArray:
        """Token ids of the decoder before the first token of a reply."""
        return np.array([self.start_id, *self.opening_ids], dtype=np.int64)

    def ids(self, reply: str, encoder: TextTokenizer) -> IntArray:
        """Return the token ids of ``reply``, with the special tokens around the reply.

        All but the first are labels of transformers: ``tokenizer(text_target=reply)``.
        """
        # T5 and relatives end labels with the end-of-text token, and add nothing else.
        closing = self.closing_ids or (encoder.end_id,)
        return np.concatenate([self.opening, encoder.target_tokens(reply), closing]).astype(
            np.int64
        )


@dataclass(frozen=True)
class ReplyTokens:
    """Conversion of assistant turns to learned tokens, and of generated tokens to replies."""

    template: ChatTemplate
    decoder: DecoderFrame | None = None
    """Tokens of the decoder of an encoder-decoder; ``None`` for other networks."""

    def encode_last(
        self, messages: Sequence[Message], context: int = 0, tools: Sequence[Tool] = ()
    ) -> EncodedReply:
        """Encode a conversation up to its last learned turn: the last of :meth:`encode`."""
        return self.encode(messages, context, tools)[-1]

    def encode(
        self, messages: Sequence[Message], context: int = 0, tools: Sequence[Tool] = ()
    ) -> list[EncodedReply]:
        """Encode a conversation with all assistant turns learned, each with its end-of-turn token.

        The result is one sequence, or several if the template rewrites earlier turns
        (:meth:`sequences`). Each learned turn follows the prompt that a server renders. Not learned
        are the first ``context`` messages and turns with ``learned=False``. Tokens after the last
        learned token of a sequence, often a newline, are dropped.

        Raises:
            RowRefused: if the template drops a part of a learned turn.
            RecipeError: if the template rejects the conversation.
        """
        self.template.check_images(messages)
        # An encoder reads the prompt apart from the reply, so no template joins both.
        encoder = self.template.text_tokenizer
        if self.decoder is not None:
            prompt, reply = _single_turn(calls_as_text(messages, tools))
            self.decoder.check()
            ids_T = self.decoder.ids(reply, encoder)
            return [EncodedReply(ids_T, np.arange(len(ids_T)) > 0, encoder.encode_whole(prompt))]
        if self.template.kind == "plain":
            prompt_T, reply_T = encoder.continued_tokens(
                *_single_turn(calls_as_text(messages, tools))
            )
            ids_T = np.concatenate([prompt_T, reply_T, [encoder.end_id]])
            return [EncodedReply(ids_T, np.arange(len(ids_T)) >= len(prompt_T))]
        encoded = list[EncodedReply]()
        for segments in self.sequences(messages, context, tools):
            text, parts = "", list[tuple[int, int]]()
            for segment, learns in segments:
                if learns:
                    parts.append((len(text), len(text) + len(segment)))
                text += segment
            encoded += self._encode_parts(text, parts) if parts else ()
        if not encoded:
            raise RowRefused(
                "row.template",
                "The model's chat template drops a part of every learned turn of the row.",
                "Write one row per learned turn, with this turn as the last message.",
            )
        if self.template.images is None or not (images := images_of(messages)):
            return encoded
        place = partial(
            self.template.images.place, images=images, tokenizer=self.template.tokenizer
        )
        return [replace(each, ids_T=place(each.ids_T), images=images) for each in encoded]

    def _encode_parts(self, text: str, parts: Sequence[tuple[int, int]]) -> list[EncodedReply]:
        """Encode a rendered conversation with learned parts, separately if prompts disagree."""
        # Tokens after the last learned part have no loss, so the text ends there.
        start, end = parts[-1]
        text = text[:end]
        if not any(name in text[start:] for name in self.template.text_tokenizer.stop_names):
            text += self.turn_end.added
        ids, places, agrees = self.template.text_tokenizer.divide(text, parts)
        # One tree with a border that a server tokenizes in another way would train other prompts.
        if not agrees:
            return [each for part in parts for each in self._encode_parts(text, [part])]
        learned_T = np.zeros(len(ids), dtype=bool)
        for first, last in places:
            learned_T[first : self._stop_after(ids, first, last)] = True
        size = int(np.flatnonzero(learned_T)[-1]) + 1
        return [EncodedReply(np.array(ids[:size], dtype=np.int64), learned_T[:size])]

    def _stop_after(self, ids: list[int], first: int, last: int) -> int:
        """Return the index after the stop token of the reply ``ids[first:last]``.

        Raises:
            RecipeError: if no stop token ends or follows the reply.
        """
        # The usual position is the end. Otherwise the next turn may start with a stop token.
        for index in range(last - 1, first - 1, -1):
            if ids[index] in self.template.stop_ids:
                return index + 1
        if last < len(ids) and ids[last] in self.template.stop_ids:
            return last + 1
        names = ", ".join(self.template.text_tokenizer.stop_names) or "none"
        raise RecipeError(
            f"the chat template ends an assistant turn without a stop token ({names}), so the model "
            "would not learn to stop. Add the end-of-turn token to `eos_token_id` in "
            "generation_config.json, or as the tokenizer's `eos_token`",
            rule="template.no_stop",
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a reply, without special tokens except marks of reasoning and calls."""
        special = self._kept_tokens
        if special.keys().isdisjoint(ids):
            return self._decode_text(ids)
        texts, start = [], 0
        for at in [at for at, token in enumerate(ids) if token in special]:
            # Decoders drop special tokens, and the marks are needed to find reasoning and calls.
            texts += [self._decode_text(ids[start:at]), special[ids[at]]]
            start = at + 1
        return "".join([*texts, self._decode_text(ids[start:])])

    @cached_property
    def _kept_tokens(self) -> dict[int, str]:
        """Special tokens that decoded replies contain: the marks of reasoning and tool calls."""
        kept = dict(self.reasoning_marks.special) if self.reasoning_marks else {}
        if supports_tools(self.template.text):
            specials = special_tokens(self.template.tokenizer)
            marks = {specials[mark]: mark for mark in CALL_MARKS & specials.keys()}
            # A stop token ends the reply, so it is never text of a call.
            kept |= {
                token: mark for token, mark in marks.items() if token not in self.template.stop_ids
            }
        return kept

    def _decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens and images."""
        # Ids of images are hashes, beyond every vocabulary.
        if self.template.images is not None:
            ids = [token for token in ids if token < FIRST_IMAGE_ID]
        return self.template.text_tokenizer.decode(ids)

    def decode_reply(self, prompt_T: IntArray, ids: Sequence[int]) -> DecodedReply:
        """Return reasoning and answer of a reply to the prompt ``prompt_T``."""
        before = self.decoding_context(prompt_T)
        text = self.decode([*before, *ids])[len(self.decode(before)) :]
        return split_reply(self.reasoning_after(prompt_T), text)

    def decoding_context(self, prompt_T: IntArray) -> list[int]:
        """Return the last tokens of a raw prompt, as context to decode the continuation.

        A SentencePiece decoder drops a leading space; the context preserves the space. Empty for
        chat templates and encoder-decoders.
        """
        if self.template.kind == "chat" or self.decoder is not None:
            return []
        return [int(token) for token in prompt_T[-TAIL:]]

    def reasoning_after(self, prompt_T: IntArray) -> ReasoningFormat | None:
        """Return the reasoning format of a reply; ``None`` without, or after a closed block."""
        marks = self.reasoning_marks
        if marks is None:
            return None
        # Decoding the whole prompt for its last mark would cost as much as reading it.
        tail = [token for token in prompt_T[-TAIL:].tolist() if token < FIRST_IMAGE_ID]
        end = "".join(self.template.text_tokenizer.pieces(tail)).rstrip()
        if end.endswith(marks.close):
            return None
        return ReasoningFormat(marks, end.endswith(marks.open))

    @cached_property
    def reasoning_marks(self) -> ReasoningMarks | None:
        """Marks around the model's reasoning; ``None`` if the template has none."""
        return None if self.decoder is not None else find_marks(self.template)

    @cached_property
    def marked(self) -> ChatTemplate:
        """Template that marks ``{% generation %}`` blocks; the model's template without blocks."""
        if "endgeneration" not in str(self.template.tokenizer.chat_template):
            return self.template
        return self.template.map_sources(mark_generation)

    @cached_property
    def turn_end(self) -> TurnEnd:
        """End of the last reply in the chat template, compared with an earlier reply."""
        turns = (Message("user", "a"), Message("assistant", REPLY), Message("user", "a"))
        try:
            own, more = (
                self.template.render_messages(each, (), reply=False) for each in (turns[:2], turns)
            )
        except RecipeError:  # the template accepts other conversations only
            return TurnEnd()
        stops = self.template.text_tokenizer.stop_names
        # The last occurrence, because a template may quote the conversation.
        start = own.rfind(REPLY) + len(REPLY)
        behind = own[start:]
        if not behind.strip():
            opening = next((name for name in stops if more.startswith(own + name)), "")
            return TurnEnd("", opening) if opening else TurnEnd(behind, next(iter(stops), ""))
        ends = [start + at + len(name) for name in stops if (at := behind.find(name)) >= 0]
        if not ends or more.startswith(own) or not more.startswith(own[: min(ends)]):
            return TurnEnd()
        return TurnEnd(own[min(ends) :])

    @cached_property
    def prompt_end(self) -> str:
        """End of prompts that turns do not repeat, such as ``<think>`` of DeepSeek R1."""
        turns = (Message("user", "a"), Message("assistant", REPLY))
        try:
            prompt = self.template.render_messages(turns[:1], (), reply=True)
            header = self.template.render_messages(turns, (), reply=False).rpartition(REPLY)[0]
        except RecipeError:  # the template accepts other conversations only
            return ""
        return prompt[len(header) :] if prompt.startswith(header) else ""

    def sequences(
        self, messages: Sequence[Message], context: int, tools: Sequence[Tool]
    ) -> list[list[Segment]]:
        """Return the training sequences of a conversation.

        Args:
            messages: the conversation.
            context: number of leading messages that are not learned.
            tools: functions that the assistant may call.

        Raises:
            RowRefused: if the template drops a part of a learned turn.
        """
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        stops = self.template.text_tokenizer.stop_names
        sequences: list[list[Segment]] = []
        done, has_stop = "", False
        for index in answers:
            before = self.template.render_messages(messages[:index], tools, reply=True)
            # A reply must end with a stop token, which the next turn may open with.
            continues = before.startswith(done) and (
                has_stop or before.startswith(stops, len(done))
            )
            if not sequences or not continues:
                sequences.append([])
                done = ""
            reply = self._render_reply(before, messages[: index + 1], tools)
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
        # Sentinels break the names of special tokens in user text, and would hide the text.
        done = done.replace(SENTINEL, "")
        for index, message in enumerate(messages[: answers[-1]]):
            if message.role == "system" and not self.template.supports_system_prompt:
                raise _dropped_by_template("the system prompt", index, SYSTEM_FIX)
            if message.role == "tool" and (missing := missing_from(done, message)):
                raise _dropped_by_template(missing, index)
        return sequences

    def _render_reply(
        self, before: str, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> RenderedReply:
        """Return the last turn as the model generates the turn after the prompt ``before``.

        Raises:
            RowRefused: for reasoning after a prompt that closes the reasoning.
            RecipeError: if the template writes the turn in a way that no prompt continues.
        """
        message, stem = messages[-1], before
        after = self.marked.render_messages(messages, tools, reply=False)
        pieces = after.split(GENERATION)
        after = "".join(pieces).removesuffix(self.turn_end.dropped)
        # A prompt may open the reasoning, and the finished turn has none.
        if not after.startswith(before):
            stem = before.removesuffix(self.prompt_end)
        marks = self.reasoning_marks
        is_open = marks is not None and before.rstrip().endswith(marks.open)
        if not after.startswith(stem) or (stem != before and not is_open and message.reasoning):
            if message.reasoning:
                raise RowRefused(
                    "row.template",
                    f"Message {len(messages)} has reasoning, and the prompt turns reasoning off.",
                    "Remove the reasoning, or set `data.chat_template_kwargs.enable_thinking=true`.",
                )
            if is_open and (
                switch := next(iter(self.template.read_kwargs(dict.fromkeys(SWITCHES, False))), "")
            ):
                raise RowRefused(
                    "row.template",
                    f"The prompt opens the reasoning, and message {len(messages)} has no reasoning.",
                    f"Set `data.chat_template_kwargs.{switch}=false`, or add `reasoning_content`.",
                )
            if messages[0].role == "system":
                # Mistral 7B v0.3 and Nemo write the system prompt into the last turn of a prompt, and
                # nowhere else. The reply does not depend on the system prompt.
                prompt = self.template.render_messages(messages[1:-1], tools, reply=True)
                reply = self._render_reply(prompt, messages[1:], tools)
                return replace(reply, is_verbatim=False)
            raise RecipeError(
                "the chat template renders the start of an answer in two ways, so the learned "
                "tokens are ambiguous. Use single-turn rows or template=plain.",
                rule="template.rewrites",
            )
        stops = self.template.text_tokenizer.stop_names
        if (
            message.calls
            and self.turn_end.added
            and not any(name in after[len(stem) :] for name in stops)
        ):
            # GLM 4 ends a call with the token that opens the turn of the result.
            results = [Message("tool", "a", call_id=call.id) for call in message.calls]
            more = self.template.render_messages((*messages, *results), tools, reply=False)
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


def _single_turn(messages: Sequence[Message]) -> tuple[str, str]:
    """Return the prompt and the completion of a model without a chat template."""
    if len(messages) != 2 or messages[1].role != "assistant":
        raise RecipeError(
            "the model has no chat template, and the plain template supports one prompt and one "
            f"completion, not a conversation. {TEMPLATE_FIX}",
            rule="template.plain",
        )
    return messages[0].content, messages[1].content


def _dropped_by_template(missing: str, index: int, fix: str = "") -> RowRefused:
    return RowRefused(
        "row.template",
        f"The model's chat template drops {missing} (message {index + 1}).",
        fix or "Write the text into the content, use another base model, or remove the row.",
    )


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
