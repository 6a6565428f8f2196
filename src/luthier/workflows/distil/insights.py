"""Prompt insights: accepted prompts and answers, and the reasons for rejection.

The name and the idea are Amazon Bedrock's; the rules are our own. Every rule is a plain check. The
rule ``answer.refusal`` is a heuristic on English phrases and misses refusals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.chat_models.base import Failure, Reply
from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import GradingFailed, line_field, line_text
from luthier.graders import Answer, Grader, check_rows, grade_answers
from luthier.types import Row
from luthier.workflows.distil.recipe import InsightSpec

RULES: Mapping[str, str] = {
    "prompt.duplicate": "An earlier row has the same prompt.",
    "prompt.too_long": "The prompt has more characters than `insights.longest_prompt`.",
    "teacher.refused": "The prompt is too long for the teacher, or its endpoint rejected the prompt.",
    "teacher.failed": "The teacher returned no complete answer after all retries.",
    "answer.cut": "The answer was cut off, by `sampling.max_tokens` or otherwise.",
    "answer.filtered": "The endpoint's content filter cut the answer off.",
    "answer.empty": "The answer is empty or white space.",
    "answer.too_short": "The answer has fewer characters than `insights.shortest_answer`.",
    "answer.too_long": "The answer has more characters than `insights.longest_answer`.",
    "answer.refusal": "The answer begins like a refusal (English phrases, a heuristic).",
    "answer.context": "Prompt and answer have more tokens than the student's context.",
    "grader.failed": "The grader failed: an error, a timeout, or no number.",
    "grader.score": "The score of the answer is below `insights.threshold`.",
}
"""Why a prompt is rejected."""
REPEATED_SHARE = 0.1
"""Share of identical answers above which a warning is reported."""

_CANNOT = r"(?:can(?:no|')?t|can not|am (?:un|not )able to|won't|will not|must decline to)"
_DO = (
    r"(?:help|assist|comply|provide|answer|fulfill?|support|engage|discuss|create|generate|write|share"
    r"|do that|give)\b"
)
_REFUSAL = re.compile(
    rf"^(?:(?:i'm|i am) (?:very |so |really )?sorry,? (?:but )?(?:i {_CANNOT} {_DO}|that(?:'s| is) not)"
    rf"|(?:sorry|unfortunately|apologies),? (?:but )?i {_CANNOT} {_DO}"
    rf"|i {_CANNOT} (?:help|assist|comply|fulfill?|engage|do that)\b"
    r"|(?:i'm sorry,? (?:but )?)?as an ai\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Insight:
    """Result of a prompt."""

    row: Row
    answer: str | None = None
    rule: str | None = None
    """Rule that rejects the prompt; ``None`` for an accepted prompt."""
    reason: str = ""
    score: float | None = None
    """Score of the grader, if any."""

    def plain(self) -> dict[str, Any]:
        """Return a line of ``insights.jsonl``."""
        prompt: Any = [turn.to_dict() for turn in self.row.turns()]
        if isinstance(self.row, PromptOnly):
            prompt = self.row.prompt
        return {
            **line_field(self.row.line), "accepted": self.rule is None, "rule": self.rule,
            "reason": self.reason or None, "score": self.score, "prompt": prompt, "answer": self.answer,
        }  # fmt: skip


@dataclass(frozen=True)
class InsightSummary:
    """Counts over all prompts."""

    prompts: int
    accepted: int
    rules: dict[str, int]
    """Rejected prompts by rule, the most frequent first."""

    @property
    def lines(self) -> list[str]:
        """Table of the counts, as text."""
        table = [f"{count:>7,}  {rule:<17} {RULES[rule]}" for rule, count in self.rules.items()]
        return [f"{self.accepted:,} of {self.prompts:,} prompts are accepted", *table]


def check_grader(rows: Sequence[Row], spec: InsightSpec) -> None:
    """Reject an incomplete grader, and rows without a reply to compare with."""
    if spec.grader is not None:
        check_rows([spec.grader], [Answer.of(row, "") for row in rows])


def reject_prompts(rows: Sequence[Row], spec: InsightSpec) -> dict[int, Insight]:
    """Return the rows that are rejected before the teacher is queried, by index."""
    rejected: dict[int, Insight] = {}
    line_of: dict[Any, int] = {}
    for index, row in enumerate(rows):
        turns = row.turns()
        first = line_of.setdefault(tuple((t.role, t.content.strip()) for t in turns), row.line)
        size = sum(len(turn.content) for turn in turns)
        if first != row.line:
            rejected[index] = Insight(
                row, None, "prompt.duplicate", f"same prompt as {line_text(first)}"
            )
        elif spec.longest_prompt is not None and size > spec.longest_prompt:
            rejected[index] = Insight(row, None, "prompt.too_long", f"{size:,} characters")
    return rejected


def judge_answer(
    row: Row, outcome: Reply | Failure, spec: InsightSpec, overflow: Callable[[Row, str], str]
) -> Insight:
    """Check an answer before grading. ``overflow`` describes text beyond the student's context."""
    if isinstance(outcome, Failure):
        return Insight(row, None, outcome.rule, outcome.reason)
    answer = outcome.text.strip()
    rule, reason = _fault(outcome.finish, answer, spec)
    if rule is None and (reason := overflow(row, answer)):
        rule = "answer.context"
    return Insight(row, answer, rule, reason)


