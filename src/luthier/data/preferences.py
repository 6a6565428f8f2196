"""What people prefer: two answers to one prompt, or one answer with a rating or a thumb.

``{"prompt", "chosen", "rejected"}`` where the prompt is a text or a list of messages and each answer a
text, a message or a list of messages; the same without a prompt, where both are whole conversations
with a common beginning; OpenAI's form ``{"input": {"messages"}, "preferred_output",
"non_preferred_output"}``; ``{"prompt", "completion"}`` with a ``rating`` (or ``score``), or with
``label: true`` or ``false`` (or ``thumb: "up"`` or ``"down"``).

A rejected answer may be empty: not to stop at once is a lesson. An empty chosen one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from luthier.data.content import joined
from luthier.data.parsing import Record, json_kind, shown
from luthier.errors import DataError, Problem, RowRefused
from luthier.types import Message, Row

RULES: Mapping[str, str] = {
    "preference.missing": "One of chosen and rejected, or of OpenAI's three fields, is not there.",
    "preference.type": "A prompt or an answer is neither a text, a message nor a list of messages.",
    "preference.empty": "The prompt, a message or the chosen answer is empty or only white space.",
    "preference.equal": "The chosen and the rejected answer are the same, white space aside.",
    "preference.no_beginning": "Chosen and rejected are conversations that do not begin alike.",
    "preference.order": "Prompt and answer are no conversation in turns that an assistant ends.",
    "rating.single": "The answer is the only one to its prompt, so nothing can be compared.",
    "rating.tied": "All answers to one prompt have the same rating.",
    "thumb.type": 'A thumb is neither true nor false, "up" nor "down".',
    "thumb.one_kind": "All thumbs point the same way.",
}
"""Every rule of preferences, with what it refuses; the reference is generated from it."""

CHOSEN = '{"prompt", "chosen", "rejected"}'
OPENAI = '{"input", "preferred_output", "non_preferred_output"}'
RATED = '{"prompt", "completion", "rating"}'
THUMB = '{"prompt", "completion", "label": true}'
SHAPES = (CHOSEN, OPENAI, RATED, THUMB)

_OPENAI_KEYS = ("input", "preferred_output", "non_preferred_output")
_THUMBS: Mapping[str, bool] = {"up": True, "down": False}
_ROLES = ("system", "user", "assistant")

Turns = tuple[Message, ...]


def shape_of(record: Record) -> str | None:
    """Which shape of preferences a record has by its keys, if any."""
    if "chosen" in record or "rejected" in record:
        return CHOSEN
    if "preferred_output" in record or "non_preferred_output" in record:
        return OPENAI
    if "prompt" not in record or "completion" not in record:
        return None
    if "thumb" in record or isinstance(record.get("label"), bool):
        return THUMB
    # As text or empty it is a remark beside the row, and no judgement of it.
    given = (record.get("rating"), record.get("score"))
    return RATED if any(type(value) in (int, float) for value in given) else None


def preference(shape: str, record: Record, file: str, line: int) -> Row:
    """The checked row of a record of ``shape``.

    Raises:
        RowRefused: with the rule that it breaks.
    """
    if shape == OPENAI:
        return _openai(record, file, line)
    if shape == CHOSEN:
        missing = [key for key in ("chosen", "rejected") if key not in record]
        if missing:
            raise RowRefused(
                "preference.missing",
                f'"{missing[0]}" is missing: a preference is one answer beside another.',
                f'Add "{missing[0]}", or rename the other to "completion".',
            )
        return _pair(record.get("prompt"), record["chosen"], record["rejected"], file, line)
    prompt = _prompt(record["prompt"], "prompt")
    reply = _turns(record["completion"], "completion", "assistant")
    _check_order((*prompt, *reply))
    thumb = None if shape == RATED else _thumb(record.get("thumb", record.get("label")))
    # An answer of nothing may be disliked, as a rejected one may be.
    _check_written((*prompt, *(reply[:-1] if thumb is False else reply)))
    rating = None if shape == THUMB else _rating(record)
    return Row(file, line, messages=prompt, reply=reply, rating=rating, desirable=thumb)


def _rating(record: Record) -> float:
    given = (record.get("rating"), record.get("score"))
    return next(float(each) for each in given if type(each) in (int, float))  # type: ignore[arg-type]


def _thumb(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _THUMBS:
        return _THUMBS[value]
    given = shown(value) if isinstance(value, str) else json_kind(value)
    raise RowRefused(
        "thumb.type",
        f"the thumb is {given}, which is neither up nor down.",
        'Write "label": true or false, or "thumb": "up" or "down".',
    )


def _openai(record: Record, file: str, line: int) -> Row:
    missing = [key for key in _OPENAI_KEYS if key not in record]
    if missing:
        raise RowRefused(
            "preference.missing", f'"{missing[0]}" is missing.', f'Add "{missing[0]}".'
        )
    given = record["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise RowRefused(
            "preference.type",
            f'"input" must be an object with "messages", but is {json_kind(given)}.',
            'Write "input": {"messages": [{"role": "user", "content": "..."}]}.',
        )
    sides = (record["preferred_output"], record["non_preferred_output"])
    return _pair(given["messages"], *sides, file, line)


def _pair(prompt: object, chosen: object, rejected: object, file: str, line: int) -> Row:
    """Two answers to one prompt, which may be told by what both have in common."""
    sides = (_turns(chosen, "chosen", "assistant"), _turns(rejected, "rejected", "assistant"))
    whole = [side[0].role != "assistant" for side in sides]
    given = None if prompt is None else _prompt(prompt, "prompt")
    if any(whole) or given is None:
        common = _beginning(*sides)
        if not common or not all(whole):
            raise RowRefused(
                "preference.no_beginning",
                "there is no prompt, and chosen and rejected have no common beginning.",
                "Add the prompt, or begin both conversations with the same messages.",
            )
        if given is not None and given not in (common[: len(given)], common[1 : len(given) + 1]):
            raise RowRefused(
                "preference.no_beginning",
                "the prompt is not what both conversations begin with.",
                "Remove the prompt, or give only the answers as chosen and rejected.",
            )
        given, sides = common, (sides[0][len(common) :], sides[1][len(common) :])
    reply, other = sides
    if _stripped(reply) == _stripped(other):
        raise RowRefused(
            "preference.equal",
            "chosen and rejected are the same, so there is nothing to prefer.",
            "Remove the row, or mend one of the two.",
        )
    for side in sides:
        _check_order((*given, *side))
    _check_written((*given, *reply, *other[:-1]))
    return Row(file, line, messages=given, reply=reply, rejected=other)


def _beginning(one: Turns, other: Turns) -> Turns:
    """Messages that both begin with, up to the last before a turn of the assistant in both."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    while count and not (one[count].role == other[count].role == "assistant"):
        count -= 1
    return one[:count]


