"""Background work on eval runs: query the model for each row, grade the reply, store the result."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.inference.inference import meter
from luthier.inference.scheduler import working_for
from luthier.limits import AccountQuotas
from luthier.server.background import BackgroundRunner, caller_fields
from luthier.server.http.messages import Caller, Fault, parse_json
from luthier.server.tables import evaluations as store
from luthier.server.tables.database import Database, now
from luthier.server.tables.evaluations import EvaluationRun, GradedRow
from luthier.server.tables.usage import CountUsage, Usage

MOST_ROWS = 50_000
"""Maximum number of rows of a run."""
MOST_ROW_BYTES = 262_144
"""Maximum size of a row in bytes, equal to the size of text that graders accept."""
MOST_PROBLEMS = 5
"""Maximum number of invalid rows that an error describes; more rows are only counted."""
AT_ONCE = 4
"""Number of rows of a run that are graded concurrently. A row may need a process for graders."""
CHECK_SECONDS = 60.0
"""Time limit for checking all rows of a run, in seconds. 50,000 short rows need about 10 seconds."""
_log = logging.getLogger("luthier.server")


def parse_row(line: bytes) -> Any:
    """Return a row as JSON.

    Raises:
        ValueError: If the row is too large or not JSON; the message describes the error.
    """
    if len(line) > MOST_ROW_BYTES:
        raise ValueError(
            f"it has more than {MOST_ROW_BYTES:,} bytes: shorten it, or make several of it."
        )
    try:
        return parse_json(line)
    except (Fault, ValueError) as error:
        text = f"it is no JSON that can be read: {str(error).rstrip('.')}."
        raise ValueError(text) from error


class EvaluationTask(ABC):
    """Work of an eval run. A server that resumes the run creates the task again.

    The constructor may raise :class:`Fault`.
    """

    model_names: Mapping[str, str] = {}
    """Names of models in the run, by model id in the library."""

    def count_rows(self) -> int:
        """Check all rows and return the number of rows.

        Raises:
            RefusedInput: If rows are invalid; the message names the rows and reasons.
        """
        count, wrong, problems, began = 0, 0, list[str](), time.monotonic()
        for name, problem in self.problems():
            count += 1
            if count > MOST_ROWS:
                raise RefusedInput(f"A run has at most {MOST_ROWS:,} rows.")
            if time.monotonic() - began > CHECK_SECONDS:
                raise RefusedInput(f"The rows could not be checked in {CHECK_SECONDS:.0f} seconds.")
            if problem:
                wrong += 1
                if wrong <= MOST_PROBLEMS:
                    problems.append(f"{name}: {problem}")
        if not count:
            raise RefusedInput("There are no rows to evaluate.")
        if problems:
            rest = f" And {wrong - MOST_PROBLEMS:,} more." if wrong > MOST_PROBLEMS else ""
            raise RefusedInput(f"Nothing was evaluated. {' '.join(problems)}{rest}")
        return count

    @abstractmethod
    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the problem of each row; the problem of a valid row is empty."""

    @abstractmethod
    def rows(self) -> Iterable[tuple[int, Any]]:
        """Yield row numbers, from 1, and rows."""

    @abstractmethod
    def grade(self, caller: Caller, number: int, row: Any) -> GradedRow:
        """Query the model for a row and grade the reply, with the permissions of ``caller``.

        Raises:
            Fault: If the model does not reply.
        """

    @abstractmethod
    def error_row(self, row: Any, fault: Fault) -> GradedRow:
        """Return the result to store for a row that failed with ``fault``."""


MakeTask = Callable[[EvaluationRun, Caller], EvaluationTask]
"""Function that creates the task of a run, with the permissions of the run's creator."""


