"""Runs of evaluations, whichever face they were asked through: rows asked, graded and written down."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from sqlalchemy.orm import Session

from luthier.api.background import BackgroundRunner, caller_fields, check_in_flight
from luthier.api.http.messages import Caller, Fault, parse_json
from luthier.errors import RefusedInput
from luthier.limits import AccountQuotas
from luthier.serving.inference import meter
from luthier.serving.scheduler import working_for
from luthier.store import evaluations as store
from luthier.store.database import Database, now
from luthier.store.evaluations import EvaluationRun, GradedRow
from luthier.store.usage import CountUsage, Usage

MOST_ROWS = 50_000
"""Of a run."""
MOST_ROW_BYTES = 262_144
"""Of a row: as much as a text that graders compare."""
MOST_PROBLEMS = 5
"""What is wrong with more rows is not told."""
AT_ONCE = 4
"""Rows of a run that are asked and graded side by side: each may take a process for its graders."""
_log = logging.getLogger("luthier.api")


def parse_row(line: bytes, most_values: int) -> Any:
    """A row as JSON, with at most ``most_values`` values.

    Raises:
        ValueError: which says what is wrong with it.
    """
    if len(line) > MOST_ROW_BYTES:
        raise ValueError(
            f"it has more than {MOST_ROW_BYTES:,} bytes: shorten it, or make several of it."
        )
    try:
        return parse_json(line, most_values)
    except (Fault, ValueError) as error:
        text = f"it is no JSON that can be read: {str(error).rstrip('.')}."
        raise ValueError(text) from error


class EvaluationTask(ABC):
    """What one run asks, as the face that took it understands it.

    Made anew each time a server goes on with the run; it may refuse with a :class:`Fault`.
    """

    model_names: Mapping[str, str] = {}
    """What the run calls models, by their ids in the store."""
    noun: ClassVar[str]
    """What its face calls a run."""
    no_rows: ClassVar[str]
    """What is said of a run without rows."""
    check_seconds: float = math.inf
    """For the check of all rows."""

    def count_rows(self) -> int:
        """How many rows there are, all of them checked.

        Raises:
            RefusedInput: naming the rows that cannot be evaluated, and why.
        """
        count, wrong, problems, began = 0, 0, list[str](), time.monotonic()
        for name, problem in self.problems():
            count += 1
            if count > MOST_ROWS:
                raise RefusedInput(f"A {self.noun} has at most {MOST_ROWS:,} rows.")
            if time.monotonic() - began > self.check_seconds:
                seconds = f"{self.check_seconds:.0f} seconds"
                raise RefusedInput(f"The rows could not be checked in {seconds}.")
            if problem:
                wrong += 1
                if wrong <= MOST_PROBLEMS:
                    problems.append(f"{name}: {problem}")
        if not count:
            raise RefusedInput(self.no_rows)
        if problems:
            rest = f" And {wrong - MOST_PROBLEMS:,} more." if wrong > MOST_PROBLEMS else ""
            raise RefusedInput(f"Nothing was evaluated. {' '.join(problems)}{rest}")
        return count

    def source_hash(self) -> str:
        """Of all rows, where somebody can replace them; a run does not go on with others."""
        return ""

    @abstractmethod
    def problems(self) -> Iterator[tuple[str, str]]:
        """How each row is called, and what is wrong with it; empty where nothing is."""

    @abstractmethod
    def rows(self) -> Iterable[tuple[int, Any]]:
        """The rows by their numbers, from 1, read once more."""

    @abstractmethod
    def grade(self, caller: Caller, number: int, row: Any) -> GradedRow:
        """Ask and grade one row, with the rights of ``caller``.

        Raises:
            Fault: where the model gave no answer.
        """

    @abstractmethod
    def error_row(self, row: Any, fault: Fault) -> GradedRow:
        """What is written down of a row that could not be asked."""

    @abstractmethod
    def finish(self, run: EvaluationRun, rows: Iterator[store.EvaluationRow]) -> None:
        """Write results elsewhere, before the run is called completed; again after a crash."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what was opened for the run."""


