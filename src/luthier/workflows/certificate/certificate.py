"""Certificate of a model: ``certificate.json`` in the model's folder.

A certificate collects the record with recipe, data report and parity, the lineage, loss curves, the
estimate and the actual duration, operations and energy, and stored reports. Nothing is measured for
a certificate. :mod:`luthier.workflows.certificate.verify` compares the certificate with its
sources.

A certificate does not change the record or the list of files, because
:func:`luthier.library.models.content_hash` ignores the certificate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from luthier import __version__
from luthier.engine.metrics import MetricsFile
from luthier.engine.runs import METRICS, run_of
from luthier.engine.timings import ACTUAL
from luthier.errors import CorruptFile, RecipeError
from luthier.files import json_text, read_json, sha256_of, write_bytes
from luthier.formatting import finite_or_none
from luthier.library.models import (
    StoredModel,
    ancestors,
    find,
    lock_record,
)
from luthier.library.reports import ModelReport, reports_of
from luthier.models.manifest import CERTIFICATE, MANIFEST, SIGNATURE, Manifest, Record, created_now
from luthier.pages import Displayed, Table
from luthier.validation import describe_constraint

ASSUMED_WATTS = {"cpu": 100.0, "gpu": 700.0}
"""Power of the whole machine without a measurement: a computer under load, an H100."""
MAX_POINTS = 200
"""Maximum points of a curve; longer curves are thinned evenly."""


class Relative(Record):
    """An ancestor of the model, or a model that helped in the training."""

    id: str
    part: str
    """``parent`` for an ancestor, ``base`` for the first ancestor, ``teacher``, …."""
    helped: str | None = None
    """Id of the model trained with the help; None for an ancestor."""
    content_sha256: str | None = None
    """Hash of everything that decides the replies; ``None`` if the model is not on this machine."""
    source: str | None = None
    source_sha256: str | None = None
    revision: str | None = None
    licence: str | None = None


class Forecast(Record):
    """An estimated quantity with its 90 % interval, and the actual value."""

    quantity: Literal["seconds", "peak_memory_bytes", "disk_bytes", "tokens"]
    actual: float
    estimate: float | None = None
    """``None`` without an estimate before the run."""
    low: float | None = None
    high: float | None = None


class ReportRecord(Record):
    """A report stored with the model."""

    file: str
    """Below the model's folder."""
    sha256: str
    report: ModelReport


class Compute(Record):
    """Operations and energy of a run; ``None`` if unknown."""

    flops: float | None
    """Floating-point operations of the training steps; an upper bound, since shared prefixes count
    in each row and frozen layers at each step. Sampling and other models are not counted."""
    seconds: float | None
    """Duration of the run."""
    watts: float | None
    """Power of the machine during the run."""
    watts_assumed: bool
    """True if the power is an assumption, not a measurement."""
    kilowatt_hours: float | None
    """Energy of the run."""


class Certificate(Displayed, Record):
    """Everything known about a model, in a form that can be verified."""

    version: Literal[1] = 1
    """Version of the certificate's format."""
    id: str
    created: str
    """Time of the certificate; ISO 8601, UTC."""
    luthier: str
    """Version of luthier that created the certificate."""
    content_sha256: str
    """Hash of everything that decides the replies: the model's files and the files of its
    ancestors."""
    record_sha256: str
    """SHA-256 of ``luthier.json``."""
    record: Manifest
    """The model's record: recipe and seed, data report, hashes of files and data, parity,
    metrics."""
    lineage: list[Relative]
    """Ancestors, the nearest first, then models that helped in the training."""
    curves: dict[str, list[tuple[int, float]]]
    """Step and loss (or minus the reward) of ``train`` and ``validation``; none if the run is
    gone."""
    machine: str | None
    """Machine of the training."""
    forecast: list[Forecast]
    """Actual and estimated quantities of the run."""
    compute: Compute
    reports: list[ReportRecord]
    """Evaluations, comparisons and further reports, oldest first."""
    missing: list[str] = Field(default_factory=list)
    """Unknown facts, in sentences."""
    sha256: str = ""
    """SHA-256 of the file without this field. Shows a change, not the author of the change."""

    def summary(self) -> list[str]:
        """Return id, hash, verdict, parents and energy."""
        lines = [f"Certificate of {self.id}", f"content {self.content_sha256}"]
        if self.record.verdict:
            lines.append(self.record.verdict)
        if self.parents:
            lines.append(f"parents: {', '.join(each.id for each in self.parents)}")
        if self.compute.kilowatt_hours is not None:
            how = "assumed" if self.compute.watts_assumed else "measured"
            lines.append(
                f"{self.compute.kilowatt_hours:.3g} kWh, at {how} {self.compute.watts:,.0f} W"
            )
        return lines

    def tables(self) -> Sequence[Table]:
        """Return the actual and estimated quantities of the run, and the reports."""
        costs = [
            [each.quantity.replace("_", " ")]
            + [
                "" if value is None else f"{value:,.0f}"
                for value in (each.actual, each.estimate, each.low, each.high)
            ]
            for each in self.forecast
        ]
        headings = {"": "name", "actual": "number", "estimate": "number", "low": "number",
                    "high": "number"}  # fmt: skip
        reports = [
            [each.report.kind, each.report.created[:10], each.sha256] for each in self.reports
        ]
        named = {"report": "name", "created": "text", "SHA-256": "code"}
        return [
            Table.of(caption, columns, rows)
            for caption, columns, rows in (
                ("Costs of the run, with 90 % intervals", headings, costs),
                ("Reports", named, reports),
            )
            if rows
        ]

    @property
    def parents(self) -> list[Relative]:
        """Ancestors of the model, the nearest first."""
        return [each for each in self.lineage if each.helped is None]

    def with_digest(self) -> Certificate:
        """Return the certificate with its SHA-256."""
        return self.model_copy(update={"sha256": self.digest()})

    def digest(self) -> str:
        """Hash of all but the hash itself."""
        rest = self.model_copy(update={"sha256": ""})
        # A file name of the training data may have bytes that are no UTF-8.
        return hashlib.sha256(rest.text().encode("utf-8", "replace")).hexdigest()

    def plain(self) -> dict[str, Any]:
        """Return the certificate as JSON values."""
        plain: dict[str, Any] = finite_or_none(self.model_dump(mode="json"))
        return {**plain, "record": finite_or_none(self.record.plain())}

    def text(self) -> str:
        """Return the content of the certificate's file; equal certificates have equal content."""
        return json_text(self.plain())


