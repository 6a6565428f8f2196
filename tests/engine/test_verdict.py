"""Verdicts on finished runs, from the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from luthier.engine.verdict import Cause, Outcome, Refit, RunVerdict, judge_run
from luthier.evaluation.label_issues import LabelIssueCounts
from luthier.recipe import Training

FALLING = [2.0 - 0.02 * step for step in range(1, 41)]
FLAT = [2.0] * 40


def held(step: int, loss: float, **further: Any) -> dict[str, Any]:
    return {"event": "validation", "step": step, "loss": loss, "best": 0, "best_step": 0, **further}


def judged(
    losses: Sequence[float], train: Sequence[float] = FALLING, steps: int = 40, rate: float = 2e-3
) -> RunVerdict:
    """Return the verdict on a run with evenly spaced ``losses``, the first before training."""
    lines = [{"event": "train", "step": n, "loss": loss} for n, loss in enumerate(train, 1)]
    every = len(train) // max(1, len(losses) - 1)
    return judge_run(
        [*lines, *(held(every * n, x) for n, x in enumerate(losses))],
        "loss",
        Training(learning_rate=rate, epochs=3),
        steps,
    )


@pytest.mark.parametrize(
    ("losses", "outcome", "kept_step"),
    [
        ((2.0, 1.2, 1.01, 1.0, 0.99), "learned", 40),
        ((2.0, 1.0), "learned", 40),  # a single measurement shows no trend
        ((2.0, 1.0, 0.99, 1.0, 1.02), "learned", 20),
        ((2.0, 1.7, 1.5, 1.3, 1.1), "still_improving", 40),
        ((2.0, 1.5, 1.0, 1.2, 1.4), "overfitted", 20),
        ((2.0, 1.5, 2.5, 3.0, 3.5), "overfitted", 10),
        ((2.0, 1.99, 1.98, 1.97, 1.98), "hardly_learned", 30),
        ((2.0, 2.0, 2.01, 2.0, 2.02), "hardly_learned", 0),
        ((2.0, 2.2, 2.4, 2.5, 2.6), "worse", 0),
        ((2.0, 1.99, 2.4, 2.5, 2.6), "hardly_learned", 10),
    ],
)
def test_the_course_of_the_validation_loss_decides(
    losses: tuple[float, ...], outcome: Outcome, kept_step: int
) -> None:
    verdict = judged(losses)
    assert (verdict.outcome, verdict.kept_step) == (outcome, kept_step)
    assert verdict.before == {"loss": losses[0]}
    assert verdict.kept == {"loss": min(losses)}
    assert verdict.last == {"loss": losses[-1]}
    assert bool(verdict.cause) is bool(verdict.advice) is (outcome != "learned")


def test_a_score_decides_instead_of_the_loss() -> None:
    """A rising loss with more right answers is not overfitting."""
    train = [{"event": "train", "step": n, "loss": 1 / n, "seconds": 5.0} for n in range(1, 41)]
    courses = ((0.2, 2.0), (0.7, 0.9), (0.8, 1.0), (0.8, 1.1), (0.9, 1.3))
    lines = [held(10 * n, loss, accuracy=score) for n, (score, loss) in enumerate(courses)]
    found = judge_run([*train, *lines], "accuracy", Training(max_steps=40), 40)
    assert (found.outcome, found.kept_step) == ("still_improving", 40)
    assert found.kept == {"accuracy": 0.9, "loss": 1.3}
    assert found.cause == "more_steps"
    assert "`training.max_steps=80`" in found.advice and "3.3 min" in found.advice
    fallen = [*lines[:4], held(40, 1.3, accuracy=0.5)]
    worse = judge_run([*train, *fallen], "accuracy", Training(), 40)
    assert (worse.outcome, worse.kept_step) == (
        "overfitted",
        20,
    )  # the lower loss of two equal scores


@pytest.mark.parametrize(
    ("rates", "losses", "outcome", "kept_step"),
    [
        # Text is recognized: the loss rises, and the characters still improve.
        ((1.0, 0.5, 0.2, 0.1, 0.05), (3.0, 0.5, 0.4, 0.5, 0.6), "still_improving", 40),
        ((1.0, 0.1, 0.1, 0.3, 0.5), (3.0, 0.5, 0.4, 0.3, 0.2), "overfitted", 20),
        # Nothing is recognized yet: surplus characters are no worse than none.
        ((1.0, 1.0, 1.3, 1.0, 1.0), (3.0, 2.5, 2.4, 2.3, 2.2), "hardly_learned", 40),
        ((1.0, 1.2, 1.4, 1.6, 1.8), (3.0, 1.5, 1.0, 0.9, 0.8), "hardly_learned", 40),
        ((1.0, 1.0, 1.0, 1.0, 1.0), (3.0, 3.1, 3.3, 3.5, 3.6), "worse", 0),
    ],
)
def test_error_rate_decides_after_first_correct_answer(
    rates: Sequence[float], losses: Sequence[float], outcome: Outcome, kept_step: int
) -> None:
    train = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]
    pairs = enumerate(zip(rates, losses, strict=True))
    lines = [held(10 * n, loss, cer=rate) for n, (rate, loss) in pairs]
    found = judge_run([*train, *lines], "cer", Training(epochs=3), 40)
    assert (found.outcome, found.kept_step) == (outcome, kept_step)
    assert next(iter(found.kept)) == ("cer" if min(rates) < 1 else "loss")
    if min(rates) >= 1:
        assert not found.learned and found.cause == ("more_steps" if kept_step else "other_rows")


def test_verdict_of_harmful_run_with_initial_weights() -> None:
    worse, late = judged((2.0, 2.2, 2.6)), judged((2.0, 1.5, 2.5))
    assert (worse.outcome, worse.kept_step, worse.unchanged) == ("worse", 0, True)
    assert (late.outcome, late.kept_step, late.unchanged) == ("overfitted", 20, False)


@pytest.mark.parametrize("losses", [(), (2.0, 1.0), (2.0, 2.2, 2.6), (2.0, 1.5, 2.5)])
def test_a_verdict_has_at_most_three_sentences(losses: tuple[float, ...]) -> None:
    verdict = judged(losses)
    sentences = [*verdict.text.split(". "), *filter(None, [verdict.advice])]
    assert len(sentences) <= 3 and ". " not in verdict.advice


def test_a_rise_of_both_losses_is_no_overfitting() -> None:
    rising = [1.0, *[1.0 + 0.05 * n for n in range(39)]]
    assert judged((2.0, 1.5, 2.0), rising).outcome == "declined"
    by_heart = [1.0 * 0.6**n for n in range(20)] + [4e-5, 6e-5] * 10
    assert judged((2.0, 1.5, 2.0), by_heart).outcome == "overfitted"


def capped(
    losses: Sequence[float], steps_per_pass: float, rows: int = 0, train: float = -0.02
) -> RunVerdict:
    """Return the verdict on ten steps, each measured, with `training.max_steps=10`."""
    lines = [{"event": "train", "step": n, "loss": 2.0 + train * n} for n in range(1, 11)]
    lines += [held(n, loss) for n, loss in enumerate(losses)]
    settings = Training(learning_rate=1e-3, max_steps=10)
    return judge_run(lines, "loss", settings, 10, rows, steps_per_pass)


RISING_AGAIN = (2.0, 1.8, 1.7, 1.6, 1.5, 1.46, 1.45, 1.47, 1.5, 1.6, 1.7)


def test_single_epoch_is_not_overfitting() -> None:
    assert capped(RISING_AGAIN, 5).outcome == "overfitted"
    once = capped(RISING_AGAIN, 32)
    assert (once.outcome, once.kept_step, once.cause) == ("declined", 6, "unsteady")
    assert "`training.learning_rate=2.5e-04`" in once.advice


def test_a_small_difference_on_few_rows_is_chance() -> None:
    near = (2.0, 1.99, 1.98, 1.97, 1.96, 1.955, 1.95, 1.951, 1.952, 1.955, 1.958)
    assert capped(near, 5, rows=40).outcome == "overfitted"
    few = capped(near, 5, rows=4)
    assert (few.outcome, few.cause) == ("learned", "few_rows")
    assert capped(RISING_AGAIN, 5, rows=4).outcome == "overfitted"


def test_capped_run_with_best_end_needs_more_steps() -> None:
    found = capped([2.0 - 0.001 * n for n in range(11)], 32, train=0.0)
    assert (found.outcome, found.kept_step) == ("hardly_learned", 10)
    assert found.cause == "more_steps" and "`training.max_steps=20`" in found.advice


def test_verdict_reports_early_stopping() -> None:
    verdict = judged((2.0, 1.0, 1.5), steps=100)
    assert verdict.stopped_early and not judged((2.0, 1.0, 1.5)).stopped_early


def test_no_claim_without_validation_rows() -> None:
    verdict = judged(())
    assert (verdict.outcome, verdict.kept_step) == ("unmeasured", 40)
    assert verdict.before == verdict.kept == verdict.last == {}
    assert verdict.cause == "unmeasured" and "`data.validation=FILE`" in verdict.advice


@pytest.mark.parametrize(
    ("losses", "train", "cause", "setting"),
    [
        ((2.0, 2.5, 3.0), FLAT, "rate_high", "`training.learning_rate=5.0e-04`"),
        ((2.0, 1.999, 1.999), FLAT, "rate_low", "`training.learning_rate=8.0e-03`"),
        ((2.0, 2.5, 3.0), FALLING, "other_rows", ""),
        ((0.8, 300.0, 700.0), [2.0, 40.0, *range(3000, 1100, -50)], "rate_high", ""),
        ((2.0, 1.999, 2.3), FLAT, "rate_high", ""),
        ((2.0, 1.5, 2.0), FALLING, "overfitting", ""),
        ((2.0, 1.5, 2.0), FALLING[::-1], "rate_high", "`training.learning_rate=5.0e-04`"),
        ((2.0, 1.5, 1.2, 1.0, 0.8), FALLING, "more_steps", "`training.epochs=6`"),
    ],
)
def test_the_cause_follows_from_both_losses(
    losses: tuple[float, ...], train: list[float], cause: Cause, setting: str
) -> None:
    found = judged(losses, train)
    assert found.cause == cause and setting in found.advice


def scored(
    right: Sequence[Sequence[int]], train: Sequence[float] = (), **fields: Any
) -> RunVerdict:
    """Return the verdict on a run with these correct rows, the first before training."""
    losses = train or [1 / n for n in range(1, 41)]
    lines = [{"event": "train", "step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    every = 40 // (len(right) - 1)
    for n, each in enumerate(right):
        share = sum(each) / len(each)
        error = (share * (1 - share) / len(each)) ** 0.5
        rows: Any = {"accuracy": {"parts": each}}
        lines.append(held(every * n, 1 - share, accuracy=share, accuracy_error=error, rows=rows))
    training = Training(learning_rate=1e-3, epochs=3, batch_size=4, refit=True)
    return judge_run(lines, "accuracy", training, 40, len(right[0]), **fields)


def test_paired_scores_are_compared_by_changed_rows() -> None:
    """Thirteen rows won and three lost are no chance, though each share has an error of two points."""
    before = [1] * 177 + [0] * 23
    after = [1] * 174 + [0] * 3 + [1] * 13 + [0] * 10
    assert scored([before, after], fitted_head=True).outcome == "learned"
    swapped = [1] * 160 + [0] * 17 + [1] * 23
    found = scored([before, swapped], fitted_head=True)
    assert (found.outcome, found.cause) == ("hardly_learned", "regression")


def test_gain_on_two_rows_gives_few_rows_advice() -> None:
    found = scored([[1, 0], [1, 1]])
    assert (found.outcome, found.cause) == ("hardly_learned", "few_rows")
    assert "`data.validation=FILE`" in found.advice


def test_perfect_base_needs_no_more_rows() -> None:
    found = scored([[1] * 40, [1] * 40], fitted_head=True)
    assert (found.outcome, found.cause, found.advice) == ("learned", "", "")


def test_unlearnable_labels_are_reported() -> None:
    found = scored([[1, 0] * 20, [1, 0] * 20], fitted_head=True, uninformative=True)
    assert found.cause == "uninformative"


def test_labels_are_not_blamed_without_training_gain() -> None:
    right = [[1, 0] * 20, [1, 0] * 20]
    flat = scored(right, FLAT, uninformative=True, informed="logistic regression on pixels")
    assert flat.cause == "rows_not_learned"
    for setting in ("epochs=12", "learning_rate=4.0e-03", "batch_size=16"):
        assert f"`training.{setting}`" in flat.advice
    risen = scored(right, [2.0] * 20 + [9.0] * 20, uninformative=True)
    assert risen.cause == "rate_high" and "`training.learning_rate=2.5e-04`" in risen.advice
    assert scored(right, uninformative=True).cause == "uninformative"


def test_refit_needs_a_gain() -> None:
    up, same = [[1, 0] * 20, [1] * 40], [[1, 0] * 20, [1, 0] * 20]
    assert scored(up).learned
    assert not scored(up, uninformative=True).learned
    assert not scored(same, FLAT).learned
    # Eight rows are too few to show learning, and forty are enough.
    little = [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert scored([each * 2 for each in little]).learned
    assert not scored([each * 2 for each in little], FLAT).learned
    assert scored([[1] * 18 + [0] * 22, [1] * 19 + [0] * 21], fitted_head=True).learned
    assert not scored([[1] * 18 + [0] * 22, [1] * 19 + [0] * 21]).learned


def test_rows_separated_by_a_baseline_are_not_blamed() -> None:
    right = [[1, 0] * 20, [1, 0] * 20]
    found = scored(right, fitted_head=True, uninformative=True, informed="naive Bayes on words")
    assert found.cause == "base_model" and "`--base ID`" in found.advice
    assert found.advice.startswith("Naive Bayes on words")
    start = "Start from `--base org/model`, which was trained on Vietnamese."
    found = scored(right, uninformative=True, informed="naive Bayes on words", other_base=start)
    assert found.cause == "base_model" and "`--base org/model`" in found.advice
    assert scored(right, uninformative=True, other_base=start).cause == "uninformative"


def test_run_without_gain_blames_wrong_labels() -> None:
    right = [[1] * 36 + [0] * 4, [1] * 35 + [0] * 5]
    many, few = LabelIssueCounts(31, 416), LabelIssueCounts(2, 416)
    found = scored(right, fitted_head=True, label_issues=many)
    assert found.cause == "wrong_labels"
    assert "31 of 416" in found.advice and "`data.label_issues=leave_out`" in found.advice
    left_out = scored(right, fitted_head=True, label_issues=many, learns_issues=False)
    assert left_out.cause == "wrong_labels" and "leave_out" not in left_out.advice
    assert scored(right, fitted_head=True, label_issues=few).cause == "regression"
    overfitted = scored([[1, 0] * 20, [1] * 40, [1, 0] * 20], label_issues=many)
    assert (overfitted.outcome, overfitted.cause) == ("overfitted", "wrong_labels")
    learned = scored([[1, 0] * 20, [1] * 40], label_issues=many)
    assert (learned.outcome, learned.cause) == ("learned", "")


def test_weak_reader_with_new_head_needs_different_base() -> None:
    lines = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]

    def reader(f1: float, new_head: bool = True) -> RunVerdict:
        course = [
            held(0, 5.0, span_f1=0.02, span_f1_error=0.01),
            held(40, 3.0, span_f1=f1, span_f1_error=0.02),
        ]
        fields: Any = {"new_head": new_head}
        return judge_run([*lines, *course], "span_f1", Training(), 40, 80, **fields)

    weak = reader(0.075)
    assert weak.cause == "reader_base" and "`--base bert-base-uncased`" in weak.advice
    assert reader(0.8).cause == "" and reader(0.075, new_head=False).cause == ""


def test_a_lower_loss_at_chance_level_is_no_gain() -> None:
    lines = [{"event": "train", "step": n, "loss": 3.0} for n in range(1, 11)]
    lines += [held(0, 4.02, chance_loss=3.0), held(10, 2.99, chance_loss=3.0)]
    found = judge_run(lines, "loss", Training(), 10, 40)
    assert (found.outcome, found.kept_step) == ("hardly_learned", 0)
    assert "chance level" in found.text


def rewarded(rewards: Sequence[float], error: float, loss: float = -0.3) -> RunVerdict:
    lines: list[dict[str, Any]] = [
        {"event": "train", "step": n, "loss": loss, "reward": 0.1} for n in range(1, 41)
    ]
    every = 40 // (len(rewards) - 1)
    lines += [
        held(every * n, -reward, reward=reward, reward_error=error)
        for n, reward in enumerate(rewards)
    ]
    return judge_run(lines, "reward", Training(learning_rate=1e-5), 40)


@pytest.mark.parametrize(
    ("rewards", "error", "outcome"),
    [
        ((0.2, 0.5, 0.7, 0.71), 0.02, "learned"),
        ((0.2, 0.3, 0.4, 0.7), 0.02, "still_improving"),
        ((0.2, 0.25, 0.3, 0.3), 0.06, "hardly_learned"),  # may be chance
        ((0.2, 0.2, 0.2, 0.2), 0.0, "hardly_learned"),
        ((0.2, 0.7, 0.5, 0.4), 0.02, "declined"),
        ((0.7, 0.5, 0.3, 0.2), 0.02, "worse"),
        ((0.5, 0.48, 0.45, 0.45), 0.06, "hardly_learned"),
        ((-0.5, -0.2, 0.1, 0.1), 0.02, "learned"),  # a reward may be below 0
    ],
)
def test_rewards_are_read_as_rewards(
    rewards: tuple[float, ...], error: float, outcome: Outcome
) -> None:
    verdict = rewarded(rewards, error)
    assert verdict.outcome == outcome
    assert verdict.before == {"reward": rewards[0]}
    expected = {"hardly_learned": "reward", "worse": "reward_fell", "declined": "reward_fell"}
    if outcome in expected:
        assert verdict.cause == expected[outcome] and "`luthier models samples`" in verdict.advice


def test_verdict_has_scores_next_to_loss() -> None:
    lines = [{"event": "train", "step": 1, "loss": 1.0}]
    lines += [held(0, 0.7, accuracy=0.5, margin=1.0), held(1, 0.2, accuracy=0.875)]
    verdict = judge_run(lines, "loss", Training(learning_rate=1e-3), 1)
    assert verdict.kept == {"loss": 0.2, "accuracy": 0.875}
    assert verdict.before == {"loss": 0.7, "accuracy": 0.5}
    assert "0.7000 (accuracy 0.500)" in verdict.text and "0.2000 (accuracy 0.875)" in verdict.text


def test_verdict_reports_few_held_out_rows() -> None:
    lines = [{"event": "train", "step": n, "loss": 1.0} for n in range(1, 3)]
    lines += [held(0, 2.0), held(2, 1.0)]
    few = judge_run(lines, "loss", Training(), 2, rows=5)
    assert (few.outcome, few.cause) == ("learned", "few_rows") and "5 rows" in few.text
    assert not judge_run(lines, "loss", Training(), 2, rows=50).cause


def test_fitted_head_is_compared_with_regression() -> None:
    lines = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]

    def judged_from(*scores: float) -> RunVerdict:
        measured = [
            held(20 * n, 1.0, accuracy=score, accuracy_error=0.02) for n, score in enumerate(scores)
        ]
        return judge_run([*lines, *measured], "accuracy", Training(), 40, 50, fitted_head=True)

    assert judged_from(0.9, 0.9, 0.91).cause == "regression"
    worse = judged_from(0.9, 0.7, 0.6)
    assert (worse.kept_step, worse.cause, worse.unchanged) == (0, "regression", False)
    assert judged_from(0.6, 0.8, 0.9).outcome == "still_improving"


def test_verdict_of_refit_names_unmeasured_weights() -> None:
    train = [{"event": "train", "step": n, "loss": loss} for n, loss in enumerate(FALLING, 1)]
    lines = [*train, held(0, 2.0), held(20, 1.0), held(40, 1.5)]
    found = judge_run(
        lines, "loss", Training(), 40, 50, refit=Refit(rows=200, held_out=50, steps=27)
    )
    assert "27 steps on all 200 rows" in found.text
    assert (found.outcome, found.kept_step, found.kept) == ("overfitted", 20, {"loss": 1.0})


def test_ruinous_rate_is_called_too_high() -> None:
    verdict = judged((2.75, 30.36), train=[2.378, 30.1, 30.3], steps=3, rate=100.0)
    assert (verdict.outcome, verdict.cause) == ("worse", "rate_high")
    assert judged((2.0, 2.1), train=[2.0, 1.9, 2.0], steps=3).cause == "few_steps"
