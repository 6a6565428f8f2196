"""HTML page of a certificate (``templates/certificate.html``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier import __version__
from luthier.formatting import format_duration
from luthier.pages import Table, interval_text, render_page, shorten
from luthier.types import dotted_items
from luthier.workflows.certificate.certificate import Certificate, Forecast, StoredReport

WIDTH, FLOOR, LEFT = 700, 220, 52
"""Pixels of the loss chart: width, height of the axis, and left margin."""
MAX_VALUES = 40
"""Values of a report on the page."""


def page(certificate: Certificate) -> str:
    """Return the HTML page."""
    record = certificate.record
    return render_page(
        "luthier.workflows",
        "certificate.html",
        version=__version__,
        certificate=certificate,
        record=record,
        facts=list(_facts(certificate)),
        lineage=_lineage_table(certificate) if certificate.lineage else None,
        tables=list(_tables(certificate)),
        chart=_draw_curves(certificate.curves),
        rules=_rule_table(record.data_report),
        recipe=_recipe_table(record.recipe),
        compute=_compute_table(certificate),
        reports=[_report(each) for each in certificate.reports],
        verdict=record.verdict,
        limits=record.limits_text,
    )


def _facts(certificate: Certificate) -> Iterator[tuple[str, str, str]]:
    record = certificate.record
    metrics = record.metrics or {}
    yield "kind", record.kind or "encoder", f"made {record.created[:16].replace('T', ' ')}"
    if method := (record.objective or {}).get("method"):
        adaptation = ((record.recipe or {}).get("adaptation") or {}).get("method", "")
        yield "objective", method, f"weights: {adaptation}" if adaptation else ""
    if metrics.get("weights"):
        trained = metrics.get("trained_weights", 0)
        yield "weights", f"{metrics['weights']:,}", f"{trained:,} trained"
    if record.data is not None:
        tokens, learned = record.data.tokens, record.data.learned_tokens
        more = f"{learned:,} of {tokens:,} tokens learned" if tokens else ""
        yield "rows", f"{record.data.rows:,}", more
        if (mask := record.data.mask) is not None and mask.behind_opening:
            replies = f"{mask.with_stop:,} end with a stop token"
            if mask.behind_opening < mask.stretches:
                replies += f", {mask.stretches - mask.behind_opening:,} include prompt tokens"
            yield "replies learned", f"{mask.stretches:,}", replies
    if metrics.get("validation_loss") is not None:
        yield "validation loss", f"{metrics['validation_loss']:.4f}", f"{metrics['steps']:,} steps"


def _lineage_table(certificate: Certificate) -> Table:
    """Return the table of ancestors, the nearest first, and of models that helped in the training."""
    rows = [
        [
            each.id,
            each.part + (f" of {each.helped}" if each.helped else ""),
            each.content_sha256 or "not on this machine",
        ]
        for each in certificate.lineage
    ]
    return Table.of("Lineage", {"model": "name", "part": "text", "SHA-256": "code"}, rows)


def _draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any] | None:
    points = [each for curve in curves.values() for each in curve]
    if not points:
        return None
    last = max(step for step, _ in points) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    spread = high - low or 1.0

    def point(step: int, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * step / last
        return f"{x:.1f},{FLOOR - (FLOOR - 14) * (loss - low) / spread:.1f}"

    return {
        "width": WIDTH, "height": FLOOR + 24, "floor": FLOOR, "left": LEFT, "last": f"{last:,}",
        "low": f"{low:.3g}", "high": f"{high:.3g}",
        "train": " ".join(point(*each) for each in curves.get("train", ())),
        "validation": [point(*each).split(",") for each in curves.get("validation", ())],
    }  # fmt: skip


def _rule_table(report: Mapping[str, Any] | None) -> Table | None:
    if report is None:
        return None
    rows = [
        [each["rule"], each["severity"], f"{each['count']:,}", ", ".join(each["first"])]
        for each in report["rules"]
    ]
    columns = {"rule": "code", "severity": "text", "count": "number", "first": "text"}
    return Table.of("Findings of the data gate", columns, rows) if rows else None


def _recipe_table(recipe: Mapping[str, Any] | None) -> Table | None:
    rows = [] if recipe is None else [[name, _short(value)] for name, value in dotted_items(recipe)]
    return Table.of("Recipe", {"field": "code", "value": "text"}, rows) if rows else None


def _short(value: Any) -> str:
    return shorten(f"{value:.6g}" if isinstance(value, float) else str(value))


def _tables(certificate: Certificate) -> Iterator[Table]:
    if certificate.forecast:
        columns = {"": "name", "estimated": "number", "interval": "number", "actual": "number"}
        rows = [_forecast_row(each) for each in certificate.forecast]
        yield Table.of("Estimated and actual", columns, rows)
    record = certificate.record
    if record.parity is not None:
        measured = dotted_items(record.parity.model_dump(exclude_none=True))
        rows = [[name.replace("_", " "), _short(each)] for name, each in measured]
        yield Table.of("Trained and stored model compared", {"": "name", "value": "number"}, rows)
    if record.exports:
        columns = {"format": "code", "date": "text", "parity": "text", "files": "code"}
        rows = [
            [
                each.name,
                each.created[:10],
                each.describe(),
                ", ".join(f"{name} {digest}" for name, digest in each.files.items()),
            ]
            for each in record.exports
        ]
        yield Table.of("Exports", columns, rows)
    if record.quantized:
        columns = {"weights": "code", "date": "text", "cost": "text"}
        rows = [[e.quantization, e.created[:10], e.describe()] for e in record.quantized]
        yield Table.of("Quantization", columns, rows)
    files = [[name, digest] for name, digest in record.files.items()]
    files.append(["luthier.json", certificate.record_sha256])
    files += [[each.file, each.sha256] for each in certificate.reports]
    yield Table.of("Files of the model", {"file": "code", "SHA-256": "code"}, files)
    if record.data is not None:
        data = [[name, digest] for name, digest in record.data.sha256.items()]
        yield Table.of("Files of the data", {"file": "code", "SHA-256": "code"}, data)


def _forecast_row(each: Forecast) -> list[str]:
    def amount(value: float | None) -> str:
        if value is None:
            return "–"
        if each.quantity == "seconds":
            return format_duration(value)
        return f"{value / 1e6:,.0f} MB" if each.quantity.endswith("bytes") else f"{value:,.0f}"

    interval = "–" if each.low is None else f"{amount(each.low)} to {amount(each.high)}"
    name = each.quantity.removesuffix("_bytes").replace("_", " ")
    return [name, amount(each.estimate), interval, amount(each.actual)]


def _compute_table(certificate: Certificate) -> Table:
    compute = certificate.compute
    flops = "unknown" if compute.flops is None else f"{compute.flops:.3g}"
    energy, note = "unknown", ""
    if compute.kilowatt_hours is not None and compute.seconds is not None:
        power = "assumed" if compute.watts_assumed else "measured"
        energy = f"{compute.kilowatt_hours:.3g} kWh"
        note = f"{format_duration(compute.seconds)} at {power} {compute.watts:,.0f} W"
    rows = [["floating-point operations", flops, ""], ["energy", energy, note]]
    columns = {"": "name", "amount": "number", "source": "text"}
    return Table.of("Operations and energy", columns, rows)


def _report(stored: StoredReport) -> dict[str, Any]:
    report, result = stored.report, stored.report.result
    return {
        "title": report.kind.replace("-", " ").capitalize(),
        "about": f"{report.created[:16].replace('T', ' ')}, luthier {report.luthier}, on "
        + (", ".join(report.data) or "no data file"),
        "lines": [
            each
            for each in (result.get("verdict"), *result.get("remarks", ()))
            if isinstance(each, str)
        ],
        "table": _result_table(result),
    }


def _result_table(result: Mapping[str, Any]) -> Table | None:
    """Return scores with intervals, compared techniques, or the single values of a report."""
    scores, intervals = result.get("scores"), result.get("intervals") or {}
    if isinstance(scores, Mapping):
        rows = [
            [name, _short(score), " to ".join(f"{each:.3f}" for each in intervals.get(name, ()))]
            for name, score in scores.items()
        ]
        columns = {"score": "name", "value": "number", "95 % confidence": "number"}
        return Table.of("Scores", columns, rows)
    if isinstance(contenders := result.get("contenders"), Sequence):
        rows = [
            [each["name"], each["technique"], _short(each["score"]),
             interval_text(each["interval"])]
            for each in contenders
        ]  # fmt: skip
        columns = {"": "name", "technique": "text", "score": "number", "95 %": "number"}
        return Table.of("Comparison", columns, rows)
    values = [
        [name.replace("_", " "), _short(value)]
        for name, value in dotted_items(result)
        if isinstance(value, str | int | float) and name != "verdict"
    ]
    further = max(0, len(values) - MAX_VALUES)
    columns = {"": "name", "value": "text"}
    return Table.of("Values", columns, values[:MAX_VALUES], further) if values else None
