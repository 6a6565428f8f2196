"""Grading by a regular expression, with a time limit because some patterns take exponential time."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from luthier.graders.base import Answer, Grader

TIME_LIMIT_S = 1.0
"""Time limit per search, in seconds. A good pattern takes less than a millisecond on a long reply."""
PATTERN_CHARACTERS = 4096
"""Length of a pattern: compiling has no time limit."""
UNROLLED_CHARACTERS = 100_000
"""Maximum length of a pattern with all counted repeats expanded, as ``regex`` compiles patterns.
The maximum takes 50 ms and 25 MB."""
_CLASS_END = re.compile(r"(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"[pPNgLkx]\{[^}]*\}|.", re.DOTALL)
_COUNT = r"((?:[\d\s]|#[^\n]*\n)*)"  # of verbose patterns, too
_COUNTS = re.compile(rf"\{{{_COUNT}(?:,{_COUNT})?\}}")
_NO_DIGITS = re.compile(r"#[^\n]*\n|\s")


def check_pattern(pattern: str) -> str:
    """Return ``pattern``, or raise :class:`ValueError` with the fault."""
    import regex

    if len(pattern) > PATTERN_CHARACTERS:
        raise ValueError(
            f"the pattern has {len(pattern):,} characters; at most {PATTERN_CHARACTERS:,} are allowed"
        )
    if unrolled_size(pattern) > UNROLLED_CHARACTERS:
        raise ValueError(
            f"the counts of the pattern {pattern[:200]!r} repeat more than {UNROLLED_CHARACTERS:,} "
            "characters; lower the counts, or use * or +"
        )
    try:
        regex.compile(pattern)
    except RecursionError as error:
        raise ValueError("the pattern is nested too deeply") from error
    except regex.error as error:
        raise ValueError(f"{pattern[:200]!r} is not a regular expression: {error}") from error
    return pattern


def unrolled_size(pattern: str) -> int:
    """Return the length of a pattern with all counts in braces expanded.

    Classes count as one character. Unknown syntax counts as its characters.
    """
    sizes, last, place = [0], 0, 0  # open groups; size of the item that a count would repeat
    while place < len(pattern):
        near = place + PATTERN_CHARACTERS  # bounds the search of hostile JSON schemas
        char, counts = pattern[place], _COUNTS.match(pattern, place, near)
        place += 1
        if counts and last:
            digits = (_NO_DIGITS.sub("", each or "").lstrip("0") for each in counts.groups())
            times = max(int(each[:9] or 0) for each in digits)
            sizes[-1] += last * (max(1, times) - 1)
            last *= max(1, times)
            place = counts.end()
            continue
        if char == "(":
            sizes.append(0)
            last = 0
            continue
        if char == ")" and len(sizes) > 1:
            last = max(1, sizes.pop())
        elif char in "*+?":
            continue
        elif char == "[":
            start = place + 1 if pattern[place : place + 1] in ("]", "^") else place
            end = _CLASS_END.match(pattern, start)
            place, last = end.end() if end else len(pattern), 1
        else:
            if char == "\\":  # may be followed by a name in braces, which is not a count
                name = _ESCAPE.match(pattern, place, near)
                place = name.end() if name else place
            last = 1
        sizes[-1] += last
    return sum(sizes)


def matches(pattern: str, text: str, whole: bool = False) -> bool:
    """Return True if ``pattern`` matches in ``text``; with ``whole``, all of ``text``.

    Raises:
        TimeoutError: after :data:`TIME_LIMIT_S`. The standard library's ``re`` has no time limit.
    """
    import regex

    search = regex.fullmatch if whole else regex.search
    try:
        return search(pattern, text, timeout=TIME_LIMIT_S) is not None
    except TimeoutError:
        raise TimeoutError(
            f"the pattern {pattern!r} took more than {TIME_LIMIT_S:g} s on {len(text)} characters; "
            "avoid nested repeats such as (a+)+"
        ) from None


class Regex(Grader):
    r"""1 if a regular expression matches the reply.

    For R1's format (DeepSeek-AI 2025, section 2.2.2), for example: ``pattern =
    '(?s)\s*<think>.+</think>\s*<answer>.+</answer>\s*'`` with ``match = "whole"``. Patterns have
    the syntax of the ``regex`` library. A search that takes more than a second is an error.
    """

    method: Literal["regex"] = "regex"
    pattern: Annotated[str, AfterValidator(check_pattern)]
    """The regular expression; ``(?s)`` lets the dot match line ends, ``(?i)`` ignores case."""
    match: Literal["search", "whole"] = "search"
    """Match somewhere in the reply, or the whole reply."""

    needs_expected = False

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        reply = answer.check_length(answer.reply, "the reply")
        return float(matches(self.pattern, reply, whole=self.match == "whole"))
