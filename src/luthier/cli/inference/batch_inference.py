"""Replies, labels or embeddings for the rows of a file, by this process or by several."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.terminal.console import extra
from luthier.errors import DataError, Problem, RecipeError, RefusedInput

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.evaluation.alarms import Alarm
    from luthier.workflows.batch_inference import InferenceRunner
    from luthier.workflows.inference_tasks import InferenceTask, InputRow


@dataclass(frozen=True)
class RowAnswers:
    """Results of a model for the rows of a file."""

    model: str
    rows: int
    seconds: float
    output: Path | None = None
    """File with the results; ``None`` if ``lines`` contains the results."""
    lines: str = ""
    """JSON Lines of rows with results."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of the task, such as the number of anomalous rows."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """Number of processes, and number of rows from an earlier, interrupted command."""
    alarms: Sequence[Alarm] | None = None
    """Alarms of a time series; ``None`` for other rows."""

    def plain(self) -> dict[str, Any]:
        """Return the results, or their file, as JSON values."""
        found = {"model": self.model, "rows": self.rows, "seconds": self.seconds, **self.shared}
        if self.alarms is not None:
            found["alarms"] = {"count": len(self.alarms), "runs": [*map(asdict, self.alarms)]}
        if self.output is not None:
            return {**found, "output": str(self.output)}
        return {**found, "answers": [json.loads(line) for line in self.lines.split("\n")[:-1]]}


@dataclass(frozen=True)
class RowProcesses:
    """Options of a command that distributes the rows of a file over processes."""

    processes: int | None
    ray_address: str | None
    ray_gpus: float

    def check(self, source: str | Path | None, output: Path | None) -> bool:
        """Return whether several processes share the rows.

        Raises:
            RefusedInput: for options that exclude each other.
        """
        if self.ray_gpus and self.ray_address is None:
            raise RefusedInput("--ray-gpus needs --ray-address")
        if self.processes is None and self.ray_address is None:
            return False
        if source is None or output is None:
            raise RecipeError("--processes and --ray-address need --input and --output")
        return True

    def answer(self, task: InferenceTask, output: Path, reporter: Reporter) -> RowAnswers:
        """Process the rows of ``task`` with several processes, and write ``output``."""
        from luthier.data.files.read import read_records
        from luthier.workflows.batch_inference import answer_file

        runner: InferenceRunner | None = None
        if self.ray_address is not None:
            with extra("server"):
                from luthier.cluster.ray_commands import RayInferenceRunner

            runner = RayInferenceRunner(self.ray_address, self.ray_gpus)
        found = answer_file(task, output, self.processes, runner, reporter)
        shared = {"resumed_rows": found.resumed_rows, "processes": found.processes}
        records = (record for _, record in read_records(output, []))
        alarms = _alarms(found.counts, task.rows([]), records)
        return RowAnswers(
            task.model, found.rows, found.seconds, output, "", found.counts, shared, alarms
        )


def answer_rows(task: InferenceTask, output: Path | None, reporter: Reporter) -> RowAnswers:
    """Process the rows of ``task`` in this process. Without ``output``, the result contains the
    lines.

    Raises:
        DataError: for unreadable rows, before the model is loaded.
    """
    from luthier.data.files.writers import write_packed

    problems: list[Problem] = []
    rows = [*task.rows(problems)]
    if problems:
        raise DataError(problems)
    task.records(rows)
    answer = task.open()
    started = time.monotonic()
    found = answer(rows, lambda done: reporter.progress(done, len(rows), task.kind))
    seconds = time.monotonic() - started
    alarms = _alarms(found.counts, rows, map(json.loads, BytesIO(found.data)))
    if output is not None:
        write_packed(output, found.data)
    lines = "" if output is not None else found.data.decode()
    return RowAnswers(task.model, len(rows), seconds, output, lines, found.counts, alarms=alarms)


def _alarms(
    counts: Mapping[str, int], rows: Iterable[InputRow], records: Iterable[Mapping[str, Any]]
) -> list[Alarm] | None:
    """Return the alarms of a time series; ``None`` for other rows."""
    if not counts.get("verdicts"):
        return None
    from luthier.data.prompts import PREDICTED
    from luthier.data.shapes.media import BareWindow
    from luthier.evaluation.alarms import find_alarms

    pairs = [
        (row.content, record[PREDICTED])
        for row, record in zip(rows, records, strict=True)
        if isinstance(row.content, BareWindow)
    ]
    return find_alarms(pairs) if pairs else None
