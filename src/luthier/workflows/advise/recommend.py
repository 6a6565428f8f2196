"""Judgements of techniques from the facts, and the resulting recommendation.

The thresholds are published rules of thumb. Measurements on held-out rows have priority. The
recommendation may be not to tune.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from luthier.evaluation.baselines import LINEAR_PROBE, NAIVE_BAYES
from luthier.evaluation.significance import CHANCE, differ
from luthier.models.catalog import WORD_READER
from luthier.pages import Displayed
from luthier.workflows.advise.evidence import Evidence, TechniqueResult
from luthier.workflows.advise.facts import AdviceFacts
from luthier.workflows.prompting import Technique

Fit = Literal["yes", "perhaps", "no"]
Risk = Literal["none", "low", "medium", "high"]

FEW_ROWS = 50
"""OpenAI's guide: improvements begin with 50 to 100 well-made examples."""
MANY_ROWS = 1000
"""Zhou et al. 2023 (LIMA): a thousand careful examples teach a style."""
PER_CLASS = 8
"""Tunstall et al. 2022 (SetFit): eight examples of each class make a usable classifier."""
CORPUS = 100_000
"""Minimum tokens for task-adaptive pre-training (Gururangan et al. 2020: 80 kB to 3 MB)."""
LARGE_CORPUS = 10_000_000
PAIRS = 500
"""Preference pairs below which reported gains are within the noise of judging."""
MIN_TRIAL_SHARE = 0.1
"""Minimum share of steps for an extrapolation of a trial."""
SURE = 0.95
"""Score above which tuning cannot gain (Bedrock's guide to reinforcement fine-tuning)."""


@dataclass(frozen=True)
class Judgement:
    """Judgement of a technique on the data."""

    technique: str
    fit: Fit
    reason: str
    needs: str
    """Required data, compared with the existing data."""
    takes: str
    """Time and memory before the first answer."""
    each_answer: str
    """Cost of an answer."""
    complexity: Risk
    overfitting: Risk
    forgetting: Risk
    measured: str = ""
    """Measured result on held-out rows."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def _targets(facts: AdviceFacts) -> str:
    """Return the name of what the rows teach."""
    if facts.shape == "question":
        return "answers"
    return "replies" if facts.writes else "labels"


def prompting(facts: AdviceFacts) -> Judgement:
    """Instructions and examples in the prompt."""
    best = facts.evidence and facts.evidence.best("zero-shot", "prompt engineering")
    if not facts.writes:
        fit: Fit = "no"
        targets = _targets(facts)
        reason = (
            f"a head predicts the {targets}; for generated {targets}, use prompt and completion"
        )
    elif best and best.score >= SURE:
        fit, reason = "yes", f"{best.name} is right in {best.score:.0%} of the rows"
    else:
        fit, reason = "perhaps", "no training, but examples in every prompt"
    read = f"{best.prompt_tokens:,.0f} prompt tokens" if best else "prompt and examples"
    return Judgement(
        "prompt engineering", fit, reason, f"a few good examples; {facts.rows:,} rows available",
        "nothing", read, "low", "none", "none",
        _best_measured(facts, "zero-shot", "prompt engineering"),
    )  # fmt: skip


def baselines(facts: AdviceFacts) -> Judgement:
    """Judge a simple classifier on words or on the base model's states."""
    best = facts.evidence and facts.evidence.best("simple baselines")
    fit: Fit = "yes" if best and best.score >= SURE else "perhaps"
    reason = "fitted in seconds, without training the base model"
    if facts.shape == "question":
        fit, reason = "no", "no simple baseline finds an answer in a context"
    needs = f"rows with {_targets(facts)}; {facts.rows:,} available"
    return Judgement(
        "simple baselines", fit, reason, needs,
        "seconds", "at most one pass over the text", "low", "none", "none",
        _best_measured(facts, "simple baselines"),
    )  # fmt: skip


def rag(facts: AdviceFacts) -> Judgement:
    """Judge retrieval of passages into the prompt."""
    if not facts.writes:
        return baselines(facts)
    if facts.document_tokens:
        fit: Fit = "yes" if facts.wishes.goal == "knowledge" else "perhaps"
        reason = (
            "documents can change without training, and tuning teaches facts badly "
            "(Ovadia et al. 2023)"
        )
        needs = f"documents; {facts.document_tokens:,} tokens available"
    else:
        fit = "no" if facts.wishes.goal == "knowledge" else "perhaps"
        reason = "without documents, only the nearest training rows can be examples in the prompt"
        needs = "documents (--documents); none given"
    best = facts.evidence and facts.evidence.best("RAG")
    each = f"{best.prompt_tokens:,.0f} prompt tokens and a search" if best else "a search"
    return Judgement(
        "RAG", fit, reason, needs, "seconds for an index", each, "medium", "none", "none",
        _best_measured(facts, "RAG"),
    )  # fmt: skip