def certificate_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a certificate: ``docs/certificate.schema.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "luthier certificate",
        **{k: v for k, v in Certificate.model_json_schema().items() if k != "title"},
    }


def check_recorded(model: StoredModel) -> None:
    """Raise :class:`RecipeError` for a model without a record."""
    if not (model.folder / MANIFEST).is_file() or not model.manifest.created:
        raise RecipeError(
            f"{model.id} has no record and cannot be certified. Name a model that luthier trained or "
            "imported."
        )


def make_certificate(model: StoredModel, watts: float | None = None) -> Certificate:
    """Create the certificate of ``model``; ``watts`` is the measured power of the machine in the
    run.

    Raises:
        RecipeError: for a model without a record.
        CorruptFile: for a changed report.
    """
    check_recorded(model)
    manifest = model.manifest
    run = run_of(model.id)
    # Models of other machines, and of deleted runs, have no folder of the run.
    actual = read_json(run.folder / ACTUAL) if (run.folder / ACTUAL).is_file() else {}
    seconds = actual.get("seconds") or (manifest.metrics or {}).get("seconds")
    machine = actual.get("machine")
    reports = [
        ReportRecord(file=r.name, sha256=r.sha256, report=r.report) for r in reports_of(model)
    ]
    curves = _curves(MetricsFile(run.folder / METRICS).read())
    forecast = _forecast(actual)
    on_gpu = actual.get("device", "cpu") != "cpu"
    return Certificate(
        id=model.id,
        created=created_now(),
        luthier=__version__,
        content_sha256=model.content_hash,
        record_sha256=sha256_of(model.folder / MANIFEST),
        record=manifest,
        lineage=_lineage(model),
        curves=curves,
        machine=machine,
        forecast=forecast,
        compute=measure_compute(manifest, seconds, on_gpu, watts),
        reports=reports,
        missing=_missing(manifest, forecast, curves, reports),
    ).with_digest()


def training_flops(manifest: Manifest) -> float | None:
    """Return the operations of the training in ``manifest``, or ``None`` if they cannot be
    counted."""
    measured = manifest.metrics
    if not measured or not measured.get("tokens"):
        return None
    if manifest.format is None or manifest.format.template == "none":
        return None  # networks of images and audio use a weight more than once per input
    weights, trained = int(measured["weights"]), int(measured["trained_weights"])
    return (4.0 * weights + 2.0 * trained) * int(measured["tokens"])


def measure_compute(
    manifest: Manifest, seconds: float | None, on_gpu: bool, watts: float | None = None
) -> Compute:
    """Return operations and energy of a run of ``seconds``; ``watts`` is a measured power."""
    power = None if seconds is None else watts or ASSUMED_WATTS["gpu" if on_gpu else "cpu"]
    return Compute(
        flops=training_flops(manifest),
        seconds=seconds,
        watts=power,
        watts_assumed=watts is None,
        kilowatt_hours=None if seconds is None or power is None else seconds * power / 3.6e6,
    )


