"""Hugging Face model card of a certificate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from luthier.models.catalog import CATALOG
from luthier.models.networks.heads import HEADS
from luthier.workflows.certificate.certificate import Certificate, Relative


class _Score(NamedTuple):
    data: str
    sha256: str | None
    """SHA-256 of the first data file."""
    name: str
    value: float
    interval: Sequence[float]
    """95 % confidence interval; empty if unknown."""


def _scores(certificate: Certificate) -> Iterator[_Score]:
    latest = {
        json.dumps(each.report.data): each.report
        for each in certificate.reports
        if each.report.kind == "evaluation"
    }
    for report in latest.values():
        data = ", ".join(PurePath(path).name for path in report.data) or "data"
        sha256 = next(iter(report.data.values()), None)
        intervals = report.result.get("intervals") or {}
        for name, value in (report.result.get("scores") or {}).items():
            yield _Score(data, sha256, name, value, intervals.get(name) or ())


def _licence(certificate: Certificate) -> str | None:
    licences = (certificate.record.licence, *(each.licence for each in certificate.parents))
    return next(filter(None, licences), None)


def model_card(certificate: Certificate, library: str | None = None) -> str:
    """Return ``README.md`` for the Hugging Face hub: metadata with ``model-index``, then text.

    ``library`` is the hub's name of the library that loads the model; the default is ``peft`` for
    an adapter and ``transformers`` for a full model.
    """
    from huggingface_hub import EvalResult, ModelCardData

    record = certificate.record
    head = HEADS.get(record.kind or "")  # type: ignore[call-overload]
    task = head.hub if head is not None else None
    results = [
        EvalResult(
            task_type=task or record.kind or "other",
            dataset_type=score.data,
            dataset_name=score.data,
            dataset_revision=score.sha256,
            metric_type=score.name,
            metric_value=score.value,
        )
        for score in _scores(certificate)
    ]
    parents, licence = certificate.parents, _licence(certificate)
    method = (record.objective or {}).get("method")
    data = ModelCardData(
        model_name=certificate.id,
        base_model=hub_name(parents[0]) if parents else None,
        license=licence.lower() if licence else None,
        library_name=library or ("peft" if record.saved == "adapter" else "transformers"),
        pipeline_tag=task,
        tags=["luthier", *([method] if method else [])],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_card_text(certificate)}"


def hub_name(each: Relative) -> str:
    """Return the hub repository of a model, else the id, or the last part of a folder's path."""
    kind, _, repository = (each.source or "").partition(":")
    if kind == "hub" and repository:
        return repository
    entry = CATALOG.get(each.id)
    if entry is not None and entry.hub and entry.source.provenance["source"] == each.source:
        return entry.hub
    # The card is public, and folder names of this machine are private.
    return PurePath(each.id).name if PurePath(each.id).is_absolute() else each.id


def _card_text(certificate: Certificate) -> str:
    record, compute = certificate.record, certificate.compute
    lines = [f"# {certificate.id}", ""]
    if parents := certificate.parents:
        lines += [f"Made from {', from '.join(map(hub_name, parents))}.", ""]
    if record.verdict:
        lines += [f"{record.verdict}.", ""]
    if record.limits_text:
        lines += [record.limits_text, ""]
    if record.data is not None:
        lines += ["## Training data", ""]
        lines += [f"- {PurePath(p).name}: SHA-256 `{h}`" for p, h in record.data.sha256.items()]
        lines += [f"- {record.data.rows:,} rows, {record.data.learned_tokens:,} tokens learned", ""]
    scores = [
        f"| {each.data} | {each.name} | {each.value:.4f} | "
        f"{' to '.join(f'{end:.3f}' for end in each.interval)} |"
        for each in _scores(certificate)
    ]
    if scores:
        head = ["| data | score | value | with 95 % confidence |", "| --- | --- | --- | --- |"]
        lines += ["## Evaluation", "", *head, *scores, ""]
    lines += ["## Training", ""]
    if compute.flops is not None:
        lines.append(f"- {compute.flops:.3g} floating-point operations")
    if compute.kilowatt_hours is not None:
        power = "assumed" if compute.watts_assumed else "measured"
        lines.append(f"- {compute.kilowatt_hours:.3g} kWh, at {power} {compute.watts:,.0f} W")
    if certificate.machine:
        lines.append(f"- on {certificate.machine}")
    lines += [f"- luthier {record.luthier}, torch {record.torch}", ""]
    if certificate.missing:
        lines += ["## Unknown", "", *(f"- {each}" for each in certificate.missing), ""]
    lines.append(f"Content SHA-256: `{certificate.content_sha256}`")
    return "\n".join(lines) + "\n"
