"""``/evals``: evals, eval runs, and the results of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from sqlalchemy import select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.errors import RecipeError
from luthier.graders import JsonSchema
from luthier.server.background import caller_fields
from luthier.server.http.routes import GRADING_SLOT, Name
from luthier.server.openai.eval_report import report_object
from luthier.server.openai.eval_runs import (
    MOST_CRITERIA,
    DataSource,
    FileId,
    Label,
    parse_criteria,
)
from luthier.server.openai.operations import (
    Call,
    GraderRoute,
    Limit,
    OpenAICall,
    Order,
    openai_router,
    page,
    row_before,
)
from luthier.server.openai.protocol import (
    Body,
    JsonObject,
    Metadata,
    absent,
    existing,
    invalid,
    seconds,
)
from luthier.server.tables import storage
from luthier.server.tables.database import now, page_of
from luthier.server.tables.openai import evaluations as store
from luthier.server.tables.openai.evaluations import Eval, EvaluationRow, EvaluationRun

router, graders = openai_router(), openai_router(GraderRoute)
RunStatus = Literal["queued", "in_progress", "completed", "canceled", "failed"]
ItemStatus = Literal["pass", "fail", "failed", "error"]
_FILTERS = {"pass": store.PASS, "fail": store.FAIL, "failed": store.FAIL, "error": store.ERROR}
"""Row statuses by filter. OpenAI's documentation says ``failed``, the client's types ``fail``."""


class CustomConfig(Body):
    """Eval of rows that clients send with each run."""

    type: Literal["custom"]
    item_schema: dict[str, Any]
    include_sample_schema: bool = False


class LogsConfig(Body):
    """Eval of replies that OpenAI stores. Always rejected."""

    type: Literal["logs", "stored_completions"]


class CreateEval(Body):
    """Body of a request for a new eval."""

    data_source_config: Annotated[CustomConfig | LogsConfig, Field(discriminator="type")]
    testing_criteria: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_CRITERIA)]
    name: Label | None = None
    metadata: Metadata = None


class UpdateEval(Body):
    """Body of a request to change an eval."""

    name: Label | None = None
    metadata: Metadata = None


class CreateRun(Body):
    """Body of a request for a new run."""

    data_source: DataSource
    name: Label | None = None
    metadata: Metadata = None


@graders.post("/evals", name="evals.create", status_code=201, dependencies=[GRADING_SLOT])
def create(call: OpenAICall, body: CreateEval) -> JsonObject:
    """Create an eval: a row schema and grading criteria."""
    call.record("eval")
    config = body.data_source_config
    if isinstance(config, LogsConfig):
        text = "The server stores no replies. Use 'custom', and send rows with each run."
        raise invalid(text, "data_source_config.type", "unsupported_value")
    try:
        JsonSchema(against=config.item_schema).check()
    except RecipeError as error:
        raise invalid(error.text, "data_source_config.item_schema", "invalid_value") from error
    if config.item_schema.get("type", "object") not in ("object", ["object"]):
        text = "The type of item_schema is not 'object', so no row can match."
        raise invalid(text, "data_source_config.item_schema.type", "invalid_value")
    criteria, context = body.testing_criteria, call.context
    parse_criteria(criteria, context.inference.judge(call.account))
    definition = {"data_source_config": config.model_dump(), "testing_criteria": criteria}
    with context.database.write() as session:
        quotas = context.evaluations.quotas(session, call.account)
        new = Eval(
            account=call.account, name=body.name or "Eval", definition=definition,
            user_metadata=body.metadata or {},
        )  # fmt: skip
        row = store.create(session, quotas, new)
    call.record_created("eval", row.id)
    return eval_object(row)


@router.get("/evals", name="evals.list")
def list_evals(
    call: OpenAICall,
    limit: Limit = 20,
    after: str | None = None,
    order: Order = "asc",
    order_by: Literal["created_at", "updated_at"] = "created_at",
) -> JsonObject:
    """List evals, oldest first."""
    ascending = order == "asc"
    moment: InstrumentedAttribute[Any] = Eval.created if order_by == "created_at" else Eval.updated
    query = select(Eval).where(Eval.account == call.account)
    with call.context.database.read() as session:
        previous = row_before(after, "eval", partial(store.get_eval, session, call.account))
        if previous is not None:
            position = tuple_(moment, Eval.seq)
            last = (getattr(previous, moment.key), previous.seq)
            query = query.where(position > last if ascending else position < last)
        sorted_by = [each.asc() if ascending else each.desc() for each in (moment, Eval.seq)]
        evals = list(session.scalars(query.order_by(*sorted_by).limit(limit + 1)))
    return page(evals, limit, eval_object)


@router.get("/evals/{eval_id}", name="evals.retrieve")
def retrieve(call: OpenAICall, eval_id: Name) -> JsonObject:
    """Return an eval."""
    with call.context.database.read() as session:
        return eval_object(_find_eval(call, session, eval_id))


@router.post("/evals/{eval_id}", name="evals.update")
def update(call: OpenAICall, eval_id: Name, body: UpdateEval) -> JsonObject:
    """Change the name or the metadata of an eval."""
    call.record("eval", eval_id)
    with call.context.database.write() as session:
        row = _find_eval(call, session, eval_id, lock=True)
        if body.name is not None:
            row.name = body.name
        if body.metadata is not None:
            row.user_metadata = body.metadata
        row.updated = now()
    return eval_object(row)


@router.delete("/evals/{eval_id}", name="evals.delete")
def delete(call: OpenAICall, eval_id: Name) -> JsonObject:
    """Delete an eval and all runs of the eval. All runs must have ended."""
    call.record("eval", eval_id)
    with call.context.database.write() as session:
        row = _find_eval(call, session, eval_id, lock=True)
        runs = select(EvaluationRun).where(EvaluationRun.eval_id == row.id).with_for_update()
        # A running run would store rows of a deleted eval.
        for run in session.scalars(runs).all():
            _refuse_unended(run)
            store.delete_run(session, run)
        session.delete(row)
        session.flush()
        storage.release(session, row.account, stored_bytes=row.stored_bytes)
    return {"object": "eval.deleted", "deleted": True, "eval_id": row.id}


@graders.post("/evals/{eval_id}/runs", name="evals.runs.create", status_code=201)
def create_run(call: OpenAICall, eval_id: Name, body: CreateRun, request: Request) -> JsonObject:
    """Create a run. The server reads the rows in the background."""
    call.record("eval", eval_id)
    context = call.context
    with context.database.read() as session:
        row = _find_eval(call, session, eval_id)
    source, definition = body.data_source, row.definition
    source.check()
    if isinstance(source.source, FileId):
        file = context.files.get(call.account, source.source.id)
        if file is None:
            text = f"No such file: {source.source.id}."
            raise invalid(text, "data_source.source.id", "file_not_found")
    if source.model is not None and source.type != "jsonl":
        context.inference.check(call.account, source.model, "data_source.model")
    source.check_constraint(context.inference.check_constraint)
    run_request = {
        "data_source": request.state.json["data_source"],
        "testing_criteria": definition["testing_criteria"],
        "item_schema": definition["data_source_config"]["item_schema"],
    }
    # Locked again: the eval may have been deleted while the request was checked.
    with context.database.write() as session:
        _find_eval(call, session, eval_id, lock=True)
        quotas = context.evaluations.quotas(session, call.account)
        new = EvaluationRun(
            account=call.account, caller=caller_fields(call.caller), eval_id=eval_id,
            name=body.name or row.name, request=run_request, user_metadata=body.metadata or {},
            status=store.QUEUED,
        )  # fmt: skip
        run = store.create(session, quotas, new)
    call.record_created("eval", f"{eval_id}/{run.id}")
    context.evaluations.wake()
    return run_object(run, request, rows=True)


@router.get("/evals/{eval_id}/runs", name="evals.runs.list")
def list_runs(
    call: OpenAICall,
    eval_id: Name,
    request: Request,
    limit: Limit = 20,
    after: str | None = None,
    order: Order = "asc",
    status: RunStatus | None = None,
) -> JsonObject:
    """List the runs of an eval, oldest first."""
    with call.context.database.read() as session:
        row = _find_eval(call, session, eval_id)
        query = select(EvaluationRun).where(EvaluationRun.eval_id == row.id)
        if status is not None:
            query = query.where(EvaluationRun.status == status)
        find = partial(store.get_run, session, call.account, eval_id)
        previous = row_before(after, "run", find)
        runs = page_of(
            session, query, EvaluationRun.seq, limit=limit + 1,
            position=None if previous is None else previous.seq, ascending=order == "asc",
        )  # fmt: skip
    return page(runs, limit, lambda run: run_object(run, request))


@router.get("/evals/{eval_id}/runs/{run_id}", name="evals.runs.retrieve")
def retrieve_run(call: OpenAICall, eval_id: Name, run_id: Name, request: Request) -> JsonObject:
    """Return a run."""
    with call.context.database.read() as session:
        return run_object(_find_run(call, session, eval_id, run_id), request)


# Older clients cancel a run by a POST to the path of the run.
@router.post("/evals/{eval_id}/runs/{run_id}", name="evals.runs.cancel", include_in_schema=False)
@router.post("/evals/{eval_id}/runs/{run_id}/cancel", name="evals.runs.cancel")
def cancel_run(call: OpenAICall, eval_id: Name, run_id: Name, request: Request) -> JsonObject:
    """Cancel a run; results of graded rows remain."""
    call.record("eval", f"{eval_id}/{run_id}")
    with call.context.database.write() as session:
        run = _find_run(call, session, eval_id, run_id, lock=True)
        if run.status in store.ENDED:
            text = f"The run is {run.status} and cannot be canceled."
            raise invalid(text, reason="invalid_state")
        store.end(run, store.CANCELED)
    call.context.evaluations.wake()
    return run_object(run, request)


@router.delete("/evals/{eval_id}/runs/{run_id}", name="evals.runs.delete")
def delete_run(call: OpenAICall, eval_id: Name, run_id: Name) -> JsonObject:
    """Delete an ended run and the results of all rows."""
    call.record("eval", f"{eval_id}/{run_id}")
    with call.context.database.write() as session:
        run = _find_run(call, session, eval_id, run_id, lock=True)
        _refuse_unended(run)
        store.delete_run(session, run)
    return {"object": "eval.run.deleted", "deleted": True, "run_id": run.id}


@router.get(
    "/evals/{eval_id}/runs/{run_id}/report",
    name="evals.runs.retrieve",
    operation_id="evals.runs.report",
)
def report(call: OpenAICall, eval_id: Name, run_id: Name) -> JsonObject:
    """Return the report of a run.

    A browser sends no key. :class:`luthier.server.console.routes.Console` therefore redirects
    browsers to the console, which requests the report with the user's key.
    """
    with call.context.database.read() as session:
        return report_object(session, _find_run(call, session, eval_id, run_id))


@router.get("/evals/{eval_id}/runs/{run_id}/output_items", name="evals.runs.output_items.list")
def list_items(
    call: OpenAICall,
    eval_id: Name,
    run_id: Name,
    limit: Limit = 20,
    after: str | None = None,
    order: Order = "asc",
    status: ItemStatus | None = None,
) -> JsonObject:
    """List the results of a run's rows, in the order of the source."""
    with call.context.database.read() as session:
        run = _find_run(call, session, eval_id, run_id)
        position = row_before(after, "output item", partial(_number_in, run))
        rows = store.list_rows(
            session,
            run.id,
            limit + 1,
            position,
            status=None if status is None else _FILTERS[status],
            ascending=order == "asc",
        )
        return page(rows, limit, lambda row: item_object(run, row))


