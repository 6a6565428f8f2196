"""Prompts of a study: the base and the tuned model with instructions and examples, as in
:mod:`luthier.workflows.compare`, each as a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.rows import load_rows
from luthier.errors import RecipeError
from luthier.files import read_text
from luthier.types import Row
from luthier.workflows.advise.evidence import ROOM, divide_rows
from luthier.workflows.compare import compare
from luthier.workflows.prompting import Records, own_prompts, questions_of, records_of

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.metrics import Reporter
    from luthier.library.models import StoredModel
    from luthier.workflows.study.cells import CellResult

_OF_TRAINING = (
    "seconds", "processor_seconds", "peak_memory_bytes", "trained_weights", "saved_bytes",
    "training_rows", "steps", "batch_size", "warmup_ratio", "forgotten", "earlier",
)  # fmt: skip
"""Measurements of a training, which the base model does not need."""


def check_prompts(job: TrainingJob, file: str) -> None:
    """Reject a file of instructions, or rows, that :func:`with_prompts` cannot use.

    Raises:
        RecipeError: for an objective without replies, an empty file, or an unknown column.
    """
    if not job.data.objective.task.writes:
        raise RecipeError("`--preset prompts` needs an objective for text generation.")
    if not (text := read_text(Path(file)).strip()):
        raise RecipeError(f"{file} has no text. Write instructions for the model.")
    _, held = _rows(job)
    own_prompts({Path(file).name: text}, held, questions_of(held), _records(job))


def with_prompts(
    outcome: CellResult,
    job: TrainingJob,
    tuned: StoredModel,
    base: StoredModel,
    file: str,
    reporter: Reporter,
) -> CellResult:
    """Return ``outcome`` with the scores of the replies, for each prompt and both models."""
    train, held = _rows(job)
    encode = job.chat.tokenizer.encode
    found = compare(
        held, base, [tuned], train,
        max_tokens=max(len(encode(each.answer)) for each in questions_of(held)) + ROOM,
        prompts={Path(file).name: read_text(Path(file)).strip()},
        records=_records(job),
        on_progress=lambda done, total: reporter.progress(done, total, "replies"),
    )  # fmt: skip
    alone = next(each for each in found.contenders if each.name == base.id)
    common = {
        "measure": found.measure, "is_share": found.best.score.is_share, "start": alone.score.value
    }  # fmt: skip
    contenders: dict[str, dict[str, Any]] = {}
    for each in found.contenders:
        name = each.name.replace(tuned.id, "tuned").replace(base.id, "base")
        free = [n for n in _OF_TRAINING if getattr(outcome, n) is not None and not each.is_tuned]
        contenders[name] = {
            **common,
            **dict.fromkeys(free, 0),
            "value": each.score.value,
            "error": each.score.error,
            "rows": each.score.plain(),
            "milliseconds": 1000 * each.seconds,
            "prompt_tokens": each.prompt_tokens,
        }
    return replace(outcome, contenders=contenders)


def _records(job: TrainingJob) -> Records:
    return records_of(str(job.recipe.data.validation or job.recipe.data.train))


def _rows(job: TrainingJob) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return training and held-out rows."""
    data = job.recipe.data
    rows = load_rows(data.train, data.columns)
    lines = job.data.held_out.get("validation", {})
    return divide_rows(data, rows, lines, len(job.data.validation) + len(rows))
