"""Tests of errors: problems, composed message, transfer between processes."""

import json
import pickle

import pytest

from luthier.errors import (
    MOST_PROBLEMS,
    BoundedProblems,
    DataError,
    GradingFailed,
    Location,
    LuthierError,
    ModelRefused,
    NameInUse,
    ObjectRefused,
    Problem,
    RecipeError,
    RefusedInput,
    RowNumber,
    RowRefused,
    UnknownModel,
    report_error,
    restore_error,
)


def problem(line: int, rule: str = "json.invalid") -> Problem:
    return Problem(rule, "m.", "x.", Location("a.jsonl", line))


def test_rows_with_equal_cause_share_a_line() -> None:
    found = [problem(line) for line in range(1, 8)]
    found += [problem(n, f"rule.{n}") for n in range(25)]
    assert str(DataError(found)).splitlines() == [
        "32 problems in the data.",
        "  a.jsonl:1: [json.invalid] m. Fix: x. (also lines 2, 3, 4 and 3 more)",
        "  a.jsonl: [rule.0] m. Fix: x.",
        *(f"  a.jsonl:{n}: [rule.{n}] m. Fix: x." for n in range(1, 19)),
        "  … and 6 more.",
    ]
    assert str(DataError([problem(1), problem(9)])).endswith("(also line 9)")
    assert DataError([problem(1), problem(1)]).problems == (problem(1),)
    numbered = str(DataError([problem(RowNumber(n)) for n in (1, 8, 9)]))
    assert numbered.endswith("a.jsonl row 1: [json.invalid] m. Fix: x. (also rows 8, 9)")
    graded = GradingFailed([problem(3), problem(3)])
    assert str(graded).splitlines()[1:] == ["  a.jsonl:3: [json.invalid] m. Fix: x."]


def test_reading_stops_after_maximum_problems() -> None:
    found = BoundedProblems(problem(line) for line in range(1, MOST_PROBLEMS))
    with pytest.raises(DataError) as caught:
        found.append(problem(MOST_PROBLEMS))
    assert caught.value.capped and len(caught.value.problems) == MOST_PROBLEMS
    assert str(caught.value).splitlines()[-1].endswith(f"and at least {MOST_PROBLEMS - 4} more)")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RecipeError("unknown"), "unknown"),
        (RecipeError("unknown", advice="Drop it."), "[recipe.invalid] unknown Fix: Drop it."),
        (RowRefused("a.b", "m.", "x."), "[a.b] m. Fix: x."),
        (ModelRefused("c.json", "a.b", "m.", "x."), "c.json: [a.b] m. Fix: x."),
        (RefusedInput("m.", location=Location("c.json")), "c.json: m."),
        (RefusedInput("m.", location=Location(field="top_p")), "m."),
    ],
)
def test_error_message_format(error: LuthierError, text: str) -> None:
    assert str(error) == text


ERRORS = [
    DataError([problem(1), problem(2)]),
    DataError([problem(RowNumber(1)), problem(RowNumber(2))]),
    GradingFailed([problem(1)]),
    RecipeError("m", setting="training.epochs", value=object),
    RowRefused("a.b", "m.", "x.", Location("a.jsonl", 3)),
    NameInUse("job"),
    ObjectRefused("NoSuchKey", "m."),
    UnknownModel("m", advice="x."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_processes_with_class_and_problems(error: LuthierError) -> None:
    restored = restore_error(json.loads(json.dumps(report_error(error, "process 1: "))))
    assert type(restored) is type(error) and restored.reported
    assert str(restored) == f"process 1: {error}"
    assert [each.to_dict() for each in restored.problems] == [
        each.to_dict() for each in error.problems
    ]
    assert (restored.rule, restored.setting) == (error.rule, error.setting)


def test_foreign_error_classes_are_restored_as_nearest_base() -> None:
    class Closer(RecipeError):
        """An error class of another module."""

        def __init__(self, code: int) -> None:
            super().__init__(f"code {code}", rule="closer")

    restored = restore_error(report_error(Closer(3)))
    assert (type(restored), restored.rule, str(restored)) == (RecipeError, "closer", "code 3")
    assert type(restore_error(report_error(ValueError("x")))) is LuthierError


def test_errors_survive_other_processes() -> None:
    problem = Problem(
        "row.too_long", "the row is long.", "Shorten the row.", Location("a.jsonl", 3)
    )
    for error in (DataError([problem], capped=True), RecipeError("no", setting="name"),
                  RowRefused("field.empty", "empty.", "Write a text.")):  # fmt: skip
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)
        assert copy.problems == error.problems and vars(copy) == vars(error)
