"""The worker of customization jobs.

    data → training → verification → outputs → Completed, in one transaction

The next worker resumes from the last checkpoint, to the same bits. The heartbeat detects a stop or a
pause. SIGTERM makes the worker give the job back at a checkpoint. If several processes share the job,
they only run the training (:mod:`luthier.engine.processes`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from luthier.data.tree import READING_BUDGET
from luthier.engine.metrics import MetricsFile
from luthier.engine.processes import SHUTDOWN_SECONDS, check_room
from luthier.engine.runs import METRICS, Run
from luthier.errors import (
    Interrupted,
    LuthierError,
    QuotaExceeded,
    RecipeError,
    UnknownModel,
    WrongState,
)
from luthier.files import folder_size, verify
from luthier.formatting import finite_or_none
from luthier.inference.reply_log import logged_for
from luthier.library import models
from luthier.library.models import StoredModel, find
from luthier.recipe import DataSpec, parse
from luthier.server.jobs import output_files as outputs
from luthier.server.jobs.comparison import compare_with_active
from luthier.server.jobs.data import JobData, fetch_data
from luthier.server.jobs.folders import tidy
from luthier.server.jobs.job_reporter import JobReporter
from luthier.server.jobs.processes import NO_SPACE
from luthier.server.jobs.worker import (
    AGAIN,
    BEAT,
    RENEWAL,
    Heartbeat,
    Worker,
    is_shortage,
)
from luthier.server.tables import jobs, queue, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import (
    ENDED,
    PAUSED,
    RUNNING,
    STOPPING,
    Job,
    JobResult,
    run_name,
)
from luthier.workflows.pipeline import KINDS

_log = logging.getLogger(__name__)
EXAMPLES = 3
"""Maximum number of validation rows in a result."""
EXAMPLES_READ, LONGEST_EXAMPLE = 100, 2000
"""Number of rows that are read for the examples, and the maximum length of an example as JSON."""


class JobHeartbeat(Heartbeat):
    """Stores the reports of the run, and interrupts the main thread after a stop or a pause."""

    def __init__(
        self,
        database: Database,
        job: Job,
        lease: str,
        reporter: JobReporter,
        repeat_seconds: float = AGAIN,
    ) -> None:
        super().__init__(self.beat, BEAT, repeat_seconds)
        self.database, self.reporter = database, reporter
        self.job_id, self.lease = job.id, lease
        self.limit, self.before = job.time_limit, job.worked
        self.started = self._renewed = time.monotonic()
        self.reason: str | None = None
        """Reason of the interruption: ``stop``, ``pause`` or ``time``; ``None`` before."""

    @property
    def seconds_worked(self) -> float:
        """Seconds of work on the job, earlier workers included."""
        return self.before + time.monotonic() - self.started

    def beat(self) -> None:
        """Store pending reports, renew the lease, and interrupt the work if necessary."""
        pending = self.reporter.drain()
        try:
            # Most beats only read, because SQLite allows one writer at a time.
            if pending or time.monotonic() - self._renewed > RENEWAL:
                with self.database.write() as session:
                    job = jobs.renew(
                        session,
                        self.job_id,
                        self.lease,
                        worked=self.seconds_worked,
                        **pending.details,
                    )
                    jobs.add_events(session, pending.events)
                self._renewed = time.monotonic()
            else:
                with self.database.read() as session:
                    job = queue.read_leased(session, Job, self.job_id, self.lease)
        except Exception:
            self.reporter.restore(pending)
            raise
        self._obey(job)

    def _obey(self, job: Job) -> None:
        reason = {STOPPING: "stop", PAUSED: "pause"}.get(job.state)
        if reason is None and job.state != RUNNING:
            reason = "pause"  # resumed before this worker had ended
        if reason is None and self.limit is not None and self.seconds_worked > self.limit:
            reason = "time"
        if reason is None:
            return
        self.reason = reason
        self.interrupt()


class TrainingWorker(Worker[Job]):
    """Worker of a customization job."""

    table = Job
    release_message = "The worker wrote a checkpoint and released the job."

    _model_bytes = 0
    _withheld: str | None = None
    """Reason why the model must not be used."""
    account = ""
    data: JobData | None = None

    def remove_ended(self) -> None:
        """Remove the working files if the job is gone, or ended before this worker started."""
        with self.database.read() as session:
            job = session.scalars(select(Job).where(Job.id == self.row_id)).first()
        if job is None or (job.state in ENDED and not job.has_working_files):
            self.folders.remove_working_files()

    def work(self, row: Job) -> int:
        """Train, verify and write the outputs. Returns the exit status."""
        self.account = row.account
        reporter = JobReporter(row, self._rename)
        with self.database.read() as session:
            reporter.remember(session)
        # A second signal would end the parent of several processes before their checkpoint.
        again = AGAIN if self.processes == 1 else SHUTDOWN_SECONDS
        heartbeat = JobHeartbeat(self.database, row, self.lease, reporter, again)
        heartbeat.start()
        try:
            result = self._train(row, reporter)
            self.ending = True
            return self._end(
                heartbeat,
                lambda s: jobs.complete(
                    s, row.id, self.lease, result, self._model_bytes, self.quotas, self._withheld
                ),
            )
        except (Interrupted, KeyboardInterrupt) as error:
            self.ending = True
            return self._end_interrupted(row, heartbeat, error)
        except OperationalError:
            _log.exception("the database does not answer; another worker will resume the job")
            return 1
        except Exception as error:
            self.ending = True
            return self._end_failed(row, heartbeat, error)

    def _train(self, job: Job, reporter: JobReporter) -> JobResult:
        """Train and write the outputs, and return the result of the job."""
        reporter.part("validation", "InProgress")
        self.data = data = self.retry(lambda: fetch_data(job, self.folders, self.locations))
        kind = KINDS[job.command]
        recipe = parse(kind.recipe, recipe_fields(job, data))
        base = self.retry(lambda: find(job.recipe["base"], reporter.stage))
        work = Run(base.root, run_name(job.id))
        metrics = MetricsFile(work.folder / METRICS)
        if "progress" in reporter.details:
            # A killed worker may have written metrics to the file but not to the database. The
            # reporter skips the stored ones.
            for line in metrics.read():
                reporter.metrics(line, reporter.details["progress"]["steps"])
        with logged_for(job.account, run_name(job.id)):
            run = kind.run(recipe, reporter, self._count_processes(reporter))
        for line in metrics.read():
            reporter.metrics(line, int(run["steps"]))
        verdicts = []
        if verdict := run["verdict"]:
            verdicts.append(f"{verdict['text']}. {verdict['advice']}".strip())
        if (comparison := run.get("comparison")) and comparison["verdict"]:
            verdicts.append(comparison["verdict"])
        for text in verdicts:
            reporter.note(text)
        if (found := run.get("label_issues")) and found["issues"]:
            count = f"{found['issues']:,} possible label error{'s' * (found['issues'] != 1)}"
            reporter.note(f"{count} in {found['rows']:,} rows")
            records = work.read_label_issues()
            work.write_label_issue_records(
                [{**each, "file": data.show_addresses(each["file"])} for each in records]
            )
        reporter.part("training", "Completed")
        model = find(run["model_id"])
        self._withheld = model.manifest.withheld
        verify(model.folder, model.manifest.files)
        self._model_bytes = folder_size(model.folder)
        with self.database.read() as session:
            quotas = quotas_of(session, job.account, self.quotas)
            # Checked before the outputs are written.
            storage.check(session, job.account, quotas, stored_bytes=self._model_bytes)
        result = JobResult(
            stored_id=model.id,
            steps=run["steps"],
            tokens=run["tokens"],
            train_loss=run["train_loss"],
            validation_losses=_validation_losses(model, job, data, run["validation_loss"]),
        )
        if verdicts:
            result["verdicts"] = list(map(reporter.rename, verdicts))
        if plan := job.details.get("retraining"):
            reporter.stage("Comparison with the model before")
            result["retraining"] = compare_with_active(job, plan, model, self.locations)
            verdicts.append(result["retraining"]["verdict"])
            reporter.note(verdicts[-1])
            result["verdicts"] = list(map(reporter.rename, verdicts))
        if examples := _held_out_examples(model, data):
            result["examples"] = examples
        if found:
            result["label_issues"] = found
        if job.output is not None:
            address = job.output
            for name, content in outputs.files(
                job, model, metrics.read(), run["rows"], result, data
            ):

                def write(name: str = name, content: bytes = content) -> None:
                    self.locations.write(job.account, address, name, content)

                self.retry(write)
        return result

    def _count_processes(self, reporter: JobReporter) -> int:
        """Return the number of training processes: 1 if memory is short."""
        if self.processes > 1:
            try:
                check_room(self.processes)
            except RecipeError as error:
                reporter.note(f"warning: the job trains on one process: {error}")
                return 1
        return self.processes

    def _end_interrupted(self, job: Job, heartbeat: JobHeartbeat, error: BaseException) -> int:
        if heartbeat.reason == "time":
            failure = (
                f"the time limit of {heartbeat.limit} seconds was reached ({error}). Set fewer epochs "
                "or a higher limit."
            )
            return self._end(heartbeat, lambda s: jobs.fail(s, self.row_id, self.lease, failure))
        return self._end(heartbeat, lambda s: self.release(s, self.release_message))

    def _end_failed(self, job: Job, heartbeat: JobHeartbeat, error: Exception) -> int:
        if isinstance(error, WrongState):
            # The job was stopped or paused at the last moment.
            return self._end_interrupted(job, heartbeat, error)
        if is_shortage(error):
            _log.exception("no memory or disk space for job %s", self.row_id)
            self._end(heartbeat, partial(self.give_back, error=error))
            return NO_SPACE
        _log.exception("job %s failed", self.row_id)
        failure = self._rename(explain(error))
        return self._end(heartbeat, lambda s: jobs.fail(s, self.row_id, self.lease, failure))

    def _end(self, heartbeat: JobHeartbeat, change: Callable[[Session], object]) -> int:
        """Write the last transaction with pending reports, then remove working files."""
        heartbeat.finish()
        pending = heartbeat.reporter.drain()

        def write(session: Session) -> Job:
            ended = jobs.renew(
                session, self.row_id, self.lease, worked=heartbeat.seconds_worked, **pending.details
            )
            jobs.add_events(session, pending.events)
            change(session)
            return ended

        try:
            job = self.write(write)
        except (QuotaExceeded, WrongState):
            # The transaction is rolled back. The transaction of the failure writes the reports.
            heartbeat.reporter.restore(pending)
            raise
        if job.state in ENDED:
            tidy(self.database, job, self.folders)
        return 0

    def release(self, session: Session, message: str) -> None:
        """Give the job back with a reason that names no path of the server."""
        super().release(session, self._rename(message))

    def _rename(self, text: str) -> str:
        """Return ``text`` with addresses, or names of files, in place of the server's paths."""
        shown = self.data.show_addresses(text) if self.data else text
        return self.locations.uploads.with_names(self.account, shown)


