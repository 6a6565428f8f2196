"""A customization job as OpenAI's clients see it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from luthier.api.openai.methods import setting_name
from luthier.api.openai.requests import seconds
from luthier.setting_names import with_setting_names
from luthier.store import jobs
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.jobs import Job
from luthier.store.uploaded_files import file_address

STATUSES = {
    jobs.QUEUED: "queued",
    jobs.RUNNING: "running",
    jobs.PAUSED: "paused",
    # Its worker still has it: who waits for the end waits until it has let go.
    jobs.STOPPING: "running",
    jobs.STOPPED: "cancelled",
    jobs.COMPLETED: "succeeded",
    jobs.FAILED: "failed",
}
_RULE = re.compile(r"\[[a-z_]+\.[a-z_]+\]")
"""What the data gate names in each of its refusals."""


def organization(account: str) -> str:
    """The account, as OpenAI writes organizations."""
    return f"org-{account}"


def shown(
    job: Job, model: CustomModel | None = None, results: Sequence[str] = ()
) -> dict[str, Any]:
    """The object of the API."""
    status = STATUSES[job.state]
    asked = job.request
    resolved = _resolved(job, _given(asked))
    made = model.openai_id if model is not None and model.status == ACTIVE else None
    return {
        "id": job.name,
        "object": "fine_tuning.job",
        "created_at": seconds(job.created),
        "finished_at": seconds(job.ended),
        "model": asked.get("model"),
        "fine_tuned_model": made if status == "succeeded" else None,
        "organization_id": organization(job.account),
        "status": status,
        "error": _error(job),
        "hyperparameters": {
            name: resolved.get(name, "auto")
            for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
        },
        "method": _method(asked, resolved),
        "training_file": asked.get("training_file"),
        "validation_file": asked.get("validation_file"),
        "result_files": list(results),
        "trained_tokens": (job.result or {}).get("tokens"),
        "seed": asked.get("seed"),
        "metadata": asked.get("metadata") or {},
        "integrations": [],
        "estimated_finish": _estimated_finish(job),
    }


def _kind(asked: dict[str, Any]) -> str:
    return str(asked.get("method", {}).get("type", "supervised"))


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters as they were sent."""
    arm = asked.get("method", {}).get(_kind(asked), {})
    found: dict[str, Any] = arm.get("hyperparameters") or asked.get("hyperparameters") or {}
    return found


def _resolved(job: Job, given: dict[str, Any]) -> dict[str, Any]:
    """The same with what was chosen for the data and the model, once it has been."""
    chosen = job.details.get("chosen")
    found: dict[str, Any] = {}
    if chosen is not None:
        training = job.recipe.get("training", {})
        epochs = chosen.get("training.epochs", training.get("epochs"))
        objective = job.recipe.get("objective") or {}
        found = {
            "n_epochs": None if epochs is None else max(1, round(epochs)),
            "batch_size": chosen.get("training.batch_size", training.get("batch_size")),
            "learning_rate_multiplier": training.get("rate_factor", 1.0),
            "beta": objective.get("beta"),
            "compute_multiplier": objective.get("num_generations", 8) / 8,
            "eval_interval": chosen.get("training.evaluate_every", training.get("evaluate_every")),
        }
    known = {name: value for name, value in found.items() if value is not None}
    asked = {name: value for name, value in given.items() if value != "auto"}
    return {**dict.fromkeys(given, "auto"), **known, **asked}


def _method(asked: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(asked)
    arm = asked.get("method", {}).get(kind, {})
    names = arm.get("hyperparameters") or ("n_epochs", "batch_size", "learning_rate_multiplier")
    shown_arm = {"hyperparameters": {name: resolved.get(name, "auto") for name in names}}
    if "grader" in arm:
        shown_arm["grader"] = arm["grader"]
    return {"type": kind, kind: shown_arm}


def _error(job: Job) -> dict[str, Any] | None:
    """Why it failed; the training file's problems are told from others by the rules they name."""
    if job.state != jobs.FAILED:
        return None
    failure = with_setting_names(job.failure or "", setting_name) or "The job failed."
    message = failure.replace(file_address(""), "")
    if not _RULE.search(message):
        return {"code": "job_failed", "message": message, "param": None}
    held = job.request.get("validation_file")
    first = _RULE.split(message, maxsplit=1)[0]
    param = "validation_file" if held and held in first else "training_file"
    return {"code": f"invalid_{param}", "message": message, "param": param}


def _estimated_finish(job: Job) -> int | None:
    """Unix time; ``None`` while nothing is known."""
    moment = (job.details.get("progress") or {}).get("estimated_finish")
    if job.state != jobs.RUNNING or not moment:
        return None
    return seconds(datetime.fromisoformat(moment))
