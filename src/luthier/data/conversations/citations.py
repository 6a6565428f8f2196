"""The prompt of a question with numbered passages, and replies with citations such as ``[1]``.

``luthier ask``, ``file_search``, rows with passages and ``luthier compare --documents`` share the
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from luthier.types import Message

INSTRUCTIONS = (
    "Answer the question from the numbered passages alone, in the language of the question. After "
    "each statement, cite its passage, such as [1]. If the passages do not contain the answer, say "
    "that the documents do not answer the question."
)
DECLINED = "The documents do not answer this question."
CITATION = re.compile(r"\[(\d{1,3})\]")
_BEFORE_CITATION = re.compile(rf"\s*{CITATION.pattern}")
_DECLINES = re.compile(
    r"[^.!?]*\b(?:(?:documents?|passages?) (?:do|does) not (?:answer|contain)"
    r"|(?:tài liệu|đoạn văn|đoạn trích)[^.!?,]* không (?:trả lời|chứa|có|nêu|đề cập))[^.!?,]*[.!?]?\s*",
    re.IGNORECASE,
)
"""A reply of one sentence, in English or Vietnamese. After a comma may come an answer."""


def add_passages(turns: Sequence[Message], passages: Sequence[str]) -> list[Message]:
    """Return ``turns`` with instructions and ``passages`` before the question of the last user turn.

    The system prompt stays: some chat templates have none. Earlier replies lose their citations,
    which name other passages.
    """
    changed = [
        replace(turn, content=without_citations(turn.content)) if turn.role == "assistant" else turn
        for turn in turns
    ]
    last = max(n for n, turn in enumerate(turns) if turn.role == "user")
    numbered = [f"[{n}] {each}" for n, each in enumerate(passages, 1)]
    parts = [INSTRUCTIONS, *numbered, f"Question: {turns[last].content}"]
    changed[last] = replace(turns[last], content="\n\n".join(parts))
    return changed


def requires_citations(turns: Sequence[Message]) -> bool:
    """Return whether :func:`add_passages` made a prompt."""
    return bool(turns) and INSTRUCTIONS in turns[-1].content


def cited_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of the citations in ``text``, in the order of their first citation."""
    return tuple(dict.fromkeys(int(each) for each in CITATION.findall(text)))


def without_citations(text: str) -> str:
    """Return ``text`` without citations and the blanks before them."""
    return _BEFORE_CITATION.sub("", text).strip()


def declines(reply: str) -> bool:
    """Return whether a reply says that the passages do not answer the question.

    Only English and Vietnamese replies are recognized.
    """
    return not CITATION.search(reply) and _DECLINES.fullmatch(reply) is not None
