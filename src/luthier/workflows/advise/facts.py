"""Facts for advice: data, model, machine, wishes and measurements."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.data.rows import RowReader
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import MediaRow
from luthier.engine.metrics import Reporter
from luthier.errors import DataError, RecipeError, RefusedInput
from luthier.objectives.base import predicts
from luthier.types import Row
from luthier.workflows.advise.evidence import HELD_OUT_LABELS, HELD_OUT_ROWS, SEED, Evidence, gather

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.gate.report import Report
    from luthier.library.models import StoredModel
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
    objective: str
    labels: int
    """Number of classes; 0 without classes."""
    smallest_class: int
    learned_tokens: int
    prompt_tokens: int
    document_tokens: int
    weights: int
    trained_weights: int
    megabytes: float
    """Size of the base model in the working type."""
    writes: bool
    """True if the model generates answers; False if a head predicts labels."""
    refused: tuple[str, ...]
    """Rules of the data gate with errors."""
    warned: tuple[str, ...]
    """Rules of the data gate with warnings."""
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

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "rows": self.rows,
            "shape": self.shape,
            "objective": self.objective,
            "labels": self.labels,
            "smallest_class": self.smallest_class,
            "learned_tokens": self.learned_tokens,
            "document_tokens": self.document_tokens,
            "weights": self.weights,
            "trained_weights": self.trained_weights,
            "megabytes": round(self.megabytes, 1),
            "refused": list(self.refused),
            "warned": list(self.warned),
            "estimate": self.estimate.plain() if self.estimate else None,
            "evidence": self.evidence.plain() if self.evidence else None,
        }


MAX_HELD_OUT_SHARE = 0.3
"""Maximum share of held-out rows."""
MIN_ROWS = 5
"""Minimum training rows and minimum held-out rows."""
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
        RefusedInput: for an invalid recipe or a missing base model. Rejected data raises an error
            only
            without readable rows, because the rejection is part of the advice.
    """
    from luthier.engine.job import with_base
    from luthier.engine.machine import choose_machine
    from luthier.library import models as store
    from luthier.objectives.by_shape import objective_for

    _check_texts(recipe)
    recipe = with_base(recipe, reporter)
    base = store.find(recipe.base, reporter.stage)
    chat = recipe.data.format(base.chat)
    report = _inspect(recipe, reporter)
    refused = _rules(report, "error")
    rows = _rows(recipe, refused)
    shape = rows[0].shape
    if recipe.objective is None and shape != "prompt_only":
        recipe = recipe.model_copy(update={"objective": objective_for(rows[0], chat)})
    weights, trained = _count_weights(recipe, base, rows, chat)
    machine = choose_machine(recipe.training.precision, recipe.training.threads)
    estimate: Estimate | None = None
    evidence: Evidence | None = None
    if not refused and shape != "prompt_only":
        estimate = _estimate(recipe, reporter)
        if shape in TASK_SHAPES:
            evidence = _try_techniques(recipe, rows, documents, seconds, reporter)
    learning: Any = report.summaries.get("learning", {})
    tokens = learning.get("splits", {}).get("train", {})
    learned = int(tokens.get("learned_tokens", 0))
    labels = Counter(name for row in rows if isinstance(row, Labelled) for name in row.classes())
    return AdviceFacts(
        wishes=wishes,
        rows=len(rows),
        shape=shape,
        objective=recipe.objective.method if recipe.objective else "",
        labels=len(labels),
        smallest_class=min(labels.values(), default=0),
        learned_tokens=learned,
        prompt_tokens=int(tokens.get("tokens", 0)) - learned,
        document_tokens=sum(len(chat.tokenizer.encode(text)) for text in documents),
        weights=weights,
        trained_weights=trained,
        megabytes=weights * machine.dtype.itemsize / 1e6,
        writes=not predicts(recipe.objective),
        refused=tuple(refused),
        warned=tuple(_rules(report, "warning")),
        cautions=tuple(_cautions(report)),
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


def _rules(report: Report, severity: str) -> list[str]:
    findings = report.findings
    return [rule.id for rule in findings.rules() if findings.severity(rule) == severity]


def _cautions(report: Report) -> list[str]:
    findings = report.findings
    first = [
        findings.examples[r.id][0]
        for r in findings.rules()
        if findings.severity(r) == "warning" and r.whole
    ]
    return [f"{each.message} {each.closest_fix}" for each in first]


def _rows(recipe: Recipe, refused: Sequence[str]) -> list[Row]:
    try:
        rows = list(RowReader(recipe.data.train, recipe.data.columns))
    except DataError:
        rows = []
    if not rows:
        raise RecipeError(
            f"{recipe.data.train} has no usable row ({', '.join(refused) or 'the file is empty'}). "
            "Run `luthier inspect` for details."
        )
    return rows


def _count_weights(
    recipe: Recipe, base: StoredModel, rows: Sequence[Row], chat: ChatFormat
) -> tuple[int, int]:
    """Return the weights of the base model, and the trained weights with the adaptation."""
    import torch

    from luthier.engine.memory import trained_numbers
    from luthier.models.networks.heads import Head

    head = base.objective.head()
    if recipe.objective is not None:
        try:
            head = recipe.objective.fit(rows, chat).head()
        except RefusedInput:
            head = Head(base.objective.task.head)
    model = base.network.sketch(head)
    weights = sum(weight.numel() for weight in model.parameters())
    with torch.device("meta"):
        recipe.adaptation.attach(model)
    return weights, trained_numbers(model)


def _estimate(recipe: Recipe, reporter: Reporter) -> Estimate | None:
    from luthier.workflows.estimate.estimate import estimate

    try:
        return estimate(recipe, reporter)
    except RefusedInput as error:
        reporter.note(f"no estimate: {error}")
        return None


def _try_techniques(
    recipe: Recipe,
    rows: Sequence[Row],
    documents: Sequence[str],
    seconds: float,
    reporter: Reporter,
) -> Evidence | None:
    """Split the rows and measure the techniques on the held-out rows."""
    train, held = _split_rows(recipe, rows)
    if len(held) < MIN_ROWS or len(train) < MIN_ROWS:
        reporter.note(f"no technique measured: fewer than {MIN_ROWS} training or held-out rows")
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines = [json.dumps(row.record(), ensure_ascii=False) for row in train]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = recipe.data.model_copy(
            update={
                "train": str(file), "validation": None, "validation_share": 0.0,
                "test_share": None, "columns": None,
            }
        )  # fmt: skip
        trial_recipe = recipe.model_copy(update={"data": data, "name": None})
        renaming = SubsetReporter(reporter, str(file), recipe.data.train)
        try:
            return gather(trial_recipe, train, held, documents, seconds, renaming)
        except DataError as error:  # such as fewer rows than a run needs
            reporter.note(f"no technique measured: {renaming.rename(str(error))}")
            return None


class SubsetReporter(Reporter):
    """A reporter that replaces the path of a temporary file by the name of the data.

    Settings are not reported, because the estimate has reported the settings of the whole run.
    """

    def __init__(self, reporter: Reporter, file: str, source: str) -> None:
        self.reporter, self.file, self.source = reporter, file, source

    def rename(self, text: str) -> str:
        """Return ``text`` with the name of the data."""
        return text.replace(self.file, self.source)

    def stage(self, text: str) -> None:
        """Report a stage."""
        self.reporter.stage(self.rename(text))

    def note(self, text: str) -> None:
        """Report a note."""
        self.reporter.note(self.rename(text))

    def progress(self, done: int, total: int, what: str) -> None:
        """Report progress."""
        self.reporter.progress(done, total, what)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Report metrics."""
        self.reporter.metrics(line, steps)


def _split_rows(recipe: Recipe, rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return training rows and held-out rows without near-duplicates across the split."""
    from luthier.data.rows import load_rows
    from luthier.data.splitting import split_rows, strata_of
    from luthier.gate.row_keys import group_related

    count = HELD_OUT_LABELS if predicts(recipe.objective) else HELD_OUT_ROWS
    if recipe.data.validation:
        held = load_rows(recipe.data.validation, recipe.data.columns, accepts_own_keys=True)
        if len(held) > count:  # stratified, because files are often sorted by label
            each_N = np.arange(len(held))
            _, held_N = split_rows(strata_of(held), each_N, [count / len(held)], SEED)
            held = [held[i] for i in held_N]
        group_N = group_related([*held, *rows])
        held_groups = {*group_N[: len(held)].tolist()}
        groups = group_N[len(held) :].tolist()
        return [
            row for row, group in zip(rows, groups, strict=True) if group not in held_groups
        ], held
    share = min(MAX_HELD_OUT_SHARE, count / len(rows))
    train_N, held_N = split_rows(strata_of(rows), group_related(rows), [share], SEED)
    return [rows[i] for i in train_N], [rows[i] for i in held_N][: 2 * count]
