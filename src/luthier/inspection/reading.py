"""The rules of reading and of row shapes as rules of the gate, with the names other validators use."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.data import preferences, rows
from luthier.inspection.findings import Rule

ALIASES: Mapping[str, tuple[str, ...]] = {
    # OpenAI's cookbook, "Data preparation and analysis for chat model fine-tuning": format_errors.
    "json.not_object": ("openai:data_type",),
    "messages.type": ("openai:message_missing_key",),
    "messages.empty": ("openai:missing_messages_list",),
    "row.unknown_shape": ("openai:missing_messages_list",),
    "message.role": ("openai:unrecognized_role",),
    "field.missing": ("openai:message_missing_key",),
    "field.empty": ("openai:missing_content",),
    "field.type": ("openai:missing_content",),
    "message.last": ("openai:example_missing_assistant_message",),
    "message.order": (
        "bedrock:A conversation must alternate between user and assistant roles.",
        "bedrock:A conversation must start with a user message.",
    ),
}
"""What people know the rules by: OpenAI's keys, and texts of Bedrock's messages."""


def rules() -> dict[str, Rule]:
    """Every rule of reading, by its id; all of them refuse the data."""
    texts = {**rows.RULES, **preferences.RULES}
    return {
        rule: Rule(rule, "error", about, aliases=ALIASES.get(rule, ()))
        for rule, about in texts.items()
    }


_RULES = rules()


def rule_of(name: str) -> Rule:
    """The rule of a problem that reading found."""
    return _RULES[name]
