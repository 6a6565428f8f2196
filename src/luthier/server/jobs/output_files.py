"""Output files of a finished job, in Bedrock's layout."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.engine.runs import LABEL_ISSUES, run_of
from luthier.evaluation.significance import perplexity_of
from luthier.files import luthier_home
from luthier.library.models import StoredModel
from luthier.models.manifest import CERTIFICATE
from luthier.server.jobs.data import JobData
from luthier.server.tables.jobs import Job, JobResult, run_name
from luthier.workflows.certificate.certificate import parse_certificate, read_certificate

DISTILLATION_FILES = {"train": "synthetic_data.jsonl", "insights": "prompt_insights.jsonl"}
"""Output file names of a distillation, by luthier's file stems."""
_NO_COLUMNS = frozenset(("event", "step", "loss", "best", "best_step", "measure"))


def artifact(job_id: str, name: str) -> str:
    """Return the path of a training artifact below the job's output address."""
    return f"{_folder(job_id)}/training_artifacts/{name}"


def _folder(job_id: str) -> str:
    return f"model-customization-job-{job_id}"


def files(
    job: Job,
    model: StoredModel,
    lines: Sequence[Mapping[str, Any]],
    rows: int,
    result: JobResult,
    data: JobData,
) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the files below the job's output address.

    Args:
        job: finished job.
        model: resulting model.
        lines: metrics of the run.
        rows: number of training rows.
        result: result of the job.
        data: fetched data, for addresses in place of paths.
    """
    # Raw text is packed: an epoch has fewer examples than rows.
    learned = model.manifest.data
    epoch = _Epochs(model, learned.examples if learned else rows)
    yield artifact(job.id, "step_wise_training_metrics.csv"), training_csv(lines, epoch)
    losses = result["validation_losses"]
    validation = f"{_folder(job.id)}/validation_artifacts/post_fine_tuning_validation"
    if losses:
        yield f"{validation}/validation/validation_metrics.csv", validation_csv(lines, epoch)
    for number, loss in enumerate(losses if len(losses) > 1 else (), 1):
        if loss is None:
            continue
        last = {"event": "validation", "step": result["steps"], "loss": loss}
        name = f"{validation}/validation-{number}/validation_metrics.csv"
        yield name, validation_csv([last], epoch)
    manifest = data.show_addresses(json.dumps(model.manifest.plain(), indent=2, ensure_ascii=False))
    yield artifact(job.id, "manifest.json"), (manifest + "\n").encode()
    shown = data.show_addresses(read_certificate(model).text()).encode()
    # Addresses replaced paths, so compute the digest again.
    certificate = parse_certificate(shown, CERTIFICATE).with_digest()
    yield artifact(job.id, CERTIFICATE), certificate.text().encode()
    issues = run_of(model.id).folder / LABEL_ISSUES
    if issues.is_file():
        yield artifact(job.id, LABEL_ISSUES), issues.read_bytes()
    for name, called in DISTILLATION_FILES.items():
        of_job = f"*/{run_name(job.id)}/{name}.jsonl"
        for path in sorted((luthier_home() / "distillations").glob(of_job)):
            yield artifact(job.id, called), path.read_bytes()


class _Epochs:
    """Mapping from training steps to epochs."""

    def __init__(self, model: StoredModel, rows: int) -> None:
        self.batch = int((model.manifest.recipe or {})["training"]["batch_size"])
        self.rows = max(1, rows)

    def of(self, step: int) -> int:
        """Return the epoch of a step; both count from 0."""
        return step // math.ceil(self.rows / self.batch)


def training_csv(lines: Sequence[Mapping[str, Any]], epochs: _Epochs) -> bytes:
    """Return training metrics as CSV: step from 0, epoch, loss, perplexity, and other metrics."""
    train = [line for line in lines if line["event"] == "train"]
    extra = list(dict.fromkeys(k for line in train for k in line if k not in _NO_COLUMNS))
    # Readers of these files expect the name reward_mean.
    names = ["reward_mean" if name == "reward" else name for name in extra]
    rows = [
        [
            line["step"] - 1,
            epochs.of(line["step"] - 1),
            line["loss"],
            perplexity_of(line["loss"]),
            *(line.get(key, "") for key in extra),
        ]
        for line in train
    ]
    return _csv(["step_number", "epoch_number", "training_loss", "perplexity", *names], rows)


def validation_csv(lines: Sequence[Mapping[str, Any]], epochs: _Epochs) -> bytes:
    """Return validation metrics as CSV, one line per measurement."""
    measured = [line for line in lines if line["event"] == "validation"]
    rewards = any("reward" in line for line in measured)
    rows = []
    for line in measured:
        # The number of steps before the measurement.
        step = line["step"]
        row = [step, epochs.of(max(0, step - 1)), line["loss"], perplexity_of(line["loss"])]
        rows.append([*row, line.get("reward", "")] if rewards else row)
    names = ["step_number", "epoch_number", "validation_loss", "perplexity"]
    return _csv([*names, *["reward_mean"] * rewards], rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
