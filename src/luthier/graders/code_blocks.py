"""Fenced code blocks of Markdown."""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """The text between two fences."""

    language: str
    """First word after the opening fence, in lower case."""
    text: str


def code_blocks(reply: str) -> list[Block]:
    """Return the fenced blocks of ``reply``; an unclosed block ends with the reply."""
    blocks: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    for line in reply.split("\n"):
        stripped = line.strip()
        if language is None and stripped.startswith("```"):
            language, lines = next(iter(stripped.strip("`").lower().split()), ""), []
        elif language is not None and stripped == "```":
            blocks.append(Block(language, "\n".join(lines)))
            language = None
        elif language is not None:
            lines.append(line)
    if language is not None:
        blocks.append(Block(language, "\n".join(lines)))
    return blocks
