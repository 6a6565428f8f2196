"""``luthier mcp``, with the official client in both revisions of the protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp")

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.types import CallToolResult

from luthier.cli.mcp import jobs
from luthier.cli.mcp.server import build_server
from luthier.files import read_json

ROWS = [{"text": f"row {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(40)]
MOST_BYTES = 8_000
CallTool = Callable[..., CallToolResult]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a server, with rows."""
    found = tmp_path / "rows"
    found.mkdir()
    (found / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return found


@pytest.fixture
def call(folder: Path, own_home: Path) -> CallTool:
    """Return a function that calls a tool, and its job until the job ends."""

    async def ask(tool: str, wait: bool, arguments: dict[str, Any]) -> CallToolResult:
        async with Client(build_server([folder])) as client:
            answer = await client.call_tool(tool, arguments)
            while wait and (answer.structured_content or {}).get("state") == "running":
                job = {"id": (answer.structured_content or {})["job"]}
                answer = await client.call_tool("job", job)
            assert len(answer.model_dump_json(exclude_none=True)) < MOST_BYTES
            return answer

    def call_tool(tool: str, wait: bool = True, **arguments: Any) -> CallToolResult:
        return asyncio.run(ask(tool, wait, arguments))

    return call_tool


def text_of(answer: CallToolResult) -> str:
    """Return the text that a model reads."""
    return "".join(each.text for each in answer.content if each.type == "text")


@pytest.mark.parametrize("revision", ["2026-07-28", "legacy"])
def test_tools_over_standard_input(revision: str, folder: Path, own_home: Path) -> None:
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "luthier", "mcp", str(folder)],
        env=dict(os.environ),
    )

    async def use() -> tuple[list[str], CallToolResult]:
        async with Client(stdio_client(server), mode=revision) as client:
            tools = await client.list_tools()
            return [each.name for each in tools.tools], await client.call_tool("job", {})

    names, answer = asyncio.run(use())
    assert len(names) == 10
    assert {"inspect", "tune", "compare", "job"} <= set(names)
    assert "colours" in text_of(answer)


def test_rows_are_inspected_and_cleaned(call: CallTool, folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    report = call("inspect", data="rows.jsonl")
    assert "duplicate" in text_of(report)
    assert report.structured_content is not None
    assert report.structured_content["rows"] == {"train": len(ROWS) + 1}
    call("clean", data="rows.jsonl", target="clean.jsonl", dedupe="exact")
    assert len((folder / "clean.jsonl").read_text().splitlines()) == len(ROWS)


def test_model_is_tuned_and_predicts(call: CallTool) -> None:
    tuned = call("tune", data="rows.jsonl", name="parity", base="fasttext",
                 settings={"training.max_steps": 2})  # fmt: skip
    assert tuned.structured_content is not None
    model = tuned.structured_content["model_id"]
    predicted = call("predict", model=model, texts=["row 3", "row 4"])
    assert len(text_of(predicted).splitlines()) == 2


def test_reply_is_generated_once(
    call: CallTool, tuned: tuple[Path, dict[str, Any], str, str]
) -> None:
    answer = call("generate", model=tuned[1]["model_id"], prompt="sky?", max_tokens=4)
    assert answer.structured_content is not None
    assert text_of(answer) == answer.structured_content["completion"].strip()


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect", {"data": "../outside.jsonl"}, "outside"),
        ("inspect", {"data": "/etc/passwd"}, "outside"),
        ("inspect", {"data": "https://example.com/rows.jsonl"}, "does not exist"),
        ("clean", {"data": "rows.jsonl", "target": "../cleaned.jsonl"}, "outside"),
        ("evaluate", {"model": "/etc", "data": "rows.jsonl"}, "outside"),
        ("evaluate", {"model": "nothing", "data": "rows.jsonl"}, "nothing"),
        ("tune", {"data": "rows.jsonl", "name": "a", "settings": {"data.validation": "/etc/passwd"}},
         "data.validation"),
        ("tune", {"data": "rows.jsonl", "name": "a", "settings": {"objective": {"method": "grpo"}}},
         "objective"),
        ("search", {"query": "a"}, "index"),
        ("search", {"query": "/etc/passwd", "data": "rows.jsonl", "model": "colours"}, "outside"),
        ("job", {"id": "../../home"}, "no job"),
        ("generate", {"model": "colours", "prompt": "a", "max_tokens": 10**6}, "max_tokens"),
    ],
)  # fmt: skip
def test_refusals(call: CallTool, tool: str, arguments: dict[str, Any], message: str) -> None:
    answer = call(tool, **arguments)
    assert answer.is_error
    assert message in text_of(answer)


def test_link_out_of_the_folder_is_refused(call: CallTool, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "outside" in text_of(call("inspect", data="link.jsonl"))


@pytest.mark.parametrize("ended", ["cancelled", "killed"])
def test_job_that_ends_early_has_failed(ended: str, call: CallTool, own_home: Path) -> None:
    job = jobs.start("demo", {})
    assert job.state == "running"
    if ended == "cancelled":
        time.sleep(1)
        call("job", wait=False, id=job.id, cancel=True)
    else:
        os.kill(read_json(job.folder / "process.json"), signal.SIGKILL)
    job.wait(60)
    answer = call("job", id=job.id)
    assert answer.is_error
    assert "failed" in text_of(answer)