@router.get(
    "/evals/{eval_id}/runs/{run_id}/output_items/{item}",
    name="evals.runs.output_items.retrieve",
)
def retrieve_item(call: OpenAICall, eval_id: Name, run_id: Name, item: Name) -> JsonObject:
    """Return the result of a row."""
    with call.context.database.read() as session:
        run = _find_run(call, session, eval_id, run_id)
        number = _number_in(run, item)
        rows = [] if number is None else store.list_rows(session, run.id, 1, number - 1)
        if not rows or rows[0].number != number:
            raise absent("output item", item, "output_item_id")
        return item_object(run, rows[0])


def _find_eval(call: Call, session: Session, eval_id: str, *, lock: bool = False) -> Eval:
    return existing(
        store.get_eval(session, call.account, eval_id, lock=lock), "eval", eval_id, "eval_id"
    )


def _find_run(
    call: Call, session: Session, eval_id: str, run_id: str, *, lock: bool = False
) -> EvaluationRun:
    found = store.get_run(session, call.account, eval_id, run_id, lock=lock)
    return existing(found, "eval run", run_id, "run_id")


def _refuse_unended(run: EvaluationRun) -> None:
    if run.status not in store.ENDED:
        text = f"The run {run.id} is {run.status}. Cancel the run first."
        raise invalid(text, reason="invalid_state")


