"""Checks of the values in a record: text, labels, ratings, tags, turns.

A problem of a single value is raised as ``RowRefused``. If a row can have several problems (both
texts of a pair, any turn of a conversation), :class:`FieldChecker` reports each problem and
continues.
"""

from __future__ import annotations

import ast
import base64
import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

import numpy as np

from luthier.data.character_spans import are_spans
from luthier.data.conversations.content_parts import join_parts
from luthier.data.conversations.tool_forms import read_tools, unify_turns
from luthier.data.conversations.turn_marks import read_marks
from luthier.data.files.parsing import Record, json_kind, quote
from luthier.data.in_memory import stored_rows
from luthier.data.inputs import (
    LARGEST_VALUE,
    LONGEST_WINDOW,
    SINGULAR,
    Media,
    MediaKind,
    object_name,
)
from luthier.data.packed_media import packed_media
from luthier.errors import Location, Problem, RowRefused, location_text
from luthier.formatting import list_some
from luthier.types import Message, Tool, ToolCall

Turns = tuple[Message, ...]
Names = Mapping[str, str]
"""Names of luthier's keys in the file, for messages."""

_ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = "system, user, assistant and tool"
_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "start": ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Allowed next roles by role; ``call`` is an assistant turn with tool calls."""
ROLE_RENAMES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
} | {role: role for role in _ROLES}
"""Role names of other tools."""
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_BIO = re.compile(r"O|[BI]-\S+")
TAGGED_EXAMPLE = '{"tokens": ["Rita", "sings"], "tags": ["B-person", "O"]}'

RENAMES: Mapping[str, str] = {
    "instruction": "prompt",
    "question": "prompt",
    "input": "prompt",
    "response": "completion",
    "output": "completion",
    "answer": "completion",
    "conversations": "messages",
    "from": "role",
    "value": "content",
} | {key: key for key in ("prompt", "completion", "messages", "text", "role", "content")}
"""Common synonyms for luthier's keys."""


def list_keys(keys: Iterable[str]) -> str:
    """Return the first ten keys, quoted for a message."""
    return list_some(map(quote, keys), 10)


def rename_fix(holder: Record, targets: tuple[str, ...]) -> str:
    """Return advice to read similar keys as the wanted keys; empty without a similar key."""
    of_turn = not {"role", "content"}.isdisjoint(targets)
    steps, absent = [], []
    for target in targets:
        similar = [key for key in holder if RENAMES.get(key.strip().lower()) == target]
        if len(similar) == 1:
            rename = f'rename {quote(similar[0])} to "{target}"'
            steps.append(rename if of_turn else f"set `data.columns.{target}={similar[0]}`")
        elif similar:
            steps.append(f'join {list_keys(similar)} into "{target}"')
        elif target not in holder:
            absent.append(f'add "{target}"')
    if not steps:
        return ""
    fix = " and ".join(steps + absent)
    hint = ', as an array of {"role", "content"}' if targets == ("messages",) else ""
    return f"{fix[:1].upper()}{fix[1:]}{hint}."


def column_fix(key: str, column: str) -> str:
    """Return advice for ``column``, whose name is similar to the key ``key``."""
    return (
        f'Did you mean {quote(column)}? Rename the column to "{key}", or set '
        f"`data.columns.{key}={column}`."
    )


