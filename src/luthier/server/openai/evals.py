"""``/evals``: how rows are graded, runs of that on sources of rows, and what came of each row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy import select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.errors import RecipeError
from luthier.graders import JsonSchema
from luthier.limits import ServerLimits
from luthier.server.http.messages import Request, Response
from luthier.server.http.routing import Operation
from luthier.server.openai.eval_report import report_object, report_page
from luthier.server.openai.eval_runner import EvaluationRunner
from luthier.server.openai.eval_runs import (
    MOST_CRITERIA,
    DataSource,
    EvalParts,
    FileId,
    Name,
    criteria_of,
)
from luthier.server.openai.generation import Inference
from luthier.server.openai.protocol import (
    Body,
    Metadata,
    Recorder,
    absent,
    body,
    invalid,
    is_ascending,
    one_of,
    page,
    page_query,
    seconds,
    text_of,
)
from luthier.server.tables import evaluations as store
from luthier.server.tables import storage
from luthier.server.tables.database import Database, now, page_of
from luthier.server.tables.evaluations import Eval, EvaluationRow, EvaluationRun

_CONTENT = "evals.runs.content"
"""Action for reading the rows of a run."""
_STATUSES = (store.QUEUED, store.IN_PROGRESS, store.COMPLETED, store.CANCELED, store.FAILED)
_FILTERS = {"pass": store.PASS, "fail": store.FAIL, "failed": store.FAIL, "error": store.ERROR}
"""``failed`` is what OpenAI's documentation says, and ``fail`` what its types do."""


class CustomConfig(Body):
    """Rows of one's own."""

    type: Literal["custom"]
    item_schema: dict[str, Any]
    include_sample_schema: bool = False


class LogsConfig(Body):
    """Answers that OpenAI would have kept."""

    type: Literal["logs", "stored_completions"]


class CreateEval(Body):
    """The body of a new eval."""

    data_source_config: Annotated[CustomConfig | LogsConfig, Field(discriminator="type")]
    testing_criteria: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_CRITERIA)]
    name: Name | None = None
    metadata: Metadata = None


class UpdateEval(Body):
    """What may be changed of an eval."""

    name: Name | None = None
    metadata: Metadata = None


class CreateRun(Body):
    """The body of a new run."""

    data_source: DataSource
    name: Name | None = None
    metadata: Metadata = None