def grade_insights(insights: Sequence[Insight], grader: Grader, threshold: float) -> list[Insight]:
    """Return ``insights`` after ``grader`` rejected accepted answers below ``threshold``.

    Raises:
        GradingFailed: if a judge was unreachable, because the answers are not at fault.
    """
    positions = [position for position, each in enumerate(insights) if each.rule is None]
    answers = [
        Answer.of(insights[position].row, insights[position].answer or "") for position in positions
    ]
    grades = grade_answers(grader, answers, on_error="zero")
    if unreachable := [each for each in grades.problems if each.rule == "judge.failed"]:
        raise GradingFailed(unreachable)
    failed = dict(zip(grades.places, grades.problems, strict=True))
    graded = list(insights)
    for index, (position, score) in enumerate(zip(positions, grades.scores, strict=True)):
        rule, reason = None, ""
        if index in failed:
            rule, reason = "grader.failed", failed[index].message
        elif score < threshold:
            rule, reason = "grader.score", f"{grader.method} {score:g}, minimum {threshold:g}"
        graded[position] = replace(insights[position], rule=rule, reason=reason, score=score)
    return graded


def summary(insights: Sequence[Insight]) -> InsightSummary:
    """Return the counts of ``insights``."""
    rules = Counter(insight.rule for insight in insights if insight.rule)
    rejected = sum(rules.values())
    return InsightSummary(len(insights), len(insights) - rejected, dict(rules.most_common()))


def repetition_warning(insights: Sequence[Insight]) -> str:
    """Return a warning if many prompts have the same answer, else an empty string."""
    answers = Counter(each.answer for each in insights if each.rule is None)
    if not answers:
        return ""
    answer, count = answers.most_common(1)[0]
    if count < 3 or count <= REPEATED_SHARE * answers.total():
        return ""
    text = str(answer) if len(str(answer)) <= 60 else f"{str(answer)[:59]}…"
    return f"{count} of {answers.total()} accepted answers are the same: {text!r}"


def _fault(finish: str, answer: str, spec: InsightSpec) -> tuple[str | None, str]:
    """Return the first rule that an answer violates, with details; ``None`` without a violation."""
    if finish in ("content_filter", "refusal"):
        return {"content_filter": "answer.filtered", "refusal": "answer.refusal"}[finish], finish
    if finish != "stop":
        return "answer.cut", f"finish reason {finish!r}"
    if not answer:
        return "answer.empty", ""
    if len(answer) < spec.shortest_answer:
        return "answer.too_short", f"{len(answer):,} characters"
    if spec.longest_answer is not None and len(answer) > spec.longest_answer:
        return "answer.too_long", f"{len(answer):,} characters"
    refusal = _REFUSAL.match(answer.replace("’", "'")) if spec.refusals else None
    return ("answer.refusal", f"begins with {refusal[0]!r}") if refusal else (None, "")
