"""How errors speak to people."""

from __future__ import annotations

import pytest

from luthier.errors import DataError, Problem, data_errors


def problem(line: int, message: str = "m", file: str = "f") -> Problem:
    return Problem(file, line, "rule", message, "fix it.")


def test_one_cause_is_told_once_with_its_first_lines() -> None:
    found = [problem(line) for line in range(1, 31)] + [problem(7, "other"), problem(9, file="g")]
    assert str(DataError(found, "nothing was read")).splitlines() == [
        "32 problems in the data; nothing was read.",
        "  f:1: [rule] m Fix: fix it. (also lines 2, 3, 4 and 26 more)",
        "  f:7: [rule] other Fix: fix it.",
        "  g:9: [rule] m Fix: fix it.",
    ]
    assert str(DataError([problem(1), problem(5)])).endswith("fix it. (also line 5)")


def test_causes_beyond_the_first_twenty_are_counted_by_their_rows() -> None:
    found = [problem(line, f"m{line % 22}") for line in range(44)]
    lines = str(DataError(found)).splitlines()
    assert len(lines) == 22 and lines[-1] == "  … and 4 more."


def test_a_count_at_which_reading_stopped_says_so() -> None:
    error = DataError([problem(line) for line in range(1, 101)], "nothing was written", capped=True)
    assert str(error).splitlines() == [
        "100 or more problems in the data; nothing was written.",
        "  f:1: [rule] m Fix: fix it. (also lines 2, 3, 4 and at least 96 more)",
    ]
    again = pytest.raises(DataError, match="100 or more problems in the data; nothing was split")
    with again, data_errors("nothing was split"):
        raise error
