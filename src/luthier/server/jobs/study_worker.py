"""Worker of a study: fetches the rows, runs the trainings, stores the report.

The measurements of the trainings stay in the work's folder until the study ends, so a study goes on
after a death of the worker.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.engine.metrics import Reporter
from luthier.library.models import find
from luthier.recipe import Recipe
from luthier.server.jobs.admission import memory_of
from luthier.server.jobs.folders import StudyFolders
from luthier.server.jobs.measurement_worker import FIXED_BYTES, ReportWorker
from luthier.server.jobs.studies import configurations_of
from luthier.server.jobs.submit import SETTABLE_DATA
from luthier.server.tables.studies import Study as Row
from luthier.workflows.study.grid import UNKNOWN_ROWS
from luthier.workflows.study.results import Study, columns_of
from luthier.workflows.study.study import study

_GROUPS = ("training", "adaptation", "objective")


class StudyWorker(ReportWorker[Row]):
    """Worker of a study."""

    table = Row
    folders_type = StudyFolders
    folders: StudyFolders
    sources = ("training", "validation", "earlier")

    def produce(self, row: Row) -> tuple[dict[str, Any], str]:
        """Return the report and the page."""
        request = row.request
        for each in row.models:
            self.retry(partial(find, each["stored_id"]))
        grid, dimensions = configurations_of(request, row.models)
        plain = [each.recipe(Recipe.parse(row.recipe), 0, UNKNOWN_ROWS).plain() for each in grid]
        self.reserve_memory(FIXED_BYTES + max(memory_of("tune", each) for each in plain))
        columns = row.recipe["data"].get("columns")
        files = {name: self.fetch(row, name, columns) for name in self.sources if request.get(name)}
        data = {**row.recipe["data"], "train": str(files["training"])}
        if "validation" in files:
            data["validation"] = str(files["validation"])
        recipe = Recipe.parse({**row.recipe, "name": row.id, "data": data})
        found = study(
            recipe, grid, dimensions, request["seeds"],
            request["forgetting"], files.get("earlier"), request["at_most"],
            request["max_minutes"], resume=True, reporter=_Progress(self),
            trials=request["search"], home=self.folders.study,
        )  # fmt: skip
        # The command would name a file of the server.
        shown = replace(found, command="")
        report = report_of(shown) | {"keep": _fields_to_keep(found, request)}
        return self.rename(row, report, shown.html())


class _Progress(Reporter):
    """Shows the current training and its steps to clients."""

    def __init__(self, worker: StudyWorker) -> None:
        self.worker, self.phase = worker, ""

    def stage(self, text: str) -> None:
        """Show the start of a training."""
        self.phase = text
        self.worker.show(text, 0, 1)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Show the steps of a training."""
        self.worker.show(self.phase, line["step"], steps)


def report_of(found: Study) -> dict[str, Any]:
    """Return the result for clients, with table and pictures."""
    return found.plain() | {
        "table": columns_of(found), "remarks": found.remarks(), "pictures": _pictures(found),
    }  # fmt: skip


def _pictures(found: Study) -> dict[str, dict[str, str]]:
    """Return the SVG pictures by name, for light and dark pages."""
    texts = [Path(path).read_text(encoding="utf-8") for path in found.pictures]
    names = [Path(path).stem for path in found.pictures[::2]]
    return {
        name: {"light": light, "dark": dark}
        for name, light, dark in zip(names, texts[::2], texts[1::2], strict=True)
    }


def _fields_to_keep(found: Study, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return fields of a new job that trains the choice; ``None`` without a choice."""
    path = Path(found.folder) / "chosen.toml"
    if not found.command:
        return None
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    settings = {group: recipe[group] for group in _GROUPS if group in recipe}
    own = {key: value for key, value in recipe["data"].items() if key in SETTABLE_DATA}
    return {
        "base": recipe["base"],
        "training": [request["training"]],
        "validation": [request["validation"]] if request["validation"] else [],
        "settings": settings | ({"data": own} if own else {}),
    }
