"""Rows to the forms of other tools: the way back from ``luthier.data.forms``.

What a form has no place for is refused, never left out. ``TARGETS`` is the table: a name and a function
from a row to a record. A record that is written and read again gives the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from luthier.data.forms import Form
from luthier.data.parsing import Record
from luthier.errors import RowRefused
from luthier.types import Message, Row

RULES: Mapping[str, str] = {
    "convert.form": "The form asked for has no place for something in the row.",
    "convert.container": "A table has no place for something in the row.",
    "convert.key": "A further key of the row has the name of one that is written.",
    "convert.message": "A message has a key beside its role and its text, which would be lost.",
}
"""Rules of ``luthier convert``."""

Turns = Sequence[Message]


def _rows(row: Row) -> Record:
    """Our own shape of the row."""
    if row.reply is not None:
        asked, replied = _side(row.messages or (), "user"), _side(row.reply, "assistant")
        if row.rejected is not None:
            return {
                "prompt": asked,
                "chosen": replied,
                "rejected": _side(row.rejected, "assistant"),
            }
        if row.rating is not None:
            return {"prompt": asked, "completion": replied, "rating": row.rating}
        return {"prompt": asked, "completion": replied, "label": bool(row.desirable)}
    if row.messages is not None:
        return {"messages": _plain(row.messages)}
    if row.tokens is not None:
        return {"tokens": list(row.tokens), "tags": list(row.tags or ())}
    if row.positive is not None:
        return {"anchor": row.text, "positive": row.positive}
    if row.text is None:
        beside = {"completion": row.completion, "expected": row.expected}
        return {"prompt": row.prompt, **{k: v for k, v in beside.items() if v is not None}}
    label = list(row.label) if isinstance(row.label, tuple) else row.label
    judged: Record = {"label": label, "rating": row.rating}
    return {"text": row.text, **{k: v for k, v in judged.items() if v is not None}}


def _pair(row: Row) -> Record:
    prompt, completion = _one_turn(row, "prompt-completion")
    return {"prompt": prompt, "completion": completion}


def _chat(row: Row) -> Record:
    return {"messages": _plain(_turns(row, "chat"))}


def _openai(row: Row) -> Record:
    if row.reply is None or row.rejected is None:
        return {"messages": _plain(_turns(row, "openai"))}
    return {
        "input": {"messages": _plain(row.messages or ())},
        "preferred_output": _plain(row.reply),
        "non_preferred_output": _plain(row.rejected),
    }


def _bedrock(row: Row) -> Record:
    if _is_raw(row):
        return {"input": row.text}
    prompt, completion = _one_turn(row, "bedrock")
    return {"prompt": prompt, "completion": completion}


def _conversation(row: Row) -> Record:
    turns = _turns(row, "bedrock-conversation")
    blocks = [
        {"role": t.role, "content": [{"text": t.content}]} for t in turns if t.role != "system"
    ]
    system = [{"text": turn.content} for turn in turns if turn.role == "system"]
    beside: Record = {"system": system} if system else {}
    return {"schemaVersion": "bedrock-conversation-2024", **beside, "messages": blocks}


def _sharegpt(row: Row) -> Record:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[t.role], "value": t.content} for t in _turns(row, "sharegpt")]
    return {"conversations": turns}


def _alpaca(row: Row) -> Record:
    turns = list(_turns(row, "alpaca"))
    system = turns.pop(0).content if turns[0].role == "system" else None
    *earlier, asked, answered = turns
    made: Record = {"instruction": asked.content, "input": "", "output": answered.content}
    if system is not None:
        made["system"] = system
    if earlier:
        pairs = zip(earlier[::2], earlier[1::2], strict=True)
        made["history"] = [[one.content, other.content] for one, other in pairs]
    return made


def _text(row: Row) -> Record:
    if not _is_raw(row):
        raise _no_place("text", "is more than a text")
    return {"text": row.text}


TARGETS: Mapping[str, Callable[[Row], Record]] = {
    "rows": _rows,
    "prompt-completion": _pair,
    "chat": _chat,
    "openai": _openai,
    "bedrock": _bedrock,
    "bedrock-conversation": _conversation,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "text": _text,
}
"""Forms that rows can be written in; ``rows`` is our own shape of each."""


def _is_raw(row: Row) -> bool:
    more = (row.label, row.rating, row.positive, row.tokens)
    return row.text is not None and all(each is None for each in more)


def _turns(row: Row, form: str) -> Turns:
    """The row as a conversation that the assistant ends."""
    if row.messages is not None and row.reply is None:
        return row.messages
    if row.prompt is not None and row.completion is not None:
        return (Message("user", row.prompt), Message("assistant", row.completion))
    if row.reply is not None:
        raise _no_place(form, "is a judgement of answers")
    raise _no_place(
        form, "is a prompt without a reply" if row.prompt is not None else "is no conversation"
    )


def _one_turn(row: Row, form: str) -> tuple[str, str]:
    turns = _turns(row, form)
    if [turn.role for turn in turns] != ["user", "assistant"]:
        what = "a system prompt" if turns[0].role == "system" else f"{len(turns)} turns"
        raise _no_place(form, f"has {what}")
    return turns[0].content, turns[1].content


def _no_place(form: str, what: str) -> RowRefused:
    return RowRefused(
        "convert.form",
        f"The row {what}, and {form} has no place for it.",
        "Choose another form with --to (rows keeps everything), or remove the row.",
    )


def _side(turns: Turns, role: str) -> object:
    return turns[0].content if [t.role for t in turns] == [role] else _plain(turns)


def _plain(turns: Turns) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


_FIELDS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "completion": ("completion",),
    "expected": ("expected",),
    "messages": ("messages", "prompt", "input"),
    "text": ("text", "anchor"),
    "positive": ("positive",),
    "label": ("label",),
    "rating": ("rating", "score"),
    "tokens": ("tokens", "tags"),
    "reply": ("completion", "chosen", "preferred_output", "messages"),
    "rejected": ("rejected", "non_preferred_output"),
    "desirable": ("label", "thumb"),
}


def keys_of(row: Row) -> set[str]:
    """Keys of our own shapes that the row was made of."""
    return {key for name, keys in _FIELDS.items() if getattr(row, name) is not None for key in keys}


def used_keys(row: Row, form: Form | None) -> set[str]:
    """Keys of the record that the row was made of; others stand beside it."""
    if form is None:
        return keys_of(row)
    judged = keys_of(row) & {"rating", "score", "label", "thumb", "expected"}
    return set(form.keys | form.used) | judged
