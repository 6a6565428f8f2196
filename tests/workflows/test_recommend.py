"""Recommendations: measurements have priority over rules of thumb."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from luthier.evaluation.baselines import KEPT_BY, LINEAR_PROBE, NAIVE_BAYES
from luthier.evaluation.significance import RowScores
from luthier.workflows.advise.evidence import Evidence
from luthier.workflows.advise.facts import AdviceFacts, Wishes
from luthier.workflows.advise.recommend import (
    Advice,
    forgetting,
    overfitting,
    recommend,
)
from luthier.workflows.contenders import Contender
from luthier.workflows.prompting import Technique

COMMAND = "luthier tune rows.jsonl"


def tried(technique: Technique, name: str, score: float, tokens: float = 50) -> Contender:
    """Return a result with independent answers to 40 rows."""
    return Contender(technique=technique, name=name, score=scores(score), scores={},
                     seconds=0.1, prompt_tokens=tokens)  # fmt: skip


def scores(share: float, rows: int = 40, seed: int = 0) -> RowScores:
    right = round(share * rows)
    shuffled = np.random.default_rng(round(1000 * share) + seed).permutation(rows)
    return RowScores.of((shuffled < right).astype(float))


def evidence(*ways: Contender, steps: int = 80, held: int = 40) -> Evidence:
    resized = [replace(each, score=scores(each.score.value, held)) for each in ways]
    return Evidence(held, resized, steps, 100)


FACTS = AdviceFacts(
    wishes=Wishes(), rows=400, shape="prompt", labels=0, smallest_class=0,
    learned_tokens=20_000, document_tokens=0, weights=135_000_000,
    trained_weights=5_000_000, megabytes=270.0, writes=True, refused=(), cautions=(),
    estimate=None, evidence=None,
)  # fmt: skip


def given(**fields: Any) -> Advice:
    return recommend(replace(FACTS, **fields), COMMAND)


def test_every_technique_is_judged_in_full() -> None:
    found = given()
    assert [each.technique for each in found.judgements] == [
        "prompt engineering", "RAG", "fine-tuning", "continued pre-training", "distillation",
        "preference tuning",
    ]  # fmt: skip
    assert all(each.reason and "{" not in each.reason for each in found.judgements)


def test_rag_is_advised_if_training_adds_nothing() -> None:
    ways = evidence(
        tried("zero-shot", "zero-shot", 0.2),
        tried("RAG", "4 nearest examples", 0.97, 400),
        tried("fine-tuning", "after 80 steps", 0.96),
    )
    found = given(evidence=ways).recommendation
    assert (found.techniques, found.tune) == (("RAG",), False)
    assert COMMAND in found.cautions[0]


def test_a_prompt_that_leaves_nothing_to_gain_fits() -> None:
    ways = evidence(
        tried("zero-shot", "zero-shot", 0.2),
        tried("prompt engineering", "4 examples", 0.97, 400),
        tried("fine-tuning", "after 80 steps", 0.96),
    )
    found = given(evidence=ways)
    assert found.judgements[0].technique == "prompt engineering"
    assert found.judgements[0].fit == "yes"
    *_, techniques = found.tables()
    strong = [row[0][0] for row in techniques.rows if row[0][1] == "strong"]
    assert strong == [*found.recommendation.techniques] == ["prompt engineering"]


@pytest.mark.parametrize(("score", "sure"), [(0.9, True), (0.55, False)])
def test_helpful_training_is_advised_with_certainty(score: float, sure: bool) -> None:
    ways = evidence(
        tried("prompt engineering", "4 examples", 0.5),
        tried("fine-tuning", "after 80 steps", score),
    )
    found = given(evidence=ways).recommendation
    assert found.techniques == ("fine-tuning",) and found.commands == (COMMAND,)
    assert found.sure is sure


def test_few_held_out_rows_are_inconclusive() -> None:
    without = tried("simple baselines", "naive Bayes", 0.5)
    tuned = tried("fine-tuning", "after 80 steps", 0.67)
    found = given(evidence=evidence(without, tuned, held=6)).recommendation
    assert not found.sure and any("6 held-out rows" in reason for reason in found.reasons)
    ways = (tried("simple baselines", "naive Bayes", 1.0), tried("fine-tuning", "tuned", 0.5))
    found = given(evidence=evidence(*ways, held=6)).recommendation
    assert found.techniques == ("simple baselines",) and not found.sure
    assert given(evidence=evidence(*ways, held=200)).recommendation.sure


def test_differences_are_paired_by_row() -> None:
    """Paired errors differ in eight rows; independent samples would not show a difference."""
    same = [1] * 30 + [0] * 66
    one, other = RowScores.of([*same, *[1] * 8]), RowScores.of([*same, *[0] * 8])
    ways = [tried("prompt engineering", "4 examples", 0), tried("fine-tuning", "tuned", 0)]
    paired = [replace(each, score=rows) for each, rows in zip(ways, (other, one), strict=True)]
    found = given(evidence=Evidence(104, paired, 80, 100)).recommendation
    assert found.sure and found.techniques == ("fine-tuning",)


def test_useless_training_is_advised_only_for_lower_cost() -> None:
    ways = evidence(
        tried("prompt engineering", "4 examples", 0.5, 400),
        tried("fine-tuning", "after 80 steps", 0.45, 50),
    )
    assert not given(evidence=ways).recommendation.tune
    found = given(evidence=ways, wishes=Wishes(goal="cost")).recommendation
    assert found.tune
    same = evidence(ways.tried[0], replace(ways.tried[1], prompt_tokens=390), steps=3)
    short = given(evidence=same).recommendation
    assert short.tune


@pytest.mark.parametrize(
    ("trial", "steps", "tunes"),
    [
        (0.48, 25, False),  # no better than the initial head
        (0.55, 25, False),  # 24 points more at this pace, and 73 % are not 85
        (0.60, 25, True),  # 93 % at this pace
        (0.48, 5, True),  # still warming up
    ],
)
def test_tuning_needs_a_trial_able_to_catch_up(trial: float, steps: int, tunes: bool) -> None:
    ways = evidence(
        tried("simple baselines", NAIVE_BAYES, 0.85),
        tried("simple baselines", LINEAR_PROBE, 0.49),
        tried("fine-tuning", "after some steps", trial),
        steps=steps,
        held=200,
    )
    found = given(evidence=ways, labels=7, writes=False).recommendation
    assert found.tune == tunes
    assert ("at this pace" in " ".join(found.reasons)) != tunes
    assert found.techniques == (("fine-tuning",) if tunes else ("simple baselines",))


@pytest.mark.parametrize(
    ("best", "options"),
    [
        (NAIVE_BAYES, "--name mine --base tfidf"),  # no model underneath
        (LINEAR_PROBE, f"--base encoder --name mine {KEPT_BY[LINEAR_PROBE]}"),
    ],
)
def test_command_stores_winning_baseline(best: str, options: str) -> None:
    ways = evidence(
        tried("simple baselines", best, 0.85),
        tried("fine-tuning", "after some steps", 0.5),
        steps=90,
        held=200,
    )
    command = "luthier tune rows.jsonl --base encoder --adaptation lora --name mine"
    facts = replace(FACTS, evidence=ways, labels=7, writes=False)
    found = recommend(facts, command).recommendation
    assert found.techniques == ("simple baselines",)
    assert found.commands == (f"luthier tune rows.jsonl {options}",)


def test_refused_data_is_fixed_first() -> None:
    found = given(refused=("row.too_long",)).recommendation
    assert not found.techniques and not found.tune and "luthier inspect" in found.commands[0]


@pytest.mark.parametrize(
    ("rag", "examples", "tuned", "expected"),
    [
        (0.5, 0.2, 0.3, ("RAG", "fine-tuning")),
        (0.3, 0.2, 0.8, ("fine-tuning", "RAG")),
        (0.0, 0.17, 0.1, ("prompt engineering", "fine-tuning")),
        (0.0, 0.1, 0.4, ("fine-tuning",)),
    ],
)
def test_measured_winner_is_first(
    rag: float, examples: float, tuned: float, expected: tuple[str, ...]
) -> None:
    ways = evidence(
        tried("RAG", "passages of the documents", rag, 500),
        tried("prompt engineering", "4 nearest examples", examples, 300),
        tried("fine-tuning", "after 20 steps", tuned),
        steps=20,
    )
    found = given(
        evidence=ways, wishes=Wishes(goal="knowledge"), document_tokens=50_000
    ).recommendation
    assert found.techniques == expected
    assert len(found.commands) == len(expected)


@pytest.mark.parametrize(
    ("fields", "techniques", "tune"),
    [
        ({"shape": "prompt_only"}, ("distillation",), True),
        ({"shape": "preference", "rows": 800}, ("preference tuning",), True),
        ({"shape": "text", "learned_tokens": 2_000}, ("RAG",), False),
        ({"shape": "text", "learned_tokens": 5_000_000}, ("continued pre-training",), True),
        ({"wishes": Wishes(max_megabytes=100)}, ("fine-tuning", "distillation"), True),
    ],
)
def test_the_shape_of_the_rows_and_the_limits_decide(
    fields: dict[str, Any], techniques: tuple[str, ...], tune: bool
) -> None:
    found = given(**fields).recommendation
    assert (found.techniques, found.tune) == (techniques, tune)
    assert len(found.commands) == len(techniques) and "{" not in "".join(found.commands)


def test_risks_grow_with_trained_weights_and_shrink_with_rows() -> None:
    order = ["none", "low", "medium", "high"]
    full = replace(FACTS, trained_weights=FACTS.weights)
    assert order.index(forgetting(full)) > order.index(forgetting(FACTS))
    few, many = replace(FACTS, rows=20), replace(FACTS, rows=9000, learned_tokens=5_000_000)
    assert order.index(overfitting(few)) > order.index(overfitting(many))
    assert forgetting(replace(FACTS, writes=False)) == "none"


@pytest.mark.parametrize("shape", ["prompt", "text", "preference", "prompt_only"])
def test_data_warnings_become_cautions(shape: str) -> None:
    advice = given(shape=shape, cautions=("the base was not trained on Vietnamese",))
    assert advice.recommendation.cautions[0] == "the base was not trained on Vietnamese"