class Evals:
    """The resource."""

    def __init__(
        self,
        database: Database,
        parts: EvalParts,
        inference: Inference,
        recorder: Recorder,
        runner: EvaluationRunner,
        limits: ServerLimits,
    ) -> None:
        self.database, self.parts, self.inference = database, parts, inference
        self.recorder, self.runner, self.limits = recorder, runner, limits

    def operations(self) -> Iterable[Operation]:
        """What can be done with evals."""
        one = "evals/{eval}"
        run = f"{one}/runs/{{run}}"
        most = self.limits.grading_body_bytes
        return (
            Operation("evals.create", "POST", "evals", self.create, body_limit=most, grading=True),
            Operation("evals.list", "GET", "evals", self.list),
            Operation("evals.retrieve", "GET", one, self.retrieve),
            Operation("evals.update", "POST", one, self.update),
            Operation("evals.delete", "DELETE", one, self.delete),
            Operation("evals.runs.create", "POST", f"{one}/runs", self.create_run, body_limit=most),
            Operation("evals.runs.list", "GET", f"{one}/runs", self.list_runs),
            Operation("evals.runs.retrieve", "GET", run, self.retrieve_run),
            # Older clients cancel a run by a POST to itself.
            Operation("evals.runs.cancel", "POST", run, self.cancel_run),
            Operation("evals.runs.cancel", "POST", f"{run}/cancel", self.cancel_run),
            Operation("evals.runs.delete", "DELETE", run, self.delete_run),
            Operation("evals.runs.retrieve", "GET", f"{run}/report", self.report),
            Operation(
                "evals.runs.output_items.list", "GET", f"{run}/output_items", self.list_items
            ),
            Operation(
                "evals.runs.output_items.retrieve",
                "GET",
                f"{run}/output_items/{{item}}",
                self.retrieve_item,
            ),
        )

    def create(self, request: Request) -> Response:
        """Say how rows are graded; 400 for a criterion that cannot be used."""
        parameters = body(request, CreateEval)
        self.recorder.record(request, "evals.create", "eval")
        config = parameters.data_source_config
        if isinstance(config, LogsConfig):
            text = "Answers are not kept here: use 'custom', and send rows with each run."
            raise invalid(text, "data_source_config.type", "unsupported_value")
        try:
            JsonSchema(against=config.item_schema).check()
        except RecipeError as error:
            raise invalid(error.text, "data_source_config.item_schema", "invalid_value") from error
        if config.item_schema.get("type", "object") not in ("object", ["object"]):
            text = "An item is an object: no row could match this item_schema."
            raise invalid(text, "data_source_config.item_schema.type", "invalid_value")
        criteria = parameters.testing_criteria
        criteria_of(criteria, self.inference.judge(request.caller), config.item_schema)
        definition = {
            "data_source_config": config.model_dump(),
            "testing_criteria": criteria,
        }
        account = request.caller.account
        with self.database.write() as session:
            row = store.create_eval(
                session,
                account,
                self.runner.quotas(session, account),
                parameters.name or "Eval",
                definition,
                parameters.metadata or {},
            )
        return Response.json(eval_object(row), 201)

    def list(self, request: Request) -> Response:
        """A page of evals, the oldest first unless asked otherwise."""
        self.recorder.record(request, "evals.list")
        limit, after = page_query(request)
        ascending = is_ascending(request, "asc")
        by = one_of("order_by", text_of(request, "order_by") or "created_at",
                    ("created_at", "updated_at"))  # fmt: skip
        moment: InstrumentedAttribute[Any] = Eval.created if by == "created_at" else Eval.updated
        query = select(Eval).where(Eval.account == request.caller.account)
        with self.database.read() as session:
            if after is not None:
                place = store.get_eval(session, request.caller.account, after)
                if place is None:
                    raise invalid(f"No such eval: {after}.", "after")
                position = tuple_(moment, Eval.seq)
                last_shown = (getattr(place, moment.key), place.seq)
                query = query.where(position > last_shown if ascending else position < last_shown)
            order = [each.asc() if ascending else each.desc() for each in (moment, Eval.seq)]
            found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
        return page(found, limit, eval_object)

    def retrieve(self, request: Request) -> Response:
        """One eval."""
        with self.database.read() as session:
            return Response.json(eval_object(self._find_eval(request, session, "evals.retrieve")))

    def update(self, request: Request) -> Response:
        """Rename an eval, or give it other metadata."""
        parameters = body(request, UpdateEval)
        with self.database.write() as session:
            row = self._find_eval(request, session, "evals.update", lock=True)
            if parameters.name is not None:
                row.name = parameters.name
            if parameters.metadata is not None:
                row.user_metadata = parameters.metadata
            row.updated = now()
        return Response.json(eval_object(row))

    def delete(self, request: Request) -> Response:
        """Forget an eval and its runs; refused while one of them goes on."""
        with self.database.write() as session:
            row = self._find_eval(request, session, "evals.delete", lock=True)
            runs = select(EvaluationRun).where(EvaluationRun.eval_id == row.id).with_for_update()
            for run in session.scalars(runs).all():
                _refuse_unended(run)
                store.delete_run(session, run)
            session.delete(row)
            session.flush()
            storage.release(session, row.account, stored_bytes=row.stored_bytes)
        return Response.json({"object": "eval.deleted", "deleted": True, "eval_id": row.id})

    def create_run(self, request: Request) -> Response:
        """Take a run; its rows are looked at in the background."""
        parameters = body(request, CreateRun)
        caller = request.caller
        with self.database.read() as session:
            row = self._find_eval(request, session, "evals.runs.create")
        source, definition = parameters.data_source, row.definition
        source.check(definition["data_source_config"]["item_schema"])
        if isinstance(source.source, FileId):
            found = self.parts.files.get(caller.account, source.source.id)
            if found is None:
                text = f"No such file: {source.source.id}."
                raise invalid(text, "data_source.source.id", "file_not_found")
        if source.model is not None and source.type != "jsonl":
            self.inference.check(
                caller, "chat.completions.create", source.model, "data_source.model"
            )
        source.check_constraint(self.inference.check_constraint)
        given = request.json
        asked = {
            "data_source": given["data_source"],
            "testing_criteria": definition["testing_criteria"],
            "item_schema": definition["data_source_config"]["item_schema"],
        }
        with self.database.write() as session:
            self._find_eval(request, session, "evals.runs.create", lock=True)
            run = self.runner.create(
                session,
                caller,
                name=parameters.name or row.name,
                request=asked,
                metadata=parameters.metadata or {},
                eval_id=row.id,
            )
        self.runner.wake()
        return Response.json(run_object(run, request, rows=True), 201)

    def list_runs(self, request: Request) -> Response:
        """A page of runs, the oldest first unless asked otherwise."""
        limit, after = page_query(request)
        ascending, status = is_ascending(request, "asc"), text_of(request, "status")
        with self.database.read() as session:
            row = self._find_eval(request, session, "evals.runs.list")
            query = select(EvaluationRun).where(EvaluationRun.eval_id == row.id)
            if status is not None:
                query = query.where(EvaluationRun.status == one_of("status", status, _STATUSES))
            position = None
            if after is not None:
                place = store.get_run(session, row.account, after)
                if place is None or place.eval_id != row.id:
                    raise invalid(f"No such run: {after}.", "after")
                position = place.seq
            found = page_of(
                session, query, EvaluationRun.seq,
                limit=limit + 1, position=position, ascending=ascending,
            )  # fmt: skip
        return page(found, limit, lambda run: run_object(run, request))

    def retrieve_run(self, request: Request) -> Response:
        """One run."""
        with self.database.read() as session:
            run = self._find_run(request, session, "evals.runs.retrieve")
        return Response.json(run_object(run, request))

    def cancel_run(self, request: Request) -> Response:
        """Ask no further row; those that are graded stay."""
        with self.database.write() as session:
            run = self._find_run(request, session, "evals.runs.cancel", lock=True)
            if run.status in store.ENDED:
                text = f"The run is {run.status}; it cannot be canceled any more."
                raise invalid(text, reason="invalid_state")
            store.end(run, store.CANCELED)
        self.runner.wake()
        return Response.json(run_object(run, request))

    def delete_run(self, request: Request) -> Response:
        """Forget a run that has ended, and what came of its rows."""
        with self.database.write() as session:
            run = self._find_run(request, session, "evals.runs.delete", lock=True)
            _refuse_unended(run)
            store.delete_run(session, run)
        return Response.json({"object": "eval.run.deleted", "deleted": True, "run_id": run.id})

    def report(self, request: Request) -> Response:
        """Return the report of a run as an HTML page, or with ``?format=json`` as JSON.

        A browser has no key: :class:`luthier.server.console.routes.Console` redirects it to the
        console, which asks for the JSON with the key of its user.
        """
        form = one_of("format", text_of(request, "format") or "html", ("html", "json"))
        with self.database.read() as session:
            run = self._find_run(request, session, _CONTENT)
            if form == "json":
                return Response.json(report_object(session, run))
            text = report_page(session, run)
        kind = {"Content-Type": "text/html; charset=utf-8", "X-Content-Type-Options": "nosniff"}
        return Response(200, text.encode(), kind)

    def list_items(self, request: Request) -> Response:
        """A page of rows, in the order of the source unless asked otherwise."""
        limit, after = page_query(request)
        status = text_of(request, "status")
        if status is not None:
            status = _FILTERS[one_of("status", status, tuple(_FILTERS))]
        with self.database.read() as session:
            run = self._find_run(request, session, _CONTENT)
            position = None
            if after is not None:
                position = _number_in(run, after)
                if position is None:
                    raise invalid(f"No such output item: {after}.", "after")
            found = store.rows_of(
                session,
                run.id,
                limit + 1,
                position,
                status=status,
                ascending=is_ascending(request, "asc"),
            )
            return page(found, limit, lambda row: item_object(run, row))

    def retrieve_item(self, request: Request) -> Response:
        """One row."""
        item_id = request.params["item"]
        with self.database.read() as session:
            run = self._find_run(request, session, _CONTENT)
            number = _number_in(run, item_id)
            found = [] if number is None else store.rows_of(session, run.id, 1, number - 1)
            if not found or found[0].number != number:
                raise absent("output item", item_id, "output_item_id")
            return Response.json(item_object(run, found[0]))

    def _find_eval(
        self, request: Request, session: Session, action: str, *, lock: bool = False
    ) -> Eval:
        eval_id = request.params["eval"]
        self.recorder.record(request, action, "eval", eval_id)
        found = store.get_eval(session, request.caller.account, eval_id, lock=lock)
        if found is None:
            raise absent("eval", eval_id, "eval_id")
        return found

    def _find_run(
        self, request: Request, session: Session, action: str, *, lock: bool = False
    ) -> EvaluationRun:
        eval_id, run_id = request.params["eval"], request.params["run"]
        self.recorder.record(request, action, "eval", eval_id)
        found = store.get_run(session, request.caller.account, run_id, lock=lock)
        if found is None or found.eval_id != eval_id:
            raise absent("eval run", run_id, "run_id")
        return found