def _number_in(run: EvaluationRun, item_id: str) -> int | None:
    """Return the row number of an output item, or None if the item belongs to another run."""
    match = re.fullmatch(
        rf"outputitem_{run.id.removeprefix('evalrun_')}-([1-9][0-9]{{0,8}})", item_id
    )
    return int(match[1]) if match else None


def eval_object(row: Eval) -> JsonObject:
    """Return an eval as OpenAI's object."""
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


def _shown_config(config: Mapping[str, Any]) -> JsonObject:
    """Return the schema of values that criteria can use: the item, and the sample if rows have
    samples."""
    properties = {"item": config["item_schema"]}
    if config["include_sample_schema"]:
        properties["sample"] = {
            "type": "object",
            "properties": {"output_text": {"type": "string"}},
            "required": ["output_text"],
        }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "custom", "schema": schema}


def run_object(run: EvaluationRun, request: Request, rows: bool = False) -> JsonObject:
    """Return a run as OpenAI's object; with ``rows``, include the rows of the request."""
    source = dict(run.request["data_source"])
    # A source may have 50,000 rows, and lists have many runs.
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
            "total": run.graded_rows,
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
    """Return the URL of the report on the host that the client used. The URL contains no key."""
    head = request.state.body.head
    prefix, host = head.path.partition("/evals")[0], request.headers.get("host", "localhost")
    scheme = "https" if head.tls else "http"
    return f"{scheme}://{host}{prefix}/evals/{run.eval_id}/runs/{run.id}/report"


def item_object(run: EvaluationRun, row: EvaluationRow) -> JsonObject:
    """Return the result of a row as OpenAI's object."""
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