def fine_tuning(facts: AdviceFacts) -> Judgement:
    """Supervised tuning on labelled rows."""
    needed = PER_CLASS * facts.labels if facts.labels else FEW_ROWS
    takes = _takes(facts)
    if facts.shape in ("text", "prompt_only"):
        fit: Fit = "no"
        reason = "the rows have no replies to learn"
    elif facts.labels and facts.smallest_class < PER_CLASS:
        fit, reason = "perhaps", f"the smallest class has {facts.smallest_class} rows"
    elif facts.rows < needed:
        fit, reason = "perhaps", f"{facts.rows:,} rows are few"
    else:
        fit, reason = "yes", f"enough rows with {_targets(facts)}"
    if facts.refused:
        fit, reason = "no", f"the data checks reject the rows: {', '.join(facts.refused[:3])}"
    needs = f"{FEW_ROWS} to {MANY_ROWS:,} rows with {_targets(facts)}; {facts.rows:,} available"
    if facts.labels:
        needs = f"{PER_CLASS} rows per class; the smallest class has {facts.smallest_class:,}"
    return Judgement(
        "fine-tuning", fit, reason, needs, takes,
        f"{facts.prompt_tokens / max(1, facts.rows):,.0f} prompt tokens",
        "medium", overfitting(facts), forgetting(facts), _best_measured(facts, "fine-tuning"),
    )  # fmt: skip


def continued_pretraining(facts: AdviceFacts) -> Judgement:
    """More of the same training on raw text of a field or a language."""
    tokens = facts.document_tokens + (facts.learned_tokens if facts.shape == "text" else 0)
    if tokens >= LARGE_CORPUS:
        fit: Fit = "yes"
        reason = "enough text to learn a field or a language"
    elif tokens >= CORPUS:
        fit, reason = "perhaps", "enough to learn words and style of a field, not its facts"
    else:
        fit, reason = "no", "too little raw text"
    needs = f"{CORPUS:,} tokens of raw text, better {LARGE_CORPUS:,}; {tokens:,} available"
    return Judgement(
        "continued pre-training", fit, reason, needs, "training on all text, then tuning",
        "like the base model", "high", "medium", "high" if tokens >= CORPUS else "medium",
    )  # fmt: skip


def distillation(facts: AdviceFacts) -> Judgement:
    """Judge teaching a smaller model with a larger model on the user's prompts."""
    small = facts.wishes.max_megabytes is not None or facts.wishes.max_seconds is not None
    too_large = (facts.wishes.max_megabytes or float("inf")) < facts.megabytes
    tuned = facts.evidence.best("fine-tuning") if facts.evidence else None
    too_slow = tuned is not None and tuned.seconds > (facts.wishes.max_seconds or float("inf"))
    if facts.shape == "prompt_only":
        fit: Fit = "yes"
        reason = "a teacher can generate the missing replies to the prompts"
    elif too_large or too_slow:
        fit = "yes"
        reason = (
            "the base model exceeds the size or time limit: tune the model, then distil a student"
        )
    elif facts.wishes.goal in ("latency", "cost") or small:
        fit, reason = "perhaps", "a smaller student is faster; measure the quality"
    else:
        fit, reason = "no", "no goal requires a smaller model"
    return Judgement(
        "distillation", fit, reason, f"prompts and a teacher; {facts.rows:,} prompts available",
        "generating replies, then tuning", "faster, by the size of the student",
        "high", "medium", "medium",
    )  # fmt: skip


def preferences(facts: AdviceFacts) -> Judgement:
    """Judge DPO, similar methods, and reinforcement with a reward model."""
    have = facts.rows if facts.shape in ("preference", "rated", "thumb") else 0
    if have >= PAIRS:
        fit: Fit = "yes"
        reason = "enough judged replies; tune on good replies first, if available"
    elif have:
        fit, reason = "perhaps", f"{have:,} judged replies are few"
    else:
        fit, reason = "no", "no judged replies"
    needs = f"{PAIRS:,} pairs of replies; {have:,} available"
    takes = _takes(facts) if have else "fine-tuning with twice the tokens"
    return Judgement(
        "preference tuning", fit, reason, needs, takes, "like fine-tuning",
        "high", "high" if 0 < have < PAIRS else "medium", "low",
    )  # fmt: skip