MakeTask = Callable[[EvaluationRun, Caller], EvaluationTask]
"""Makes the task of a run, with the rights of who asked for it."""


class EvaluationRunner(BackgroundRunner[EvaluationRun, GradedRow]):
    """Works on runs. Start it with the server; several servers may share a database."""

    kind, at_once, working = EvaluationRun, AT_ONCE, store.IN_PROGRESS
    gives_up = True

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, MakeTask],
        quotas: Callable[[Session, str], AccountQuotas],
        count: CountUsage = lambda account, model, used: None,
    ) -> None:
        """``tasks`` by the face that runs were asked through; others may be added before the start."""
        super().__init__(database, count)
        self.tasks, self.quotas = dict(tasks), quotas

    def create(
        self,
        session: Session,
        caller: Caller,
        *,
        face: str,
        name: str,
        request: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
        application: str | None = None,
        eval_id: str | None = None,
        run_id: str | None = None,
    ) -> EvaluationRun:
        """A new run of ``caller``; :meth:`wake` the runner after the transaction.

        Raises:
            QuotaExceeded: where the account has too many that have not ended, or no room.
        """
        account = caller.account
        quotas = self.quotas(session, account)
        check_in_flight(session, EvaluationRun, account, quotas, "evaluations_in_flight")
        return store.create_run(
            session,
            account,
            quotas,
            caller=caller_fields(caller),
            face=face,
            name=name,
            request=request,
            metadata=metadata,
            application=application,
            eval_id=eval_id,
            run_id=run_id,
        )

    def work(self, run: EvaluationRun) -> None:
        """Check its rows, grade those that are not graded, and end it."""
        with closing(self.tasks[run.face](run, self.caller_of(run))) as task:
            self._work(run, task)

    def _work(self, run: EvaluationRun, task: EvaluationTask) -> None:
        source_hash = task.source_hash()
        if run.status == store.QUEUED:
            total = task.count_rows()
            with self.database.write() as session:
                held = self.lock_held(session, run)
                if held is not None and held.status == store.QUEUED:
                    held.total, held.status = total, store.IN_PROGRESS
                    held.source_hash = source_hash
        elif run.source_hash != source_hash:
            raise RefusedInput(
                f"The data was replaced while the {task.noun} ran. The rows that are graded stay; make "
                f"a new {task.noun} for the data as it is."
            )
        with self.database.read() as session:
            done = store.done_rows(session, run.id)
        left = ((number, (number, row)) for number, row in task.rows() if number not in done)
        if self.work_through(run, left, partial(self._grade, run, task)):
            self._finish(run, task)

    def record(self, session: Session, run: EvaluationRun, number: int, graded: GradedRow) -> None:
        """Write a row down; those of a run that was cancelled meanwhile are dropped."""
        if run.status == store.IN_PROGRESS:
            store.record(session, run, self.quotas(session, run.account), number, graded)

    def state(self, run: EvaluationRun) -> str:
        """Its status; failed, once its time is over."""
        return store.FAILED if now() > run.expires else run.status

    def fail(self, run: EvaluationRun, code: str, message: str) -> None:
        """End it; the rows that are graded stay."""
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

    def _finish(self, run: EvaluationRun, task: EvaluationTask) -> None:
        with self.database.read() as session:
            now_there = store.get_run(session, run.account, run.id)
            if now_there is None or now_there.status != store.IN_PROGRESS:
                return
            if now() > now_there.expires:
                hours = store.PATIENCE.total_seconds() / 3600
                text = f"The run took more than {hours:.0f} hours; the rows that are graded stay."
                self.fail(run, "expired", text)
                return
            task.finish(now_there, store.every_row(session, run.id))
        self._end(run, store.COMPLETED)

    def _end(
        self, run: EvaluationRun, status: str, code: str | None = None, message: str | None = None
    ) -> None:
        with self.database.write() as session:
            held = self.lock_held(session, run)
            if held is not None and held.status not in store.ENDED:
                store.end(held, status, code, message)
