"""A certificate in the forms of others: views of it, which hold nothing that it does not.

Hugging Face model card with ``model-index``; CycloneDX 1.7 bill of materials of a model; in-toto
statements 1 with the predicates SLSA provenance 1 and test result 0.1; Croissant 1.1 for the data. The
tests validate each with the standard's own tools.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from luthier import __version__
from luthier.errors import RecipeError
from luthier.files import json_text
from luthier.models.catalog import CATALOG
from luthier.models.manifest import MANIFEST
from luthier.objectives import OBJECTIVES
from luthier.workflows.certificate.certificate import Certificate, Relative

Format = Literal["json", "model-card", "cyclonedx", "in-toto", "croissant"]
BUILD_TYPE, BUILDER = "urn:luthier:training:v1", "urn:luthier:engine"
"""What SLSA calls the kind of build, whose parameters are those of a recipe, and who built."""
_PIPELINES: Mapping[str, str] = {
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "token_classification": "token-classification",
    "embedding": "sentence-similarity",
}
"""Hugging Face's name of a task, where the kind of a model says it alone."""


def render(certificate: Certificate, form: Format) -> str:
    """The text of ``certificate`` in another form; ``json`` is its own."""
    views: dict[Format, Callable[[Certificate], str]] = {
        "json": Certificate.text,
        "model-card": model_card,
        "cyclonedx": lambda each: json_text(cyclonedx(each)),
        "in-toto": lambda each: "".join(json.dumps(s) + "\n" for s in statements(each)),
        "croissant": lambda each: json_text(croissant(each)),
    }
    return views[form](certificate)


class _Score(NamedTuple):
    """A score of the latest evaluation on some data."""

    data: str
    sha256: str | None
    """Of the first file of the data."""
    name: str
    value: float
    interval: Sequence[float]
    """With 95 % confidence; empty where it is not known."""


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
    """Its own, or the base's: nothing that luthier does gives a model another one."""
    known = (certificate.record.licence, *(each.licence for each in certificate.parents))
    return next((each for each in known if each), None)


def _objective(certificate: Certificate) -> str:
    return str((certificate.record.objective or {}).get("method", ""))


def model_card(certificate: Certificate, library: str | None = None) -> str:
    """``README.md`` of a model on the Hugging Face hub: metadata with ``model-index``, then text.

    ``library`` loads it, as the hub calls it; that of the form in which it is stored when not given.
    """
    from huggingface_hub import EvalResult, ModelCardData

    record = certificate.record
    task = _PIPELINES.get(record.kind or "")
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
    parents = certificate.parents
    licence = _licence(certificate)
    data = ModelCardData(
        model_name=certificate.id,
        base_model=hub_name(parents[0]) if parents else None,
        license=licence.lower() if licence else None,
        library_name=library or ("peft" if record.saved == "adapter" else "transformers"),
        pipeline_tag=task,
        tags=["luthier", *([method] if (method := _objective(certificate)) else [])],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_card_text(certificate)}"


def hub_name(each: Relative) -> str:
    """The repository of a model of the hub; else its id, of a folder the last name alone."""
    kind, _, place = (each.source or "").partition(":")
    if kind == "hub" and place:
        return place
    entry = CATALOG.get(each.id)
    if entry is not None and entry.hub and entry.source.provenance["source"] == each.source:
        return entry.hub
    # A card is read elsewhere: the folders of this machine say nothing there, and are private.
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
        lines.append(f"- {compute.flops:.3g} floating-point operations: {compute.counted_as}")
    if compute.kilowatt_hours is not None:
        how = "assumed" if compute.watts_assumed else "measured"
        lines.append(f"- {compute.kilowatt_hours:.3g} kWh, at {how} {compute.watts:,.0f} W")
    if certificate.machine:
        lines.append(f"- on {certificate.machine}")
    lines += [f"- luthier {record.luthier}, torch {record.torch}", ""]
    if certificate.missing:
        lines += ["## Not known", "", *(f"- {each}" for each in certificate.missing), ""]
    lines.append(f"Content SHA-256: `{certificate.content_sha256}`")
    return "\n".join(lines) + "\n"


