"""``/mcp``: tools for agents over streamable HTTP (Model Context Protocol).

Each tool sends requests to the server's own APIs with the key of the client. So the roles, quotas,
rate limits and audit log of these APIs apply, and a tool reaches the rows, models and jobs of the
key's account only.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

import httpx2
from mcp.server.mcpserver import Context as McpContext
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import CallToolResult
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.server.agent_tools import WAIT_SECONDS, Columns, answer, short_values, tool_server
from luthier.server.stores.uploaded_files import file_address

LOCAL = ("127.0.0.1", "localhost", "[::1]")
_MOST_REPLIES = 100
"""Unread replies of all accounts."""
_SHOWN = 10
"""Jobs, measurements and files in a list."""
_ENDED = ("Completed", "Failed", "Stopped")
_KINDS = {
    "job": "jobs",
    "evaluation": "evaluations",
    "comparison": "comparisons",
    "study": "studies",
}
"""Path of an operation by the first part of a job's id."""

INSTRUCTIONS = """\
luthier tunes models on this server with the rows of the key's account. Order: inspect the rows,
clean them if it names faults with a fix, tune, then compare the model with its base on rows that
were not trained on. Report the verdict as printed, also if it says that the model did not learn or
that a cheaper method is as good. Longer work returns the id of a job: call job with this id until
its state is Completed or Failed. Upload rows with POST /v1/files of the same server; job without an
id lists files and models.
"""

Context = McpContext[Any, Any]
File = Annotated[str, Field(description="Id of an uploaded file of rows, or s3:// address.")]
ModelId = Annotated[str, Field(description="Id or name of a base or custom model.")]


class McpApplication:
    """ASGI application of ``/mcp``, called with an authenticated request."""

    def __init__(self, application: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Create the tools.

        Args:
            application: The server's APIs.
            hosts: Names of the server in the ``Host`` header, with or without a port.
            origins: Origins of web pages that may call the tools.
        """
        tools = _Tools(application)
        self._server = tool_server(
            INSTRUCTIONS,
            [tools.inspect, tools.predict, tools.generate, tools.search],
            [tools.clean, tools.tune, tools.evaluate, tools.compare, tools.job, tools.examples],
        )
        names = [*LOCAL, *hosts]
        self._security = TransportSecuritySettings(
            allowed_hosts=[form for name in names for form in (name, f"{name}:*")],
            allowed_origins=[*origins],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request. No state is kept between requests, except replies in progress."""
        # A new application for each request: the library's session manager runs only once, and no
        # state is shared between accounts.
        app = self._server.streamable_http_app(
            json_response=True, stateless_http=True, transport_security=self._security
        )
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)


