"""Background work on eval runs: query the model for each row, grade the reply, store the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import RefusedInput, RowRefused
from luthier.files import numbered_lines
from luthier.graders import Answer, GraderModels, JsonSchema
from luthier.limits import AccountQuotas, ServerLimits
from luthier.pages import shorten
from luthier.server.background import BackgroundRunner
from luthier.server.http.messages import Caller, Fault, parse_json
from luthier.server.openai.eval_runs import (
    MOST_ROWS,
    SEED,
    TEMPERATURE,
    TOP_P,
    Criterion,
    DataSource,
    FileContent,
    FileId,
    parse_criteria,
)
from luthier.server.openai.generation import Answers, Judge
from luthier.server.openai.graders import grade_reply, text_content
from luthier.server.openai.protocol import error_of, invalid, validate
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.database import Database, now
from luthier.server.tables.openai import evaluations as store
from luthier.server.tables.openai.evaluations import EvaluationRun, GradedRow
from luthier.server.tables.usage import CountUsage

MOST_ROW_BYTES = 262_144
"""Maximum size of a row in bytes, equal to the size of text that graders accept."""
MOST_PROBLEMS = 5
"""Number of invalid rows after which a run fails."""
AT_ONCE = 4
"""Number of rows of a run that are graded concurrently. A row may need a process for graders."""
CHECK_SECONDS = 60.0
"""Time limit for checking all rows of a run, in seconds. 50,000 short rows need about 10 seconds."""


@dataclass(frozen=True)
class EvalParts:
    """Services for eval tasks."""

    files: UploadedFiles
    answers: Answers
    """Return the chat completion for a body."""
    judges: Callable[[str], Judge]
    """Return the function that finds grading models of an account."""
    models: GraderModels
    limits: ServerLimits


class EvalTask:
    """Work of an eval run. A server that resumes the run creates the task again."""

    def __init__(self, parts: EvalParts, run: EvaluationRun, caller: Caller) -> None:
        """Parse the run's request, with the permissions of ``caller``.

        Raises:
            Fault: If a grading model is deleted or forbidden.
        """
        self.parts, self.run = parts, run
        request = run.request
        self.source = validate(request["data_source"], DataSource, "data_source")
        self.schema = JsonSchema(against=request["item_schema"])
        judge, names = parts.judges(caller.account), dict[str, str]()

        def find(name: str, where: str) -> str:
            stored_id = judge(name, where)
            # Usage is reported under the name that the client sent.
            names.setdefault(stored_id, name)
            return stored_id

        criteria = parse_criteria(request["testing_criteria"], find)
        self.criteria = [criterion.open(parts.models) for criterion in criteria]
        if self.source.model is not None:
            # If the evaluated model is deleted, each row reports the error.
            try:
                names[judge(self.source.model, "data_source.model")] = self.source.model
            except Fault as fault:
                if fault.code == "AccessDenied":
                    raise
        self.model_names: Mapping[str, str] = names
        """Names of models in the run, by model id in the library."""

    def count_rows(self) -> int:
        """Check all rows and return the number of rows.

        Raises:
            RefusedInput: If rows are invalid; the message names the rows and reasons.
        """
        count, problems, deadline = 0, list[str](), time.monotonic() + CHECK_SECONDS
        for count, (number, line) in enumerate(self._lines(), 1):
            if count > MOST_ROWS:
                raise RefusedInput(f"A run has at most {MOST_ROWS:,} rows.")
            # A schema may be slow on purpose, and the account's other runs wait.
            if time.monotonic() > deadline:
                raise RefusedInput(
                    f"Checking the rows takes more than {CHECK_SECONDS:.0f} seconds. Use fewer rows."
                )
            if problem := self._problem(line):
                problems.append(f"row {number}: {problem}")
            if len(problems) == MOST_PROBLEMS:
                break
        if problems or not count:
            raise RefusedInput(" ".join(problems) or "The source has no rows.")
        return count

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield row numbers, from 1, and rows with ``item`` and ``sample``."""
        for number, line in self._lines():
            # All rows were checked, so no error can occur here.
            yield number, json.loads(line)

    def grade(self, number: int, row: Any) -> GradedRow:
        """Query the model, if the run has a model, and grade the reply.

        Raises:
            Fault: If the model does not reply.
        """
        # Rows with replies need no model.
        item = row["item"]
        if self.source.type == "jsonl":
            text = (row.get("sample") or {}).get("output_text")
            output = [] if text is None else [{"role": "assistant", "content": text}]
            sample = _sample(output=output)
        else:
            try:
                messages = self.source.messages(self._answer(number, item, ""))
            except RowRefused as error:
                raise invalid(error.problem.message, reason=error.rule) from error
            body = self.source.chat_body(messages)
            sample = _sample_of(body, self.parts.answers(self.run.account, body))
        reply = "".join(message["content"] or "" for message in sample["output"])
        answer = self._answer(number, item, reply)
        results = [_result(criterion, answer) for criterion in self.criteria]
        statuses = {
            each["name"]: store.ERROR if "error" in each
            else store.PASS if each["passed"] else store.FAIL
            for each in results
        }  # fmt: skip
        worst = next((s for s in (store.ERROR, store.FAIL) if s in statuses.values()), store.PASS)
        return GradedRow(worst, {"item": item, "results": results, "sample": sample}, statuses)

    def error_row(self, row: Any, fault: Fault) -> GradedRow:
        """Return the result to store for a row that failed with ``fault``."""
        error = error_of(fault)
        shown = {"code": error["code"] or error["type"], "message": error["message"]}
        sample = _sample(model=self.source.model or "", error=shown, finish_reason="error")
        return GradedRow(store.ERROR, {"item": row["item"], "results": [], "sample": sample})

    def _answer(self, number: int, item: Mapping[str, Any], reply: str) -> Answer:
        row = PromptOnly("item", number, "", members=item)
        return Answer((), reply, None, row, self.parts.limits.grading_text_characters)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        source = self.source.source
        if isinstance(source, FileContent):
            rows = self.run.request["data_source"]["source"]["content"]
            yield from ((number, json.dumps(row).encode()) for number, row in enumerate(rows, 1))
        elif isinstance(source, FileId):
            file = self.parts.files.get(self.run.account, source.id)
            if file is None:
                raise RefusedInput(f"The file {source.id} is deleted.")
            yield from numbered_lines(self.parts.files.read(file), MOST_ROW_BYTES)

    def _problem(self, line: bytes) -> str:
        """Return the problem of a row, or an empty string."""
        if len(line) > MOST_ROW_BYTES:
            return f"The row has more than {MOST_ROW_BYTES:,} bytes. Shorten or split the row."
        try:
            row = parse_json(line)
        except (Fault, ValueError) as error:
            return f"The row is not valid JSON: {str(error).rstrip('.')}."
        if not isinstance(row, dict) or not isinstance(row.get("item"), dict):
            return "'item' is missing or not an object."
        sample = row.get("sample") or {}
        if not isinstance(sample, dict) or not isinstance(sample.get("output_text", ""), str):
            return "'sample' is not an object with a text 'output_text'."
        try:
            mismatch = self.schema.first_error(row["item"])
        except (TimeoutError, ValueError) as slow:
            raise RefusedInput(f"The item_schema cannot be applied: {slow}.") from slow
        # jsonschema repeats the whole value.
        return f"'item' does not match item_schema: {shorten(mismatch)}." if mismatch else ""


