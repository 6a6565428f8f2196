"""The rules of reading and of row shapes as rules of the gate, with the names other validators use."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.data import preferences, prompts, rows
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


WHY: Mapping[str, str] = {
    "file": "Nothing of it can be read.",
    "line": "The line cannot be held in memory beside others.",
    "encoding": "Characters would be lost, or learned wrong.",
    "json": "What the row says is unclear, so it would be lost or learned wrong.",
    "row": "It is unclear what is given and what is to be learned.",
    "field": "There is nothing to learn from, or nothing to learn.",
    "id": "Answers and findings could not be told apart by their id.",
    "messages": "There is no conversation to learn from.",
    "message": "The model's template would write the conversation wrong.",
    "label": "It is unclear which class is to be learned.",
    "rating": "There is no number to learn.",
    "tags": "Tags would be learned for the wrong words.",
}
"""What the rules protect from, by the first part of their ids."""


def rules() -> dict[str, Rule]:
    """Every rule of reading, by its id; all of them refuse the data."""
    texts = {**rows.RULES, **preferences.RULES}
    return {
        rule: Rule(
            rule,
            "error",
            about,
            WHY.get(rule.partition(".")[0], ""),
            aliases=ALIASES.get(rule, ()),
            whole=rule.startswith("file."),
        )
        for rule, about in texts.items()
    }


_LATE: Mapping[str, str] = {
    "rows.too_few": "A single labelled row is not enough to learn from.",
    "label.one_class": "All rows have the same label, so there is nothing to tell apart.",
    "label.unseen": "A label of held-out rows is in none of the training rows.",
    "label.mixed": "Some rows have one label and others an array of them.",
    "rating.constant": "All rows have the same rating.",
    **prompts.RULES,
}
"""Rules that objectives find broken while they take in the rows."""


def late_rules() -> tuple[Rule, ...]:
    """Every rule of objectives, which refuse the data too."""
    return tuple(map(late_rule, _LATE))


def late_rule(name: str) -> Rule:
    """A rule of an objective by its id."""
    about = _LATE.get(name, "The objective refuses the row.")
    return Rule(name, "error", about, whole=name.startswith(("rows.", "label.", "rating.")))


_RULES = rules()


def rule_of(name: str) -> Rule:
    """The rule of a problem that reading found."""
    return _RULES[name]