class _Tools:
    """The tools. An agent reads docstrings and signatures."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application
        # Clients of agents stop waiting after about a minute, so longer replies get an id and are
        # fetched later.
        self._replies: dict[str, tuple[str, asyncio.Task[CallToolResult]]] = {}
        """Account and reply of calls that take longer than :data:`WAIT_SECONDS`, by id."""

    async def inspect(
        self, context: Context, data: File, columns: Columns = None
    ) -> CallToolResult:
        """Check rows before a training: kind, counts, and each fault with row and fix."""

        async def work() -> CallToolResult:
            body = {"training": _address(data), "columns": columns or {}}
            report = (await self._send(context, "POST", "/api/v1/inspections", body))["report"]
            lines = [f"Inspection {report['verdict']}: {json.dumps(report['rows'])} rows"]
            for rule in report["rules"]:
                lines.append(
                    f"{rule['severity']} [{rule['rule']}] {rule['count']:,}: {rule['about']} "
                    f"{rule['fix']}"
                )
                lines += [f"  {_line(place)}" for place in rule["places"][:3]]
            fixable = [rule["rule"] for rule in report["rules"] if rule["fixable"]]
            lines += [f"clean fixes: {', '.join(fixable)}"] if fixable else []
            return answer("\n".join(lines), short_values(report))

        return await self._reply(context, work())

    async def clean(
        self,
        context: Context,
        data: File,
        rules: Annotated[list[str], Field(description="Rules to fix, as inspect names.")],
        columns: Columns = None,
    ) -> CallToolResult:
        """Store a cleaned copy of rows as a new file; the original stays."""

        async def work() -> CallToolResult:
            body = {"training": _address(data), "rules": rules, "columns": columns or {}}
            found = await self._send(context, "POST", "/api/v1/cleanings", body)
            file = found.pop("address").rpartition("/")[2]
            text = f"{file} has {found['rows_out']:,} of {found['rows_in']:,} rows. {_line(found)}"
            return answer(text, {"file": file} | short_values(found))

        return await self._reply(context, work())

    async def tune(
        self,
        context: Context,
        data: File,
        name: Annotated[str, Field(description="Name of the new model and its job.")],
        base: Annotated[str, Field(description="Base model; job lists the ids.")],
        validation: Annotated[str | None, Field(description="File of held-out rows.")] = None,
        columns: Columns = None,
        settings: Annotated[
            dict[str, dict[str, Any]] | None,
            Field(description='Fields of the recipe, such as {"training": {"epochs": 2}}.'),
        ] = None,
    ) -> CallToolResult:
        """Tune a model on rows. The defaults fit the rows; the verdict names the gain."""
        settings = dict(settings or {})
        if columns:
            settings["data"] = {**settings.get("data", {}), "columns": columns}
        body = {
            "name": name, "model_name": name, "base": base, "training": [_address(data)],
            "validation": [_address(validation)] if validation else [], "settings": settings,
        }  # fmt: skip
        return await self._start(context, "job", body)

    async def evaluate(
        self, context: Context, model: ModelId, data: File, columns: Columns = None
    ) -> CallToolResult:
        """Score a model on test rows, with intervals."""
        body = {"model": model, "rows": _address(data), "columns": columns or {}}
        return await self._start(context, "evaluation", body)

    async def compare(
        self,
        context: Context,
        models: Annotated[list[str], Field(description="Custom models.")],
        data: File,
        base: Annotated[str | None, Field(description="Rival; the base of the models.")] = None,
        columns: Columns = None,
    ) -> CallToolResult:
        """Compare custom models with their base and baselines on test rows, and name the winner."""
        body = {"models": models, "rows": _address(data), "base": base, "columns": columns or {}}
        return await self._start(context, "comparison", body)

    async def predict(
        self,
        context: Context,
        model: ModelId,
        texts: Annotated[list[str], Field(max_length=40)],
    ) -> CallToolResult:
        """Predict labels, ratings or tags of texts: a line for each text, in order."""

        async def work() -> CallToolResult:
            path = f"/api/v1/models/{_part(model)}/predictions"
            body = {"inputs": [{"text": text} for text in texts], "top": 1}
            found = (await self._send(context, "POST", path, body))["answers"]
            return answer("\n".join(_line(each) for each in found), {"answers": len(found)})

        return await self._reply(context, work())

    async def generate(
        self,
        context: Context,
        model: ModelId,
        prompt: str,
        system: str | None = None,
        max_tokens: Annotated[int, Field(ge=1, le=1_000)] = 256,
    ) -> CallToolResult:
        """Generate a reply to a prompt."""

        async def work() -> CallToolResult:
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": prompt})
            body = {"model": model, "messages": turns, "max_tokens": max_tokens}
            found = await self._send(context, "POST", "/v1/chat/completions", body)
            (choice,) = found["choices"]
            text = choice["message"]["content"] or ""
            return answer(text, {"finish_reason": choice["finish_reason"], "usage": found["usage"]})

        return await self._reply(context, work())

    async def search(
        self,
        context: Context,
        query: str,
        store: Annotated[str, Field(description="Id of a vector store.")],
        top: Annotated[int, Field(ge=1, le=20)] = 5,
    ) -> CallToolResult:
        """Find passages of a vector store of documents."""

        async def work() -> CallToolResult:
            path = f"/v1/vector_stores/{_part(store)}/search"
            body = {"query": query, "max_num_results": top}
            found = (await self._send(context, "POST", path, body))["data"]
            lines = [
                f"[{each['score']:.2f}] {each['filename']}: {each['content'][0]['text']}"
                for each in found
            ]
            return answer("\n\n".join(lines) or "No passage was found.", {"passages": len(found)})

        return await self._reply(context, work())

    async def job(
        self,
        context: Context,
        id: Annotated[str | None, Field(description="Job; all are listed without it.")] = None,
        cancel: Annotated[bool, Field(description="Interrupt the job.")] = False,
    ) -> CallToolResult:
        """Return the state and result of a job, or list jobs, models and files."""
        if id is None:
            return await self._reply(context, self._lists(context))
        kind, _, name = id.partition("/")
        if kind == "reply":
            account, task = self._replies.get(id, ("", None))
            # One error for both cases: an id of another account must not be confirmed.
            if task is None or account != _account(context):
                raise ToolError(f'there is no job "{id}". Call job without an id for a list')
            if cancel:
                task.cancel()
            return await self._wait(id, task)
        if kind not in _KINDS or not name:
            raise ToolError(f'there is no job "{id}". Call job without an id for a list')
        path = f"/api/v1/{_KINDS[kind]}/{_part(name)}"
        if cancel:
            await self._send(context, "POST", f"{path}/stop")
        return await self._reply(context, self._state(context, id, path))

    async def examples(
        self,
        context: Context,
        name: Annotated[str | None, Field(description="Use case whose rows are stored.")] = None,
    ) -> CallToolResult:
        """List use cases with measured results, or store the sample rows of a use case as files."""
        if name is None:
            uses = (await self._send(context, "GET", "/api/v1/examples"))["examples"]
            lines = [f"{use['name']}: {use['title']}. {use['result']}" for use in uses]
            return answer("\n".join(lines), {"examples": [use["name"] for use in uses]})
        path = f"/api/v1/examples/{_part(name)}"
        files = (await self._send(context, "POST", path))["files"]
        ids = {key: address.rpartition("/")[2] for key, address in files.items()}
        return answer("\n".join(f"{key}: {file}" for key, file in ids.items()), {"files": ids})

    async def _start(self, context: Context, kind: str, body: dict[str, Any]) -> CallToolResult:
        """Create leased work, which outlives the connection and the server."""

        async def work() -> CallToolResult:
            path = f"/api/v1/{_KINDS[kind]}"
            found = await self._send(context, "POST", path, body)
            id = f"{kind}/{found['id']}"
            values = {"job": id, "state": found["state"]}
            return answer(f"{id} is {found['state']}. Call job with this id.", values)

        return await self._reply(context, work())

    async def _state(self, context: Context, id: str, path: str) -> CallToolResult:
        found = await self._send(context, "GET", path)
        state, values = found["state"], {"job": id, "state": found["state"]}
        if state not in _ENDED:
            progress = found.get("progress") or found.get("details", {}).get("progress") or {}
            text = f"{id} is {state}. Call job with this id.\n{_line(progress)}"
            return answer(text, values | short_values({"progress": progress}))
        if state == "Failed":
            return answer(f"{id} has failed.\n{found['failure']}", values, is_error=True)
        result = found.get("report") or found.get("result") or {}
        verdicts = [result["verdict"]] if "verdict" in result else result.get("verdicts", [])
        lines = [f"{id} is {state}.", *verdicts]
        if "model_name" in found:
            lines.append(f"Model: {found['model_name']}")
        errors, intervals = result.get("errors", {}), result.get("intervals", {})
        for name, value in result.get("scores", {}).items():
            low, high = intervals.get(name, (None, None))
            error = f" ± {errors[name]:.4f}" if name in errors else ""
            between = "" if low is None else f", 95 % interval {low:.4f} to {high:.4f}"
            lines.append(f"{name}: {value:.4f}{error}{between}")
        return answer("\n".join(lines), values | short_values(result))

    async def _lists(self, context: Context) -> CallToolResult:
        lines, jobs = list[str](), list[str]()
        for kind, path in _KINDS.items():
            found = await self._send(context, "GET", f"/api/v1/{path}?limit={_SHOWN}")
            for each in found.get("jobs", found.get("measurements", [])):
                jobs.append(f"{kind}/{each['id']}")
                lines.append(f"{jobs[-1]}: {each['state']}")
        models = (await self._send(context, "GET", f"/api/v1/models?limit={_SHOWN}"))["models"]
        files = (await self._send(context, "GET", f"/v1/files?limit={_SHOWN}"))["data"]
        values = {
            "jobs": jobs,
            "models": [each["id" if each["kind"] == "foundation" else "name"] for each in models],
            "files": {each["id"]: each["filename"] for each in files},
        }
        lines.append(f"models: {', '.join(values['models'])}")
        lines.append(f"files: {_line(values['files'])}")
        return answer("\n".join(lines), short_values(values))

    async def _reply(
        self, context: Context, work: Coroutine[Any, Any, CallToolResult]
    ) -> CallToolResult:
        """Return the reply of ``work``, or the id of the reply if the reply takes longer."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task], timeout=WAIT_SECONDS)
        # `asyncio.wait` does not cancel its tasks: without this, the work of a client that hung up
        # would continue.
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        # Finished replies that no client fetched make room first; replies in progress are never
        # dropped.
        ended = [id for id, (_, one) in self._replies.items() if one.done()]
        if len(self._replies) >= _MOST_REPLIES and not ended:
            task.cancel()
            raise ToolError("the server has too many replies in progress. Try again in a minute")
        for id in ended[: max(0, len(self._replies) - _MOST_REPLIES + 1)]:
            del self._replies[id]
        id = f"reply/{secrets.token_hex(8)}"
        self._replies[id] = (_account(context), task)
        return _running(id)

    async def _wait(self, id: str, task: asyncio.Task[CallToolResult]) -> CallToolResult:
        await asyncio.wait([task], timeout=WAIT_SECONDS)
        if not task.done():
            return _running(id)
        self._replies.pop(id, None)
        if task.cancelled():
            return answer(f"{id} is Stopped.", {"job": id, "state": "Stopped"})
        return task.result()

    async def _send(
        self,
        context: Context,
        method: Literal["GET", "POST"],
        path: str,
        body: dict[str, Any] | None = None,
    ) -> Any:
        """Send a request to the server's APIs as the client, and return the JSON of the response.

        Raises:
            ToolError: if an API rejects the request.
        """
        request: Any = context.request_context.request
        address = request.client or ("127.0.0.1", 0)
        # Through the application, and not by its functions: authentication, quotas, rate limits and
        # the audit log apply to agents, too.
        transport = httpx2.ASGITransport(self._application, client=tuple(address))
        head = {"Authorization": request.headers["authorization"]}
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", headers=head, timeout=None
        ) as client:
            response = await client.request(method, path, json=body)
        found = response.json()
        if response.status_code >= 400:
            raise ToolError(found["error"]["message"])
        return found


def _running(id: str) -> CallToolResult:
    text = f"{id} is Running. Call job with this id."
    return answer(text, {"job": id, "state": "Running"})


def _account(context: Context) -> str:
    request: Any = context.request_context.request
    return str(request.scope["state"]["caller"].account)


def _address(file: str) -> str:
    """Return the address of rows of the account.

    Raises:
        ToolError: for a path.
    """
    if file.startswith("s3://"):
        return file
    # Agents that also run on the client's machine offer paths, which the server must not open.
    if not file.startswith("file-"):
        raise ToolError(f'"{file}" is no uploaded file. Call job without an id for a list')
    return file_address(file)


def _part(name: str) -> str:
    """Return a name as a part of a path."""
    # A name with `/` would otherwise become two parts of the path.
    return quote(name, safe="")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
