"""Worker of an evaluation or comparison: fetches the rows, measures the models, stores the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.data.rows import load_rows
from luthier.evaluation.evaluate import load_graded
from luthier.evaluation.report_page import page, worst_answers
from luthier.evaluation.significance import RowScores, as_gain, paired_differences
from luthier.files import folder_size, hashes_of, sha256_of
from luthier.library.models import find
from luthier.server.jobs.data import base_reads_media, fetch_rows
from luthier.server.jobs.folders import MeasurementFolders
from luthier.server.jobs.measurements import graders_of
from luthier.server.jobs.worker import ResultWorker, explain_error, rename
from luthier.server.tables import results, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.jobs import COMPLETED
from luthier.server.tables.measurements import EVALUATION, Measurement, Report, runs_of
from luthier.workflows.compare import compare, comparison_page
from luthier.workflows.evaluate import evaluate
from luthier.workflows.prompting import records_of

FIXED_BYTES = 512 << 20
"""Memory of a worker without a model."""


class ReportWorker(ResultWorker[Report]):
    """Base class of workers whose result is a report and a page."""

    sources: ClassVar[Sequence[str]]
    """Fields of the request with addresses of rows."""
    addresses: Mapping[str, str] = MappingProxyType({})
    """Addresses of fetched files and folders by path."""

    def finish(self, session: Session, end: Any) -> None:
        """Store the report and the page, which count towards the account's storage."""
        report, html = (end, "") if isinstance(end, str) else end
        row = results.finish(session, self.table, self.row_id, self.lease, report)
        if row.state == COMPLETED:
            row.page, row.stored_bytes = html, len(json.dumps(report)) + len(html.encode())
            quotas = quotas_of(session, row.account, self.quotas)
            storage.charge(session, row.account, quotas, stored_bytes=row.stored_bytes)

    def explain(self, error: Exception, row: Report) -> str:
        """See :meth:`ResultWorker.explain`."""
        return explain_error(error, self._names(row))

    def fetch(self, row: Report, member: str, columns: Mapping[str, str] | None) -> Path:
        """Fetch the rows that a field of the request names, with media of renamed ``columns``."""
        media = any(base_reads_media(each["stored_id"]) for each in row.models)
        folder, address = self.folders.data / member, row.request[member]
        path, addresses = self.retry(
            lambda: fetch_rows(self.locations, row.account, address, folder, media, columns)
        )
        self.addresses = {**self.addresses, **addresses}
        return path

    def rename(
        self, row: Report, report: Mapping[str, Any], html: str
    ) -> tuple[dict[str, Any], str]:
        """Return the report and the page with the client's names of models and rows."""
        names = self._names(row)
        # Names of models are also keys of objects. Keys of S3 may contain quotes and tags, and paths
        # letters that JSON escapes.
        quoted = {json.dumps(name)[1:-1]: json.dumps(shown)[1:-1] for name, shown in names.items()}
        escaped = {escape(name): escape(shown) for name, shown in names.items()}
        return json.loads(rename(json.dumps(report), quoted)), rename(html, escaped)

    def _names(self, row: Report) -> dict[str, str]:
        """Return the client's names of models and rows by the names on this machine."""
        names = {each["stored_id"]: each["name"] for each in row.models if ":" in each["stored_id"]}
        # Failed fetches have no addresses of files.
        names |= {
            str(self.folders.data / each): str(row.request.get(each)) for each in self.sources
        }
        names |= self.addresses
        # An id can be the start of another id.
        return dict(sorted(names.items(), key=lambda each: len(each[0]), reverse=True))


class MeasurementWorker(ReportWorker[Measurement]):
    """Worker of an evaluation or comparison."""

    table = Measurement
    folders_type = MeasurementFolders
    sources = ("rows", "training")
    row_scores: dict[str, Any] | None = None
    """Scores of the rows of a scheduled evaluation."""

    def produce(self, row: Measurement) -> tuple[dict[str, Any], str]:
        """Return the report and the page."""
        models = [self.retry(partial(find, each["stored_id"])) for each in row.models]
        # One model at a time is loaded: its weights, and its activations.
        largest = max(folder_size(each.network_folder) for each in models)
        self.reserve_memory(FIXED_BYTES + 2 * largest)
        request = row.request
        columns, max_tokens = request["columns"], request["max_tokens"]
        rows = self.fetch(row, "rows", columns)
        graders = graders_of(request)
        if row.kind == EVALUATION:
            found = evaluate(
                models[0], rows, graders, max_tokens, request["on_grader_error"],
                long_rows=request.get("long_rows"), turns=request["turns"], columns=columns,
                slices=request["slices"],
                on_progress=lambda done, total: self.show("evaluate", done, total),
            )  # fmt: skip
            report = found.plain() | {"worst": worst_answers(found)}
            html = page(found, models[0].id, request["rows"])
            if row.schedule is not None:
                measure, score = next(iter(found.row_scores.items()))
                if isinstance(score, RowScores):
                    lines = [getattr(each, "line", None) for each in found.rows]
                    hashed = hashes_of(rows) if rows.is_dir() else sha256_of(rows)
                    self.row_scores = {
                        "measure": measure, "rows": hashed, "lines": lines, **score.plain()
                    }  # fmt: skip
        else:
            *tuned, base = models
            train = self.fetch(row, "training", columns) if request.get("training") else None
            prompts = request["prompts"]
            compared = compare(
                load_graded(rows, columns, (graders or {}).values()), base, tuned,
                load_rows(train, columns) if train is not None else (),
                graders=graders, max_tokens=max_tokens, prompts=prompts,
                records=records_of(str(rows)) if prompts else {},
                show=request["show"], seeds=request["seeds"],
                on_progress=lambda done, total: self.show("compare", done, total),
            )  # fmt: skip
            report, html = compared.plain(), comparison_page(compared, request["rows"])
        return self.rename(row, report, html)

    def finish(self, session: Session, end: Any) -> None:
        """Store the report, and the change of a scheduled evaluation."""
        super().finish(session, end)
        row = session.scalars(select(Measurement).filter_by(id=self.row_id)).one()
        if row.state == COMPLETED:
            row.row_scores = self.row_scores
            row.change = _change(session, row)

    def time_limit(self, row: Measurement) -> float:
        """See :meth:`ResultWorker.time_limit`."""
        return float(row.request.get("time_limit", math.inf))


def _change(session: Session, row: Measurement) -> dict[str, Any] | None:
    """Return the difference of a scheduled evaluation to the first on the same rows.

    The reference is fixed: several small falls in sequence add up, and no best of many is chosen.
    """
    scores = row.row_scores
    if scores is None or row.schedule is None:
        return None
    for first in runs_of(session, row.schedule):
        known = first.row_scores or {}
        # A different model can grade a different part of the rows.
        same = all(known.get(each) == scores[each] for each in ("measure", "rows", "lines"))
        if first.seq < row.seq and same and len(known["parts"]) == len(scores["parts"]):
            pair = RowScores.read(known), RowScores.read(scores)
            difference = paired_differences({"": pair})[""]
            fell = difference.significant and as_gain(scores["measure"], difference.value) < 0
            return {**difference.plain(), "reference": first.id, "is_fall": fell}
    return None
