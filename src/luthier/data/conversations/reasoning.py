"""Separation of reasoning and answer in generated text.

The marks around reasoning are detected from the output of the chat template, as for Qwen3,
DeepSeek-R1, QwQ, GLM 4.5 and SmolLM3: ``<think>`` and ``</think>``, or another name in angle or
square brackets. Without such marks in the template, text stays unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from luthier.data.conversations.chat_template import ChatTemplate
from luthier.data.conversations.tokenization import special_tokens
from luthier.errors import RecipeError
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.types import TemplateKwargs

_CLOSE = re.compile(r"<[|｜]?/[\w:.-]{1,40}[|｜]?>|\[/[\w:.-]{1,40}\]")
"""Pattern of closing marks; the opening mark is the closing mark without the slash."""
CANDIDATES = 32
"""Most candidate marks per template, because a template is untrusted input."""
CHARACTERS = 1_000_000
"""Most characters of a rendered short conversation."""
TAIL = 32
"""Tokens at the end of a prompt to search for an open or closed reasoning block."""
SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn reasoning on and off."""
_USER, _ANSWER, _THOUGHT = "a probe's question", "a probe's answer", "a probe's thought"


@dataclass(frozen=True)
class ReasoningMarks:
    """Marks around a model's reasoning."""

    open: str
    close: str
    open_id: int | None = None
    """Id of the opening mark, if the mark is a single token."""
    close_id: int | None = None
    special: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Special tokens of the marks, which the tokenizer drops from decoded text."""
    answer: tuple[str, ...] = ()
    """Marks before an answer, such as gpt-oss's ``<|channel|>final<|message|>``."""

    @property
    def empty_block(self) -> re.Pattern[str]:
        """Pattern of the empty block that a template writes for a turn without reasoning.

        The block ends at the answer's first line, whose indentation belongs to the answer.
        """
        return re.compile(rf"{re.escape(self.open)}\s*{re.escape(self.close)}(?:\s*\n)?")


@dataclass(frozen=True)
class ReasoningFormat:
    """Marks of a reply's reasoning, and whether the prompt already opened the reasoning."""

    marks: ReasoningMarks
    is_open: bool


@dataclass(frozen=True)
class DecodedReply:
    """A decoded reply: reasoning and answer."""

    reasoning: str
    text: str


def find_marks(template: ChatTemplate) -> ReasoningMarks | None:
    """Return the reasoning marks of a chat template; ``None`` without marks.

    Tried are all known kinds of templates. They render the reasoning of a turn, render an empty
    block, open or close a block in the prompt (also with a switch), or cut the reasoning from
    earlier turns.
    """
    # The opening mark alone is ambiguous: "<s>" or "<user>" have the same form.
    closes = list(dict.fromkeys(_CLOSE.findall(template.text)))[:CANDIDATES]
    if not closes:
        return _channel_marks(template)
    pairs = [(close.replace("/", "", 1), close) for close in closes]
    # Rendered one by one: the first two usually decide.
    renderings = _renderings(template)
    thoughtful, plain = next(renderings), next(renderings)
    # Marks around whole answers, <assistant>…</assistant>, are not reasoning.
    pairs = [p for p in pairs if not re.search(rf"{re.escape(p[0])}\s*{_ANSWER}", plain)]
    for text in chain((thoughtful, plain), renderings):
        for opening, close in pairs:
            if _has_marks(text, opening, close):
                return _known_marks(template, opening, close)
    for opening, close in _cut_from_history(template, pairs):
        return _known_marks(template, opening, close)
    return _channel_marks(template)


