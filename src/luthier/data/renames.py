"""What keys with other names were probably meant to be, for the fixes in messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from luthier.data.parsing import Record, shown

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
"""Names that people give to our keys."""


def listed(keys: Iterable[str]) -> str:
    """The first ten keys, for messages."""
    names = [shown(key) for key in keys]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def rename_fix(holder: Record, wanted: tuple[str, ...]) -> str:
    """Say which near-misses to rename to the wanted keys; empty when there is none."""
    steps, absent = [], []
    for target in wanted:
        found = [key for key in holder if RENAMES.get(key.strip().lower()) == target]
        if len(found) == 1:
            steps.append(f'rename {shown(found[0])} to "{target}"')
        elif found:
            steps.append(f'join {listed(found)} into "{target}"')
        else:
            absent.append(f'add "{target}"')
    if not steps:
        return ""
    fix = " and ".join(steps + absent)
    hint = ', as an array of {"role", "content"}' if wanted == ("messages",) else ""
    return f"{fix[:1].upper()}{fix[1:]}{hint}."