def explain(error: Exception) -> str:
    """Return the failure message of a job for the job's owner."""
    if isinstance(error, UnknownModel):
        # The error of the library names models of other accounts.
        return "the base model or the teacher of the job does not exist any more."
    return str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"


def recipe_fields(job: Job, data: JobData) -> dict[str, Any]:
    """Return the job's recipe with the paths of the fetched rows."""
    rows = {**job.recipe["data"], "train": data.source}
    if data.validation is not None:
        rows["validation"] = data.validation
    return {**job.recipe, "data": rows}


def _held_out_examples(model: StoredModel, data: JobData) -> list[dict[str, Any]]:
    """Return short rows that the model has not learned, with different targets if possible."""
    from luthier.data.rows import RowReader
    from luthier.engine.dataset import checker_for

    lines = model.manifest.data.held_out if model.manifest.data else {}
    files = [*lines] if lines or data.validation is None else [data.validation]
    columns = (model.manifest.recipe or {}).get("data", {}).get("columns")
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        rows = RowReader(file, columns, checker_for(model.objective), accepts_own_keys=True)
        held = (row for row in rows if not lines or row.line in lines[file])
        for row in islice(held, EXAMPLES_READ):
            wanted = row.expected_reply() or row.target()
            turns = [{"role": each.role, "content": each.reply_text} for each in row.prompt_turns()]
            example = {"messages": turns} if turns else row.input_record()
            # The console shows text only; the input of a media row is a path of the server.
            if not example.keys() & {"messages", "text"}:
                continue
            text = json.dumps({**example, "wanted": wanted}, ensure_ascii=False)
            if wanted is not None and len(text) <= LONGEST_EXAMPLE:
                found.setdefault(str(wanted), json.loads(text))
    return [*found.values()][:EXAMPLES]


