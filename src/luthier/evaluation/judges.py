"""Agreement of a judge with people, on pairs of replies with human preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.shapes.preferences import JudgedAnswers
from luthier.errors import DataError, Problem
from luthier.evaluation.significance import CHANCE, RowScores
from luthier.graders.base import Answer
from luthier.graders.ruler import PairVerdict, Ruler, judge_pairs
from luthier.types import Row

CHUNK = 32
"""Number of pairs between two progress reports."""


@dataclass(frozen=True, eq=False)
class JudgeAgreement:
    """Agreement of a judge with people, consistency and bias."""

    agreement: RowScores
    """Share of pairs with the human preference; one half if the order of the replies decides."""
    consistency: RowScores
    """Share of pairs with equal verdicts in both orders, among pairs with two verdicts."""
    first: RowScores
    """Share of preferences for the first reply, among pairs where the order decides."""
    longer: RowScores
    """Share of preferences for the longer reply, among decided pairs of different lengths."""
    people_longer: RowScores
    """Share of human preferences for the longer reply, among the same pairs."""
    unread: int
    """Verdicts without scores."""

    def verdict(self) -> str:
        """Summary in sentences."""
        agreement, rows = self.agreement, len(self.agreement)
        summary = (
            f"The judge agrees with people on {agreement.value:.1%} of {rows:,} pairs "
            f"(\N{PLUS-MINUS SIGN} {agreement.error:.1%})"
        )
        if agreement.value - CHANCE * agreement.error <= 0.5:
            summary += ", which may be chance."
        else:
            summary += "."
        if len(self.consistency):
            changed = 1 - self.consistency.value
            summary += f" The order of the replies changes {changed:.0%} of the verdicts"
            summary += f" ({self.first.value:.0%} for the first reply)." if len(self.first) else "."
        own, theirs = self.longer, self.people_longer
        if abs(own.value - theirs.value) > CHANCE * own.difference_error(theirs):
            summary += (
                f" The judge prefers long replies {'more' if own.value > theirs.value else 'less'} "
                f"often than people: in {own.value:.0%} of the decided pairs, and people in "
                f"{theirs.value:.0%}."
            )
        return summary

    def plain(self) -> dict[str, Any]:
        """Return all figures for JSON."""
        scores = {
            "agreement": self.agreement, "consistency": self.consistency, "prefers_first": self.first,
            "prefers_longer": self.longer, "people_prefer_longer": self.people_longer,
        }  # fmt: skip
        return {
            "rows": len(self.agreement),
            "scores": {name: each.value for name, each in scores.items() if len(each)},
            "errors": {name: each.error for name, each in scores.items() if len(each) > 1},
            "unread": self.unread,
            "verdict": self.verdict(),
        }


def check_pairs(rows: Sequence[Row]) -> list[tuple[Answer, Answer]]:
    """Return the chosen and the rejected reply of each row; of several replies the best and the
    worst.

    Raises:
        DataError: rows without two judged replies.
    """
    problems, pairs = [], []
    for row in rows:
        answers = row.answers() if isinstance(row, JudgedAnswers) else ()
        if len(answers) < 2:
            message = "the row has no human preference between two replies."
            fix = "Write rows of prompt, chosen and rejected, or of prompt and ranked replies."
            problems.append(Problem("judge.pair", message, fix, row.location))
            continue
        assert isinstance(row, JudgedAnswers)
        chosen, rejected = (
            Answer(row.messages, "\n\n".join(turn.whole_text for turn in turns), None, row)
            for turns in (answers[0], answers[-1])
        )
        pairs.append((chosen, rejected))
    if problems or not pairs:
        raise DataError(problems)
    return pairs


def measure_agreement(
    judge: Ruler,
    pairs: Sequence[tuple[Answer, Answer]],
    done: Callable[[int], None] = lambda count: None,
) -> JudgeAgreement:
    """Ask ``judge`` for a preference between the replies of each pair. People chose the first
    reply."""
    verdicts: list[PairVerdict] = []
    while len(verdicts) < len(pairs):
        # Two pairs reveal a judge without scores.
        size = CHUNK if verdicts else 2
        verdicts += judge_pairs(judge, pairs[len(verdicts) :][:size])
        done(len(verdicts))
    consistent = [each.is_consistent for each in verdicts if each.is_consistent is not None]
    # Where the order decides: preferred in the place where it stands first, or in the other.
    firsts = [
        each.shown_first > each.shown_second for each in verdicts if each.is_consistent is False
    ]
    sizes = [len(chosen.reply) - len(rejected.reply) for chosen, rejected in pairs]
    decided = [
        (verdict.win == 1, size > 0)
        for verdict, size in zip(verdicts, sizes, strict=True)
        if verdict.win != 0.5 and size
    ]
    return JudgeAgreement(
        RowScores.of([verdict.win for verdict in verdicts]),
        RowScores.of(consistent),
        RowScores.of(firsts),
        RowScores.of([agrees == is_longer for agrees, is_longer in decided]),
        RowScores.of([is_longer for _, is_longer in decided]),
        sum(verdict.unread for verdict in verdicts),
    )
