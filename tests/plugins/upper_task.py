"""Batch inference without a model: replies are the text in capitals, with a log of the process ids.

``python -m upper_task FOLDER NAME`` is a process of a batch, and the command is ``python -m
upper_task run SOURCE OUTPUT PROCESSES``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from luthier.engine.metrics import Reporter
from luthier.errors import DataError, Location, LuthierError, Problem
from luthier.library.models import StoredModel
from luthier.workflows import batch_inference
from luthier.workflows.batch_inference import FileAnswers, InferenceRunner
from luthier.workflows.child_processes import Resources
from luthier.workflows.inference_tasks import (
    TASKS,
    Answer,
    InferenceTask,
    InputRow,
    OnDone,
    ShardAnswer,
)

SHARD_ROWS = 4
LOG, KILL, WAIT = "answered.log", "kill", "wait"
"""Files next to the source: log of answered rows, kill switch for the next process, pause switch."""
STOP, STOPPED = "stop", "stopped"
"""Files that stop the next process before its first row, and report its id."""


@dataclass(frozen=True, kw_only=True)
class UpperTask(InferenceTask):
    """Capitalizes each row; rows with "?" fail, and "!" ends the batch."""

    kind: ClassVar[str] = "upper"
    shard_rows: ClassVar[int] = SHARD_ROWS
    answer_key: ClassVar[str] = "upper"

    mark: str = ""

    def needed_models(self) -> list[StoredModel]:
        return []

    def open(self) -> Answer:
        folder = Path(self.source).parent
        try:
            (folder / STOP).rename(folder / STOPPED)  # succeeds in a single process
        except FileNotFoundError:
            pass
        else:
            (folder / STOPPED).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

        def answer(rows: Sequence[InputRow], done: OnDone) -> ShardAnswer:
            texts = [row.record["text"] for row in rows]
            if "!" in texts:
                raise LuthierError("there is no network")
            while (folder / WAIT).exists() and rows[0].line > SHARD_ROWS * 3:
                time.sleep(0.02)
                done(1)
            if (folder / KILL).exists():
                (folder / KILL).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            problems = [
                Problem(
                    "row.unknown",
                    "It asks nothing.",
                    "Ask something.",
                    Location(row.file, row.line),
                )
                for row in rows
                if row.record["text"] == "?"
            ]
            if problems:
                raise DataError(problems)
            with (folder / LOG).open("a") as log:
                log.write("".join(f"{row.line} {os.getpid()}\n" for row in rows))
            lines = [
                json.dumps({**row.record, "upper": row.record["text"].upper()}) for row in rows
            ]
            return ShardAnswer(
                "".join(f"{line}{self.mark}\n" for line in lines).encode(), {"n": len(rows)}
            )

        return answer


TASKS[UpperTask.kind] = UpperTask  # type: ignore[index]


class UpperRunner(InferenceRunner):
    """A runner whose processes use the task."""

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        return [sys.executable, "-m", "upper_task", *process[-2:]]


def run(
    source: Path, output: Path, processes: int, mark: str = "", reporter: Reporter | None = None
) -> FileAnswers:
    """Process the rows of ``source`` like a command."""
    task = UpperTask(model="none", source=str(source), mark=mark)
    return batch_inference.answer_file(task, output, processes, UpperRunner(), reporter)


if __name__ == "__main__":
    import upper_task  # the module whose task processes know

    if sys.argv[1] == "run":
        upper_task.run(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        try:
            batch_inference.main(Path(sys.argv[1]), sys.argv[2])
        except LuthierError as error:
            sys.exit(str(error))
