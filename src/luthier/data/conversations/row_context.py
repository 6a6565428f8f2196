"""System prompts, earlier turns, tools, images, reasoning and learning marks next to a row's turns.

All row forms use the same keys for this context. The context joins the turns here, after form and
shape of the row are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from luthier.data.conversations.content_parts import join_parts, place_images
from luthier.data.conversations.tool_forms import REASONING_KEYS
from luthier.data.conversations.turn_marks import (
    check_row_marks,
    has_mark_list,
    is_mark,
    mark_sense,
    plain_name,
    spread_marks,
)
from luthier.data.files.parsing import Record, json_kind, parse_embedded, quote
from luthier.data.shapes.base import Shape
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.preferences import (
    JudgedAnswers,
    JudgedReply,
    Preference,
    RankedReplies,
)
from luthier.errors import RowRefused

_SYSTEM_NAMES = frozenset(
    ("system", "systemprompt", "systemmessage", "sysprompt", "systeminstruction", "instructions")
)
TOOL_KEYS = frozenset(("tools", "functions", "toolConfig"))
IMAGE_KEYS = ("image", "images")
"""Keys of the images of a conversation."""
_CONTEXT_KEYS = TOOL_KEYS | {"history"}
TURN_KEYS = ("messages", "conversations")
"""Keys of turns."""


def is_system_key(key: str) -> bool:
    """Return whether a key is a name for the system prompt."""
    return plain_name(key) in _SYSTEM_NAMES


def context_keys(kind: type[Shape], record: Record) -> set[str]:
    """Return the keys of a record that :func:`join_context` reads for the shape."""
    if issubclass(kind, PromptOnly):
        return {key for key in record if is_system_key(key)}
    if not issubclass(kind, Conversation | PromptCompletion | JudgedAnswers):
        return set()
    accepted = {*(TOOL_KEYS if any(key in record for key in TURN_KEYS) else _CONTEXT_KEYS)}
    if not issubclass(kind, JudgedAnswers):
        accepted.update(IMAGE_KEYS)
    if not issubclass(kind, Preference | RankedReplies):  # whose reasoning is in each answer
        accepted.update(key for key in REASONING_KEYS if isinstance(record.get(key), str))
    return {
        key for key in record if key in accepted or is_system_key(key) or is_mark(key, record[key])
    }


@lru_cache(1000)
def _may_hold_context(keys: tuple[str, ...]) -> bool:
    """Return whether a record with these keys can have context, cached because rows share keys."""
    return any(
        key in _CONTEXT_KEYS
        or key in IMAGE_KEYS
        or key in REASONING_KEYS
        or is_system_key(key)
        or mark_sense(key) is not None
        for key in keys
    )


def parse_turns(record: Record) -> Record:
    """Return the record with turns parsed from JSON text, as in table cells."""
    for key in TURN_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                record = {**record, key: parse_embedded(value)}
            except ValueError as error:
                raise RowRefused(
                    "messages.type",
                    f"{quote(key)} is not valid JSON: {error}.",
                    'Write an array of {"role": "...", "content": "..."} in JSON.',
                ) from None
    return record


def join_context(
    kind: type[Shape], record: Record, asks: bool = False
) -> tuple[type[Shape], Record]:
    """Merge the context of a row into its turns; return shape and record.

    A prompt and a completion with a system prompt, earlier turns, tools, images or reasoning become
    messages.

    Args:
        kind: shape of the record.
        record: row with the keys of the shape.
        asks: also convert a prompt without a completion to messages, and ignore marks.

    Raises:
        RowRefused: if the context is invalid, or contradicts the turns of the row.
    """
    if issubclass(kind, PromptCompletion) and isinstance(record.get("completion"), list):
        kind, record = _join_turn_lists(kind, record)
    if issubclass(kind, JudgedReply) and "messages" in record:
        record = _split_reply(record)
    if not _may_hold_context(tuple(record)):
        return kind, record
    if not issubclass(kind, Conversation | PromptOnly | PromptCompletion | JudgedAnswers):
        flags: Record = {key: value for key, value in record.items() if isinstance(value, bool)}
        check_row_marks(flags, may_list=False)
        return kind, record
    keys = context_keys(PromptCompletion if asks else kind, record)
    if asks:
        keys = {key for key in keys if mark_sense(key) is None and key not in REASONING_KEYS}
    context = {key: record[key] for key in record if key in keys}
    if not context:
        return kind, record
    check_row_marks(context, may_list=not issubclass(kind, JudgedAnswers))
    if issubclass(kind, Conversation):
        turns = record["messages"]
        images = _images_of(context)
        if isinstance(turns, list):
            turns = _put_before(_system_turns(context), spread_marks(context, turns))
            turns = _with_reasoning(turns, context)
            turns = place_images(turns, len(images)) if images else turns
        return kind, {**record, "messages": turns, "images": images}
    if issubclass(kind, JudgedAnswers):
        if issubclass(kind, JudgedReply) and (reply := record.get("completion")):
            turns = [_turn("assistant", reply)] if isinstance(reply, str) else _turns_of(reply)
            record = {**record, "completion": _with_reasoning(turns, context)}
        return kind, _with_turns_before(record, [*_system_turns(context), *_history_turns(record)])
    if issubclass(kind, PromptOnly) and not asks:
        system = _system_turns(context)
        return kind, {**record, "system": system[0]["content"] if system else None}
    return _as_messages(kind, record, context)


def _join_turn_lists(kind: type[Shape], record: Record) -> tuple[type[Shape], Record]:
    """Return a prompt and a completion as messages if both are lists of turns, as in TRL.

    Assistant turns of the prompt are not learned.
    """
    prompt, completion = record.get("prompt"), record["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return kind, record
    turns = [*prompt, *completion]
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return kind, record
    prompt_turns = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt
    ]
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    return Conversation, {**rest, "messages": [*prompt_turns, *completion]}


def _as_messages(kind: type[Shape], record: Record, context: Record) -> tuple[type[Shape], Record]:
    """Return a prompt and an optional completion as messages if the row has context."""
    before = [*_system_turns(context), *_history_turns(record)]
    tools = any(record.get(key) not in (None, "", [], {}, "[]") for key in TOOL_KEYS)
    texts = [record.get("prompt")]
    if issubclass(kind, PromptCompletion) or not is_blank(record.get("completion")):
        texts.append(record.get("completion"))
    images, reasons = _images_of(context), any(context.get(key) for key in REASONING_KEYS)
    if not (before or tools or images or reasons or has_mark_list(context)) or any(
        is_blank(text) or not isinstance(text, str) for text in texts
    ):
        return kind, record
    turns = [_turn(role, text) for role, text in zip(("user", "assistant"), texts, strict=False)]
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion")}
    marked = _with_reasoning(spread_marks(context, turns), context)
    marked = place_images(marked, len(images)) if images else marked
    return Conversation, {**rest, "messages": [*before, *marked], "images": images}


def _turn(role: str, text: object) -> dict[str, Any]:
    return {"role": role, "content": text}


def _split_reply(record: Record) -> Record:
    """Return a judged conversation as a prompt and the last turn."""
    turns = record["messages"]
    rest = {key: value for key, value in record.items() if key != "messages"}
    if not isinstance(turns, list) or len(turns) < 2:
        raise RowRefused(
            "preference.type",
            '"messages" must be an array of a prompt and a reply.',
            'Write "messages": [{"role": "user", "content": "..."}, {"role": "assistant", …}].',
        )
    return {**rest, "prompt": turns[:-1], "completion": turns[-1:]}


def _images_of(context: Record) -> list[object]:
    """Return the images of a row, from one path or an array."""
    found: list[object] = []
    for value in (context.get(key) for key in IMAGE_KEYS):
        if not is_blank(value):
            found += value if isinstance(value, list) else [value]
    return found


def _with_reasoning(turns: Sequence[object], context: Record) -> list[object]:
    """Return the turns with the row's reasoning in the last turn.

    Raises:
        RowRefused: if several keys have different reasoning.
    """
    # By text: the same reasoning under two keys is no conflict.
    found = {str(context[key]): key for key in REASONING_KEYS if not is_blank(context.get(key))}
    last = turns[-1] if turns else None
    if not found or not isinstance(last, dict) or last.get("role") != "assistant":
        return list(turns)
    own = next((last[key] for key in REASONING_KEYS if not is_blank(last.get(key))), None)
    reasoning, key = next(iter(found.items()))
    if len(found) > 1 or own not in (None, reasoning):
        raise RowRefused(
            "row.ambiguous",
            "The row has different texts of reasoning.",
            f"Ignore one, as with `data.columns.{key}=`.",
        )
    return [*turns[:-1], {**last, "reasoning_content": reasoning}]


def _with_turns_before(record: Record, before: list[dict[str, Any]]) -> Record:
    """Return a row of judged answers with turns before its prompt, or before both conversations."""
    if not before:
        return record
    openai_input = record.get("input")
    if "prompt" not in record and isinstance(openai_input, Mapping) and "messages" in openai_input:
        return {
            **record,
            "input": {
                **openai_input,
                "messages": _put_before(before, _turns_of(openai_input["messages"])),
            },
        }
    # A whole conversation needs the turns at its own start, because the prompt is only the common
    # beginning of both.
    sides = [key for key in ("chosen", "rejected") if _is_whole(record.get(key))]
    if sides:
        return {**record, **{key: _put_before(before, _turns_of(record[key])) for key in sides}}
    return {**record, "prompt": _put_before(before, _turns_of(record.get("prompt")))}


def _is_whole(value: object) -> bool:
    """Return whether an answer is a whole conversation, starting before the assistant."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _turns_of(value: object) -> list[object]:
    if isinstance(value, str):
        return [_turn("user", value)]
    return value if isinstance(value, list) else [value]