def _stripped(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _prompt(value: object, key: str) -> Turns:
    turns = _turns(value, key, "user")
    if turns[-1].role == "assistant":
        raise RowRefused(
            "preference.order",
            "the prompt ends with a turn of the assistant, which is to answer it.",
            "Move that turn to the beginning of both answers, or add the user's next turn.",
        )
    return turns


def _turns(value: object, key: str, role: str) -> Turns:
    """A text (of ``role``), a message, or a list of at least one message."""
    if isinstance(value, str):
        return (Message(role, value),)
    items = value if isinstance(value, list) and value else [value]
    found = []
    for each in items:
        item = each
        if isinstance(each, dict) and "content" in each:
            item = {**each, "content": joined(each["content"])}
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise RowRefused(
                "preference.type",
                f'"{key}" must be a text, a message or a list of messages, but holds '
                f"{json_kind(item)}{' without a text as content' * isinstance(item, dict)}.",
                f'Write "{key}": "text", or {{"role": "{role}", "content": "text"}}.',
            )
        if item.get("role") not in _ROLES:
            raise RowRefused(
                "preference.order",
                f"a message of {key} has the role {shown(str(item.get('role')))}.",
                "Roles are system, user and assistant.",
            )
        if item.get("tool_calls") or item.get("function_call"):
            raise RowRefused(
                "preference.type",
                f"a message of {key} calls a tool; tool calls cannot be learned yet.",
                "Write the call as text in the content, or remove the row.",
            )
        found.append(Message(item["role"], item["content"]))
    return tuple(found)


def _check_written(turns: Turns) -> None:
    for turn in turns:
        if not turn.content.strip():
            raise RowRefused(
                "preference.empty",
                f"a turn of the {turn.role} is empty, and only a rejected answer may be.",
                "Write its text, or remove the row.",
            )


def _check_order(turns: Turns) -> None:
    """System may come first, then user and assistant in turns, the assistant last."""
    start = 1 if turns[0].role == "system" else 0
    wanted = [("user", "assistant")[place % 2] for place in range(len(turns) - start)]
    roles = [turn.role for turn in turns[start:]]
    if roles != wanted or roles[-1:] != ["assistant"]:
        raise RowRefused(
            "preference.order",
            f"prompt and answer are the turns {', '.join(turn.role for turn in turns)}.",
            "After an optional system message, user and assistant take turns; the assistant ends.",
        )


def paired(rows: Sequence[Row]) -> list[Row]:
    """Rows with one judged answer each to pairs; rows that are pairs stay as they are.

    Every two answers to one prompt with different ratings are a pair (Ouyang et al. 2022, section
    3.5); a thumb is a rating of 1 or 0. Pairs stand at the place of the better answer.

    Raises:
        DataError: for answers that nothing can be compared with.
    """
    groups: dict[Turns | None, list[Row]] = {}
    for row in rows:
        if row.rejected is None:
            groups.setdefault(row.messages, []).append(row)
    problems = [found for group in groups.values() if (found := _incomparable(group))]
    if problems:
        raise DataError(problems)
    made: list[Row] = []
    for row in rows:
        if row.rejected is not None:
            made.append(row)
            continue
        worse = [other for other in groups[row.messages] if _worth(other) < _worth(row)]
        made += [replace(row, rejected=o.reply, rating=None, desirable=None) for o in worse]
    problems = [_equal(row) for row in made if row.reply == row.rejected]
    if problems:
        raise DataError(problems)
    return made


def _equal(row: Row) -> Problem:
    return Problem(
        row.file,
        row.line,
        "preference.equal",
        "the same answer to the same prompt has another judgement in another row.",
        "Keep one of the two rows.",
    )


def _incomparable(group: Sequence[Row]) -> Problem | None:
    first = group[0]
    if any(_worth(one) != _worth(other) for one, other in combinations(group, 2)):
        return None
    if len(group) == 1:
        return Problem(
            first.file,
            first.line,
            "rating.single",
            "this is the only answer to its prompt, so there is nothing to compare it with.",
            "Add another answer with another rating, remove the row, learn from thumbs one by one "
            "with objective kto, or from every answer alike with objective sft.",
        )
    return Problem(
        first.file,
        first.line,
        "rating.tied",
        f"all {len(group)} answers to this prompt have the same rating ({_worth(first):g}).",
        "Rate one of them differently, or remove the rows.",
    )


def _worth(row: Row) -> float:
    return float(bool(row.desirable)) if row.rating is None else row.rating
