"""How messages name settings, so that each face of luthier speaks of its own.

A message of any room names a setting as the recipe has it, between backticks:

    `training.epochs`         a field
    `data.long_rows=drop`     advice to set it
    `luthier search`          advice to run a command

That reads well in Python. Who shows the message puts in what its people type: ``--set
data.long_rows=drop`` on a command line, ``hyperParameters luthier.longRows=drop`` in Bedrock's API.

Advice comes as alternatives joined by ``, or``. One that names a setting which a face does not have is
left out there, and so is a sentence of which nothing is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SettingName = Callable[[str, str | None], str | None]
"""What a face calls a field of the recipe, or the advice to set it to a value; ``None`` where it has no
such setting. A command of luthier comes as the field ``luthier`` with the rest of its line."""

OPTIONS: Mapping[str, str] = {
    "base": "--base",
    "objective.method": "--objective",
    "adaptation.method": "--adaptation",
    "data.validation": "--validation",
}
"""Fields that every command with a recipe has an option of its own for."""
_FURTHER: Mapping[str, str] = {
    **OPTIONS,
    "data.mix": "--mix",
    "training.learning_rate": "--learning-rate",
    "sampling.max_tokens": "--max-tokens",
    "method": "--method",
    "long_rows": "--long-rows",
    "turns": "--turns",
}
"""Those of single commands, which advice is given for where they have them."""

_GROUPS = "training|adaptation|objective|data|teacher|sampling|insights"
_REFERENCE = re.compile(
    rf"`(?:luthier (?P<command>[^`\n]+)"
    rf"|(?P<field>(?:{_GROUPS})(?:\.\w+)*|base|method|long_rows|turns)(?:=(?P<value>[^`\n]*))?)`"
)
_BOUNDARY = re.compile(r"((?<=[.;!?])[ \t]+|(?<=Fix:)[ \t]+|\n+)")
_OR = ", or "


def dotted_items(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables with their names, such as ``training.epochs``."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def with_setting_names(text: str, name: SettingName) -> str:
    """``text`` in the words of a face; empty where it was nothing but advice that the face has not."""
    if "`" not in text:
        return text
    parts = _BOUNDARY.split(text)
    found = ""
    for sentence, gap in zip(parts[::2], [*parts[1::2], ""], strict=True):
        rendered = _sentence(sentence, name)
        found += rendered + gap if rendered or not sentence else ""
    return found if found.endswith("\n") or text.endswith((" ", "\t")) else found.rstrip(" \t")


def without_commands(text: str) -> str:
    """``text`` without advice to run a command, for those who have no terminal."""

    def name(field: str, value: str | None) -> str | None:
        return None if field == "luthier" else f"`{field}{'' if value is None else f'={value}'}`"

    return with_setting_names(text, name)


def option(field: str, value: str | None) -> str | None:
    """The :data:`SettingName` of the command line."""
    if field == "luthier":
        return f"`luthier {value}`"
    if value is None:
        return field
    if field.startswith("data.columns."):
        return f"--map {field.removeprefix('data.columns.')}={value}"
    return f"{_FURTHER[field]} {value}" if field in _FURTHER else f"--set {field}={value}"


def _sentence(sentence: str, name: SettingName) -> str:
    alternatives = sentence.split(_OR)
    left = [each for each in alternatives if all(map(name, *_advised_fields(each)))]
    if not left:
        return ""
    text = _OR.join(left)
    if alternatives[0] is not left[0] and sentence[:1].isupper():
        text = text[:1].upper() + text[1:]
    if alternatives[-1] is not left[-1] and sentence[-1:] in ".;!?":
        text += sentence[-1]
    return _REFERENCE.sub(lambda found: _replacement(found, name), text)


def _advised_fields(text: str) -> tuple[list[str], list[str | None]]:
    """Fields that ``text`` advises to set, and their values."""
    found = [_field_and_value(each) for each in _REFERENCE.finditer(text)]
    advised = [(field, value) for field, value in found if value is not None]
    return [field for field, _ in advised], [value for _, value in advised]


def _field_and_value(found: re.Match[str]) -> tuple[str, str | None]:
    command = found["command"]
    return (found["field"], found["value"]) if command is None else ("luthier", command)


def _replacement(found: re.Match[str], name: SettingName) -> str:
    field, value = _field_and_value(found)
    # What is wrong with a field is told in any case: by its own name where the face has none.
    return name(field, value) or field
