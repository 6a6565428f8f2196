"""Check for conversations inside plain text, and for calls that do not match the tools."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import ClassVar

from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.gate.batch_text import Spot, SpotCheck, Spots, excerpt, excerpt_of
from luthier.gate.check import RowBatch
from luthier.gate.rules import Rule
from luthier.graders.json_schema import JsonSchema
from luthier.types import Row

IN_TEXT = Rule(
    "message.in_text",
    "warning",
    "A text contains a conversation in JSON, which the model learns as text.",
    "The model learns to write brackets and roles, without the chat template.",
    "Set `data.columns.messages=text` for an array of messages in `text`, or write `messages`.",
)
UNDECLARED = Rule(
    "message.undeclared_tool",
    "warning",
    "An answer calls a function, and the row declares no tools.",
    "Requests declare tools, so the prompt in inference differs from the prompt in training.",
    'Add the functions to the row under "tools".',
)
ARGUMENTS = Rule(
    "message.tool_arguments",
    "warning",
    "A call does not match the schema of its tool.",
    "The model learns to leave out arguments, to invent arguments or to write wrong types.",
    "Correct the arguments of the call, or the schema of the tool.",
    drop=True,
)
TRANSCRIPT = Rule(
    "message.transcript",
    "note",
    "A text is a transcript with names of speakers, which the model learns as prose.",
    "The model continues both sides of the conversation, without the chat template.",
    'Write the turns as `messages`: the customer as {"role": "user", "content": "..."}, the agent as '
    '{"role": "assistant", "content": "..."}.',
)
SEVERAL_REPLIES = Rule(
    "answer.first_learned",
    "note",
    "A row has several correct replies, and the first is learned.",
    "The other replies only count in graders, which keep the best score.",
    "To learn all replies, write one row for each reply.",
)
_SPEAKER = re.compile(
    r"(?:^|[\n.?!…])[\s*_>\-\[(]*((?:agent|advisor|assistant|bot|ai|caller|client|customer|doctor|"
    r"human|operator|patient|rep|representative|student|support|teacher|tutor|user|speaker)"
    r"(?:[ _]?[a-z0-9])?)[\])*_]*\s?:",
    re.I,
)
LOOKED_AT = 4000
"""Characters of a text that are searched for speakers."""
SPEAKER_TURNS = 3
"""Fewest turns of at least two speakers in a transcript."""
_TURNS = re.compile(
    r"\s*(?:\{\s*[\"'](?:messages|conversations)[\"']\s*:\s*)?"
    r"\[\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:"
)


class Conversations(SpotCheck):
    """Check for conversations inside texts, and for calls of undeclared or other tools."""

    name: ClassVar[str] = "conversations"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        IN_TEXT,
        TRANSCRIPT,
        UNDECLARED,
        ARGUMENTS,
        SEVERAL_REPLIES,
    )

    def measure(self, batch: RowBatch) -> Spots:
        """Find the rows of a batch that break a rule."""
        spots: list[Spot] = []
        for index, row in enumerate(batch.rows):
            for text in row.texts():
                # Most texts begin otherwise, and two characters tell.
                if text.content[:1] in "[{ \n\t\r" and (found := _TURNS.match(text.content)):
                    fix = _fix_of(text.field, text.content.lstrip())
                    shown = excerpt(text.content, found.start(), found.end())
                    message = f"{text.field} contains a conversation in JSON."
                    spots.append(Spot(index, IN_TEXT.id, message, shown, fix))
                    break
            if row.other_replies:
                message = f"the row has {len(row.other_replies) + 1} correct replies."
                spots.append(Spot(index, SEVERAL_REPLIES.id, message, excerpt_of(row)))
            if isinstance(row, RawText) and (speakers := _speakers(row.text)):
                message = f"the text has turns of {' and '.join(speakers)}."
                spots.append(Spot(index, TRANSCRIPT.id, message, excerpt_of(row)))
            calls = [] if row.tools else [c for turn in row.turns() for c in turn.calls]
            if calls:
                message = f'An answer calls "{calls[0].name}", and the row declares no tools.'
                spots.append(Spot(index, UNDECLARED.id, message, excerpt_of(row)))
            if row.tools and (wrong := _wrong_call(row)):
                spots.append(Spot(index, ARGUMENTS.id, wrong, excerpt_of(row)))
        return Spots(spots)


def _speakers(text: str) -> list[str]:
    """Return the first two speakers of a transcript; empty for other text."""
    found = [match.group(1).capitalize() for match in _SPEAKER.finditer(text[:LOOKED_AT])]
    different = list(dict.fromkeys(found))
    return different[:2] if len(found) >= SPEAKER_TURNS and len(different) > 1 else []


def _wrong_call(row: Row) -> str:
    """Return why the first wrong call of a row does not match the schema of its tool."""
    schemas = {tool.name: tool.parameters for tool in row.tools}
    for turn in row.turns():
        for call in turn.calls:
            known = schemas.get(call.name)
            reason = _mismatch(json.dumps(known), call.arguments_json) if known else None
            if reason:
                return f'The call of "{call.name}" does not match the schema: {reason}.'
    return ""


@lru_cache(1000)
def _mismatch(schema: str, arguments: str) -> str | None:
    """Return why a schema rejects the arguments of a call; ``None`` for an unusable schema."""
    known = json.loads(schema)
    if "properties" in known:  # other names are allowed by JSON Schema, but not by a function
        known = {"additionalProperties": False, **known}
    checked = JsonSchema(against=known)
    try:
        checked.check()
        return checked.first_error(json.loads(arguments))
    except (RecipeError, TimeoutError, ValueError):
        return None


def _fix_of(field: str, text: str) -> str:
    """Return how to read the text of a field as a conversation."""
    if re.match(r"[\[{\s]*'", text):
        return "Write the conversation as JSON, in double quotes, under `messages`."
    if field == "text" and text.startswith("["):
        key = "conversations" if re.match(r'\[\s*\{\s*"(?:from|value)"', text) else "messages"
        return f"Set `data.columns.{key}=text` (`--map {key}=text`)."
    if field == "text":
        return "Write the object as the row: `jq -c '.text | fromjson' OLD > NEW.jsonl`."
    return f"Write {field} as an array of messages, in JSON Lines and not as text."