def _refuse_unended(run: EvaluationRun) -> None:
    if run.status not in store.ENDED:
        text = f"The run {run.id} is {run.status}: cancel it first."
        raise invalid(text, reason="invalid_state")


def _number_in(run: EvaluationRun, item_id: str) -> int | None:
    """The row that an output item is of; ``None`` for what is none of the run's."""
    found = re.fullmatch(
        rf"outputitem_{run.id.removeprefix('evalrun_')}-([1-9][0-9]{{0,8}})", item_id
    )
    return int(found[1]) if found else None


def eval_object(row: Eval) -> dict[str, Any]:
    """An eval as clients see it."""
    definition = row.definition
    return {
        "id": row.id,
        "object": "eval",
        "name": row.name,
        "created_at": seconds(row.created),
        "data_source_config": _shown_config(definition["data_source_config"]),
        "testing_criteria": definition["testing_criteria"],
        "metadata": row.user_metadata,
    }


def _shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of what criteria can name: the item, and the sample where rows bring or get one."""
    properties = {"item": config["item_schema"]}
    if config["include_sample_schema"]:
        properties["sample"] = {
            "type": "object",
            "properties": {"output_text": {"type": "string"}},
            "required": ["output_text"],
        }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "custom", "schema": schema}


def run_object(run: EvaluationRun, request: Request, rows: bool = False) -> dict[str, Any]:
    """A run as clients see it; who brought ``rows`` sees them here, and all others as output items."""
    source = dict(run.request["data_source"])
    if not rows and "content" in source["source"]:
        source["source"] = {**source["source"], "content": []}
    criteria, usage = run.tallies.get("criteria", {}), run.tallies.get("usage", {})
    error = {"code": run.error_code, "message": run.error_message} if run.error_code else None
    return {
        "id": run.id,
        "object": "eval.run",
        "eval_id": run.eval_id,
        "name": run.name,
        "created_at": seconds(run.created),
        "status": run.status,
        "model": source.get("model") or "",
        "data_source": source,
        "error": error,
        "report_url": _report_url(run, request),
        "result_counts": {
            "total": run.passed + run.failed + run.errored,
            "passed": run.passed,
            "failed": run.failed,
            "errored": run.errored,
        },
        "per_testing_criteria_results": [
            {"testing_criteria": name, "passed": passed, "failed": failed, "errored": errored}
            for name, (passed, failed, errored) in criteria.items()
        ],
        "per_model_usage": [
            {
                "model_name": model,
                "invocation_count": calls,
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
                "cached_tokens": 0,
            }
            for model, (calls, read, written) in usage.items()
        ],
        "metadata": run.user_metadata,
    }


def _report_url(run: EvaluationRun, request: Request) -> str:
    """Return the address of the report, on the host that the client used.

    The address contains no key. A proxy's header about TLS is trusted here only, because only the
    sender of the header sees the address.
    """
    prefix = request.path.partition("/evals")[0]
    host = request.headers.get("host", "localhost")
    encrypted = request.tls or request.headers.get("x-forwarded-proto") == "https"
    scheme = "https" if encrypted else "http"
    return f"{scheme}://{host}{prefix}/evals/{run.eval_id}/runs/{run.id}/report"


def item_object(run: EvaluationRun, row: EvaluationRow) -> dict[str, Any]:
    """A row as clients see it."""
    record = row.record
    return {
        "id": f"outputitem_{run.id.removeprefix('evalrun_')}-{row.number}",
        "object": "eval.run.output_item",
        "created_at": seconds(row.graded),
        "eval_id": run.eval_id,
        "run_id": run.id,
        "status": row.status,
        "datasource_item_id": row.number,
        "datasource_item": record["item"],
        "results": record["results"],
        "sample": record["sample"],
    }
