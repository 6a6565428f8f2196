"""The texts of a row, by what they are to a model: what it is given, and what it learns to write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from luthier.types import Message, Row

Part = Literal["input", "target", "other"]


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a row."""

    field: str
    """As people know it: ``prompt``, ``messages[2].content``, ``tokens``."""
    content: str
    part: Part
    """``input`` is what is given, ``target`` what is learned or preferred, ``other`` is graded
    against, or was rejected."""


def texts(row: Row) -> Iterator[Text]:
    """Every text of ``row``, in the order a model reads them."""
    yield from _turns("messages", row.messages, "target" if row.reply is None else "input")
    yield from _turns("reply" if row.rejected is None else "chosen", row.reply, "target")
    yield from _turns("rejected", row.rejected, "other", "other")
    if row.prompt is not None:
        yield Text("prompt", row.prompt, "input")
    if row.completion is not None:
        yield Text("completion", row.completion, "target")
    if row.expected is not None:
        yield Text("expected", row.expected, "other")
    if row.text is not None:
        labelled = row.label is not None or row.rating is not None or row.positive is not None
        yield Text("text", row.text, "input" if labelled else "target")
    if row.positive is not None:
        yield Text("positive", row.positive, "target")
    if row.tokens is not None:
        yield Text("tokens", " ".join(row.tokens), "input")


def _turns(
    field: str, turns: tuple[Message, ...] | None, answered: Part, given: Part = "input"
) -> Iterator[Text]:
    """Turns of a conversation; those of the assistant are ``answered``."""
    for number, turn in enumerate(turns or (), 1):
        part = answered if turn.role == "assistant" else given
        yield Text(f"{field}[{number}].content", turn.content, part)


def input_of(row: Row) -> tuple[str, ...]:
    """All that the model is given before it first answers; what makes two rows ask the same."""
    if row.messages is not None:
        until = len(row.messages)
        if row.reply is None and row.messages[-1].role == "assistant":
            until -= 1
        return tuple(f"{turn.role}: {turn.content}" for turn in row.messages[:until])
    if row.prompt is not None:
        return (row.prompt,)
    if row.tokens is not None:
        return tuple(row.tokens)
    return (row.text or "",)


def target_of(row: Row) -> tuple[str, ...]:
    """All that the row teaches about :func:`input_of`; empty for raw text and bare prompts."""
    if row.reply is not None:
        turns = [turn.content for turn in row.reply]
        judged = row.rejected if row.rejected is not None else ()
        return (*turns, *(f"not: {turn.content}" for turn in judged), _judgement(row))
    if row.messages is not None:
        last = row.messages[-1]
        return (last.content,) if last.role == "assistant" else ()
    if row.completion is not None:
        return (row.completion,)
    if row.label is not None:
        return tuple(sorted((row.label,) if isinstance(row.label, str) else row.label))
    if row.rating is not None:
        return (repr(row.rating),)
    if row.positive is not None:
        return (row.positive,)
    return row.tags or ()


def _judgement(row: Row) -> str:
    return repr(row.rating) if row.rating is not None else repr(row.desirable)


def excerpt_of(row: Row, width: int = 100) -> str:
    """How a row begins, on one line, for people to recognise it by."""
    text = " ".join(" ".join(each.content[: 4 * width] for each in texts(row)).split())
    return text if len(text) <= width else text[: width - 1] + "…"