class EvaluationRunner(BackgroundRunner[EvaluationRun, GradedRow]):
    """Thread that works on eval runs. Several servers may share a database."""

    kind, at_once, working = EvaluationRun, AT_ONCE, store.IN_PROGRESS
    action = "luthier:openai.evals.runs.create"
    gives_up = True

    def __init__(
        self,
        database: Database,
        make_task: MakeTask,
        quotas: Callable[[Session, str], AccountQuotas],
        count: CountUsage = lambda account, model, used: None,
    ) -> None:
        super().__init__(database, count)
        self.make_task, self.quotas = make_task, quotas

    def create(
        self,
        session: Session,
        caller: Caller,
        *,
        name: str,
        request: Mapping[str, Any],
        metadata: Mapping[str, str],
        eval_id: str,
    ) -> EvaluationRun:
        """Create a run of ``caller``; call :meth:`wake` after the transaction.

        Raises:
            QuotaExceeded: If the account has no space.
        """
        account = caller.account
        quotas = self.quotas(session, account)
        return store.create_run(
            session,
            account,
            quotas,
            caller=caller_fields(caller),
            name=name,
            request=request,
            metadata=metadata,
            eval_id=eval_id,
        )

    def work(self, run: EvaluationRun) -> None:
        """Check the rows of ``run``, grade each row without a result, and end the run."""
        task = self.make_task(run, self.caller_of(run))
        if run.status == store.QUEUED:
            total = task.count_rows()
            with self.database.write() as session:
                held = self.lock_held(session, run)
                if held is not None and held.status == store.QUEUED:
                    held.total, held.status = total, store.IN_PROGRESS
        with self.database.read() as session:
            done = store.done_rows(session, run.id)
        left = ((number, (number, row)) for number, row in task.rows() if number not in done)
        if self.work_through(run, left, partial(self._grade, run, task)):
            self._finish(run)

    def record(self, session: Session, run: EvaluationRun, number: int, graded: GradedRow) -> None:
        """Store the result of a row, unless the run was cancelled."""
        if run.status == store.IN_PROGRESS:
            store.record(session, run, self.quotas(session, run.account), number, graded)

    def state(self, run: EvaluationRun) -> str:
        """Return the status of ``run``, or ``failed`` after the time limit."""
        return store.FAILED if now() > run.expires else run.status

    def fail(self, run: EvaluationRun, code: str, message: str) -> None:
        """End ``run`` with an error; results of graded rows remain."""
        self._end(run, store.FAILED, code, message)

    def _grade(self, run: EvaluationRun, task: EvaluationTask, piece: tuple[int, Any]) -> GradedRow:
        number, row = piece
        caller = self.caller_of(run)
        calls: list[tuple[str, int, int]] = []

        def count(model: str, read: int, written: int) -> None:
            calls.append((task.model_names.get(model, model), read, written))
            self.count_tokens(run.account, model, read, written)

        self.count(run.account, "", Usage(requests=1))
        with meter(count), working_for(run.account, background=True):
            try:
                graded = task.grade(caller, number, row)
            except Fault as fault:
                graded = task.error_row(row, fault)
            except Exception as error:
                _log.exception("a row of %s failed", run.id)
                text = f"The row failed: {type(error).__name__}."
                graded = task.error_row(row, Fault("InternalServer", text))
        return replace(graded, usage=calls)

    def _finish(self, run: EvaluationRun) -> None:
        with self.database.read() as session:
            now_there = store.get_run(session, run.account, run.id)
            if now_there is None or now_there.status != store.IN_PROGRESS:
                return
            if now() > now_there.expires:
                hours = store.PATIENCE.total_seconds() / 3600
                text = f"The run took more than {hours:.0f} hours; the rows that are graded stay."
                self.fail(run, "expired", text)
                return
        self._end(run, store.COMPLETED)

    def _end(
        self, run: EvaluationRun, status: str, code: str | None = None, message: str | None = None
    ) -> None:
        with self.database.write() as session:
            held = self.lock_held(session, run)
            if held is not None and held.status not in store.ENDED:
                store.end(held, status, code, message)
