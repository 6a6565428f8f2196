"""Answers from passages, and citations in a stream of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from luthier.data.conversations.citations import CITATION, add_passages, cited_numbers
from luthier.documents.index import FoundPassage
from luthier.documents.passages import count_words
from luthier.pages import Displayed
from luthier.types import Message

Result = TypeVar("Result")

PASSAGES = 4
"""Number of passages in a prompt."""
UNCITED = "No passage is cited. The nearest passages:"
SHORT_WORDS = 5
"""Maximum number of words of a message that is searched together with the message before."""
_UNFINISHED = re.compile(r"\[\d{0,3}$")


def search_text(turns: Sequence[Message]) -> str:
    """Return the text to search for: the last user message, after the one before if it is short.

    A short message, such as "And in winter?", is often a follow-up without a topic of its own.
    """
    *earlier, last = [turn.content.strip() for turn in turns if turn.role == "user"] or [""]
    if not last or count_words(last) > SHORT_WORDS:
        return last
    return " ".join([*earlier[-1:], last])


@dataclass(frozen=True, repr=False)
class DocumentAnswer(Displayed):
    """An answer with its sources."""

    question: str
    text: str
    passages: tuple[FoundPassage, ...]
    """The passages of the prompt, in the order of their numbers."""
    declined: bool = False
    """True if the passages do not answer the question."""
    remark: str = ""
    """Doubt about the model, for readers; empty without doubt."""

    @property
    def cited(self) -> tuple[int, ...]:
        """Numbers of the cited passages, from 1, in the order of their first citation."""
        return tuple(n for n in cited_numbers(self.text) if 1 <= n <= len(self.passages))

    @property
    def sources(self) -> dict[int, FoundPassage]:
        """The cited passages by number; all passages without citations."""
        numbers = self.cited or range(1, len(self.passages) + 1)
        return {n: self.passages[n - 1] for n in numbers}

    def summary(self) -> list[str]:
        """Return the answer and the places of the sources."""
        if self.declined:
            return [self.text]
        places = [f"[{n}] {each.place}" for n, each in self.sources.items()]
        remarks = [*([] if self.cited else [UNCITED]), *filter(None, [self.remark])]
        return [self.text, *remarks, *places[:4]]

    def plain(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "question": self.question,
            "answer": self.text,
            "declined": self.declined,
            "cited": list(self.cited),
            "passages": [each.plain() for each in self.passages],
            **({"remark": self.remark} if self.remark else {}),
        }


class Citations:
    """Citations in a stream of text. A number that names no passage of the prompt is removed."""

    def __init__(self, passages: int) -> None:
        self._passages, self._held = passages, ""
        self.length = 0
        """Number of characters that :meth:`add` has returned."""

    def add(self, text: str, last: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return the next characters, and each citation's position and number.

        The beginning of a possible citation waits for the next call, except in the ``last`` call.
        """
        text = self._held + text
        unfinished = None if last else _UNFINISHED.search(text)
        self._held = unfinished[0] if unfinished else ""
        text = text.removesuffix(self._held)
        ready, found, start = "", list[tuple[int, int]](), 0
        for each in CITATION.finditer(text):
            ready += text[start : each.start()]
            if 1 <= int(each[1]) <= self._passages:
                found.append((self.length + len(ready), int(each[1])))
                ready += each[0]
            start = each.end()
        ready += text[start:]
        self.length += len(ready)
        return ready, found


def without_unknown_citations(text: str, passages: int) -> str:
    """Return ``text`` without citations of passages outside the prompt."""
    return Citations(passages).add(text, last=True)[0]


def submit_passages(
    turns: Sequence[Message],
    passages: Sequence[str],
    submit: Callable[[list[Message]], Result],
    is_too_long: Callable[[Exception], bool],
) -> tuple[Result, int]:
    """Return the result of ``submit`` for the first ``passages`` that fit in the context, and their
    number.

    Raises:
        Exception: any exception of ``submit`` for the first passage alone.
    """
    count = len(passages)
    while True:
        try:
            return submit(add_passages(turns, passages[:count])), count
        except Exception as error:
            # The template decides the length of the prompt, so the number of passages is found by
            # trial. The last passage is the least similar.
            if count < 2 or not is_too_long(error):
                raise
        count -= 1
