"""What a fine-tuning job tells of itself: events, checkpoints, and the file with its results."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.api.openai.methods import setting_name
from luthier.api.openai.requests import seconds
from luthier.setting_names import with_setting_names
from luthier.store.jobs import Job, JobEvent

_LEVELS = {"warning": "warn", "error": "error"}
_COLUMNS = ("step", "train_loss", "valid_loss")


def event_id(event: JobEvent) -> str:
    """Under which a list goes on."""
    return f"ftevent-{event.seq}"


def position_of(identifier: str) -> int | None:
    """Where an event stands; ``None`` for what is no id of one."""
    text = identifier.removeprefix("ftevent-")
    known = identifier.startswith("ftevent-") and text.isascii() and text.isdigit()
    return int(text) if known and len(text) < 19 else None


def shown_event(event: JobEvent) -> dict[str, Any]:
    """An event as clients see it.

    What is measured before the first step has no training loss, and clients read that of every event
    with metrics: it is told as a message.
    """
    metrics = event.kind == "metrics" and "train_loss" in event.data
    return {
        "id": event_id(event),
        "object": "fine_tuning.job.event",
        "created_at": seconds(event.at),
        "level": _LEVELS.get(event.kind, "info"),
        "message": with_setting_names(event.message, setting_name),
        "type": "metrics" if metrics else "message",
        "data": dict(event.data) if metrics else None,
    }


def checkpoints(job: Job, metrics: Sequence[JobEvent], model: str) -> list[dict[str, Any]]:
    """The end of each epoch, the newest first, of a job that made ``model``.

    The weights of the last one are the model's own. Those of earlier epochs are not kept, and their
    names answer to nothing; what was measured there is shown.
    """
    steps = _steps(metrics)
    total = max(steps, default=0)
    epochs = _epochs(job)
    ends = sorted({round(total * number / epochs) for number in range(1, epochs + 1)} - {0})
    found = []
    for end in reversed(ends):
        name = model if end == total else f"{model}:ckpt-step-{end}"
        at = max((step for step in steps if step <= end), default=0)
        found.append(
            {
                "id": f"ftckpt-{job.id}-{end}",
                "object": "fine_tuning.job.checkpoint",
                "created_at": seconds(_moment(metrics, at) or job.modified),
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job.name,
                "step_number": end,
                "metrics": {"step": end, **_named(steps.get(at, {}))},
            }
        )
    return found


def result_file(metrics: Sequence[JobEvent]) -> Iterator[bytes]:
    """CSV: ``step,train_loss,valid_loss``, and what else the run recorded; a step is one line."""
    steps = _steps(metrics)
    further = sorted(
        {key for values in steps.values() for key in values if key not in (*_COLUMNS, "epoch")}
    )
    columns = (*_COLUMNS, *further)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for step, values in sorted(steps.items()):
        writer.writerow({**values, "step": step})
    yield text.getvalue().encode()


def _steps(metrics: Sequence[JobEvent]) -> dict[int, dict[str, Any]]:
    """What was measured, by step; of a step that ran again after a crash, the last time."""
    steps: dict[int, dict[str, Any]] = {}
    for event in metrics:
        step = event.data.get("step")
        if isinstance(step, int):
            steps.setdefault(step, {}).update(event.data)
    return steps


def _epochs(job: Job) -> int:
    """Whole passes over the rows."""
    asked = job.recipe.get("training", {}).get("epochs")
    epochs = job.details.get("chosen", {}).get("training.epochs", asked)
    return max(1, round(float(epochs or 1)))


def _moment(metrics: Sequence[JobEvent], step: int) -> Any:
    return next((each.at for each in reversed(metrics) if each.data.get("step") == step), None)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in ("train_loss", "valid_loss")}