def _validation_losses(
    model: StoredModel, job: Job, data: JobData, together: float | None
) -> list[float | None]:
    """Return the loss on each validation file; ``together`` is the loss on all files."""
    if len(data.validators) < 2:
        return [together] if data.validators and together is not None else []
    # These modules take seconds to import, and most jobs have at most one validator.
    from luthier.engine.dataset import prepare
    from luthier.engine.machine import choose_machine
    from luthier.models.load import as_network

    objective, chat = model.objective, model.chat
    training = job.recipe.get("training", {})
    machine = choose_machine(training.get("precision", "auto"), training.get("threads"))
    loaded = models.load(model, machine.dtype, machine.device, objective.head())
    network = as_network(loaded, machine.device, machine.dtype)
    network.chat = chat
    shared = ("long_rows", "columns", "severity")
    fields = {key: value for key, value in job.recipe["data"].items() if key in shared}
    fields |= {"validation_share": 0.0, "test_share": 0.0}
    losses = []
    for number in range(len(data.validators)):
        rows = DataSpec.model_validate({**fields, "train": data.validator(number)})
        examples = prepare(rows, objective, chat, model.room, 0).train
        losses.append(objective.validation_metrics(network, examples, READING_BUDGET)["loss"])
    return [finite_or_none(loss) for loss in losses]
