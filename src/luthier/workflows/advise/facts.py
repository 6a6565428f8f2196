"""Facts for advice: data, model, machine, wishes and measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.data.rows import RowReader
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import MediaRow
from luthier.errors import DataError, RecipeError, RefusedInput
from luthier.objectives.base import predicts
from luthier.types import Row
from luthier.workflows.advise.evidence import Evidence, gather

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.gate.report import Report
    from luthier.recipe import Recipe
    from luthier.workflows.estimate.estimate import Estimate


Goal = Literal["quality", "cost", "latency", "knowledge", "style"]
"""Goal of the user; ``knowledge`` means facts from documents."""


@dataclass(frozen=True)
class Wishes:
    """Goal and limits of the user; ``None`` is no limit."""

    goal: Goal = "quality"
    max_minutes: float | None = None
    """Maximum minutes of training."""
    max_seconds: float | None = None
    """Maximum seconds per answer."""
    max_megabytes: float | None = None
    """Maximum size of the model in megabytes."""


@dataclass(frozen=True)
class AdviceFacts:
    """Facts known before the advice."""

    wishes: Wishes
    rows: int
    shape: str
    """Shape of the rows, as objectives name shapes."""
    labels: int
    """Number of classes; 0 without classes."""
    smallest_class: int
    learned_tokens: int
    document_tokens: int
    weights: int
    trained_weights: int
    megabytes: float
    """Size of the base model in the working type."""
    writes: bool
    """True if the model generates answers; False if a head predicts labels."""
    refused: tuple[str, ...]
    """Rules of the data gate with errors."""
    cautions: tuple[str, ...]
    """Warnings about the data as a whole."""
    estimate: Estimate | None
    """Estimate of the recipe; ``None`` if the estimate failed."""
    evidence: Evidence | None

    @property
    def epochs(self) -> float:
        """Passes of the recipe over the rows."""
        return self.estimate.epochs if self.estimate else 1.0

    @property
    def minutes(self) -> float | None:
        """Estimated minutes of training."""
        return self.estimate.seconds.value / 60 if self.estimate else None

    @property
    def cost(self) -> str:
        """Estimated minutes and memory of training, as text."""
        if self.estimate is None:
            return "not estimated"
        low, high = self.estimate.seconds.low / 60, self.estimate.seconds.high / 60
        texts = dict.fromkeys((f"{low:,.0f}", f"{high:,.0f}"))
        minutes = "less than 1" if high < 1 else " to ".join(texts)
        return f"{minutes} min, {self.estimate.memory.value / 1e9:.1f} GB of memory"

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return vars(self) | {
            "wishes": asdict(self.wishes),
            "estimate": self.estimate.plain() if self.estimate else None,
            "evidence": self.evidence.plain() if self.evidence else None,
        }


TASK_SHAPES = frozenset({"prompt", "messages", "label"})
"""Shapes of rows with one right answer."""


def collect(
    recipe: Recipe,
    documents: Sequence[str],
    wishes: Wishes,
    seconds: float,
    reporter: Reporter,
) -> AdviceFacts:
    """Collect the facts for advice; the trial training takes about ``seconds``.

    Raises:
        RefusedInput: for an invalid recipe, a missing base model, or data without a readable row.
            Other rejected data is part of the advice.
    """
    import torch

    from luthier.engine.job import with_base, with_base_defaults
    from luthier.engine.machine import choose_machine
    from luthier.engine.memory import trained_numbers
    from luthier.engine.metrics import Reporter
    from luthier.library import models as store
    from luthier.objectives.by_shape import objective_for
    from luthier.workflows.estimate.estimate import estimate as estimate_run

    _check_texts(recipe)
    recipe = with_base(recipe, reporter)
    base = store.find(recipe.base, reporter.stage)
    chat = recipe.data.format(base.chat)
    report = _inspect(recipe, reporter)
    findings = report.findings
    severities = {rule: findings.severity(rule) for rule in findings.rules()}
    refused = tuple(rule.id for rule, severity in severities.items() if severity == "error")
    warned = [rule for rule, found in severities.items() if found == "warning" and rule.whole]
    first = [findings.examples[rule.id][0] for rule in warned]
    rows = list[Row]()
    with suppress(DataError):  # in the report, too
        rows = list(RowReader(recipe.data.train, recipe.data.columns))
    if not rows:
        raise RecipeError(
            f"{recipe.data.train} has no usable row ({', '.join(refused) or 'the file is empty'}). "
            "Run `luthier inspect` for details."
        )
    shape = rows[0].shape
    # Prompts alone have no objective: a teacher must reply first.
    if recipe.objective is None and shape != "prompt_only":
        recipe = recipe.model_copy(update={"objective": objective_for(rows[0], chat)})
    recipe = with_base_defaults(recipe, base, chat, Reporter())
    model = base.network.sketch(base.objective.head())
    weights = sum(weight.numel() for weight in model.parameters())
    with torch.device("meta"):
        recipe.adaptation.attach(model)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    estimate: Estimate | None = None
    evidence: Evidence | None = None
    if not refused and shape != "prompt_only":
        # Advice without times is better than none.
        try:
            estimate = estimate_run(recipe, reporter)
        except RefusedInput as error:
            reporter.note(f"no estimate: {error}")
        if shape in TASK_SHAPES:
            evidence = gather(recipe, rows, documents, seconds, reporter)
    learning: Any = report.summaries.get("learning", {})
    labels = Counter(name for row in rows if isinstance(row, Labelled) for name in row.classes())
    return AdviceFacts(
        wishes=wishes,
        rows=len(rows),
        shape=shape,
        labels=len(labels),
        smallest_class=min(labels.values(), default=0),
        learned_tokens=int(learning.get("splits", {}).get("train", {}).get("learned_tokens", 0)),
        document_tokens=sum(len(chat.tokenizer.encode(text)) for text in documents),
        weights=weights,
        trained_weights=trained_numbers(model),
        megabytes=weights * machine.dtype.itemsize / 1e6,
        writes=not predicts(recipe.objective),
        refused=refused,
        cautions=tuple(f"{each.message} {each.closest_fix}" for each in first),
        estimate=estimate,
        evidence=evidence,
    )


def _check_texts(recipe: Recipe) -> None:
    """Reject rows of images, audio and time series, because prompts and search do not apply."""
    source, first = recipe.data.train, None
    with suppress(RefusedInput):  # the gate reports invalid rows later
        first = next(iter(RowReader(source, recipe.data.columns)), None)
    if isinstance(first, MediaRow):
        raise RecipeError(
            f"`advise` compares tuning with prompts and search for text, and {source} has "
            f"{first.noun}. Use `luthier inspect {source}` and `luthier estimate {source}`."
        )


def _inspect(recipe: Recipe, reporter: Reporter) -> Report:
    from luthier.gate import inspect as gate

    reporter.stage("Inspecting the data")
    objective = recipe.objective.model_dump(mode="json") if recipe.objective else None
    data = recipe.data
    return gate.inspect(
        gate.InspectionRequest(
            data.train, data.validation, columns=data.columns, base=recipe.base,
            objective=objective, severity=data.severity or {},
        )
    )  # fmt: skip
