"""Tools for agents on the server, with the official client in both revisions of the protocol."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import httpx2
import pytest

pytest.importorskip("mcp")

from luthier_server import BASE, KEYS, ONE, OTHER, Served
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult

from luthier.server import mcp
from luthier.server.http.messages import Caller
from luthier.server.mcp import _Tools

ROWS = [{"prompt": f"row {n}", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
ROWS.append(ROWS[0])
MOST_BYTES = 8_000
CallTool = Callable[..., CallToolResult]


def text_of(answer: CallToolResult) -> str:
    """Return the text that a model reads."""
    return "".join(each.text for each in answer.content if each.type == "text")


@pytest.fixture
def call(server: Served) -> CallTool:
    """Return ``call(tool, account, **arguments)`` over HTTP."""

    async def ask(tool: str, account: str, revision: str, arguments: Any) -> Any:
        head = {"Authorization": f"Bearer {KEYS[account]['api_key']}"}
        async with (
            httpx2.AsyncClient(headers=head, timeout=60) as http,
            Client(
                streamable_http_client(f"{server.url}/mcp", http_client=http), mode=revision
            ) as client,
        ):
            if tool == "tools":
                return [each.name for each in (await client.list_tools()).tools]
            return await client.call_tool(tool, arguments)

    def call_tool(
        tool: str, account: str = ONE, revision: str = "2026-07-28", **arguments: Any
    ) -> Any:
        answer = asyncio.run(ask(tool, account, revision, arguments))
        if isinstance(answer, CallToolResult):
            assert len(answer.model_dump_json(exclude_none=True)) < MOST_BYTES
        return answer

    return call_tool


@pytest.fixture
def file(server: Served) -> str:
    """Return the id of an uploaded file of the first account."""
    from openai import OpenAI

    body = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"]) as client:
        return client.files.create(file=("rows.jsonl", body), purpose="fine-tune").id


@pytest.mark.parametrize("revision", ["2026-07-28", "legacy"])
def test_tools_in_both_revisions(revision: str, call: CallTool) -> None:
    names: Any = call("tools", revision=revision)
    assert set(names) == {
        "inspect", "clean", "tune", "evaluate", "compare", "predict", "generate", "search", "job",
        "examples",
    }  # fmt: skip
    assert BASE in text_of(call("job", revision=revision))


@pytest.mark.slow
def test_rows_are_inspected_and_cleaned(call: CallTool, file: str) -> None:
    def result_of(tool: str, **arguments: Any) -> CallToolResult:
        answer = call(tool, **arguments)
        while (answer.structured_content or {}).get("state") == "Running":
            answer = call("job", id=(answer.structured_content or {})["job"])
        return answer

    report = text_of(result_of("inspect", data=file))
    assert "41" in report and "clean fixes: duplicate.exact" in report
    cleaned = result_of("clean", data=file, rules=["duplicate.exact"])
    values = cleaned.structured_content or {}
    assert (values["rows_in"], values["rows_out"]) == (41, 40), text_of(cleaned)
    assert values["file"] in (call("job").structured_content or {})["files"]


def context_of(account: str) -> Any:
    """Return the context of a call with a key of ``account``."""
    caller = Caller(account, "anna", ("administrator",))
    request = SimpleNamespace(
        client=None, headers={"authorization": "Bearer x"}, scope={"state": {"caller": caller}}
    )
    return SimpleNamespace(request_context=SimpleNamespace(request=request))


def test_slow_reply_has_an_id_for_its_account(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)
        body = json.dumps({"answers": [{"label": "even"}]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def use() -> None:
        tools = _Tools(slow)
        monkeypatch.setattr(mcp, "WAIT_SECONDS", 0.05)
        answer = await tools.predict(context_of(ONE), "model", ["row 2"])
        id = (answer.structured_content or {})["job"]
        with pytest.raises(ToolError, match="no job"):
            await tools.job(context_of(OTHER), id)
        await asyncio.sleep(0.5)  # a finished reply stays until its client reads the reply
        monkeypatch.setattr(mcp, "WAIT_SECONDS", 0.05)
        for _ in range(3):
            await tools.predict(context_of(ONE), "model", ["row 2"])
        monkeypatch.setattr(mcp, "WAIT_SECONDS", 5)
        assert "even" in text_of(await tools.job(context_of(ONE), id))
        with pytest.raises(ToolError, match="no job"):
            await tools.job(context_of(ONE), id)

    asyncio.run(use())


def test_rows_are_tuned_and_evaluated(call: CallTool, file: str) -> None:
    started = call("tune", data=file, name="parity", base=BASE,
                   settings={"training": {"max_steps": 2}})  # fmt: skip
    assert started.structured_content is not None, text_of(started)
    job = started.structured_content["job"]
    assert "Queued" in text_of(call("job", id=job))
    measured = call("evaluate", model=BASE, data=file)
    assert (measured.structured_content or {}).get("state") == "Queued", text_of(measured)
    listed = call("job").structured_content
    assert listed is not None
    assert job in listed["jobs"]
    assert listed["files"][file] == "rows.jsonl"
    assert "Stopped" in text_of(call("job", id=job, cancel=True))


def test_reply_is_generated(call: CallTool) -> None:
    answer = call("generate", model=BASE, prompt="sky?", max_tokens=2)
    values = answer.structured_content or {}
    assert values.get("usage", {}).get("completion_tokens") == 2 or values["state"] == "Running"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect", {"data": "/etc/passwd"}, "passwd"),
        ("evaluate", {"model": BASE, "data": "../rows.jsonl"}, "../rows.jsonl"),
        ("inspect", {"data": "file-missing"}, "file-missing"),
        ("clean", {"data": "/etc/passwd", "rules": ["duplicate.exact"]}, "passwd"),
        ("compare", {"models": ["nothing"], "data": "file-missing"}, "nothing"),
        ("search", {"query": "a", "store": "../files"}, "../files"),
        ("examples", {"name": "../../etc"}, "etc"),
        ("examples", {"name": "mail"}, "folder"),
        ("evaluate", {"model": "/etc", "data": "file-missing"}, "/etc"),
        ("tune", {"data": "file-missing", "name": "a", "base": "nothing"}, "nothing"),
        ("predict", {"model": "../jobs", "texts": ["a"]}, "jobs"),
        ("job", {"id": "job/nothing"}, "nothing"),
        ("job", {"id": "reply/nothing"}, "nothing"),
        ("job", {"id": "../../v1/files"}, "no job"),
        ("generate", {"model": BASE, "prompt": "a", "max_tokens": 10**6}, "max_tokens"),
    ],
)  # fmt: skip
def test_refusals(call: CallTool, tool: str, arguments: dict[str, Any], message: str) -> None:
    answer = call(tool, **arguments)
    assert answer.is_error
    assert message in text_of(answer)


def test_files_and_jobs_of_other_accounts_are_hidden(call: CallTool, file: str) -> None:
    started = call("tune", data=file, name="mine", base=BASE)
    job = (started.structured_content or {})["job"]
    assert call("job", OTHER, id=job).is_error
    assert call("job", OTHER, id=job, cancel=True).is_error
    assert call("tune", OTHER, data=file, name="theirs", base=BASE).is_error
    listed = call("job", OTHER).structured_content
    assert listed is not None
    assert job not in listed["jobs"] and file not in listed["files"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer sk-wrong"}, 403),
        ({}, 401),
        ({"Authorization": f"Bearer {KEYS[ONE]['api_key']}", "Host": "evil.example"}, 421),
        ({"Authorization": f"Bearer {KEYS[ONE]['api_key']}", "Origin": "http://evil.example"}, 403),
    ],
)
def test_wrong_key_host_and_origin_are_refused(
    headers: dict[str, str], status: int, server: Served
) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).encode()
    head = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    request = urllib.request.Request(f"{server.url}/mcp", body, {**head, **headers})
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as answer:
        assert answer.code == status
