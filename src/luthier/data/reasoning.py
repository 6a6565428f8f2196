"""Reasoning in what a model writes: the marks around it, and the answer behind it.

Which marks those are, and whether there are any, is read from the chat template of a model by what it
renders, as those of Qwen3, DeepSeek-R1, QwQ, GLM 4.5 and SmolLM3: ``<think>`` and ``</think>``, or any
other name in angle or square brackets. The text of a model whose template has none stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from luthier.errors import RecipeError
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.types import IntArray, TemplateKwargs

_CLOSE = re.compile(r"<[|｜]?/[\w:.-]{1,40}[|｜]?>|\[/[\w:.-]{1,40}\]")
"""What may close reasoning; what opens it is the same without the slash."""
CANDIDATES = 32
"""Such marks of one template that are tried: a template may come from anybody."""
CHARACTERS = 1_000_000
"""Of a conversation of a few words, as a template writes it, at most."""
TAIL = 32
"""Tokens at the end of a prompt that are looked at, where it may begin or close the reasoning."""
_SWITCHES = ("enable_thinking", "thinking")
"""Names that templates read to turn reasoning on and off."""
_USER, _ANSWER, _THOUGHT = "a probe's question", "a probe's answer", "a probe's thought"


@dataclass(frozen=True)
class ReasoningMarks:
    """What a model writes around its reasoning."""

    open: str
    close: str
    open_id: int | None = None
    """The token that is the whole mark, where there is one."""
    close_id: int | None = None
    special: Mapping[int, str] = field(default_factory=dict, hash=False)
    """Those of them that a tokenizer leaves out of a text, as it does special tokens."""

    @property
    def empty_block(self) -> re.Pattern[str]:
        """Pattern of the block that a template writes for a turn without reasoning.

        The block ends at the line of the answer, whose indentation belongs to the answer.
        """
        return re.compile(rf"{re.escape(self.open)}\s*{re.escape(self.close)}(?:\s*\n)?")


@dataclass(frozen=True)
class ReasoningFormat:
    """How an answer may reason: between which marks, and whether its prompt has begun it."""

    marks: ReasoningMarks
    is_open: bool


@dataclass(frozen=True)
class DecodedReply:
    """A reply as text: what was thought, and what is said."""

    reasoning: str
    text: str


def find_marks(chat: ChatFormat) -> ReasoningMarks | None:
    """The marks that the chat template of ``chat`` writes or cuts; ``None`` where it has none.

    Each way in which templates have them is tried: they write the reasoning of a turn, or an empty
    block; the prompt begins or closes one, also by a switch; what stands before the closing mark is cut
    out of earlier turns.
    """
    closes = list(dict.fromkeys(_CLOSE.findall(chat.template_text)))[:CANDIDATES]
    if not closes:
        return None
    pairs = [(close.replace("/", "", 1), close) for close in closes]
    renderings = _renderings(chat)
    thoughtful, plain = next(renderings), next(renderings)
    # What stands around answers themselves is none: <assistant>…</assistant>.
    pairs = [p for p in pairs if not re.search(rf"{re.escape(p[0])}\s*{_ANSWER}", plain)]
    for text in chain((thoughtful, plain), renderings):
        for opening, close in pairs:
            if _has_marks(text, opening, close):
                return _known_marks(chat, opening, close)
    for opening, close in _cut_from_history(chat, pairs):
        return _known_marks(chat, opening, close)
    return None


def _known_marks(chat: ChatFormat, opening: str, close: str) -> ReasoningMarks:
    ids = {mark: chat.tokens(mark, first=False).tolist() for mark in (opening, close)}
    single = {mark: tokens[0] for mark, tokens in ids.items() if len(tokens) == 1}
    special = {
        token: mark for mark, token in single.items() if mark not in chat.decode_tokens([token])
    }
    return ReasoningMarks(opening, close, single.get(opening), single.get(close), special)


def _renderings(chat: ChatFormat) -> Iterator[str]:
    """A turn with and one without reasoning, then prompts by each switch that the template has."""
    question = Message("user", _USER)
    for answer in (
        Message("assistant", _ANSWER, reasoning=_THOUGHT),
        Message("assistant", _ANSWER),
    ):
        yield _render(chat, (question, answer), reply=False)
    switched: list[TemplateKwargs] = [
        {name: value} for name in _SWITCHES for value in (True, False)
    ]
    for kwargs in [{}, *switched]:
        if chat.read_kwargs(kwargs) == kwargs:
            yield _render(chat, (question,), kwargs=kwargs)


def _has_marks(text: str, opening: str, close: str) -> bool:
    """Whether reasoning, or an empty block, stands in a rendered text, or begins at its end."""
    block = rf"{re.escape(opening)}\s*(?:{_THOUGHT}\s*)?{re.escape(close)}\s*(?:{_ANSWER}|$)"
    return text.rstrip().endswith(opening) or re.search(block, text) is not None


def _cut_from_history(
    chat: ChatFormat, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Those of ``pairs`` by which a template cuts reasoning out of the content of earlier turns."""
    turns: list[Message] = []
    for number, (_, close) in enumerate(pairs):
        said = f"{_THOUGHT} {number}.{close}{_ANSWER} {number}."
        turns += [Message("user", _USER), Message("assistant", said)]
    text = _render(chat, (*turns, Message("user", _USER)))
    for number, pair in enumerate(pairs):
        if f"{_ANSWER} {number}." in text and f"{_THOUGHT} {number}." not in text:
            yield pair


