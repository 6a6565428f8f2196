"""Judgements of techniques from the facts, and the resulting recommendation.

The thresholds are published rules of thumb. Measurements on held-out rows have priority. The
recommendation may be not to tune.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from luthier.evaluation.baselines import KEPT_BY, LINEAR_PROBE, NAIVE_BAYES, TFIDF
from luthier.evaluation.significance import CHANCE, differ
from luthier.pages import Displayed
from luthier.workflows.advise.evidence import Evidence, TechniqueResult
from luthier.workflows.advise.facts import AdviceFacts
from luthier.workflows.prompting import Technique

Fit = Literal["yes", "perhaps", "no"]
Risk = Literal["none", "low", "medium", "high"]

FEW_ROWS = 50
"""OpenAI's guide: improvements begin with 50 to 100 well-made examples."""
PER_CLASS = 8
"""Tunstall et al. 2022 (SetFit): eight examples of each class make a usable classifier."""
PAIRS = 500
"""Preference pairs below which reported gains are within the noise of judging."""
MIN_TRIAL_SHARE = 0.1
"""Minimum share of steps for an extrapolation of a trial."""
SURE = 0.95
"""Score above which tuning cannot gain (Bedrock's guide to reinforcement fine-tuning)."""
MIN_HELD_OUT = 20
"""Minimum held-out rows for a difference: each of fewer rows is more than 5 %."""
EXPENSIVE = 3.0
"""Ratio of input tokens per answer from which training pays off."""
JUDGED = ("preference", "rated", "thumb")
"""Shapes of rows with judged replies."""
UNTRAINED: tuple[Technique, ...] = ("zero-shot", "prompt engineering", "RAG")


@dataclass(frozen=True)
class Judgement:
    """Judgement of a technique on the data."""

    technique: str
    fit: Fit
    reason: str
    needs: str
    measured: str = ""
    """Measured result on held-out rows."""


def _corpus(facts: AdviceFacts) -> int:
    return facts.document_tokens + (facts.learned_tokens if facts.shape == "text" else 0)


def _wins(facts: AdviceFacts, *techniques: Technique) -> bool:
    best = facts.evidence.best(*techniques) if facts.evidence else None
    return best is not None and best.score >= SURE


def _too_large_or_slow(facts: AdviceFacts) -> bool:
    tuned = facts.evidence.best("fine-tuning") if facts.evidence else None
    seconds, megabytes = facts.wishes.max_seconds, facts.wishes.max_megabytes
    too_slow = tuned is not None and seconds is not None and tuned.seconds > seconds
    return too_slow or (megabytes is not None and megabytes < facts.megabytes)


def _small_wished(facts: AdviceFacts) -> bool:
    wishes = facts.wishes
    limited = wishes.max_megabytes is not None or wishes.max_seconds is not None
    return limited or wishes.goal in ("latency", "cost")


