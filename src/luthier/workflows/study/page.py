"""HTML page of a study."""

from __future__ import annotations

from pathlib import Path

from luthier import __version__
from luthier.pages import PAGE, Table, render_page, svg_address
from luthier.workflows.study.results import Study, columns_of


def study_page(found: Study, data: str, layout: str = PAGE) -> str:
    """Return the HTML page of a study on the rows of ``data``."""
    least = found.smallest_difference
    return render_page(
        "luthier.workflows",
        "study.html",
        layout,
        version=__version__,
        data=data,
        rows=found.held_out,
        verdict=found.verdict(),
        least="" if least is None else found.text(least),
        command=found.command,
        table=_table(found),
        failures=[(row.name, row.reason) for row in found.rows if not row.is_measured],
        pictures=_pictures(found),
    )


def _table(found: Study) -> Table:
    columns = columns_of(found)
    rows = [
        [row.name, *(texts[number] for texts in columns.values())]
        for number, row in enumerate(found.rows)
        if row.is_measured
    ]
    return Table.of("Measurements", {"": "name", **dict.fromkeys(columns, "number")}, rows)


def _pictures(found: Study) -> list[tuple[str, str]]:
    """Return the addresses of each picture for light and for dark pages."""
    return [
        (svg_address(Path(light).read_bytes()), svg_address(Path(dark).read_bytes()))
        for light, dark in zip(found.pictures[::2], found.pictures[1::2], strict=True)
    ]