def _put_before(before: list[dict[str, Any]], turns: Iterable[object]) -> list[object]:
    """Return the earlier turns and then the row's turns, without a repeated system prompt.

    Raises:
        RowRefused: for two different system prompts.
    """
    result = list(turns)
    first = result[0] if result else None
    if (
        before
        and before[0]["role"] == "system"
        and isinstance(first, Mapping)
        and first.get("role") in ("system", "developer")
    ):
        if join_parts(first.get("content")) != before[0]["content"]:
            raise RowRefused(
                "message.order",
                "The row has one system prompt next to the messages and another as the first message.",
                "Join both prompts, or ignore a column with `data.columns.system=`.",
            )
        before = before[1:]
    return [*before, *result]


def _system_turns(context: Record) -> list[dict[str, Any]]:
    """Return the system prompt as a list of at most one turn.

    Raises:
        RowRefused: if the prompt is not text, or two keys have different prompts.
    """
    prompts: dict[str, str] = {}
    for key, value in context.items():
        if not is_system_key(key):
            continue
        if isinstance(value, Mapping) and "content" in value:
            value = value["content"]
        text = join_parts([value] if isinstance(value, dict) else value)
        # Exports write an empty column for rows without a system prompt.
        if is_blank(text) or text == []:
            continue
        if not isinstance(text, str):
            raise RowRefused(
                "field.type",
                f"{quote(key)} must be a string, but is {json_kind(text)}.",
                f"Write one string, or ignore the column with `data.columns.{key}=`.",
            )
        prompts[key] = text
    if len(set(prompts.values())) > 1:
        raise RowRefused(
            "row.ambiguous",
            f"The row has different system prompts under {' and '.join(map(quote, prompts))}.",
            f"Ignore one column, as with `data.columns.{next(iter(prompts))}=`.",
        )
    return [{"role": "system", "content": text} for text in prompts.values()][:1]


def _history_turns(record: Record) -> list[dict[str, Any]]:
    """Return earlier turns, from pairs of question and answer or from turns with a role.

    Raises:
        RowRefused: for any other history.
    """
    history = record.get("history")
    if isinstance(history, str) and history.lstrip().startswith("["):
        with suppress(RowRefused):  # the error below names the column
            history = parse_turns({"messages": history})["messages"]
    if is_blank(history) or history == []:
        return []
    turns: list[dict[str, Any]] = []
    for pair in history if isinstance(history, list) else [None]:
        if isinstance(pair, dict) and "role" in pair:
            turns.append(pair)
        elif isinstance(pair, list) and len(pair) == 2:
            turns += [
                _turn(role, text) for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        else:
            raise RowRefused(
                "messages.type",
                '"history" must be an array of pairs of question and answer.',
                'Write [["question", "answer"]], or ignore the column with `data.columns.history=`.',
            )
    return turns


def is_blank(value: object) -> bool:
    """Return whether a value is null, or a text of nothing but white space."""
    return value is None or (isinstance(value, str) and not value.strip())