NEEDS = {
    "prompt engineering": "a few good examples; {rows:,} rows available",
    "simple baselines": "rows with {targets}; {rows:,} available",
    "RAG": "documents (--documents); {document_tokens:,} tokens available",
    "fine-tuning": "{examples}",
    "continued pre-training": "100,000 tokens of raw text, better 10,000,000; {corpus:,} available",
    "distillation": "prompts and a teacher; {rows:,} prompts available",
    "preference tuning": "500 pairs of replies; {pairs:,} available",
}
"""Required data of each technique, compared with the existing data."""
# fmt: off
RULES: tuple[tuple[str, Callable[[AdviceFacts], bool], Fit, str], ...] = (
    ("prompt engineering", lambda f: not f.writes, "no",
     "a head predicts the {targets}; for generated {targets}, use prompt and completion"),
    ("prompt engineering", lambda f: _wins(f, "zero-shot", "prompt engineering"), "yes",
     "the measured result leaves nothing to gain"),
    ("prompt engineering", lambda f: True, "perhaps", "no training, but examples in every prompt"),
    ("simple baselines", lambda f: not f.writes and f.shape == "question", "no",
     "no simple baseline finds an answer in a context"),
    ("simple baselines", lambda f: not f.writes and _wins(f, "simple baselines"), "yes",
     "fitted in seconds, without training the base model"),
    ("simple baselines", lambda f: not f.writes, "perhaps",
     "fitted in seconds, without training the base model"),
    ("RAG", lambda f: f.writes and f.document_tokens > 0 and f.wishes.goal == "knowledge", "yes",
     "documents can change without training, and tuning teaches facts badly (Ovadia et al. 2023)"),
    ("RAG", lambda f: f.writes and f.document_tokens > 0, "perhaps",
     "documents can change without training"),
    ("RAG", lambda f: f.writes and f.wishes.goal == "knowledge", "no", "no documents are given"),
    ("RAG", lambda f: f.writes, "perhaps",
     "without documents, only the nearest training rows can be examples in the prompt"),
    ("fine-tuning", lambda f: bool(f.refused), "no", "the data checks reject the rows: {refused}"),
    ("fine-tuning", lambda f: f.shape in ("text", "prompt_only"), "no",
     "the rows have no replies to learn"),
    ("fine-tuning", lambda f: f.labels > 0 and f.smallest_class < PER_CLASS, "perhaps",
     "the smallest class has {smallest_class} rows"),
    ("fine-tuning", lambda f: f.rows < (PER_CLASS * f.labels or FEW_ROWS), "perhaps",
     "{rows:,} rows are few"),
    ("fine-tuning", lambda f: True, "yes", "enough rows with {targets}"),
    ("continued pre-training", lambda f: _corpus(f) >= 10_000_000, "yes",
     "enough text to learn a field or a language"),
    ("continued pre-training", lambda f: _corpus(f) >= 100_000, "perhaps",
     "enough to learn words and style of a field, not its facts"),
    ("continued pre-training", lambda f: True, "no", "too little raw text"),
    ("distillation", lambda f: f.shape == "prompt_only", "yes",
     "a teacher can generate the missing replies to the prompts"),
    ("distillation", _too_large_or_slow, "yes",
     "the base model exceeds the size or time limit: tune the model, then distil a student"),
    ("distillation", _small_wished, "perhaps", "a smaller student is faster; measure the quality"),
    ("distillation", lambda f: True, "no", "no goal requires a smaller model"),
    ("preference tuning", lambda f: f.shape in JUDGED and f.rows >= PAIRS, "yes",
     "enough judged replies; tune on good replies first, if available"),
    ("preference tuning", lambda f: f.shape in JUDGED, "perhaps", "{rows:,} judged replies are few"),
    ("preference tuning", lambda f: True, "no", "no judged replies"),
)
"""Technique, condition on the facts, fit and reason. The first row that holds judges a technique."""
# fmt: on


def _judge(facts: AdviceFacts) -> list[Judgement]:
    targets = "answers" if facts.shape == "question" else "replies" if facts.writes else "labels"
    examples = f"{FEW_ROWS} to 1,000 rows with {targets}; {facts.rows:,} available"
    if facts.labels:
        examples = f"{PER_CLASS} rows per class; the smallest class has {facts.smallest_class:,}"
    pairs = facts.rows if facts.shape in JUDGED else 0
    values = vars(facts) | {
        "targets": targets, "examples": examples, "pairs": pairs, "corpus": _corpus(facts),
        "refused": ", ".join(facts.refused[:3]),
    }  # fmt: skip
    judged = dict[str, Judgement]()
    for technique, holds, fit, reason in RULES:
        if technique in judged or not holds(facts):
            continue
        tried = (technique, "zero-shot" if technique == "prompt engineering" else technique)
        best = facts.evidence.best(*tried) if facts.evidence else None
        measured = f"{best.result} ({best.name})" if best else ""
        needs = NEEDS[technique].format_map(values)
        judged[technique] = Judgement(technique, fit, reason.format_map(values), needs, measured)
    return [*judged.values()]


def overfitting(facts: AdviceFacts) -> Risk:
    """Return the risk from trained weights per learned token and passes over the rows."""
    ratio = facts.trained_weights / max(1, facts.learned_tokens)
    if facts.rows < FEW_ROWS or (ratio > 1000 and facts.epochs > 2):
        return "high"
    return "medium" if ratio > 30 or facts.epochs > 3 else "low"


def forgetting(facts: AdviceFacts) -> Risk:
    """Return the risk from the trained share of weights.

    LoRA learns less and forgets less (Biderman et al. 2024).
    """
    share = facts.trained_weights / max(1, facts.weights)
    if not facts.writes:
        return "none"
    return "high" if share > 0.5 else "medium" if share > 0.1 else "low"


@dataclass(frozen=True)
class Recommendation:
    """Recommended techniques with reasons."""

    techniques: tuple[str, ...]
    """Techniques in order of application; empty if the data needs a fix first."""
    tune: bool
    """True if the recommendation is to train weights."""
    reasons: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    sure: bool = True
    """True unless the measured differences may be chance."""