def _lineage(model: StoredModel) -> list[Relative]:
    lineage, helpers = [], []
    above = ancestors(model)
    for number, each in enumerate(above):
        part = "base" if number == len(above) - 1 else "parent"
        if isinstance(each, str):
            lineage.append(Relative(id=each, part=part))
            continue
        manifest = each.manifest
        lineage.append(
            Relative(
                id=each.id,
                part=part,
                content_sha256=each.content_hash,
                source=manifest.source,
                source_sha256=manifest.source_sha256,
                revision=manifest.revision,
                licence=manifest.licence,
            )
        )
    for child in (model, *(each for each in above if isinstance(each, StoredModel))):
        for part, helper in (child.manifest.others or {}).items():
            helpers.append(Relative(id=helper, part=part, helped=child.id))
        teacher = (child.manifest.distillation or {}).get("teacher")
        if isinstance(teacher, dict) and teacher.get("model"):
            helpers.append(Relative(id=str(teacher["model"]), part="teacher", helped=child.id))
    return [*lineage, *helpers]


def _curves(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for event in ("train", "validation"):
        points = [
            (int(line["step"]), float(line["loss"]))
            for line in lines
            if line.get("event") == event and math.isfinite(line.get("loss", math.nan))
        ]
        stride = -(-len(points) // (MAX_POINTS - 1)) or 1
        if points:
            # Always include the last point, the end of the run.
            curves[event] = [*points[:-1:stride], points[-1]]
    return curves


def _forecast(actual: dict[str, Any]) -> list[Forecast]:
    estimate = actual.get("estimate") or {}
    named: dict[Literal["seconds", "peak_memory_bytes", "disk_bytes", "tokens"], str] = {
        "seconds": "seconds", "peak_memory_bytes": "memory", "disk_bytes": "disk", "tokens": "tokens",
    }  # fmt: skip
    forecast = []
    for quantity, name in named.items():
        if quantity in actual:
            interval = estimate.get(name) or {}
            forecast.append(
                Forecast(
                    quantity=quantity, actual=actual[quantity], estimate=interval.get("value"),
                    low=interval.get("low"), high=interval.get("high"),
                )
            )  # fmt: skip
    return forecast


def _missing(
    manifest: Manifest,
    forecast: Sequence[Forecast],
    curves: dict[str, Any],
    reports: Sequence[ReportRecord],
) -> list[str]:
    missing = []
    if manifest.data is None:
        missing.append("The record has no training data.")
    elif manifest.data_report is None:
        missing.append("The data gate did not check the data.")
    if manifest.metrics is not None:
        if not curves:
            missing.append("The folder of the run with the loss curves is missing.")
        elif not any(each.estimate is not None for each in forecast):
            missing.append("The run has no estimate.")
    if manifest.parity is None:
        missing.append("The stored model was not compared with the trained model (parity).")
    kinds = {each.report.kind for each in reports}
    for kind in ("evaluation", "comparison"):
        if kind not in kinds:
            missing.append(f"No {kind} is attached.")
    return missing


def certify(model_id: str) -> None:
    """Update the certificate of a model after training or evaluation.

    A signed certificate is not updated; the signer creates a new certificate. A measured power is
    kept.
    """
    # The lock keeps the reports of two concurrent evaluations.
    with lock_record(find(model_id)):
        model = find(model_id)
        if (model.folder / SIGNATURE).exists():
            return
        stored = _stored_certificate(model)
        watts = None if stored.compute.watts_assumed else stored.compute.watts
        certificate = make_certificate(model, watts)
        unchanged = {"created": stored.created, "sha256": stored.sha256}
        # The time of creation alone is no change, so the certificate keeps its hash.
        if certificate.model_copy(update=unchanged).text() != stored.text():
            write_certificate(model, certificate)


def write_certificate(model: StoredModel, certificate: Certificate) -> Path:
    """Write the certificate into the model's folder atomically and return the path.

    The signature of an earlier certificate is removed, because the signature is no longer valid.
    """
    path = model.folder / CERTIFICATE
    # First: a new certificate with an old signature would look forged.
    (model.folder / SIGNATURE).unlink(missing_ok=True)
    write_bytes(path, certificate.text().encode("utf-8", "replace"))
    return path


def parse_certificate(content: bytes, where: object) -> Certificate:
    """Return the certificate in the bytes of a file ``where``.

    Raises:
        CorruptFile: for an invalid field.
    """
    try:
        return Certificate.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"])) or "file"
        raise CorruptFile(
            f"{where} is not a certificate: {location}: {describe_constraint(first)}"
        ) from error


def read_certificate(model: StoredModel) -> Certificate:
    """Return the stored certificate of ``model``; create a missing certificate.

    Raises:
        CorruptFile: for an invalid or changed file.
        RecipeError: see :func:`make_certificate`.
    """
    certificate = _stored_certificate(model)
    if certificate.sha256 != certificate.digest():
        raise CorruptFile(
            f"{model.folder / CERTIFICATE} was changed: the SHA-256 differs. Write a new certificate "
            f"with `luthier models certificate {model.id}`."
        )
    return certificate


def _stored_certificate(model: StoredModel) -> Certificate:
    path = model.folder / CERTIFICATE
    if not path.is_file():
        write_certificate(model, make_certificate(model))
    return parse_certificate(path.read_bytes(), path)