_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d+"""
_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})(?:\s*,\s*|\s+|(?=\s*\])))*\s*\]", re.S)
"""A list as printed by Python or numpy: ``['a', 'b']``, ``['a' 'b']``, ``[1, 2]``."""


def _parse_list(text: str) -> object:
    """Return the labels of a list that is written as text; other text unchanged.

    Raises:
        RowRefused: for a list or an object in another notation.
    """
    text_ = text.strip()
    if (text_[:1], text_[-1:]) not in (("[", "]"), ("{", "}")):
        return text
    with suppress(ValueError, RecursionError):
        value = json.loads(text_)
        if isinstance(value, list):
            return value
    if _LIST.fullmatch(text_):
        # literal_eval of the whole list would concatenate the strings of numpy's ['a' 'b'].
        return [ast.literal_eval(item) for item in re.findall(_ITEM, text_, re.S)]
    if "," in text_ or '"' in text_ or "'" in text_:
        raise RowRefused(
            "label.type",
            f'"label" is {quote(text)}, which looks like several labels in an unknown notation.',
            'Write several labels as a JSON array: ["a", "b"].',
        )
    return text


def read_label(value: object) -> str | tuple[str, ...]:
    """Return one label, or a tuple for an array of labels.

    Integers become text, and an array written as text is parsed.
    """
    if isinstance(value, str):
        value = _parse_list(value)
    if not isinstance(value, list):
        return _label_name(value)
    if value and are_spans(value):  # the first row has no entity
        fix = "For entities in the text, set `data.columns.entities=label`."
        raise RowRefused("label.type", '"label" is an array of entities.', fix)
    names = tuple(_label_name(item, "an array with {} inside") for item in value)
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise RowRefused(
            "label.duplicate", f"The label {quote(repeated[0])} occurs twice.", "Keep one."
        )
    return names


def _label_name(value: object, description: str = "{}") -> str:
    if type(value) is int or type(value) is bool:
        return str(value).lower()
    if isinstance(value, str) and value.strip():
        return value
    kind = "empty" if isinstance(value, str) else json_kind(value)
    fix = 'Write {"text": "...", "label": "name"}, or ["a", "b"] for several labels.'
    if value is None or value == "":
        fix = "Write the label, or remove the row."
    if type(value) is float:
        fix += " For a rating, set `data.columns.rating=label`."
    raise RowRefused(
        "label.type",
        f'"label" must be text, an integer, or an array of both, but is {description.format(kind)}.',
        fix,
    )


def read_rating(value: object) -> float:
    """Return a finite number."""
    number = type(value) in (int, float)
    if number and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    description = f"{value}" if number else json_kind(value)
    fix = "Write the number without quotes, or remove the row."
    if isinstance(value, str):
        description = f"the text {quote(value)}" if value.strip() else "empty"
        if DECIMAL_COMMA.fullmatch(value.strip()):
            fix = f"Write the number with a decimal point: {value.strip().replace(',', '.')}."
        elif not re.search(r"\d", value):
            fix = "Write a number, or remove the row."
    raise RowRefused("rating.type", f'"rating" must be a finite number, but is {description}.', fix)


def read_tagged(tokens: object, tags: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return words and BIO tags of equal number."""
    words, names = read_words(tokens, "tokens"), read_words(tags, "tags")
    if len(words) != len(names):
        raise RowRefused(
            "tags.length",
            f"The row has {len(words)} tokens and {len(names)} tags.",
            "Write one tag per token; O for tokens outside of entities.",
        )
    for number, name in enumerate(names, 1):
        if not _BIO.fullmatch(name):
            raise RowRefused(
                "tags.bio",
                f"Tag {number} is {quote(name)}.",
                "Tags are O, B-name for the first word of an entity and I-name for the next words.",
            )
    return words, names


def read_words(value: object, key: str) -> tuple[str, ...]:
    """Return a non-empty array of non-blank strings under ``key``."""
    if isinstance(value, list) and value and all(isinstance(i, str) and i.strip() for i in value):
        return tuple(value)
    if value is None:
        kind = "missing"
    elif not isinstance(value, list):
        kind = json_kind(value)
    elif not value:
        kind = "empty"
    else:
        wrong = next(each for each in value if not isinstance(each, str) or not each.strip())
        kind = f"an array with {'an empty text' if isinstance(wrong, str) else json_kind(wrong)}"
    raise RowRefused(
        "tags.type",
        f'"{key}" must be an array of texts, but is {kind}.',
        f"Write {TAGGED_EXAMPLE}.",
    )