def _render(
    chat: ChatFormat,
    turns: Sequence[Message],
    reply: bool = True,
    kwargs: TemplateKwargs | None = None,
) -> str:
    """A conversation as the template writes it; empty where it refuses it, or writes a book."""
    try:
        text = chat.render_turns(turns, (), reply=reply, kwargs=kwargs)
    except RecipeError:
        return ""
    return text if len(text) <= CHARACTERS else ""


def reasoning_after(chat: ChatFormat, prompt_T: IntArray) -> ReasoningFormat | None:
    """How an answer to a prompt may reason; ``None`` where it does not, or the prompt has closed it."""
    marks = chat.reasoning_marks
    if marks is None:
        return None
    end = "".join(chat.pieces(prompt_T[-TAIL:].tolist())).rstrip()
    if end.endswith(marks.close):
        return None
    return ReasoningFormat(marks, end.endswith(marks.open))


def overlap(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that one of ``marks`` begins with, and is longer than."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(mark) > size and mark.startswith(end) for mark in marks):
            return size
    return 0


class ReasoningSplitter:
    """Parts the text of an answer, as it comes, into reasoning and what is said behind it.

    White space around the reasoning is left out, and so are blank lines before the answer. What may be
    a mark is held back until that is known. How the text is cut into pieces makes no difference.
    """

    def __init__(self, reasoning: ReasoningFormat | None) -> None:
        """``None`` for an answer without reasoning: all of it is said."""
        self._reasoning = reasoning
        self._state: Literal["opening", "reasoning", "closed", "answer"] = (
            "answer" if reasoning is None else "opening"
        )
        self._held = ""
        self._came = 0
        self._shown = False
        self.answer_start: int | None = 0 if reasoning is None else None
        """Characters before the answer, marks included; ``None`` until it has begun."""

    def feed(self, text: str) -> tuple[str, str]:
        """The next characters; what of all that is held is reasoning, and what is said."""
        reasoning = self._reasoning
        if reasoning is None:
            return "", text
        self._held += text
        self._came += len(text)
        if self._state == "opening":
            self._open(reasoning)
        thought = ""
        if self._state == "reasoning":
            thought = self._reason(reasoning.marks.close)
        if self._state == "closed" and (said := self._held.lstrip()):
            space = self._held[: len(self._held) - len(said)]
            self._held = self._held[space.rfind("\n") + 1 :]
            self._begin_answer()
        if self._state != "answer":
            return thought, ""
        said, self._held = self._held, ""
        return thought, said

    def end(self) -> tuple[str, str]:
        """What is left when no more comes."""
        reasoning, held = self._reasoning, self._held
        self._held = ""
        if reasoning is None:
            return "", ""
        if self._state == "opening" and not reasoning.is_open:
            self.answer_start, self._state = 0, "answer"
            return "", held
        if self._state in ("opening", "reasoning"):
            return (held.rstrip() if self._shown else held.strip()), ""
        return "", ""

    def _open(self, reasoning: ReasoningFormat) -> None:
        mark, text = reasoning.marks.open, self._held.lstrip()
        if text.startswith(mark):
            # A model may write it although its prompt has, too.
            self._held, self._state = text[len(mark) :], "reasoning"
        elif not mark.startswith(text):
            if reasoning.is_open:
                self._state = "reasoning"
            else:
                self._begin_answer()

    def _reason(self, close: str) -> str:
        """The reasoning that is known to be some."""
        if not self._shown:
            self._held = self._held.lstrip()
        at = self._held.find(close)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(close) :]
            self._state = "closed"
        else:
            thought = self._held[: len(self._held) - overlap(self._held, [close])].rstrip()
            self._held = self._held[len(thought) :]
        self._shown = self._shown or bool(thought)
        return thought

    def _begin_answer(self) -> None:
        self.answer_start, self._state = self._came - len(self._held), "answer"


def split_reply(reasoning: ReasoningFormat | None, text: str) -> DecodedReply:
    """A whole reply, parted."""
    splitter = ReasoningSplitter(reasoning)
    parts = [splitter.feed(text), splitter.end()]
    return DecodedReply("".join(part[0] for part in parts), "".join(part[1] for part in parts))