@dataclass(frozen=True, repr=False)
class Advice(Displayed):
    """The comparison people draw by hand, computed."""

    facts: AdviceFacts
    judgements: list[Judgement]
    recommendation: Recommendation

    def summary(self) -> list[str]:
        """Return the recommended techniques and the first reasons."""
        chosen = self.recommendation
        what = ", then ".join(chosen.techniques) or "fix the data first"
        return [f"Advice: {what}", *chosen.reasons[:3], *chosen.commands[:1]]

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        risks = {"overfitting": overfitting(self.facts), "forgetting": forgetting(self.facts)}
        return {
            "recommendation": asdict(self.recommendation),
            "techniques": [asdict(each) for each in self.judgements],
            "facts": {**self.facts.plain(), **risks},
        }


def recommend(facts: AdviceFacts, command: str) -> Advice:
    """Judge every technique and recommend; ``command`` is the tuning command."""
    judgements = _judge(facts)
    chosen = _choose(facts, {each.technique: each for each in judgements}, command)
    chosen = replace(chosen, cautions=(*facts.cautions, *chosen.cautions))
    return Advice(facts, judgements, chosen)


def _choose(facts: AdviceFacts, judged: Mapping[str, Judgement], command: str) -> Recommendation:
    if facts.refused:
        return Recommendation(
            (), False, (judged["fine-tuning"].reason,),
            commands=("luthier inspect, then luthier clean",),
        )  # fmt: skip
    if facts.shape == "prompt_only":
        reason, commands = (
            "the rows are prompts without replies",
            (_distil(command, "MODEL", "MODEL"),),
        )
        return Recommendation(("distillation",), True, (reason,), commands=commands)
    if facts.shape in JUDGED:
        reason = f"{facts.rows:,} rows have judged replies"
        cautions = ("compare the win rate on held-out pairs before and after",)
        return Recommendation(("preference tuning",), True, (reason,), cautions, (command,))
    if facts.shape == "text":
        pretraining = judged["continued pre-training"]
        if pretraining.fit == "no":
            reasons = (pretraining.reason, "use retrieval instead")
            return Recommendation(("RAG",), False, reasons)
        cautions = ("mix in general text against forgetting: --mix FILE=0.25",)
        return Recommendation(
            (pretraining.technique,), True, (pretraining.reason,), cautions, (command,)
        )
    return _for_labelled(facts, judged["distillation"].fit == "yes", command)


def _for_labelled(facts: AdviceFacts, distils: bool, command: str) -> Recommendation:
    evidence, minutes, limit = facts.evidence, facts.minutes, facts.wishes.max_minutes
    chosen, cautions = list[str](), list[str]()
    against, reasons, sure = _without_training(facts)
    if evidence and not sure:
        reasons.append(
            f"the difference is not significant on {evidence.held:,} held-out rows. Start with "
            "this technique, and measure on more rows (--validation FILE)"
        )
    best = evidence and evidence.best(*UNTRAINED)
    if facts.document_tokens and facts.wishes.goal == "knowledge":
        rag = evidence and evidence.best("RAG")
        if rag and best and rag.score < best.score:
            reasons.append(f"retrieval: {rag.result}; {best.name}: {best.result}")
        else:
            chosen.append("RAG")
            reasons.append("retrieval is better than tuning for facts (Ovadia et al. 2023)")
    if against:
        spent = f" (about {minutes:,.0f} min)" if minutes else ""
        cautions.append(f"if the result is not sufficient, tune{spent}: {command}")
        # A baseline has no server, so users need the nearest model that has one.
        if against == "simple baselines":
            cautions.append(_nearest_served(facts, command))
        chosen = _by_score([*chosen, against], evidence)
        return Recommendation(tuple(chosen), False, tuple(reasons), tuple(cautions), sure=sure)
    if facts.rows < FEW_ROWS and not facts.labels:
        cautions.append(f"{facts.rows:,} rows are few: the model learns form, not content")
    # A prompt that beats the trial is usable at once, while the tuning runs.
    if best and best.score and facts.wishes.goal not in ("cost", "latency"):
        tuned = evidence and evidence.best("fine-tuning")
        if tuned and tuned.score < best.score and best.technique != "zero-shot":
            chosen.append(best.technique)
    chosen, commands = _by_score([*chosen, "fine-tuning"], evidence), [command]
    if limit is not None and minutes is not None and minutes > limit:
        cautions.append(
            f"training takes about {minutes:,.0f} min, and the limit is {limit:,.0f} min: plan with "
            "luthier estimate --within"
        )
    if evidence and chosen[0] in ("prompt engineering", "RAG"):
        caution = "Compare with prompting after tuning: luthier compare FILE --tuned TUNED_MODEL"
        cautions.append(caution + " --documents TEXT" * ("RAG" in chosen))
    if distils:
        chosen.append("distillation")
        reasons.append("the tuned model exceeds the size or time limit: distil a student")
        commands.append(_distil(command, "TUNED_MODEL", "SMALLER_MODEL"))
    return Recommendation(
        tuple(chosen), True, tuple(reasons), tuple(cautions), tuple(commands), sure
    )


