"""What is printed of a model beside simple baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.cli.comparing import print_comparison
from luthier.cli.console import new_console
from luthier.evaluation.baselines import Baseline, Comparison

FOUND = Comparison(
    "accuracy",
    200,
    1800,
    [
        Baseline("always the most frequent label", 0.25, {"accuracy": 0.25}, 0.0, constant=True),
        Baseline("naive Bayes on words", 0.735, {"accuracy": 0.735}, 0.31),
    ],
    0.485,
    ["logistic regression on the base model"],
)


def lines(found: Comparison | None, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_comparison(new_console(highlight=False), found)
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_one_line_each_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    said = lines(replace(FOUND, verdict=FOUND.judge()), capsys)
    assert said[0] == "on 200 held-out rows, beside simple baselines:"
    assert [line.split()[1] for line in said[1:4]] == ["73.5%", "48.5%", "25.0%"]
    assert "naive Bayes on words  (0.3 s)" in said[1] and said[2].endswith("this model")
    assert said[4] == "not measured for want of time: logistic regression on the base model"
    assert " ".join(said[5:]).startswith(
        "a simple baseline does better: naive Bayes on words, accuracy 73.5% against"
    )


def test_no_word_where_the_model_wins_and_nothing_without_baselines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(lines(replace(FOUND, tuned=0.9), capsys)) == 5
    assert not lines(replace(FOUND, tuned=None), capsys)
    assert not lines(None, capsys)
