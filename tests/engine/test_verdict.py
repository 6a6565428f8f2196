"""What is said of a finished run, by its measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from luthier.engine.verdict import Outcome, Refit, RunVerdict, judge_run
from luthier.recipe import Training

FALLING = [2.0 - 0.02 * step for step in range(1, 41)]
FLAT = [2.0] * 40


def held(step: int, loss: float, **further: Any) -> dict[str, Any]:
    return {"event": "validation", "step": step, "loss": loss, "best": 0, "best_step": 0, **further}


def judged(
    losses: Sequence[float], train: Sequence[float] = FALLING, steps: int = 40, rate: float = 2e-3
) -> RunVerdict:
    """The verdict on a run that measured ``losses`` at even distances, first before training."""
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
        ((2.0, 1.0), "learned", 40),  # one measurement does not tell where it was going
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
    assert f"{losses[0]:.4f} before training" in verdict.text
    assert bool(verdict.advice) is (outcome != "learned")


def test_a_score_decides_where_it_is_what_is_measured() -> None:
    """A loss that rises while more answers are right is no overfitting."""
    train = [{"event": "train", "step": n, "loss": 1 / n, "seconds": 5.0} for n in range(1, 41)]
    courses = ((0.2, 2.0), (0.7, 0.9), (0.8, 1.0), (0.8, 1.1), (0.9, 1.3))
    lines = [held(10 * n, loss, accuracy=score) for n, (score, loss) in enumerate(courses)]
    found = judge_run([*train, *lines], "accuracy", Training(max_steps=40), 40)
    assert (found.outcome, found.kept_step) == ("still_improving", 40)
    assert found.kept == {"accuracy": 0.9, "loss": 1.3}
    assert "validation accuracy 0.2000 (loss 2.000) before training" in found.text
    assert "`training.max_steps=80` would take 3.3 min more than this run" in found.advice
    fallen = [*lines[:4], held(40, 1.3, accuracy=0.5)]
    worse = judge_run([*train, *fallen], "accuracy", Training(), 40)
    assert (worse.outcome, worse.kept_step) == ("overfitted", 20)  # of equal ones the lower loss


@pytest.mark.parametrize(
    ("rates", "losses", "outcome", "kept_step"),
    [
        # Texts are read: the loss rises, and the letters still get better.
        ((1.0, 0.5, 0.2, 0.1, 0.05), (3.0, 0.5, 0.4, 0.5, 0.6), "still_improving", 40),
        ((1.0, 0.1, 0.1, 0.3, 0.5), (3.0, 0.5, 0.4, 0.3, 0.2), "overfitted", 20),
        # Nothing is read yet: more letters than there should be are no worse than none.
        ((1.0, 1.0, 1.3, 1.0, 1.0), (3.0, 2.5, 2.4, 2.3, 2.2), "still_improving", 40),
        ((1.0, 1.0, 1.0, 1.0, 1.0), (3.0, 3.1, 3.3, 3.5, 3.6), "worse", 0),
    ],
)
def test_an_error_rate_decides_once_something_is_right(
    rates: Sequence[float], losses: Sequence[float], outcome: Outcome, kept_step: int
) -> None:
    train = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]
    pairs = enumerate(zip(rates, losses, strict=True))
    lines = [held(10 * n, loss, cer=rate) for n, (rate, loss) in pairs]
    found = judge_run([*train, *lines], "cer", Training(epochs=3), 40)
    assert (found.outcome, found.kept_step) == (outcome, kept_step)
    kept = "validation character error rate" if min(rates) < 1 else "validation loss"
    assert kept in found.text


def test_a_run_that_got_worse_says_plainly_what_is_stored() -> None:
    text = judged((2.0, 2.2, 2.6)).text
    assert text.startswith("worse than before training: ") and "2.6000 at the end" in text
    assert text.endswith(
        "The weights from before training are stored: this model answers as it did before"
    )
    assert judged((2.0, 2.2, 2.6)).unchanged and not judged((2.0, 1.5, 2.5)).unchanged
    late = judged((2.0, 1.5, 2.5)).text
    assert late.startswith("overfitted since step 20: ")
    assert "1.5000 at step 20, whose weights are stored" in late
    assert late.endswith("2.5000 at step 40, the last, worse than before training")


def test_a_rise_of_both_losses_is_no_overfitting() -> None:
    rising = [1.0, *[1.0 + 0.05 * n for n in range(39)]]
    assert judged((2.0, 1.5, 2.0), rising).outcome == "declined"
    by_heart = [1.0 * 0.6**n for n in range(20)] + [4e-5, 6e-5] * 10
    assert judged((2.0, 1.5, 2.0), by_heart).outcome == "overfitted"


def capped(
    losses: Sequence[float], steps_per_pass: float, rows: int = 0, train: float = -0.02
) -> RunVerdict:
    """The verdict on ten steps, each measured, as `training.max_steps=10` asked for."""
    lines = [{"event": "train", "step": n, "loss": 2.0 + train * n} for n in range(1, 11)]
    lines += [held(n, loss) for n, loss in enumerate(losses)]
    settings = Training(learning_rate=1e-3, max_steps=10)
    return judge_run(lines, "loss", settings, 10, rows, steps_per_pass)


RISING_AGAIN = (2.0, 1.8, 1.7, 1.6, 1.5, 1.46, 1.45, 1.47, 1.5, 1.6, 1.7)


def test_rows_that_were_seen_once_are_not_known_by_heart() -> None:
    assert capped(RISING_AGAIN, 5).outcome == "overfitted"
    once = capped(RISING_AGAIN, 32)
    assert once.outcome == "declined" and once.text.startswith("worse again since step 6")
    assert "heart" not in once.advice and "passes" not in once.advice
    assert "`training.learning_rate=2.5e-04`" in once.advice


def test_a_small_difference_on_few_rows_is_chance() -> None:
    near = (2.0, 1.99, 1.98, 1.97, 1.96, 1.955, 1.95, 1.951, 1.952, 1.955, 1.958)
    assert capped(near, 5, rows=40).outcome == "overfitted"
    few = capped(near, 5, rows=4)
    assert few.outcome == "learned"
    assert "of so few rows the difference of 0.4% is chance. 4 held-out rows give" in few.text
    assert capped(RISING_AGAIN, 5, rows=4).outcome == "overfitted"


def test_a_capped_run_that_was_best_at_its_end_needs_more_steps() -> None:
    found = capped([2.0 - 0.001 * n for n in range(11)], 32, train=0.0)
    assert (found.outcome, found.kept_step) == ("hardly_learned", 10)
    assert "`training.max_steps=20`" in found.advice and "rate" not in found.advice


def test_early_stopping_is_said() -> None:
    verdict = judged((2.0, 1.0, 1.5), steps=100)
    assert verdict.stopped_early
    assert verdict.text.endswith("1.5000 at step 40, where training stopped early")
    assert not judged((2.0, 1.0, 1.5)).stopped_early
    untrained = judged((1.0, 1.5, 2.0), steps=100).text
    assert "never better in 40 steps, 2.0000 where training stopped early" in untrained


def test_without_validation_rows_nothing_is_claimed() -> None:
    verdict = judged(())
    assert (verdict.outcome, verdict.kept_step) == ("unmeasured", 40)
    assert verdict.before == verdict.kept == verdict.last == {}
    assert "`data.validation=FILE`" in verdict.advice


@pytest.mark.parametrize(
    ("losses", "train", "words"),
    [
        ((2.0, 2.5, 3.0), FLAT, "too high: try `training.learning_rate=5.0e-04`"),
        (
            (2.0, 1.999, 1.999),
            FLAT,
            "too low: try `training.learning_rate=8",
        ),
        ((2.0, 2.5, 3.0), FALLING, "The training loss fell"),
        ((0.8, 300.0, 700.0), [2.0, 40.0, *range(3000, 1100, -50)], "too high: try"),
        ((2.0, 1.999, 2.3), FLAT, "too high: try"),
        ((2.0, 1.5, 2.0), FALLING, "by heart"),
        ((2.0, 1.5, 2.0), FALLING[::-1], "The training loss rose too, so the rate is too high"),
        ((2.0, 1.5, 1.2, 1.0, 0.8), FALLING, "`training.epochs=6` would take 0 s more"),
    ],
)
def test_advice_follows_from_both_losses(
    losses: tuple[float, ...], train: list[float], words: str
) -> None:
    assert words in judged(losses, train).advice


def scored(
    right: Sequence[Sequence[int]], train: Sequence[float] = (), **fields: Any
) -> RunVerdict:
    """The verdict on a run that got these rows right, first before training."""
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


def test_scores_of_the_same_rows_are_told_apart_by_those_that_changed() -> None:
    """Thirteen rows won and three lost are no chance, though each share has an error of two points."""
    before = [1] * 177 + [0] * 23
    after = [1] * 174 + [0] * 3 + [1] * 13 + [0] * 10
    assert scored([before, after], fitted_head=True).outcome == "learned"
    swapped = [1] * 160 + [0] * 17 + [1] * 23
    found = scored([before, swapped], fitted_head=True)
    assert found.outcome == "hardly_learned"
    assert found.text.startswith("not measurably better than the logistic regression")


def test_a_gain_on_two_rows_is_no_ground_to_change_the_rate() -> None:
    found = scored([[1, 0], [1, 1]])
    assert found.outcome == "hardly_learned"
    assert found.text.startswith("better, on too few held-out rows to be sure: ")
    assert "2 held-out rows give only a rough measurement" in found.text
    assert found.advice == "Give more rows to measure on: `data.validation=FILE`"
    assert scored([[1, 0], [1, 0]]).text.startswith("hardly learned")


def test_what_is_all_right_before_training_needs_no_more_rows() -> None:
    found = scored([[1] * 40, [1] * 40], fitted_head=True)
    assert found.text.startswith("as right as the logistic regression that it started from")
    assert not found.advice


def test_labels_that_the_rows_do_not_tell_are_said_to_be_so() -> None:
    found = scored([[1, 0] * 20, [1, 0] * 20], fitted_head=True, uninformative=True)
    assert "check what they are labelled with" in found.advice


def test_labels_are_not_blamed_where_training_rows_were_not_learned() -> None:
    right = [[1, 0] * 20, [1, 0] * 20]
    flat = scored(right, FLAT, uninformative=True, informed="logistic regression on pixels")
    assert "labelled" not in flat.advice and "base model" not in flat.advice
    settings = re.findall(r"`(training[^`]+)`", flat.advice)
    assert settings == [
        "training.epochs=12", "training.learning_rate=4.0e-03", "training.batch_size=16"
    ]  # fmt: skip
    risen = scored(right, [2.0] * 20 + [9.0] * 20, uninformative=True)
    assert "`training.learning_rate=2.5e-04`" in risen.advice
    assert "labelled" in scored(right, uninformative=True).advice


def test_only_a_run_that_learned_is_worth_a_refit() -> None:
    up, same = [[1, 0] * 20, [1] * 40], [[1, 0] * 20, [1, 0] * 20]
    assert scored(up).learned
    assert not scored(up, uninformative=True).learned
    failed = scored(same, FLAT)
    assert not failed.learned
    assert "not trained once more on all rows: nothing was learned" in failed.text
    assert "rows: it answers every row alike" in scored(up, uninformative=True).text
    # Eight rows do not show what was learned of others, and forty do.
    little = [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert scored([each * 2 for each in little]).learned
    assert not scored([each * 2 for each in little], FLAT).learned
    assert scored([[1] * 18 + [0] * 22, [1] * 19 + [0] * 21], fitted_head=True).learned
    assert not scored([[1] * 18 + [0] * 22, [1] * 19 + [0] * 21]).learned


def test_rows_that_a_baseline_tells_apart_are_not_blamed() -> None:
    right = [[1, 0] * 20, [1, 0] * 20]
    found = scored(right, fitted_head=True, uninformative=True, informed="naive Bayes on words")
    assert "labelled" not in found.advice and "yet naive Bayes on words tells" in found.advice
    assert "`--base ID`" in found.advice
    start = "Start from `--base org/model`, which was trained on Vietnamese."
    found = scored(right, uninformative=True, informed="naive Bayes on words", other_base=start)
    assert start in found.advice and "`--base ID`" not in found.advice
    assert "nothing shows" in scored(right, uninformative=True, other_base=start).advice


def test_a_lower_loss_that_is_no_gain_is_explained() -> None:
    lines = [{"event": "train", "step": n, "loss": 3.0} for n in range(1, 11)]
    lines += [held(0, 4.02, chance_loss=3.0), held(10, 2.99, chance_loss=3.0)]
    found = judge_run(lines, "loss", Training(), 10, 40)
    assert (found.outcome, found.kept_step) == ("hardly_learned", 0)
    assert "no partner would be told from another at a loss of 3.000" in found.text


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
    first = f"{rewards[0]:.4f} ± {error:.3f}" if error else f"{rewards[0]:.4f}"
    assert f"validation reward {first} before training" in verdict.text
    assert verdict.before == {"reward": rewards[0]}
    assert "loss" not in verdict.text + verdict.advice and "too high" not in verdict.advice
    if outcome in ("hardly_learned", "worse", "declined"):
        assert "`luthier samples`" in verdict.advice


def test_scores_stand_beside_the_loss() -> None:
    lines = [{"event": "train", "step": 1, "loss": 1.0}]
    lines += [held(0, 0.7, accuracy=0.5, margin=1.0), held(1, 0.2, accuracy=0.875)]
    verdict = judge_run(lines, "loss", Training(learning_rate=1e-3), 1)
    assert verdict.kept == {"loss": 0.2, "accuracy": 0.875}
    assert verdict.before == {"loss": 0.7, "accuracy": 0.5}
    assert verdict.text == (
        "learned: validation loss 0.7000 (accuracy 0.500) before training, "
        "0.2000 (accuracy 0.875) at step 1"
    )


def test_few_held_out_rows_are_said_to_be_few() -> None:
    lines = [{"event": "train", "step": n, "loss": 1.0} for n in range(1, 3)]
    lines += [held(0, 2.0), held(2, 1.0)]
    few = judge_run(lines, "loss", Training(), 2, rows=5)
    assert few.outcome == "learned" and "5 held-out rows give only a rough" in few.text
    assert "data.validation=FILE" in few.advice
    enough = judge_run(lines, "loss", Training(), 2, rows=50)
    assert "rough" not in enough.text and not enough.advice


def test_a_loss_that_rose_by_chance_on_few_rows_does_not_undo_the_run() -> None:
    """Four pairs of which two are better and two worse tell nothing of the run."""

    def measured(step: int, parts: Sequence[float]) -> dict[str, Any]:
        rows = {"loss": {"parts": parts, "is_share": False}}
        return held(step, sum(parts) / len(parts), loss_error=0.1, rows=rows)

    train = [{"event": "train", "step": n, "loss": 0.7 - 0.01 * n} for n in range(1, 37)]
    lines = [*train, measured(0, [0.69] * 4), measured(36, [1.1, 0.6, 1.0, 0.5])]
    found = judge_run(lines, "loss", Training(), 36, rows=4)
    assert (found.kept_step, found.unchanged) == (36, False)
    assert found.text.startswith(
        "so few held-out rows do not tell it from the model before training: "
    )
    assert (
        "(the 0.6900 of step 0 may be chance, and of losses of few rows that are alike"
        in found.text
    )
    assert found.advice == "Give more rows to measure on: `data.validation=FILE`"


def test_a_head_that_started_from_regression_is_compared_with_it() -> None:
    lines = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]

    def judged_from(*scores: float) -> RunVerdict:
        measured = [
            held(20 * n, 1.0, accuracy=score, accuracy_error=0.02) for n, score in enumerate(scores)
        ]
        return judge_run([*lines, *measured], "accuracy", Training(), 40, 50, fitted_head=True)

    same = judged_from(0.9, 0.9, 0.91)
    assert same.text.startswith(
        "not measurably better than the logistic regression that it started from"
    )
    assert (
        "0.9000 ± 0.020 (loss 1.000) of the regression" in same.text and "More rows" in same.advice
    )
    worse = judged_from(0.9, 0.7, 0.6)
    assert "The regression is what is stored" in worse.text and worse.kept_step == 0
    assert "held-out rows: only" not in worse.text
    better = judged_from(0.6, 0.8, 0.9)
    assert better.text.startswith("learned") and "before training" not in better.text


def test_a_regression_that_is_stored_did_not_learn_from_the_held_out_rows() -> None:
    lines = [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 41)]
    lines += [held(20 * n, 1.0 + n, accuracy=score) for n, score in enumerate((0.9, 0.7, 0.6))]
    settings = Training(refit=True)
    found = judge_run(lines, "accuracy", settings, 40, 50, fitted_head=True)
    assert "The regression is what is stored. It did not learn from the held-out rows" in found.text
    untrained = judge_run(lines, "accuracy", settings, 40, 50)
    assert "did not learn from" not in untrained.text


def test_a_refit_stores_other_weights_than_those_that_were_measured() -> None:
    train = [{"event": "train", "step": n, "loss": loss} for n, loss in enumerate(FALLING, 1)]
    lines = [*train, held(0, 2.0), held(20, 1.0), held(40, 1.5)]
    plain = judge_run(lines, "loss", Training(), 40, 50)
    found = judge_run(
        lines, "loss", Training(), 40, 50, refit=Refit(rows=200, held_out=50, steps=27)
    )
    assert "at step 20, whose weights are stored;" in plain.text
    assert "at step 20, whose weights are the best;" in found.text
    assert re.findall(r"\d+ held-out|\d+ steps|\d+ rows", found.text.rpartition("The scores")[2]) == [
        "50 held-out", "27 steps", "200 rows"
    ]  # fmt: skip
    assert (found.outcome, found.kept_step, found.kept) == ("overfitted", 20, {"loss": 1.0})


def test_a_rate_that_ruins_the_model_in_a_few_steps_is_called_too_high() -> None:
    verdict = judged((2.75, 30.36), train=[2.378, 30.1, 30.3], steps=3, rate=100.0)
    assert verdict.outcome == "worse" and verdict.advice.startswith("The rate is too high")
    few = judged((2.0, 2.1), train=[2.0, 1.9, 2.0], steps=3)
    assert "3 steps are too few to tell why" in few.advice
