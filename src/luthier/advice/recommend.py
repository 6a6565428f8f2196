"""From the judgements to one recommendation, which may be not to tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from luthier.advice.evidence import Tried
from luthier.advice.facts import Facts
from luthier.advice.techniques import FEW_ROWS, SURE, TECHNIQUES, Judgement
from luthier.evaluation.significance import differ

MARGIN = 0.05
"""Difference of losses, as a share, that is taken for one."""
EXPENSIVE = 3.0
"""So many times the tokens read for each answer, and training pays for itself sooner or later."""


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why."""

    techniques: tuple[str, ...]
    """In the order to apply them; empty where the data has to be mended first."""
    tune: bool
    """Whether any weight should move."""
    reasons: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    commands: tuple[str, ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Advice:
    """The comparison people draw by hand, computed."""

    facts: Facts
    judgements: list[Judgement]
    recommendation: Recommendation

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "recommendation": self.recommendation.plain(),
            "techniques": [each.plain() for each in self.judgements],
            "facts": self.facts.plain(),
        }


def advise(facts: Facts, command: str) -> Advice:
    """Judge every technique and choose; ``command`` is what tunes on this data."""
    judgements = [judge(facts) for judge in TECHNIQUES]
    chosen = _recommend(facts, judgements, command)
    chosen = replace(chosen, cautions=(*facts.cautions, *chosen.cautions))
    return Advice(facts, judgements, chosen)


def _recommend(facts: Facts, judgements: list[Judgement], command: str) -> Recommendation:
    fits = {each.technique: each.fit for each in judgements}
    if facts.refused:
        return Recommendation(
            (), False, (f"the data gate refuses the rows ({', '.join(facts.refused)})",),
            commands=("luthier inspect, then luthier clean",),
        )  # fmt: skip
    if facts.shape == "prompt_only":
        reason = "the rows are prompts without answers"
        return Recommendation(("distillation",), True, (reason,), commands=(_distil(command),))
    if facts.shape in ("preference", "rated", "thumb"):
        reason = f"{facts.rows:,} judged answers are here"
        cautions = ("compare the win rate on held-out pairs before and after",)
        return Recommendation(("preference tuning",), True, (reason,), cautions, (command,))
    if facts.shape == "text":
        chosen = fits["continued pre-training"] != "no"
        reason = next(j.reason for j in judgements if j.technique == "continued pre-training")
        if not chosen:
            return Recommendation(("RAG",), False, (reason, "search the texts instead"))
        cautions = ("mix in general text against forgetting: --mix FILE=0.25",)
        return Recommendation(("continued pre-training",), True, (reason,), cautions, (command,))
    return _labelled(facts, fits, command)


def _labelled(facts: Facts, fits: Mapping[str, str], command: str) -> Recommendation:
    """Rows with answers: is training worth it?"""
    chosen: list[str] = []
    cautions: list[str] = []
    against, reasons = _without_training(facts)
    if facts.document_tokens and facts.wishes.goal == "knowledge":
        chosen.append("RAG")
        reasons.append("facts belong into documents, which can be changed (Ovadia et al. 2023)")
    if against:
        chosen = [*dict.fromkeys([*chosen, against])]
        spent = f"takes about {facts.minutes:,.0f} min" if facts.minutes else "is the next step"
        caution = f"if that is not enough, tuning {spent}: {command}"
        return Recommendation(tuple(chosen), False, tuple(reasons), (caution,))
    if facts.rows < FEW_ROWS and not facts.labels:
        cautions.append(f"{facts.rows:,} rows are few: expect the form, not the substance")
    chosen.append("fine-tuning")
    if fits["distillation"] == "yes":
        chosen.append("distillation")
        reasons.append(
            "the tuned model is larger or slower than asked for; teach a student with it"
        )
    limit, minutes = facts.wishes.max_minutes, facts.minutes
    if limit is not None and minutes is not None and minutes > limit:
        cautions.append(
            f"training takes about {minutes:,.0f} min, more than the {limit:,.0f} allowed: luthier "
            "estimate --within says what fits"
        )
    commands = [command, *([_student(command)] if "distillation" in chosen else [])]
    return Recommendation(tuple(chosen), True, tuple(reasons), tuple(cautions), tuple(commands))


def _without_training(facts: Facts) -> tuple[str, list[str]]:
    """What does as well without training, if anything, and the reasons either way."""
    evidence = facts.evidence
    best = evidence and evidence.best("as it is", "prompt engineering", "RAG", "simple baselines")
    tuned = evidence and evidence.best("fine-tuning")
    if not evidence or not best:
        return "", ["nothing was tried without training"]
    gain, sure = _gain(tuned, best, evidence.held) if tuned else (0.0, False)
    if best.score is not None and best.score >= SURE and not (gain > 0 and sure):
        return best.technique, [f"{best.name}: {best.score:.1%} right without training"]
    if not tuned:
        return "", [f"without training the best is {_said(best)}"]
    share = evidence.steps / max(1, evidence.all_steps)
    said = (
        f"after {evidence.steps:,} of {evidence.all_steps:,} steps {_said(tuned)}; without training "
        f"the best is {best.name} with {_said(best)}"
    )
    if gain > 0:
        unsure = [] if sure else ["the difference is within the noise of so few rows"]
        return "", [said, *unsure]
    dear = best.prompt_tokens > EXPENSIVE * max(1.0, tuned.prompt_tokens)
    if share < 0.5 or (dear and facts.wishes.goal in ("cost", "latency")):
        why = (
            f"{best.name} reads {best.prompt_tokens:,.0f} tokens for each answer, the tuned model "
            f"{tuned.prompt_tokens:,.0f}"
            if dear
            else "the trial was too short to tell; a longer one (--trial) says more"
        )
        return "", [said, why]
    return best.technique, [said]


def _gain(tuned: Tried, best: Tried, held: int) -> tuple[float, bool]:
    """How much better the tuned one is, and whether that is more than noise."""
    if tuned.score is not None and best.score is not None:
        return tuned.score - best.score, differ(tuned.score, best.score, held)
    if tuned.loss is None or best.loss is None:
        return 1.0, False
    gain = (best.loss - tuned.loss) / best.loss
    return (gain if gain > MARGIN else 0.0), gain > MARGIN


def _said(each: Tried) -> str:
    parts = [] if each.score is None else [f"{each.score:.0%} right"]
    parts += [] if each.loss is None else [f"a loss of {each.loss:.2f}"]
    return ", ".join(parts)


def _distil(command: str) -> str:
    data = command.removeprefix("luthier tune ").split(" --")[0]
    return f"luthier distil {data} --teacher MODEL --student MODEL"


def _student(command: str) -> str:
    data = command.removeprefix("luthier tune ").split(" --")[0]
    return f"luthier distil {data} --teacher TUNED_MODEL --student SMALLER_MODEL"
