"""Shapes of prompts, replies and conversations, for generative models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from luthier.data.conversations.tools import describe_tool
from luthier.data.field_checks import FieldChecker, Turns, check_calls
from luthier.data.files.parsing import Record
from luthier.data.shapes.base import ENOUGH_ANSWERS, ENOUGH_HINTS, Shape
from luthier.types import Message, Part, Tool

LONGEST_CLASS = 64
"""Most characters of a completion that counts as a class name."""
_REJECTED = dict.fromkeys(
    ("rejected_response", "rejected_responses", "rejected_messages"),
    'Write {"prompt", "chosen", "rejected"} to learn preferences.',
)
_PASSAGE = dict.fromkeys(
    ("context", "passage", "input"),
    'Name the columns "instruction", "context" and "response" to use both in the prompt.',
)


def tool_record(tools: Sequence[Tool]) -> Record:
    """Return the ``tools`` entry of a written row; empty without tools."""
    return {"tools": [describe_tool(tool) for tool in tools]} if tools else {}


@dataclass(frozen=True, slots=True)
class PromptCompletion(Shape):
    """A prompt and the reply to learn; of several correct replies, the first is learned."""

    shape: ClassVar[str] = "prompt"
    title: ClassVar[str] = '{"prompt", "completion"}'
    noun: ClassVar[str] = "prompt and completion"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    other_tasks: ClassVar[Mapping[str, str]] = {**_REJECTED, **_PASSAGE}
    keys: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "completion")),)
    parts: ClassVar[Mapping[str, Part]] = {
        "prompt": "input",
        "completion": "target",
        "other_replies": "other",
    }

    prompt: str
    completion: str
    other_replies: tuple[str, ...] = ()
    """Other correct replies, as of a translation."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        prompt = fields.text(record, "prompt")
        reply = record.get("completion")
        other_replies = tuple[str, ...]()
        if isinstance(reply, list) and reply and {*map(type, reply)} <= {str, int, float}:
            reply, *others = map(str, reply)
            other_replies = tuple(each for each in others if each.strip())
        if type(reply) in (int, float):
            reply = str(reply)
        if isinstance(reply, str):
            record = {**record, "completion": reply}
        completion = fields.text(record, "completion", target=True)
        if prompt is None or completion is None:
            return None
        return cls(fields.file, fields.line, prompt, completion, other_replies)

    def inputs(self) -> tuple[str, ...]:
        return (self.prompt,)

    def targets(self) -> tuple[str, ...]:
        return (self.completion, *self.other_replies)

    def turns(self) -> Turns:
        return (Message("user", self.prompt), Message("assistant", self.completion))

    def classes(self) -> tuple[str, ...]:
        """Return the completion, if short enough for a class name."""
        return (self.completion,) if len(self.completion) <= LONGEST_CLASS else ()

    def record(self) -> Record:
        both = [self.completion, *self.other_replies] if self.other_replies else self.completion
        return {"prompt": self.prompt, "completion": both}

    def input_record(self) -> Record:
        return self.record()


@dataclass(frozen=True, slots=True)
class Conversation(Shape):
    """A conversation; assistant turns are learned."""

    shape: ClassVar[str] = "messages"
    title: ClassVar[str] = '{"messages"}'
    noun: ClassVar[str] = "messages"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("messages",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("messages",)),)
    other_tasks: ClassVar[Mapping[str, str]] = _REJECTED
    optional_keys: ClassVar[frozenset[str]] = frozenset(("prompt", "completion", "input"))
    json_keys: ClassVar[frozenset[str]] = frozenset(("messages", "tools", "functions", "images"))
    parts: ClassVar[Mapping[str, Part]] = {"messages": "target", "expected": "other"}

    messages: Turns
    expected: str | None = None
    """Reference answer for graders; never learned."""
    members: Mapping[str, Any] | None = field(default=None, kw_only=True)
    tools: tuple[Tool, ...] = field(default=(), kw_only=True)

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        messages, tools = (
            fields.messages(record["messages"], images=record.get("images")),
            fields.tools(record),
        )
        if messages is None:
            return None
        check_calls(messages, tools)
        return cls(fields.file, fields.line, messages, tools=tools)

    def inputs(self) -> tuple[str, ...]:
        return tuple(f"{turn.role}: {turn.whole_text}" for turn in self.prompt_turns())

    def targets(self) -> tuple[str, ...]:
        last = self.messages[-1]
        return (last.whole_text,) if last.role == "assistant" else ()

    def turns(self) -> Turns:
        return self.messages

    def expected_reply(self) -> str | None:
        """Return the reference answer, or else the last assistant turn."""
        last = self.messages[-1]
        return self.expected or (last.reply_text if last.role == "assistant" else None)

    def record(self) -> Record:
        return {"messages": [turn.to_row() for turn in self.messages], **tool_record(self.tools)}


@dataclass(frozen=True, slots=True)
class PromptOnly(Shape):
    """A prompt without a reply."""

    shape: ClassVar[str] = "prompt_only"
    title: ClassVar[str] = '{"prompt"}'
    noun: ClassVar[str] = "a prompt without a reply"
    enough: ClassVar[int] = ENOUGH_HINTS
    keys: ClassVar[tuple[str, ...]] = ("prompt",)
    optional_keys: ClassVar[frozenset[str]] = frozenset(("expected",))
    beside: ClassVar[frozenset[str]] = frozenset(("expected",))
    parts: ClassVar[Mapping[str, Part]] = {
        "system": "input",
        "prompt": "input",
        "expected": "other",
    }

    prompt: str
    expected: str | None = None
    """Reference answer for graders; never learned."""
    members: Mapping[str, Any] | None = field(default=None, kw_only=True)
    system: str | None = field(default=None, kw_only=True)
    """System prompt."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        expected = fields.text(record, "expected") if "expected" in record else None
        prompt = fields.text(record, "prompt")
        if prompt is None or (expected is None and "expected" in record):
            return None
        system = record.get("system")
        system = system if isinstance(system, str) else None
        return cls(fields.file, fields.line, prompt, expected, system=system)

    def inputs(self) -> tuple[str, ...]:
        return (self.prompt,) if self.system is None else (self.system, self.prompt)

    def turns(self) -> Turns:
        system = () if self.system is None else (Message("system", self.system),)
        return (*system, Message("user", self.prompt))

    def expected_reply(self) -> str | None:
        return self.expected

    def record(self) -> Record:
        expected = {} if self.expected is None else {"expected": self.expected}
        system = {} if self.system is None else {"system": self.system}
        return {**system, "prompt": self.prompt, **expected}
