"""Reporter from a training run to the events of a job.

A worker that resumes after a crash reports the steps since the last checkpoint again, with the same
numbers. The reporter skips events that are in the database.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Unpack

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.engine.metrics import SCORES, Reporter, ShownReply
from luthier.formatting import finite_or_none
from luthier.server.tables.database import now
from luthier.server.tables.jobs import Job, JobDetails, JobEvent, JobPart, JobProgress, StepReplies

PARTS = ("validation", "data_processing", "training")
"""Parts of a job in the Bedrock API."""
LAST_REPLIES = 4
"""Number of earlier measurements with replies, besides the first."""
_NAMES = {"train": "train_loss", "validation": "valid_loss"}


@dataclass
class Pending:
    """Events and details before their transaction."""

    events: list[dict[str, Any]] = field(default_factory=list)
    """Columns of :class:`JobEvent`."""
    details: JobDetails = field(default_factory=JobDetails)

    def __bool__(self) -> bool:
        return bool(self.events or self.details)


class JobReporter(Reporter):
    """Buffer of a run's reports. The heartbeat thread writes the reports to the database."""

    shows_replies = True

    def __init__(self, job: Job, rename: Callable[[str], str]) -> None:
        """Create the reporter; ``rename`` replaces internal names and paths by the owner's names."""
        self.job_id, self.rename = job.id, rename
        self.details = job.details.copy()
        self._pending = Pending()
        # The trainer adds reports while the heartbeat thread drains them.
        self._lock = threading.Lock()
        self._messages: set[str] = set()
        self._steps = dict.fromkeys(_NAMES, -1)
        self._train_loss: tuple[int, Any] = (0, None)
        """Last trained step and loss."""
        self._began: tuple[float, int] | None = None

    def remember(self, session: Session) -> None:
        """Read the events of earlier workers."""
        written = select(JobEvent.kind, JobEvent.message, JobEvent.data)
        for kind, message, data in session.execute(written.where(JobEvent.job_id == self.job_id)):
            if kind == "metrics":
                event, step = "validation" if "valid_loss" in data else "train", int(data["step"])
                self._steps[event] = max(self._steps[event], step)
                if event == "train" and step >= self._train_loss[0]:
                    self._train_loss = step, data["train_loss"]
            else:
                self._messages.add(message)

    def stage(self, text: str) -> None:
        """Report the start of a stage."""
        self.note(text)

    def note(self, text: str) -> None:
        """Report a message once."""
        text = self.rename(text)
        if text in self._messages:
            return
        self._messages.add(text)
        kind = "warning" if text.startswith("warning") else "message"
        self._add(kind, text, {})

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Store the chosen settings; the checks of the data have passed."""
        chosen = {name: _plain(value) for name, value, _ in defaults}
        reasons = {name: self.rename(reason) for name, _, reason in defaults if reason}
        self._detail(
            chosen={**self.details.get("chosen", {}), **chosen},
            reasons={**self.details.get("reasons", {}), **reasons},
        )
        self.part("validation", "Completed")
        self.part("data_processing", "Completed")
        self.part("training", "InProgress")

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Report a line of metrics and the job's progress."""
        event, step = line["event"], int(line["step"])
        if event == "refit":
            self._detail(refit={"step": step, "rows": line["row_count"]})
        if event not in _NAMES:
            return
        if event == "train":
            self._progress(line, step, steps)
            self._train_loss = step, _plain(line["loss"])
        if step <= self._steps[event]:
            return
        self._steps[event] = step
        values = {
            # In OpenAI's files a line has scores of validation and of training rows.
            f"valid_{key}" if event == "validation" and key in SCORES else key: _plain(value)
            for key, value in line.items()
            if key not in ("event", "loss")
        }
        data = {"step": step, _NAMES[event]: _plain(line["loss"]), "total_steps": steps, **values}
        if event == "validation" and self._train_loss[0]:
            # OpenAI's clients expect a training loss in each event with metrics.
            data["train_loss"] = self._train_loss[1]
        measure = line.get("measure", "loss")
        self._add("metrics", f"Step {step}/{steps}: {event} {measure} {line[measure]:.4f}", data)

    def replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """Keep the replies of the first and the last measurements, by step."""
        known = [each for each in self.details.get("replies", []) if each["step"] < step]
        first, last = known[:1], known[1:][-LAST_REPLIES:]
        self._detail(replies=[*first, *last, StepReplies(step=step, replies=[*replies])])

    def part(self, name: str, status: str) -> None:
        """Set the status of a part, in Bedrock's words."""
        moment = now().isoformat()
        parts = dict(self.details.get("parts", {}))
        before = parts.get(name)
        # A resumed worker starts each part again; a completed part keeps its times.
        if before is None or before["status"] != "Completed":
            created = moment if before is None else before["created"]
            parts[name] = JobPart(status=status, created=created, modified=moment)
            self._detail(parts=parts)

    def drain(self) -> Pending:
        """Return the pending reports; call :meth:`restore` if they could not be written."""
        with self._lock:
            pending, self._pending = self._pending, Pending()
        return pending

    def restore(self, pending: Pending) -> None:
        """Restore ``pending`` before later reports, after a failed transaction."""
        with self._lock:
            self._pending.events[:0] = pending.events
            self._pending.details = {**pending.details, **self._pending.details}

    def _progress(self, line: Mapping[str, Any], step: int, steps: int) -> None:
        if self._began is None or step <= self._began[1]:
            self._began = (time.monotonic(), step)
        started, first = self._began
        progress = JobProgress(step=step, steps=steps, loss=_plain(line["loss"]))
        if step > first:
            left = (time.monotonic() - started) / (step - first) * (steps - step)
            progress["estimated_finish"] = (now() + timedelta(seconds=left)).isoformat()
        self._detail(progress=progress)

    def _detail(self, **values: Unpack[JobDetails]) -> None:
        with self._lock:
            self.details |= values
            self._pending.details |= values

    def _add(self, kind: str, message: str, data: dict[str, Any]) -> None:
        event = {"job_id": self.job_id, "at": now(), "kind": kind, "message": message, "data": data}
        with self._lock:
            self._pending.events.append(event)


def _plain(value: Any) -> Any:
    """Return a value ready for JSON."""
    known = isinstance(value, (bool, int, float, str, type(None)))
    return finite_or_none(value) if known else str(value)