def _channel_marks(template: ChatTemplate) -> ReasoningMarks | None:
    """Return the marks of a template with channels: of prompts (Gemma 4) or of replies (gpt-oss)."""
    if "channel" not in template.text:  # rendering imports transformers, which takes seconds
        return None
    specials = tuple(special_tokens(template.tokenizer))
    thoughtful, plain, *prompts = _renderings(template)
    turn = plain.partition(_ANSWER)[0]
    for block in (each.removeprefix(turn) for each in prompts if each.startswith(turn)):
        close = next((name for name in specials if block.endswith(name) and block != name), "")
        if close and block.startswith(specials):
            return _known_marks(template, block.removesuffix(close), close)
    prompt = prompts[0]
    header = prompt[len(_render(template, (Message("user", _USER),), reply=False)) :]
    channel = plain.removeprefix(prompt).partition(_ANSWER)[0]
    if not (plain.startswith(prompt) and any(name in channel for name in specials)):
        return None
    opening, thought, rest = thoughtful.removeprefix(prompt).partition(_THOUGHT)
    between = rest.partition(_ANSWER)[0]
    close = between.removesuffix(header + channel)
    if not thought or close in ("", between):
        return None
    return _known_marks(template, opening, close, (channel, header + channel))


def _known_marks(
    template: ChatTemplate, opening: str, close: str, answer: tuple[str, ...] = ()
) -> ReasoningMarks:
    encoder = template.text_tokenizer
    # A mark of several tokens is found in text only; a single token also in ids.
    ids = {mark: encoder.ids(mark) for mark in (opening, close, *answer)}
    single = {mark: tokens[0] for mark, tokens in ids.items() if len(tokens) == 1}
    special: dict[int, str] = {}
    for token in chain.from_iterable(ids.values()):
        if (name := encoder.tokenizer.decode([token])) not in encoder.decode([token]):
            special[token] = name
    return ReasoningMarks(opening, close, single.get(opening), single.get(close), special, answer)


def _renderings(template: ChatTemplate) -> Iterator[str]:
    """Yield a turn with and without reasoning, then prompts with each switch of the template."""
    question = Message("user", _USER)
    for answer in (
        Message("assistant", _ANSWER, reasoning=_THOUGHT),
        Message("assistant", _ANSWER),
    ):
        yield _render(template, (question, answer), reply=False)
    switched: list[TemplateKwargs] = [{name: value} for name in SWITCHES for value in (True, False)]
    for kwargs in [{}, *switched]:
        if template.read_kwargs(kwargs) == kwargs:
            yield _render(template, (question,), kwargs=kwargs)


def _has_marks(text: str, opening: str, close: str) -> bool:
    """Return whether a rendered text has a reasoning block, or opens one at the end."""
    block = rf"{re.escape(opening)}\s*(?:{_THOUGHT}\s*)?{re.escape(close)}\s*(?:{_ANSWER}|$)"
    return text.rstrip().endswith(opening) or re.search(block, text) is not None