def cyclonedx(certificate: Certificate) -> dict[str, Any]:
    """Bill of materials (ECMA-424, CycloneDX 1.7): the model, its files, its data, its ancestors."""
    record = certificate.record
    objective = OBJECTIVES.get(_objective(certificate))
    datasets = [] if record.data is None else [*record.data.sha256.items()]
    files = [*record.files.items(), (MANIFEST, certificate.record_sha256)]
    parameters: dict[str, Any] = {"task": record.kind or "encoder"}
    if objective is not None and objective.approach:
        parameters["approach"] = {"type": objective.approach}
    if datasets:
        parameters["datasets"] = [{"ref": f"data:{path}"} for path, _ in datasets]
    metrics = []
    for score in _scores(certificate):
        metric: dict[str, Any] = {
            "type": score.name, "value": f"{score.value:.6g}", "slice": score.data
        }  # fmt: skip
        if score.interval:
            low, high = (f"{end:.6g}" for end in score.interval)
            metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
        metrics.append(metric)
    compute = certificate.compute
    known = {
        "luthier:training-flops": compute.flops,
        "luthier:base-flops": compute.base_flops,
        "luthier:flops-ratio": compute.ratio,
        "luthier:kilowatt-hours": compute.kilowatt_hours,
        "luthier:certificate-sha256": certificate.sha256,
    }
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": certificate.id,
        "name": certificate.id,
        "version": certificate.content_sha256[:16],
        "modelCard": {
            "modelParameters": parameters,
            **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        },
        "properties": [
            {"name": name, "value": f"{value:.6g}" if isinstance(value, float) else value}
            for name, value in known.items()
            if value is not None
        ],
        **_cyclonedx_licence(_licence(certificate)),
    }
    if parents := certificate.parents:
        component["pedigree"] = {"ancestors": [_ancestor(each) for each in parents]}
    serial = uuid.uuid5(uuid.NAMESPACE_OID, certificate.sha256)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "timestamp": certificate.created,
            "tools": {
                "components": [{"type": "application", "name": "luthier", "version": __version__}]
            },
            "component": component,
        },
        "components": [
            *(
                {
                    "type": "file",
                    "bom-ref": f"file:{name}",
                    "name": name,
                    "hashes": [{"alg": "SHA-256", "content": digest}],
                }
                for name, digest in files
            ),
            *(
                {
                    "type": "data",
                    "bom-ref": f"data:{path}",
                    "name": PurePath(path).name,
                    "hashes": [{"alg": "SHA-256", "content": digest}],
                    "data": [{"type": "dataset", "name": PurePath(path).name}],
                }
                for path, digest in datasets
            ),
        ],
        "dependencies": [
            {
                "ref": certificate.id,
                "dependsOn": [
                    *(f"file:{name}" for name, _ in files),
                    *(f"data:{path}" for path, _ in datasets),
                ],
            }
        ],
    }


def _cyclonedx_licence(licence: str | None) -> dict[str, Any]:
    return {"licenses": [{"license": {"name": licence}}]} if licence else {}


def _ancestor(each: Relative) -> dict[str, Any]:
    version = each.content_sha256 or each.revision or each.source_sha256
    return {
        "type": "machine-learning-model",
        "bom-ref": f"ancestor:{each.id}",
        "name": each.id,
        **({"version": version[:16]} if version else {}),
        **_cyclonedx_licence(each.licence),
    }


def statements(certificate: Certificate) -> list[dict[str, Any]]:
    """How the model was made (SLSA provenance 1), and what its gates said (test result 0.1)."""
    record = certificate.record
    files = {**record.files, MANIFEST: certificate.record_sha256}
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()]
    return [
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": subject,
            "predicateType": kind,
            "predicate": predicate,
        }
        for kind, predicate in (
            ("https://slsa.dev/provenance/v1", _provenance(certificate)),
            ("https://in-toto.io/attestation/test-result/v0.1", _test_result(certificate)),
        )
    ]