TECHNIQUES: tuple[Callable[[AdviceFacts], Judgement], ...] = (
    prompting,
    rag,
    fine_tuning,
    continued_pretraining,
    distillation,
    preferences,
)


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


def _takes(facts: AdviceFacts) -> str:
    estimate = facts.estimate
    if estimate is None:
        return "not estimated"
    low, high = estimate.seconds.low / 60, estimate.seconds.high / 60
    texts = dict.fromkeys((f"{low:,.0f}", f"{high:,.0f}"))
    minutes = "less than 1" if high < 1 else " to ".join(texts)
    return f"{minutes} min, {estimate.memory.value / 1e9:.1f} GB of memory"


def _best_measured(facts: AdviceFacts, *techniques: Technique) -> str:
    best = facts.evidence and facts.evidence.best(*techniques)
    return f"{best.result} ({best.name})" if best else ""


MIN_HELD_OUT = 20
"""Minimum held-out rows for a difference: each of fewer rows is more than 5 %."""
EXPENSIVE = 3.0
"""Ratio of input tokens per answer from which training pays off."""


@dataclass(frozen=True)
class Recommendation:
    """Recommended techniques with reasons."""

    techniques: tuple[str, ...]
    """Techniques in order of application; empty if the data needs a fix first."""
    tune: bool
    """True if the recommendation is to train weights."""
    reasons: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    commands: tuple[str, ...] = field(default=())
    sure: bool = True
    """True unless the measured differences may be chance."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


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
        return {
            "recommendation": self.recommendation.plain(),
            "techniques": [each.plain() for each in self.judgements],
            "facts": self.facts.plain(),
        }


def recommend(facts: AdviceFacts, command: str) -> Advice:
    """Judge every technique and recommend; ``command`` is the tuning command."""
    judgements = [judge(facts) for judge in TECHNIQUES]
    chosen = _choose(facts, judgements, command)
    chosen = replace(chosen, cautions=(*facts.cautions, *chosen.cautions))
    return Advice(facts, judgements, chosen)


def _choose(facts: AdviceFacts, judgements: list[Judgement], command: str) -> Recommendation:
    fits = {each.technique: each.fit for each in judgements}
    if facts.refused:
        return Recommendation(
            (), False, (f"the data checks reject the rows ({', '.join(facts.refused)})",),
            commands=("luthier inspect, then luthier clean",),
        )  # fmt: skip
    if facts.shape == "prompt_only":
        reason = "the rows are prompts without replies"
        return Recommendation(
            ("distillation",), True, (reason,), commands=(_distil(command, "MODEL", "MODEL"),)
        )
    if facts.shape in ("preference", "rated", "thumb"):
        reason = f"{facts.rows:,} rows have judged replies"
        cautions = ("compare the win rate on held-out pairs before and after",)
        return Recommendation(("preference tuning",), True, (reason,), cautions, (command,))
    if facts.shape == "text":
        is_recommended = fits["continued pre-training"] != "no"
        reason = next(j.reason for j in judgements if j.technique == "continued pre-training")
        if not is_recommended:
            return Recommendation(("RAG",), False, (reason, "use retrieval instead"))
        cautions = ("mix in general text against forgetting: --mix FILE=0.25",)
        return Recommendation(("continued pre-training",), True, (reason,), cautions, (command,))
    return _for_labelled(facts, fits, command)


def _for_labelled(facts: AdviceFacts, fits: Mapping[str, str], command: str) -> Recommendation:
    chosen: list[str] = []
    cautions: list[str] = []
    against, reasons, sure = _without_training(facts)
    if facts.evidence and not sure:
        reasons.append(
            f"the difference is not significant on {facts.evidence.held:,} held-out rows. Start with "
            "this technique, and measure on more rows (--validation FILE)"
        )
    best = facts.evidence and facts.evidence.best("zero-shot", "prompt engineering", "RAG")
    if facts.document_tokens and facts.wishes.goal == "knowledge":
        rag = facts.evidence and facts.evidence.best("RAG")
        if rag and best and rag.score < best.score:
            reasons.append(f"retrieval: {rag.result}; {best.name}: {best.result}")
        else:
            chosen.append("RAG")
            reasons.append("retrieval is better than tuning for facts (Ovadia et al. 2023)")
    if against:
        chosen = _by_score([*chosen, against], facts.evidence)
        spent = f" (about {facts.minutes:,.0f} min)" if facts.minutes else ""
        cautions.append(f"if the result is not sufficient, tune{spent}: {command}")
        if against == "simple baselines":
            cautions.append(_nearest_served(facts, command))
        return Recommendation(tuple(chosen), False, tuple(reasons), tuple(cautions), sure=sure)
    if facts.rows < FEW_ROWS and not facts.labels:
        cautions.append(f"{facts.rows:,} rows are few: the model learns form, not content")
    if best and best.score and facts.wishes.goal not in ("cost", "latency"):
        tuned = facts.evidence and facts.evidence.best("fine-tuning")
        if tuned and tuned.score < best.score and best.technique != "zero-shot":
            chosen.append(best.technique)
    chosen = _by_score([*chosen, "fine-tuning"], facts.evidence)
    if fits["distillation"] == "yes":
        chosen.append("distillation")
        reasons.append("the tuned model exceeds the size or time limit: distil a student")
    limit, minutes = facts.wishes.max_minutes, facts.minutes
    if limit is not None and minutes is not None and minutes > limit:
        cautions.append(
            f"training takes about {minutes:,.0f} min, and the limit is {limit:,.0f} min: plan with "
            "luthier estimate --within"
        )
    commands = [command]
    if facts.evidence and chosen[0] in ("prompt engineering", "RAG"):
        caution = "Compare with prompting after tuning: luthier compare FILE --tuned TUNED_MODEL"
        cautions.append(caution + " --documents TEXT" * ("RAG" in chosen))
    if "distillation" in chosen:
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
    plain = without_option(command, "--adaptation")
    if best and best.name == NAIVE_BAYES:
        nearest = "learns words and pairs of words"
        plain = f"{without_option(plain, '--base')} --base {WORD_READER}"
    else:
        nearest, plain = "trains only a new head", f"{plain} --adaptation feature_extraction"
    return f"luthier cannot serve this baseline. The most similar model {nearest}: {plain}"


def _without_training(facts: AdviceFacts) -> tuple[str, list[str], bool]:
    """Return the best technique without training if sufficient, the reasons, and the certainty."""
    evidence = facts.evidence
    best = evidence and evidence.best("zero-shot", "prompt engineering", "RAG", "simple baselines")
    tuned = evidence and evidence.best("fine-tuning")
    if not evidence or not best:
        return "", ["no technique without training was measured"], True
    enough = evidence.held >= MIN_HELD_OUT
    gain, sure = _gain(tuned, best, evidence.held) if tuned else (0.0, False)
    if best.score >= SURE and not (gain > 0 and sure):
        return best.technique, [f"{best.name}: {best.score:.1%} right without training"], enough
    if not tuned:
        return "", [f"best without training: {best.result}"], enough
    share = evidence.steps / max(1, evidence.all_steps)
    said = (
        f"after {evidence.steps:,} of {evidence.all_steps:,} steps: {tuned.result}; best without "
        f"training: {best.name}, {best.result}"
    )
    if gain > 0:
        return "", [said], sure and enough
    most = _most_reachable(evidence, tuned)
    if most is not None and most < best.score and differ(most, best.score, evidence.held):
        pace = f"all {evidence.all_steps:,} steps would reach at most {most:.0%} at this pace"
        return best.technique, [said, pace], sure and enough
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


def _most_reachable(evidence: Evidence, tuned: TechniqueResult) -> float | None:
    """Return the score after all steps at the pace of the trial: an upper bound, because curves
    flatten.

    Known for heads that start from the measured linear probe. Unknown for a trial of less than a
    tenth of the steps, which may be within the warm-up.
    """
    probe = next((each.score for each in evidence.tried if each.name == LINEAR_PROBE), None)
    share = evidence.steps / max(1, evidence.all_steps)
    if probe is None or share < MIN_TRIAL_SHARE:
        return None
    return min(1.0, tuned.score + max(0.0, tuned.score - probe) * (1 - share) / share)


def _gain(tuned: TechniqueResult, best: TechniqueResult, held: int) -> tuple[float, bool]:
    """Return the gain of the tuned result, and whether the gain exceeds the noise."""
    one, other, gain = tuned.row_scores, best.row_scores, tuned.score - best.score
    if one is None or other is None:
        return gain, differ(tuned.score, best.score, held)
    return gain, abs(gain) >= CHANCE * one.difference_error(other)  # paired by row


def without_option(command: str, option: str) -> str:
    """Return a command without an option and its value."""
    parts = shlex.split(command)
    if option in parts:
        position = parts.index(option)
        del parts[position : position + 2]
    return shlex.join(parts)


def _distil(command: str, teacher: str, student: str) -> str:
    data = command.removeprefix("luthier tune ").split(" --")[0]
    return f"luthier distil {data} --teacher {teacher} --student {student}"
