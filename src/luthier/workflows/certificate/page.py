"""A certificate as one HTML page.

What is shown is chosen here; how it is written stands in ``templates/certificate.html``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier import __version__
from luthier.escaping import format_duration
from luthier.pages import Table, interval_text, render_page, shorten
from luthier.types import dotted_items
from luthier.workflows.certificate.certificate import Certificate, Forecast, KeptReport

BOX, GAP, HEIGHT, LINE = 230, 44, 46, 78
"""Pixels of a box of the lineage, between two, of its height, and from one row to the next."""
WIDTH, FLOOR, LEFT = 700, 220, 52
"""Pixels of the chart of the losses, of its floor, and left of it."""
MOST_VALUES = 40
"""Values of a report that are shown."""


def page(certificate: Certificate) -> str:
    """The whole page."""
    record = certificate.record
    return render_page(
        "luthier.workflows",
        "certificate.html",
        version=__version__,
        certificate=certificate,
        record=record,
        facts=list(_facts(certificate)),
        lineage=draw_lineage(certificate),
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
        yield "learned by", method, f"weights: {adaptation}" if adaptation else ""
    if metrics.get("weights"):
        trained = metrics.get("trained_weights", 0)
        yield "weights", f"{metrics['weights']:,}", f"{trained:,} of them trained"
    if record.data is not None:
        tokens, learned = record.data.tokens, record.data.learned_tokens
        more = f"{learned:,} of {tokens:,} tokens learned" if tokens else ""
        yield "rows", f"{record.data.rows:,}", more
        if (mask := record.data.mask) is not None and mask.behind_opening:
            replies = f"{mask.with_stop:,} end with a stop token"
            if mask.behind_opening < mask.stretches:
                replies += f", {mask.stretches - mask.behind_opening:,} are more than replies"
            yield "replies learned", f"{mask.stretches:,}", replies
    if metrics.get("validation_loss") is not None:
        yield "validation loss", f"{metrics['validation_loss']:.4f}", f"{metrics['steps']:,} steps"


def draw_lineage(certificate: Certificate) -> dict[str, Any]:
    """Boxes and arrows: the base at the left, this model at the right, helpers below."""
    chain = certificate.parents[::-1]
    columns = {each.id: number for number, each in enumerate(chain)} | {certificate.id: len(chain)}
    boxes = [
        _box(each.id, each.part if each.content_sha256 else f"{each.part}, not here", number, 0)
        for number, each in enumerate(chain)
    ]
    boxes.append(_box(certificate.id, "this model", len(chain), 0))
    arrows = [
        {
            "x1": number * (BOX + GAP) + BOX, "y1": HEIGHT // 2 + 1,
            "x2": (number + 1) * (BOX + GAP), "y2": HEIGHT // 2 + 1, "kind": "interval",
        }
        for number in range(len(chain))
    ]  # fmt: skip
    rows: dict[int, int] = {}
    for each in certificate.lineage:
        column = columns.get(each.helped or "")
        if column is not None:
            rows[column] = rows.get(column, 0) + 1
            boxes.append(_box(each.id, each.part, column, rows[column]))
            middle = column * (BOX + GAP) + BOX // 2
            top = rows[column] * LINE
            arrows.append(
                {"x1": middle, "y1": top, "x2": middle, "y2": top - LINE + HEIGHT, "kind": "mark"}
            )
    return {
        "width": len(columns) * (BOX + GAP) - GAP + 2,
        "height": max(rows.values(), default=0) * LINE + HEIGHT + 2,
        "boxes": boxes,
        "arrows": arrows,
    }


def _box(name: str, part: str, column: int, row: int) -> dict[str, Any]:
    short = name if len(name) <= 34 else f"…{name[-33:]}"
    x, y = column * (BOX + GAP) + 1, row * LINE + 1
    return {"x": x, "y": y, "name": short, "part": part, "title": f"{name} ({part})"}


def _draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Any] | None:
    """Losses of training and validation by step."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return None
    last = max(step for step, _ in points) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    spread = high - low or 1.0

    def place(step: int, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * step / last
        return f"{x:.1f},{FLOOR - (FLOOR - 14) * (loss - low) / spread:.1f}"

    return {
        "width": WIDTH, "height": FLOOR + 24, "floor": FLOOR, "left": LEFT, "last": f"{last:,}",
        "low": f"{low:.3g}", "high": f"{high:.3g}",
        "train": " ".join(place(*point) for point in curves.get("train", ())),
        "validation": [place(*point).split(",") for point in curves.get("validation", ())],
    }  # fmt: skip


def _rule_table(report: Mapping[str, Any] | None) -> Table | None:
    if report is None:
        return None
    rows = [
        [each["rule"], each["severity"], f"{each['count']:,}", ", ".join(each["first"])]
        for each in report["rules"]
    ]
    columns = {"rule": "code", "severity": "text", "times": "number", "first": "text"}
    return Table.of("What the data gate found", columns, rows) if rows else None


def _recipe_table(recipe: Mapping[str, Any] | None) -> Table | None:
    rows = [] if recipe is None else [[name, _short(value)] for name, value in dotted_items(recipe)]
    return Table.of("Recipe", {"field": "code", "value": "text"}, rows) if rows else None


def _short(value: Any) -> str:
    return shorten(f"{value:.6g}" if isinstance(value, float) else str(value))


def _tables(certificate: Certificate) -> Iterator[Table]:
    if certificate.forecast:
        columns = {"": "name", "estimated": "number", "between": "number", "took": "number"}
        rows = [_forecast_row(each) for each in certificate.forecast]
        yield Table.of("Estimate and what it took", columns, rows)
    record = certificate.record
    if record.parity is not None:
        measured = dotted_items(record.parity.model_dump(exclude_none=True))
        rows = [[name.replace("_", " "), _short(each)] for name, each in measured]
        yield Table.of("As trained and as read back", {"": "name", "value": "number"}, rows)
    if record.exports:
        columns = {"form": "code", "written": "text", "how near": "text", "files": "code"}
        rows = [
            [
                each.name,
                each.created[:10],
                each.describe(),
                ", ".join(f"{name} {digest}" for name, digest in each.files.items()),
            ]
            for each in record.exports
        ]
        yield Table.of("Written for other software", columns, rows)
    if record.quantized:
        columns = {"weights": "code", "measured": "text", "what they cost": "text"}
        rows = [[e.quantization, e.created[:10], e.describe()] for e in record.quantized]
        yield Table.of("With weights of fewer bits", columns, rows)
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

    between = "–" if each.low is None else f"{amount(each.low)} to {amount(each.high)}"
    name = each.quantity.removesuffix("_bytes").replace("_", " ")
    return [name, amount(each.estimate), between, amount(each.actual)]


def _compute_table(certificate: Certificate) -> Table:
    found = certificate.compute
    flops = "unknown" if found.flops is None else f"{found.flops:.3g}"
    energy, note = "unknown", ""
    if found.kilowatt_hours is not None and found.seconds is not None:
        power = "assumed" if found.watts_assumed else "measured"
        energy = f"{found.kilowatt_hours:.3g} kWh"
        note = f"{format_duration(found.seconds)} at {power} {found.watts:,.0f} W"
    rows = [["floating-point operations", flops, ""], ["energy", energy, note]]
    columns = {"": "name", "amount": "number", "how it is known": "text"}
    return Table.of("Operations and energy", columns, rows)


def _report(kept: KeptReport) -> dict[str, Any]:
    report = kept.report
    result = report.result
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
    """Scores with their intervals, ways that were compared, or the single values of another
    report."""
    scores, intervals = result.get("scores"), result.get("intervals") or {}
    if isinstance(scores, Mapping):
        rows = [
            [name, _short(score), " to ".join(f"{each:.3f}" for each in intervals.get(name, ()))]
            for name, score in scores.items()
        ]
        columns = {"score": "name", "value": "number", "with 95 % confidence": "number"}
        return Table.of("Scores", columns, rows)
    if isinstance(contenders := result.get("contenders"), Sequence):
        rows = [
            [each["name"], each["technique"], _short(each["score"]),
             interval_text(each["interval"])]
            for each in contenders
        ]  # fmt: skip
        columns = {"": "name", "way": "text", "score": "number", "95 %": "number"}
        return Table.of("All that were compared", columns, rows)
    values = [
        [name.replace("_", " "), _short(value)]
        for name, value in dotted_items(result)
        if isinstance(value, str | int | float) and name != "verdict"
    ]
    further = max(0, len(values) - MOST_VALUES)
    columns = {"": "name", "value": "text"}
    return Table.of("Values", columns, values[:MOST_VALUES], further) if values else None