def _provenance(certificate: Certificate) -> dict[str, Any]:
    record = certificate.record
    dependencies: list[dict[str, Any]] = [
        {
            "name": each.id,
            **({"uri": each.source} if each.source else {}),
            **({"digest": {"sha256": each.content_sha256}} if each.content_sha256 else {}),
            "annotations": {"part": each.part},
        }
        for each in certificate.lineage
    ]
    if record.data is not None:
        dependencies += [
            {"name": path, "digest": {"sha256": digest}, "annotations": {"part": "data"}}
            for path, digest in record.data.sha256.items()
        ]
    versions = {"luthier": record.luthier, "torch": record.torch, **(record.plugins or {})}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"model": certificate.id, "recipe": record.recipe or {}},
            "internalParameters": {"machine": certificate.machine, "precision": record.precision},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {k: v for k, v in versions.items() if v}},
            "metadata": {
                "invocationId": certificate.id,
                "finishedOn": record.created.replace("+00:00", "Z"),
            },
        },
    }


def _test_result(certificate: Certificate) -> dict[str, Any]:
    """The checks that the model passed before it was stored."""
    record = certificate.record
    passed: list[str] = []
    warned: list[str] = []
    failed: list[str] = []
    if (report := record.data_report) is not None:
        rules = {each["rule"]: each["severity"] for each in report["rules"]}
        for check in report["checks"]:
            own = {level for rule, level in rules.items() if rule.partition(".")[0] == check}
            place = failed if "error" in own else warned if "warning" in own else passed
            place.append(f"data.{check}")
    if record.parity is not None:  # without parity a model is not stored
        passed.append("parity")
    for name, checked in (record.checks or {}).items():
        (passed if checked is not False else failed).append(f"import.{name}")
    found: dict[str, Any] = {
        "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
        "configuration": [
            {"name": MANIFEST, "digest": {"sha256": certificate.record_sha256}},
            *({"name": k.file, "digest": {"sha256": k.sha256}} for k in certificate.reports),
        ],
    }
    tests = {"passedTests": passed, "warnedTests": warned, "failedTests": failed}
    return found | {name: each for name, each in tests.items() if each}


_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in (
        "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field",
        "fileProperty", "fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset",
        "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex", "repeated",
        "replace", "samplingRate", "separator", "source", "subField", "transform",
    )},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "sc": "https://schema.org/",
}  # fmt: skip
_ENCODINGS = {
    ".jsonl": "application/jsonlines", ".json": "application/json", ".csv": "text/csv",
    ".tsv": "text/tab-separated-values", ".txt": "text/plain",
    ".parquet": "application/vnd.apache.parquet", ".zip": "application/zip",
}  # fmt: skip


def croissant(certificate: Certificate) -> dict[str, Any]:
    """The data that the model was made of: its files and their hashes; columns are not recorded.

    Raises:
        RecipeError: where no data is known.
    """
    record = certificate.record
    if record.data is None or not record.data.sha256:
        raise RecipeError(f"the record of {certificate.id} says nothing of training data")
    files = [
        {
            "@type": "cr:FileObject",
            "@id": path,
            "name": PurePath(path).name,
            "contentUrl": path,
            "encodingFormat": _ENCODINGS.get(PurePath(path).suffix, "application/octet-stream"),
            "sha256": digest,
        }
        for path, digest in record.data.sha256.items()
    ]
    rows, held = record.data.rows, record.data.validation_rows
    gate = record.data_report["verdict"] if record.data_report else "not checked"
    return {
        "@context": dict(_CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"data of {certificate.id}",
        "description": f"{rows:,} rows that {certificate.id} was trained on and {held:,} that it was "
        f"measured on. luthier's data gate: {gate}.",
        "url": f"urn:luthier:data:{certificate.content_sha256}",
        "version": "1.0.0",
        "datePublished": record.created[:10],
        "isLiveDataset": False,
        "distribution": files,
    }