def _by_score(techniques: Sequence[str], evidence: Evidence | None) -> list[str]:
    """Return the techniques without repetition, the best measured first, then the unmeasured."""
    tried = sorted(evidence.tried, key=lambda each: each.score) if evidence else []
    scores: dict[str, float] = {each.technique: each.score for each in tried}
    return sorted(dict.fromkeys(techniques), key=lambda name: -scores.get(name, -1.0))


def _nearest_served(facts: AdviceFacts, command: str) -> str:
    """Return the command for a served model similar to the best simple baseline."""
    best = facts.evidence and facts.evidence.best("simple baselines")
    plain = _without_option(command, "--adaptation")
    if best and best.name in (NAIVE_BAYES, TFIDF):
        plain = f"{_without_option(plain, '--base')} {KEPT_BY[TFIDF]}"
        if best.name == TFIDF:
            return f"Keep the baseline: {plain}"
        nearest = "learns words and pairs of words"
    else:
        nearest, plain = "trains only a new head", f"{plain} --adaptation feature_extraction"
    return f"luthier cannot serve this baseline. The most similar model {nearest}: {plain}"


def _without_training(facts: AdviceFacts) -> tuple[str, list[str], bool]:
    """Return the best technique without training if sufficient, the reasons, and the certainty."""
    evidence = facts.evidence
    best = evidence and evidence.best(*UNTRAINED, "simple baselines")
    tuned = evidence and evidence.best("fine-tuning")
    if not evidence or not best:
        return "", ["no technique without training was measured"], True
    enough = evidence.held >= MIN_HELD_OUT
    gain, sure = _gain(tuned, best, evidence.held) if tuned else (0.0, False)
    # A better tuned model is still worth it if the gain is no chance.
    if best.score >= SURE and not (gain > 0 and sure):
        return best.technique, [f"{best.name}: {best.score:.1%} right without training"], enough
    if not tuned:
        return "", [f"best without training: {best.result}"], enough
    said = (
        f"after {evidence.steps:,} of {evidence.all_steps:,} steps: {tuned.result}; best without "
        f"training: {best.name}, {best.result}"
    )
    if gain > 0:
        return "", [said], sure and enough
    share = evidence.steps / max(1, evidence.all_steps)
    most = _most_reachable(evidence, tuned, share)
    if most is not None and most < best.score and differ(most, best.score, evidence.held):
        pace = f"all {evidence.all_steps:,} steps would reach at most {most:.0%} at this pace"
        return best.technique, [said, pace], sure and enough
    # Long prompts cost with every reply, and tuning costs once.
    dear = best.prompt_tokens > EXPENSIVE * max(1.0, tuned.prompt_tokens)
    if share < 0.5 or (dear and facts.wishes.goal in ("cost", "latency")):
        why = (
            f"{best.name} needs {best.prompt_tokens:,.0f} prompt tokens per reply, the tuned model "
            f"{tuned.prompt_tokens:,.0f}"
            if dear
            else "the trial was too short; increase --trial"
        )
        return "", [said, why], enough
    return best.technique, [said], sure and enough


def _most_reachable(evidence: Evidence, tuned: TechniqueResult, share: float) -> float | None:
    """Return the score after all steps at the pace of the trial: an upper bound, because curves
    flatten.

    Known for heads that start from the measured linear probe. Unknown for a trial of less than a
    tenth of the steps, which may be within the warm-up.
    """
    probe = next((each.score for each in evidence.tried if each.name == LINEAR_PROBE), None)
    if probe is None or share < MIN_TRIAL_SHARE:
        return None
    return min(1.0, tuned.score + max(0.0, tuned.score - probe) * (1 - share) / share)


def _gain(tuned: TechniqueResult, best: TechniqueResult, held: int) -> tuple[float, bool]:
    """Return the gain of the tuned result, and whether the gain exceeds the noise."""
    one, other, gain = tuned.row_scores, best.row_scores, tuned.score - best.score
    if one is None or other is None:
        return gain, differ(tuned.score, best.score, held)
    return gain, abs(gain) >= CHANCE * one.difference_error(other)  # paired by row


def _without_option(command: str, option: str) -> str:
    """Return a command without an option and its value."""
    parts = shlex.split(command)
    if option in parts:
        position = parts.index(option)
        del parts[position : position + 2]
    return shlex.join(parts)


def _distil(command: str, teacher: str, student: str) -> str:
    data = command.removeprefix("luthier tune ").split(" --")[0]
    return f"luthier distil {data} --teacher {teacher} --student {student}"