def _cut_from_history(
    template: ChatTemplate, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield the pairs whose reasoning the template cuts from the content of earlier turns."""
    turns: list[Message] = []
    for number, (_, close) in enumerate(pairs):
        reply = f"{_THOUGHT} {number}.{close}{_ANSWER} {number}."
        turns += [Message("user", _USER), Message("assistant", reply)]
    text = _render(template, (*turns, Message("user", _USER)))
    for number, pair in enumerate(pairs):
        if f"{_ANSWER} {number}." in text and f"{_THOUGHT} {number}." not in text:
            yield pair


def _render(
    template: ChatTemplate,
    turns: Sequence[Message],
    reply: bool = True,
    kwargs: TemplateKwargs | None = None,
) -> str:
    """Return a rendered conversation; empty if the template rejects it or renders too much text."""
    try:
        text = template.render_messages(turns, (), reply=reply, kwargs=kwargs)
    except RecipeError:
        return ""
    return text if len(text) <= CHARACTERS else ""


def overlap(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of a mark."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0


class ReasoningSplitter:
    """Incremental split of a reply's text into reasoning and answer.

    White space around the reasoning and blank lines before the answer are dropped. Text that may
    start a mark is buffered. The result does not depend on the pieces.
    """

    def __init__(self, reasoning: ReasoningFormat | None) -> None:
        """``None`` stands for a reply without reasoning: all text is the answer."""
        self._reasoning = reasoning
        self._state: Literal["opening", "reasoning", "closed", "answer"] = (
            "answer" if reasoning is None else "opening"
        )
        self._buffer = ""
        self._received = 0
        self._has_reasoning = False
        self.answer_start: int | None = 0 if reasoning is None else None
        """Characters before the answer, marks included; ``None`` before the answer starts."""

    def feed(self, text: str) -> tuple[str, str]:
        """Add text; return the new reasoning and the new part of the answer."""
        reasoning = self._reasoning
        if reasoning is None:
            return "", text
        self._buffer += text
        self._received += len(text)
        if self._state == "opening":
            self._open(reasoning)
        reasoning_text = ""
        if self._state == "reasoning":
            reasoning_text = self._reason(reasoning.marks.close)
        if self._state == "closed" and (answer := self._buffer.lstrip()):
            marks = reasoning.marks.answer
            if answer not in marks and any(each.startswith(answer) for each in marks):
                return reasoning_text, ""
            found = next((each for each in marks if answer.startswith(each)), "")
            self._buffer = self._buffer.replace(found, "", 1)
            answer = self._buffer.lstrip()
            space = self._buffer[: len(self._buffer) - len(answer)]
            self._buffer = self._buffer[space.rfind("\n") + 1 :]
            self._begin_answer()
        if self._state != "answer":
            return reasoning_text, ""
        answer, self._buffer = self._buffer, ""
        return reasoning_text, answer

    def end(self) -> tuple[str, str]:
        """Return the buffered reasoning and answer at the end of the text."""
        reasoning, text = self._reasoning, self._buffer
        self._buffer = ""
        if reasoning is None:
            return "", ""
        if self._state == "opening" and not reasoning.is_open:
            self.answer_start, self._state = 0, "answer"
            return "", text
        if self._state in ("opening", "reasoning"):
            return (text.rstrip() if self._has_reasoning else text.strip()), ""
        return "", ""

    def _open(self, reasoning: ReasoningFormat) -> None:
        mark, text = reasoning.marks.open, self._buffer.lstrip()
        if text.startswith(mark):
            # A model may repeat the opening mark of the prompt.
            self._buffer, self._state = text[len(mark) :], "reasoning"
        elif found := next((m for m in reasoning.marks.answer if text.startswith(m)), ""):
            self._buffer = text[len(found) :]
            self._begin_answer()
        elif not any(each.startswith(text) for each in (mark, *reasoning.marks.answer)):
            if reasoning.is_open:
                self._state = "reasoning"
            else:
                self._begin_answer()

    def _reason(self, close: str) -> str:
        """Return the new reasoning before a possible closing mark."""
        if not self._has_reasoning:
            self._buffer = self._buffer.lstrip()
        at = self._buffer.find(close)
        if at >= 0:
            reasoning_text, self._buffer = (
                self._buffer[:at].rstrip(),
                self._buffer[at + len(close) :],
            )
            self._state = "closed"
        else:
            reasoning_text = self._buffer[
                : len(self._buffer) - overlap(self._buffer, [close])
            ].rstrip()
            self._buffer = self._buffer[len(reasoning_text) :]
        self._has_reasoning = self._has_reasoning or bool(reasoning_text)
        return reasoning_text

    def _begin_answer(self) -> None:
        self.answer_start, self._state = self._received - len(self._buffer), "answer"


def split_reply(reasoning: ReasoningFormat | None, text: str) -> DecodedReply:
    """A whole reply, parted."""
    splitter = ReasoningSplitter(reasoning)
    parts = [splitter.feed(text), splitter.end()]
    return DecodedReply("".join(part[0] for part in parts), "".join(part[1] for part in parts))