class FieldChecker:
    """Checker for the values of one record at a time; problems get file and line.

    Args:
        file: the current file.
        problems: list for the problems.
    """

    other_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that are never suggested as a misspelt text column."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self.file = file
        self.problems = problems
        self.warnings: list[Problem] = []
        """Doubts about rows that are read."""
        self.line = 0
        self.names: Names = {}
        self._images: deque[object] = deque()
        self._placed: list[Media | None] = []
        self.unread_of_turns: dict[str, None] = {}
        """Ignored keys of turns, such as ``messages[].speaker``."""

    def report(self, rule: str, message: str, fix: str) -> None:
        """Add a problem of the current row."""
        self.problems.append(Problem(rule, message, fix, Location(self.file, self.line)))

    def text(
        self, holder: Record, key: str, number: int = 0, *, target: bool = False
    ) -> str | None:
        """Return a required, non-blank text; ``number`` is the number of the message, if any."""
        value = holder.get(key)
        if isinstance(value, str) and value and not value.isspace():
            return value
        called = self.names.get(key) or key
        name = f'"{called}" of message {number}' if number else f'"{called}"'
        if key not in holder:
            keys = list_keys(holder) if holder else "none"
            fix = rename_fix(holder, (key,)) or ("" if number else self._column_fix(holder, key))
            fix = fix or f'Add "{called}", or remove the row.'
            self.report("field.missing", f"{name} is missing; the keys are {keys}.", fix)
        elif not isinstance(value, str):
            fix = f"Write {name} as one string in double quotes."
            fix = f"Write {name}, or remove the row." if value is None else fix
            self.report("field.type", f"{name} must be a string, but is {json_kind(value)}.", fix)
        else:
            blank = "holds only white space" if value else "is empty"
            reason = ": there would be nothing to learn" if target else ""
            fix = f"Write the text of {name}, or remove the row."
            self.report("field.empty", f"{name} {blank}{reason}.", fix)
        return None

    def media(self, holder: Record, kind: MediaKind) -> Media | None:
        """Return the unopened image or audio of a record.

        Accepted are a path below the file's folder, bytes with or without a name as in Hugging Face
        data sets, and a ``data:`` address.
        """
        value = holder.get(kind)
        if isinstance(value, Media):
            return value
        if kind == "window":
            return self._window(value)
        name = location_text(self.file, self.line)
        # Hugging Face stores `{"bytes", "path"}`; the path is that of the machine that wrote the
        # file, so only the bytes are read.
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return Media(kind, str(value.get("path") or name), data=value["bytes"])
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, bytes):
            return Media(kind, name, data=value)
        if type(value) is int and (packed := packed_media(kind, Path(self.file), value)):
            return packed
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            key = quote(self.names.get(kind) or kind)
            what = SINGULAR[kind]
            fix = f"Write the path of the {what}, relative to the folder of this file, in {key}."
            message = f"{key} must be a path, but is {json_kind(value)}."
            self.report("media.type", message, fix)
            return None
        if value.startswith("data:"):
            return self._decode_data_address(value, kind, name)
        if value.startswith(("http://", "https://")):
            fix = "Download the file, and write its path or a data: address."
            self.report("media.remote", f"{quote(value)} is remote and not fetched.", fix)
            return None
        folder = Path(self.file).parent.resolve()
        if value.startswith("s3://"):
            copy = folder / object_name(value)
            if copy.is_file():
                return Media(kind, value, str(copy))
            fix = "Download the object and write its path. Jobs of the service download objects."
            self.report("media.missing", f"{quote(value)} is not downloaded.", fix)
            return None
        try:
            path = (folder / value).resolve()
            exists = path.is_file()
        except (OSError, RuntimeError, ValueError):  # name too long, circular links
            path, exists = folder, False
        # After symbolic links are resolved: rows of a client must not read files of the server. Rows
        # that a program passed are not a client's.
        if not path.is_relative_to(folder) and folder != stored_rows():
            fix = "Move the file into the folder of the rows, or a subfolder."
            message = f"{quote(value)} is not below the folder of this file."
            self.report("media.outside", message, fix)
            return None
        if not exists and (packed := packed_media(kind, Path(self.file), value)):
            return packed
        if not exists:
            fix = f"Correct the path (relative to {folder}), or remove the row."
            self.report("media.missing", f"the file {quote(value)} does not exist.", fix)
            return None
        return Media(kind, value, str(path))

    def _window(self, value: object) -> Media | None:
        """Return a window of a time series: values in order, the newest last."""
        times = value if isinstance(value, list) else []
        several = bool(times) and isinstance(times[0], list)
        rows = times if several else [[each] for each in times]
        width = len(rows[0]) if rows else 0
        if width and all(
            isinstance(row, list)
            and len(row) == width
            # An exact type, because True is an int in Python. The comparison is also False for NaN.
            and all(type(each) in (int, float) and abs(each) <= LARGEST_VALUE for each in row)
            for row in rows
        ):
            # The newest values, because the last value is the one that is scored.
            array = np.array(times[-LONGEST_WINDOW:], np.float64)
            return Media("window", location_text(self.file, self.line), array=array)
        message = f'"window" must be an array of finite numbers up to {LARGEST_VALUE:.0e}.'
        fix = "Write the values in order, the newest last; of several columns, an array for each time."
        self.report("media.type", message, fix)
        return None

    def _decode_data_address(self, value: str, kind: MediaKind, name: str) -> Media | None:
        """Decode a base64 ``data:`` address (RFC 2397)."""
        head, comma, body = value.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError
            return Media(kind, name, data=base64.b64decode(body, validate=True))
        except ValueError:
            fix = f"Write data:{kind}/…;base64, and the file's bytes in base64."
            self.report("media.type", "the data: address is not valid base64.", fix)
            return None

    def _column_fix(self, record: Record, key: str) -> str:
        """Return advice for the columns with names similar to ``key``; empty without such columns."""
        others = [name for name in record if name not in self.other_keys]
        near = [self.names.get(name) or name for name in get_close_matches(key, others, 2, 0.7)]
        if len(near) == 2 and all(isinstance(record[name], str) for name in near):
            one, other = sorted(near)
            return (
                f"The row has two texts. For pairs with a relevance from 0 to 1, set "
                f"`data.columns.query={one}` and `data.columns.document={other}`. For classes, set "
                f"`data.columns.premise={one}` and `data.columns.hypothesis={other}`."
            )
        return column_fix(key, near[0]) if near else ""

    def messages(self, value: object, answered: bool = True, images: object = None) -> Turns | None:
        """Return a conversation; with ``answered``, the last turn must be the assistant's.

        ``images`` are the images of parts without an own image, in order.
        """
        if not isinstance(value, list):
            called = self.names.get("messages") or "messages"
            message = f'"{called}" must be an array of objects, but is {json_kind(value)}.'
            fix = 'Write "messages": [{"role": "user", "content": "..."}, ...].'
            self.report("messages.type", message, fix)
            return None
        if not value:
            message = f'"{self.names.get("messages") or "messages"}" is an empty array.'
            fix = "Add at least one user and one assistant message, or remove the row."
            self.report("messages.empty", message, fix)
            return None
        self._images = deque(images if isinstance(images, list) else ())
        turns = [self._message(number, item) for number, item in enumerate(unify_turns(value), 1)]
        messages = tuple(turn for turn in turns if turn is not None)
        # Images without a part would be dropped in silence.
        if self._images:
            message = f'"images" has {len(self._images)} more images than the messages.'
            fix = 'Add one part {"type": "image"} per image, or remove the images.'
            self.report("media.count", message, fix)
            return None
        # The order is undefined if a message is missing or has an unknown role.
        if len(messages) == len(turns):
            self._check_order(messages, answered)
            replies = [turn for turn in messages if turn.role == "assistant"]
            if answered and replies and not any(turn.learned for turn in replies):
                message = "Every assistant turn is marked as not learned."
                fix = "Remove the mark of a turn to learn, or remove the row."
                self.report("message.weight", message, fix)
        return messages

    def _message(self, number: int, item: object) -> Message | None:
        """Return one turn; ``None`` after a reported problem."""
        if not isinstance(item, dict):
            message = f"Message {number} must be an object, but is {json_kind(item)}."
            fix = 'Write each message as {"role": "...", "content": "..."}.'
            self.report("messages.type", message, fix)
            return None
        role = self._role(number, item)
        try:
            learned = self.learned(item, "messages", role == "assistant")
            place = self._place_image if role == "user" else None
            if "content" in item:
                item = {**item, "content": join_parts(item["content"], place)}
            images, self._placed = tuple(self._placed), []
        except RowRefused as bad:
            self.report(bad.rule, f"Message {number}: {bad.problem.message}", bad.problem.advice)
            return None
        calls: tuple[ToolCall, ...] = tuple(item.get("tool_calls") or ())
        if calls or role == "tool":  # a tool result may be empty
            content = item.get("content")
            content = content if isinstance(content, str) else self.text(item, "content", number)
        else:
            content = self.text(item, "content", number, target=role == "assistant")
        if role is None or content is None or None in images:
            return None
        call_id, reasoning = item.get("tool_call_id"), item.get("reasoning_content")
        if role != "assistant" or not isinstance(reasoning, str):
            reasoning = ""
        found = tuple(filter(None, images))
        return Message(role, content, learned, calls, str(call_id or ""), reasoning.strip(), found)

    def _place_image(self, value: object) -> None:
        """Read an image part of the current turn; ``None`` stands for the row's next image."""
        if value is None and not self._images:
            raise RowRefused(
                "media.count",
                "an image part has no image.",
                'Write {"type": "image_url", "image_url": {"url": "PATH"}}, or add "images".',
            )
        value = self._images.popleft() if value is None else value
        self._placed.append(self.media({"image": value}, "image"))

    def learned(self, turn: Record, key: str, of_assistant: bool = True) -> bool:
        """Return whether a turn is learned, and record the turn's ignored keys.

        Raises:
            RowRefused: for an invalid mark.
        """
        learned, unread = read_marks(turn, of_assistant)
        called = self.names.get(key) or key
        self.unread_of_turns |= {f"{called}[].{name}": None for name in unread}
        return learned

    def _role(self, number: int, item: Record) -> str | None:
        """Return the role of a turn; ``None`` after a reported problem."""
        if item.get("role") in _ROLES:
            return str(item["role"])
        if item.get("role") == "developer":  # OpenAI's newer name for "system"
            return "system"
        role = self.text(item, "role", number)
        if role is None:
            return None
        message = f"Message {number} has the unknown role {quote(role)}."
        better = ROLE_RENAMES.get(role.strip().lower())
        fix = f"Change the role to one of {_ROLE_NAMES}."
        if better is not None:
            fix = f'Change the role {quote(role)} to "{better}".'
        self.report("message.role", message, fix)
        return None

    def tools(self, record: Record) -> tuple[Tool, ...]:
        """Return the tools of a conversation; empty if the record has none.

        Raises:
            RowRefused: for invalid tools.
        """
        variants = [
            tools
            for key in ("tools", "functions", "toolConfig")
            if (value := record.get(key)) is not None and (tools := read_tools(value))
        ]
        # Equal tools under OpenAI's older and newer key are no conflict.
        if any(tools != variants[0] for tools in variants):
            raise RowRefused(
                "tools.type",
                'The row has different tools under "tools", "functions" and "toolConfig".',
                'Write all tools under "tools".',
            )
        return variants[0] if variants else ()

    def _check_order(self, messages: Sequence[Message], answered: bool) -> None:
        """Report the first turn in a wrong position."""
        before = "start"
        for number, message in enumerate(messages, 1):
            if message.role not in _FOLLOWS[before] and not (
                number == 1 and message.role == "system"
            ):
                self._report_order(number, messages)
                # One error for a conversation: after a turn in a wrong position, all later turns
                # are wrong, too.
                break
            before = "call" if message.calls else message.role
        last = messages[-1].role
        if answered and last != "assistant":
            number = len(messages)
            text = f"The last message (message {number}) has the role {last}, not assistant."
            fix = "Add the assistant's reply, or remove the row."
            if number > 2 and messages[-2].role == "assistant":
                fix = f"Add the assistant's reply, or remove message {number}."
            self.report("message.last", text, fix)

    def _report_order(self, number: int, messages: Sequence[Message]) -> None:
        role, before = messages[number - 1].role, messages[number - 2]
        if role == "system":
            text = f"Message {number} has the role system, which is only allowed first."
            fix = "Move the text to the first message, or change the role."
        elif role == "tool":
            text = f"Message {number} is a tool result without a call before."
            fix = "Move the result after the assistant's call, or remove the message."
        elif number > 1 and before.calls:
            text = (
                f"Message {number - 1} calls a tool, and message {number} is not the tool's result."
            )
            fix = f'Add {{"role": "tool", "content": "..."}} after message {number - 1}.'
        elif number == 1 or before.role == "system":
            text = f"Message {number} has the role {role}; the first turn must be the user's."
            fix = f"Add the user message before message {number}, or remove message {number}."
        elif before.role == "tool":
            text = (
                f"Message {number} has the role {role} and follows a tool result without an answer."
            )
            fix = f"Add the assistant message before message {number}."
        else:
            text = f"Messages {number - 1} and {number} have the role {role}; roles must alternate."
            fix = "Join both messages, or add the missing turn between."
        self.report("message.order", text, fix)