def _result(criterion: Criterion, answer: Answer) -> dict[str, Any]:
    score, parts, error = grade_reply(criterion.grader, answer)
    result: dict[str, Any] = {
        "name": criterion.name,
        "type": criterion.type,
        "score": score,
        "passed": error is None and score >= criterion.threshold,
        "sample": None,
    }
    if parts:
        result["sub_scores"] = parts
    if error is not None:
        result["error"] = {"code": error.rule, "message": error.problem.message}
    return result


def _sample(**members: Any) -> dict[str, Any]:
    """Return a sample with all members of OpenAI's object; absent ``members`` have no reply."""
    usage = dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"), 0
    )
    return {
        "input": [], "output": [], "finish_reason": "", "model": "", "usage": usage, "error": None,
        "temperature": TEMPERATURE, "max_completion_tokens": 0, "top_p": TOP_P, "seed": SEED,
    } | members  # fmt: skip


def _sample_of(body: Mapping[str, Any], completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample of a chat request and completion."""
    (choice,), usage = completion["choices"], completion["usage"]
    message = choice["message"]
    output = {"role": "assistant", "content": message["content"] or ""}
    if "tool_calls" in message:
        output["tool_calls"] = message["tool_calls"]
    tokens = ("prompt_tokens", "completion_tokens", "total_tokens")
    sampling = ("model", "temperature", "max_completion_tokens", "top_p", "seed")
    return _sample(
        input=[
            {"role": turn["role"], "content": text_content(turn.get("content")) or ""}
            for turn in body["messages"]
        ],
        output=[output],
        finish_reason=choice["finish_reason"],
        usage={name: usage[name] for name in tokens} | {"cached_tokens": 0},
        **{name: body[name] for name in sampling},
    )


class EvaluationRunner(BackgroundRunner[EvaluationRun, GradedRow]):
    """Thread that works on eval runs. Several servers may share a database."""

    kind, at_once, working = EvaluationRun, AT_ONCE, store.IN_PROGRESS
    action = "luthier:openai.evals.runs.create"
    gives_up = True

    def __init__(
        self,
        database: Database,
        make_task: Callable[[EvaluationRun, Caller], EvalTask],
        quotas: Callable[[Session, str], AccountQuotas],
        count: CountUsage = lambda account, user, model, used: None,
    ) -> None:
        super().__init__(database, count)
        self.make_task, self.quotas = make_task, quotas

    def work(self, run: EvaluationRun) -> None:
        """Check the rows of ``run``, grade each row without a result, and end the run."""
        task = self.make_task(run, self.caller_of(run))
        # A resumed run was counted before.
        if run.status == store.QUEUED:
            total = task.count_rows()
            with self.database.write() as session:
                locked = self.lock_held(session, run)
                if locked is not None and locked.status == store.QUEUED:
                    locked.total, locked.status = total, store.IN_PROGRESS
        with self.database.read() as session:
            done = store.done_rows(session, run.id)
        left = ((number, (number, row)) for number, row in task.rows() if number not in done)
        if self.work_through(run, left, partial(self._grade, run, task)):
            self._end(run)

    def record(self, session: Session, run: EvaluationRun, number: int, graded: GradedRow) -> None:
        """Store the result of a row, unless the run was cancelled."""
        if run.status == store.IN_PROGRESS:
            store.record(session, run, self.quotas(session, run.account), number, graded)

    def state(self, run: EvaluationRun) -> str:
        """Return the status of ``run``, or ``failed`` after the time limit."""
        return store.FAILED if now() > run.expires else run.status

    def fail(self, run: EvaluationRun, code: str, message: str) -> None:
        """End ``run`` with an error; results of graded rows remain."""
        self._end(run, code, message)

    def _grade(self, run: EvaluationRun, task: EvalTask, piece: tuple[int, Any]) -> GradedRow:
        number, row = piece
        self.caller_of(run)  # the role must still allow the run
        calls: list[tuple[str, int, int]] = []

        def count(model: str, prompt: int, generated: int) -> None:
            calls.append((task.model_names.get(model, model), prompt, generated))
            self.count_tokens(run, model, prompt, generated)

        try:
            graded = self.attempt(run, partial(task.grade, number, row), count)
        except Fault as fault:
            graded = task.error_row(row, fault)
        return replace(graded, usage=calls)

    def _end(self, run: EvaluationRun, code: str | None = None, message: str | None = None) -> None:
        """End ``run``, unless a client canceled the run; with ``code``, the run failed."""
        with self.database.write() as session:
            locked = self.lock_held(session, run)
            if locked is None or locked.status in store.ENDED:
                return
            if code is None and now() > locked.expires:
                hours = store.PATIENCE.total_seconds() / 3600
                message = (
                    f"The run takes more than {hours:.0f} hours. Results of graded rows remain."
                )
                code = "expired"
            store.end(locked, store.FAILED if code else store.COMPLETED, code, message)
