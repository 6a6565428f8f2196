"""Grading of the number at the end of a reply, as for GSM8K."""

from __future__ import annotations

import re
from collections import deque
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from luthier.errors import RowRefused
from luthier.graders.base import Answer, Grader

MARKER = "####"
"""Marker before the result in GSM8K answers."""
_NUMBER = re.compile(
    r"(?<![^\W_])(?<![0-9]\.)"  # not in the middle of a word or of a number
    r"(?P<sign>(?:(?<![)\]%])[-+−])?)[$€£¥]?"  # 16-3 is a difference, = -3 a negative number
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?P<power>(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
    r"\s?(?P<percent>%?)"
)
_EXACT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


class FoundNumber(NamedTuple):
    """A number in a text."""

    value: Decimal
    percent: bool


class Number(Grader):
    r"""1 if the last number of the reply equals the last number of the expected text.

    In a text with GSM8K's ``####``, the number after the last mark counts (Cobbe et al. 2021,
    "Training Verifiers to Solve Math Word Problems"). Supported: signs, decimals, commas between
    thousands, currency signs, powers of ten (``1.5e3``) and percent: ``50%`` equals ``50`` and
    ``0.5``. Not supported: fractions (``3/4`` ends in 4), words ("twelve") and the decimal comma. A
    reply without a number scores 0.
    """

    method: Literal["number"] = "number"
    tolerance: float = Field(default=0.0, ge=0, le=1e300)
    """Largest difference that counts as equal, relative to the expected number or to 1, if
    larger."""

    has_time_limit: ClassVar[bool] = False

    def check_expected(self, expected: str | None) -> None:
        """Raise :class:`RowRefused` for an expected text without a number."""
        super().check_expected(expected)
        if last_number(expected or "") is None:
            raise RowRefused(
                "grader.no_number",
                "the expected reply has no number.",
                "End the expected reply with the result, such as `#### 42`, or use another grader.",
            )

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        expected, given = last_number(self.expected_of(answer)), last_number(answer.reply)
        if expected is None or given is None:
            return 0.0
        readings = [given.value]
        if given.percent and not expected.percent:
            readings.append(_EXACT.divide(given.value, Decimal(100)))
        if expected.percent and not given.percent:
            readings.append(_EXACT.multiply(given.value, Decimal(100)))
        return float(any(self._equal(value, expected.value) for value in readings))

    def _equal(self, given: Decimal, expected: Decimal) -> bool:
        allowed = _EXACT.multiply(Decimal(self.tolerance), max(Decimal(1), expected.copy_abs()))
        return _EXACT.subtract(given, expected).copy_abs() <= allowed


def last_number(text: str) -> FoundNumber | None:
    """Return the number after the last ``####``, or else the last number."""
    _, marker, tail = text.rpartition(MARKER)
    if marker and (first := _NUMBER.search(tail)):
        return _parse(first)
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return _parse(found[0]) if found else None


def _parse(match: re.Match[str]) -> FoundNumber:
    sign = "-" if match["sign"] in ("-", "−") else ""
    plain = sign + match["digits"].replace(",", "") + match["power"]
    return FoundNumber(Decimal(plain), bool(match["percent"]))