def check_calls(messages: Turns, tools: Sequence[Tool]) -> None:
    """Reject calls of functions outside of the row's tools, if the row has tools."""
    names = {tool.name for tool in tools}
    for number, message in enumerate(messages, 1):
        for call in message.calls if names else ():
            if call.name not in names:
                raise RowRefused(
                    "message.tool_calls",
                    f"Message {number} calls {quote(call.name)}, which is not among the row's tools.",
                    f"Correct the name, or add the tool ({list_keys(sorted(names))}).",
                )


def read_prompt(value: object, fields: FieldChecker) -> Turns:
    """Return the turns of a prompt; the assistant must not be last. See :func:`read_turns`."""
    turns = read_turns(value, "prompt", "user", fields)
    if turns[-1].role == "assistant":
        raise RowRefused(
            "preference.order",
            "the prompt ends with an assistant turn.",
            "Move this turn to the start of both answers, or add the user's next turn.",
        )
    return turns


def read_turns(value: object, key: str, role: str, fields: FieldChecker) -> Turns:
    """Return the turns of a text (of ``role``), a message, or a non-empty list of messages.

    Raises:
        RowRefused: for any other value, for tool calls, and for an answer without a learned turn.
    """
    if isinstance(value, str):
        return (Message(role, value),)
    items = value if isinstance(value, list) and value else [value]
    messages = []
    # Check before, for malformed calls, and after, for calls in other forms.
    _reject_calls(items, key)
    turns = unify_turns(items)
    _reject_calls(turns, key)
    for each in turns:
        item = each
        if isinstance(each, dict) and "content" in each:
            item = {**each, "content": join_parts(each["content"])}
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise RowRefused(
                "preference.type",
                f'"{key}" must be a text, a message or a list of messages, but has '
                f"{json_kind(item)}{' without text as content' * isinstance(item, dict)}.",
                f'Write "{key}": "text", or {{"role": "{role}", "content": "text"}}.',
            )
        speaker = "system" if item.get("role") == "developer" else item.get("role")
        if speaker not in ("system", "user", "assistant"):
            raise RowRefused(
                "preference.order",
                f"a message of {key} has the role {quote(str(speaker))}.",
                "Roles are system, user and assistant.",
            )
        answers = speaker == "assistant"
        # A prompt is never learned, so marks have no effect.
        learned = fields.learned(item, key, answers and role == "assistant")
        reasoning = str(item.get("reasoning_content") or "").strip() if answers else ""
        messages.append(Message(speaker, item["content"], learned, reasoning=reasoning))
    learned_turns = [turn.learned for turn in messages if turn.role == "assistant"]
    if role == "assistant" and learned_turns and not any(learned_turns):
        raise RowRefused(
            "message.weight",
            f"every assistant turn in {key} is marked as not learned.",
            "Remove the mark of a turn to learn, or remove the row.",
        )
    return tuple(messages)


def _reject_calls(turns: Sequence[object], key: str) -> None:
    for turn in turns:
        if isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("function_call")):
            raise RowRefused(
                "preference.type",
                f"a message of {key} calls a tool, which is not supported in preferences.",
                "Write the call as text in the content, or remove the row.",
            )


def check_not_blank(turns: Turns) -> None:
    """Refuse turns of white space alone."""
    for turn in turns:
        if not turn.content.strip():
            raise RowRefused(
                "preference.empty",
                f"a turn of the {turn.role} is empty; only a rejected answer may be empty.",
                "Write some text, or remove the row.",
            )


def check_turn_order(turns: Turns) -> None:
    """System may come first, then user and assistant in turns, the assistant last."""
    start = 1 if turns[0].role == "system" else 0
    expected = [("user", "assistant")[place % 2] for place in range(len(turns) - start)]
    roles = [turn.role for turn in turns[start:]]
    if roles != expected or roles[-1:] != ["assistant"]:
        raise RowRefused(
            "preference.order",
            f"prompt and answer have the roles {', '.join(turn.role for turn in turns)}.",
            "After an optional system message, user and assistant alternate; the assistant is last.",
        )
