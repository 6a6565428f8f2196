"""How far a judge agrees with people, on pairs of replies that people have judged."""

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
"""Pairs that are judged between two looks at the progress."""


@dataclass(frozen=True, eq=False)
class JudgeAgreement:
    """A judge beside people."""

    agreement: RowScores
    """Pairs of which it prefers what people chose; where the order decides, one half."""
    consistency: RowScores
    """Pairs of which it says the same in both orders, of those with two verdicts."""
    first: RowScores
    """Of the pairs where the order decides: those in which it prefers what stands first."""
    longer: RowScores
    """Pairs in which it prefers the longer reply, of those that it decides and that have one."""
    people_longer: RowScores
    """Those of them in which people chose it."""
    unread: int
    """Verdicts without scores."""

    def verdict(self) -> str:
        """What to make of it, in words."""
        agreement, rows = self.agreement, len(self.agreement)
        said = (
            f"The judge agrees with people on {agreement.value:.1%} of {rows:,} pairs "
            f"(\N{PLUS-MINUS SIGN} {agreement.error:.1%})"
        )
        if agreement.value - CHANCE * agreement.error <= 0.5:
            said += ", which may be chance: do not rely on it here."
        else:
            said += "."
        if len(self.consistency):
            changed = 1 - self.consistency.value
            said += f" The order of the replies changes {changed:.0%} of its verdicts"
            said += f", {self.first.value:.0%} of them for the first." if len(self.first) else "."
        own, theirs = self.longer, self.people_longer
        if abs(own.value - theirs.value) > CHANCE * own.difference_error(theirs):
            said += (
                f" It likes long replies {'more' if own.value > theirs.value else 'less'} than people "
                f"do: it prefers the longer one of {own.value:.0%} of the pairs it decides, people of "
                f"{theirs.value:.0%}."
            )
        return said

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
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
    """What people chose and what they rejected in each row: of more replies the best and the worst.

    Raises:
        DataError: with each row in which people have not judged two replies.
    """
    problems, pairs = [], []
    for row in rows:
        answers = row.answers() if isinstance(row, JudgedAnswers) else ()
        if len(answers) < 2:
            message = "people have not judged two replies here."
            fix = "Give rows of prompt, chosen and rejected, or of prompt and ranked replies."
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
    """Let ``judge`` prefer one reply of each pair, of which people chose the first."""
    verdicts: list[PairVerdict] = []
    while len(verdicts) < len(pairs):
        # A judge that gives no scores shows it on the first two.
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
