"""Judgements of techniques from the facts, and the resulting recommendation.

The thresholds are published rules of thumb. Measurements on held-out rows have priority. The
recommendation may be not to tune.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from luthier.evaluation.baselines import KEPT_BY, LINEAR_PROBE, TFIDF, method_name
from luthier.evaluation.significance import CHANCE, differ
from luthier.pages import Displayed, Table
from luthier.workflows.advise.evidence import Evidence
from luthier.workflows.advise.facts import AdviceFacts
from luthier.workflows.contenders import Contender
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


def _corpus(facts: AdviceFacts) -> int:
    return facts.document_tokens + (facts.learned_tokens if facts.shape == "text" else 0)


def _wins(facts: AdviceFacts, *techniques: Technique) -> bool:
    best = facts.evidence.best(*techniques) if facts.evidence else None
    return best is not None and best.score.value >= SURE


def _too_large_or_slow(facts: AdviceFacts) -> bool:
    tuned = facts.evidence.best("fine-tuning") if facts.evidence else None
    seconds, megabytes = facts.wishes.max_seconds, facts.wishes.max_megabytes
    too_slow = tuned is not None and seconds is not None and tuned.seconds > seconds
    return too_slow or (megabytes is not None and megabytes < facts.megabytes)


# fmt: off
RULES: tuple[tuple[str, Callable[[AdviceFacts], bool], Fit, str], ...] = (
    ("prompt engineering", lambda f: not f.writes, "no", "a head predicts, and reads no prompt"),
    ("prompt engineering", lambda f: _wins(f, "zero-shot", "prompt engineering"), "yes",
     "the measured result leaves nothing to gain"),
    ("prompt engineering", lambda f: True, "perhaps", "no training, but examples in every prompt"),
    ("simple baselines", lambda f: not f.writes and f.shape == "question", "no",
     "no simple baseline finds an answer in a context"),
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
     "the smallest class has {smallest_class} rows; 8 are needed"),
    ("fine-tuning", lambda f: f.rows < (PER_CLASS * f.labels or FEW_ROWS), "perhaps",
     "{rows:,} rows are few; 50 to 1,000 are usual"),
    ("fine-tuning", lambda f: True, "yes", "{rows:,} rows are enough"),
    ("continued pre-training", lambda f: _corpus(f) >= 10_000_000, "yes",
     "enough text to learn a field or a language"),
    ("continued pre-training", lambda f: _corpus(f) >= 100_000, "perhaps",
     "enough to learn words and style of a field, not its facts"),
    ("continued pre-training", lambda f: True, "no",
     "{corpus:,} tokens of raw text are too few; 100,000 are needed"),
    ("distillation", lambda f: f.shape == "prompt_only", "yes",
     "a teacher can generate the missing replies to the prompts"),
    ("distillation", _too_large_or_slow, "yes",
     "the base model exceeds the size or time limit: tune the model, then distil a student"),
    ("distillation", lambda f: f.wishes.goal in ("latency", "cost"), "perhaps",
     "a smaller student is faster; measure the quality"),
    ("distillation", lambda f: True, "no", "no goal requires a smaller model"),
    ("preference tuning", lambda f: f.shape in JUDGED and f.rows >= PAIRS, "yes",
     "enough judged replies; tune on good replies first, if available"),
    ("preference tuning", lambda f: f.shape in JUDGED, "perhaps",
     "{rows:,} judged replies are few; 500 are needed"),
    ("preference tuning", lambda f: True, "no", "no judged replies"),
)
"""Technique, condition on the facts, fit and reason. The first row that holds judges a technique."""
# fmt: on


def _judge(facts: AdviceFacts) -> dict[str, Judgement]:
    values = vars(facts) | {"corpus": _corpus(facts), "refused": ", ".join(facts.refused[:3])}
    judged = dict[str, Judgement]()
    for technique, holds, fit, reason in RULES:
        if technique not in judged and holds(facts):
            judged[technique] = Judgement(technique, fit, reason.format_map(values))
    return judged


def result_of(contender: Contender) -> str:
    """Return name and score of a measured technique."""
    return f"{contender.name}: {contender.score.value:.1%} right"


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
    """Advice on techniques, with reasons."""

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

    def tables(self) -> Sequence[Table]:
        """Return the trials, and how each technique fits the rows."""
        tables = []
        if (evidence := self.facts.evidence) is not None:
            columns = dict.fromkeys(("score", "prompt tokens", "s per reply"), "number")
            rows = [
                [
                    f"{each.technique}: {each.name}", f"{each.score.value:.0%}",
                    "" if each.prompt_tokens is None else f"{each.prompt_tokens:,.0f}",
                    f"{each.seconds:.2f}",
                ]
                for each in evidence.tried
            ]  # fmt: skip
            caption = f"Trials on {evidence.held} held-out rows"
            tables.append(Table.of(caption, {"": "name"} | columns, rows))
        rows = [[each.technique, each.fit, each.reason] for each in self.judgements]
        columns = {"": "name", "fits": "text", "reason": "text"}
        return [
            *tables,
            Table.of("Techniques", columns, rows, strong=self.recommendation.techniques),
        ]

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        risks = {"overfitting": overfitting(self.facts), "forgetting": forgetting(self.facts)}
        return {
            "recommendation": asdict(self.recommendation),
            "techniques": [asdict(each) for each in self.judgements],
            "facts": {**self.facts.plain(), **risks},
        }


_SHAPE_TECHNIQUES = {
    "prompt_only": "distillation",
    "text": "continued pre-training",
} | dict.fromkeys(JUDGED, "preference tuning")
"""Technique of rows without a right answer, by shape."""
COMMANDS = {
    "zero-shot": "luthier chat BASE_MODEL",
    "prompt engineering": "luthier chat BASE_MODEL --system INSTRUCTIONS",
    "RAG": "luthier index add DOCUMENTS --name NAME",
    "simple baselines": "{keep}",
    "continued pre-training": "{tune}",
    "preference tuning": "{tune}",
    "fine-tuning": "{tune}",
    "distillation": "luthier distil {data} --teacher {teacher} --student SMALLER_MODEL",
}
"""Command of each technique."""
CAUTIONS = {
    "preference tuning": ("compare the win rate on held-out pairs before and after",),
    "continued pre-training": ("mix in general text against forgetting: --mix FILE=0.25",),
}


def recommend(facts: AdviceFacts, command: str) -> Advice:
    """Judge every technique and recommend; ``command`` is the tuning command."""
    judged = _judge(facts)
    chosen = _choose(facts, judged, command)
    data = command.removeprefix("luthier tune ").split(" --")[0]
    teacher = "MODEL" if facts.shape == "prompt_only" else "TUNED_MODEL"
    baseline = facts.evidence and facts.evidence.best("simple baselines")
    keep = _keep(command, baseline.name) if baseline else ""
    values = {"tune": command, "data": data, "teacher": teacher, "keep": keep}
    commands = tuple(COMMANDS[each].format_map(values) for each in chosen.techniques)
    if facts.refused:
        commands = (f"luthier inspect {data}", f"luthier clean {data} CLEANED.jsonl")
    chosen = replace(chosen, cautions=(*facts.cautions, *chosen.cautions), commands=commands)
    return Advice(facts, [*judged.values()], chosen)


def _choose(facts: AdviceFacts, judged: Mapping[str, Judgement], command: str) -> Recommendation:
    technique = _SHAPE_TECHNIQUES.get(facts.shape)
    if facts.refused:
        return Recommendation((), False, (judged["fine-tuning"].reason,))
    if technique is None:
        return _for_labelled(facts, judged["distillation"].fit == "yes", command)
    reason = judged[technique].reason
    if facts.shape == "text" and judged[technique].fit == "no":
        return Recommendation(("RAG",), False, (reason, "use retrieval instead"))
    return Recommendation((technique,), True, (reason,), CAUTIONS.get(technique, ()))


def _for_labelled(facts: AdviceFacts, distils: bool, command: str) -> Recommendation:
    evidence = facts.evidence or Evidence(0, [])
    minutes, limit = facts.minutes, facts.wishes.max_minutes
    chosen, cautions = list[str](), list[str]()
    against, reasons, sure = _without_training(facts, evidence)
    if evidence.tried and not sure:
        reasons.append(
            f"the difference is not significant on {evidence.held:,} held-out rows. Start with "
            "this technique, and measure on more rows (--validation FILE)"
        )
    best, rag = evidence.best(*UNTRAINED), evidence.best("RAG")
    if facts.document_tokens and facts.wishes.goal == "knowledge":
        if rag and best and rag.score.value < best.score.value:
            reasons.append(f"{result_of(rag)}; {result_of(best)}")
        else:
            chosen.append("RAG")
            reasons.append("retrieval is better than tuning for facts (Ovadia et al. 2023)")
    if against:
        spent = f" (about {minutes:,.0f} min)" if minutes else ""
        cautions.append(f"if the result is not sufficient, tune{spent}: {command}")
        chosen = _by_score([*chosen, against], evidence)
        return Recommendation(tuple(chosen), False, tuple(reasons), tuple(cautions), sure=sure)
    if facts.rows < FEW_ROWS and not facts.labels:
        cautions.append(f"{facts.rows:,} rows are few: the model learns form, not content")
    # A prompt that beats the trial is usable at once, while the tuning runs.
    tuned = evidence.best("fine-tuning")
    if best and tuned and best.score.value > tuned.score.value and best.technique != "zero-shot":
        chosen += [] if facts.wishes.goal in ("cost", "latency") else [best.technique]
    chosen = _by_score([*chosen, "fine-tuning"], evidence)
    if limit is not None and minutes is not None and minutes > limit:
        cautions.append(
            f"training takes about {minutes:,.0f} min, and the limit is {limit:,.0f} min: plan with "
            "luthier estimate --within"
        )
    if evidence.tried and chosen[0] != "fine-tuning":
        caution = "Compare with prompting after tuning: luthier compare FILE --tuned TUNED_MODEL"
        cautions.append(caution + " --documents TEXT" * ("RAG" in chosen))
    if distils:
        chosen.append("distillation")
        reasons.append("the tuned model exceeds the size or time limit: distil a student")
    return Recommendation(tuple(chosen), True, tuple(reasons), tuple(cautions), sure=sure)


def _by_score(techniques: Sequence[str], evidence: Evidence) -> list[str]:
    """Return the techniques without repetition, the best measured first, then the unmeasured."""
    scores = {
        name: found.score.value for name in techniques if (found := evidence.best(name)) is not None
    }
    return sorted(dict.fromkeys(techniques), key=lambda name: -scores.get(name, -1.0))


def _without_training(facts: AdviceFacts, evidence: Evidence) -> tuple[str, list[str], bool]:
    """Return the best technique without training if sufficient, the reasons, and the certainty."""
    best = evidence.best(*UNTRAINED, "simple baselines")
    tuned, held = evidence.best("fine-tuning"), evidence.held
    if not best:
        return "", ["no technique without training was measured"], True
    enough = held >= MIN_HELD_OUT
    gain, sure = _gain(tuned, best) if tuned else (0.0, False)
    # A better tuned model is still worth it if the gain is no chance.
    if best.score.value >= SURE and not (gain > 0 and sure):
        return best.technique, [f"{result_of(best)} without training"], enough
    if not tuned:
        return "", [f"best without training: {result_of(best)}"], enough
    reasons = [
        f"{result_of(tuned)}, of {evidence.all_steps:,} steps in all; best without training: "
        f"{result_of(best)}"
    ]
    if gain > 0:
        return "", reasons, sure and enough
    share = evidence.steps / max(1, evidence.all_steps)
    most = _most_reachable(evidence, tuned, share)
    # Long prompts cost with every reply, and tuning costs once.
    prompts = best.prompt_tokens or 0.0, tuned.prompt_tokens or 0.0
    dear = prompts[0] > EXPENSIVE * max(1.0, prompts[1])
    if most is not None and most < best.score.value and differ(most, best.score.value, held):
        reasons.append(f"all steps would reach at most {most:.0%} at this pace")
    elif dear and (share < 0.5 or facts.wishes.goal in ("cost", "latency")):
        reasons.append(
            f"{best.name} needs {prompts[0]:,.0f} prompt tokens per reply, the tuned model "
            f"{prompts[1]:,.0f}"
        )
        return "", reasons, enough
    elif share < 0.5:
        return "", [*reasons, "the trial was too short; increase --trial"], enough
    return best.technique, reasons, sure and enough


def _most_reachable(evidence: Evidence, tuned: Contender, share: float) -> float | None:
    """Return the score after all steps at the pace of the trial: an upper bound, because curves
    flatten.

    Known for heads that start from the measured linear probe. Unknown for a trial of less than a
    tenth of the steps, which may be within the warm-up.
    """
    probe = next(
        (each.score.value for each in evidence.tried if method_name(each.name) == LINEAR_PROBE),
        None,
    )
    if probe is None or share < MIN_TRIAL_SHARE:
        return None
    score = tuned.score.value
    return min(1.0, score + max(0.0, score - probe) * (1 - share) / share)


def _gain(tuned: Contender, best: Contender) -> tuple[float, bool]:
    """Return the gain of the tuned result, and whether the gain exceeds the noise, paired by row."""
    gain = tuned.score.value - best.score.value
    return gain, abs(gain) >= CHANCE * tuned.score.difference_error(best.score)


def _keep(command: str, baseline: str) -> str:
    """Return the command for storing ``baseline`` or, if impossible, a similar baseline."""
    parts = shlex.split(command)
    similar = KEPT_BY[TFIDF if "words" in baseline else LINEAR_PROBE]
    kept = shlex.split(KEPT_BY.get(method_name(baseline), similar))
    for option in ("--adaptation", *kept[::2]):
        if option != "--set" and option in parts:
            position = parts.index(option)
            del parts[position : position + 2]
    return shlex.join([*parts, *kept])
