"""Training rows from captured requests and feedback, by the CLI and by boto3's job."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import captured_service
import pytest
from captured_service import TEXT, Running
from luthier_server import ONE
from typer.testing import CliRunner

from luthier.cli.service.live import live_app
from luthier.data.rows import load_rows
from luthier.errors import RefusedInput
from luthier.server.live import settings
from luthier.server.live.rows import CapturedAnswer, answers_of, logged_answers, training_rows
from luthier.server.tables.jobs import Job
from luthier.server.tables.live.captures import Feedback
from luthier.server.tables.objects import ObjectMetadata

running = captured_service.running
ROLE = f"arn:aws:iam::{ONE}:role/x"


@pytest.fixture
def ask(running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Return a function that sends a captured chat with feedback and returns the request id."""
    monkeypatch.chdir(tmp_path)
    with running.service.database.write() as session:
        settings.enable(session, ONE, redact=False)
    running.service.capture.reload()

    def chat(text: str, path: str = "", body: Any = None, **feedback: Any) -> str:
        answer = running.ask(path, body) if path else running.chat(text=text)
        assert answer.status_code == 200, answer.text
        request = answer.headers.get("x-request-id") or answer.headers["x-amzn-requestid"]
        if feedback:
            rated = running.ask("/api/v1/feedback", {"request": request, **feedback})
            assert rated.status_code == 200, rated.text
        running.service.capture.flush()
        return str(request)

    return chat


def export(*words: str) -> Any:
    done = CliRunner().invoke(live_app, ["capture", "export", "--model", "tiny", *words, "--json"])
    return done.exit_code, json.loads(done.stdout)


def rows(*words: str) -> list[dict[str, Any]]:
    """Return the exported rows, after luthier has read them as training data."""
    code, found = export("--output", "rows.jsonl", *words)
    assert code == 0, found
    file = Path("rows.jsonl")
    assert len(load_rows(file)) == found["rows"]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return lines


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_conversations_without_duplicates(ask: Callable[..., str]) -> None:
    first, second = ask("one", rating=5), ask("one", thumb="up")
    ask("two", rating=2)
    third = ask("three", corrected="Better.")
    good = {"messages": [user("one"), assistant(TEXT)], "requests": [first, second]}
    assert rows("--rating", ">=4", "--since", "1d") == [good]
    assert rows()[-1] == {"messages": [user("three"), assistant("Better.")], "requests": [third]}
    assert len(rows()) == 2  # without the bad answer
    code, refused = export("--since", "2030-01-01")
    assert code == 2 and "0 captured answers" in refused["error"]["message"]


def test_export_with_wrong_names(ask: Callable[..., str]) -> None:
    ask("one")
    code, refused = export("--output", "rows.csv")
    assert code == 2 and ".jsonl" in refused["error"]["message"]
    done = CliRunner().invoke(live_app, ["capture", "export", "--model", "tyni", "--json"])
    assert done.exit_code == 2 and "There is no model" in done.stdout


def test_preferences(ask: Callable[..., str]) -> None:
    request = ask("one", preferred="Shorter.")
    ask("two", rating=5)
    row = {"prompt": [user("one")], "chosen": "Shorter.", "rejected": TEXT, "requests": [request]}
    assert rows("--to", "dpo") == [row]


def test_thumbs(ask: Callable[..., str]) -> None:
    ask("one", rating=5)
    ask("two", thumb="down")
    ask("three", rating=3)
    assert [(row["messages"][0]["content"], row["label"]) for row in rows("--to", "kto")] == [
        ("one", True), ("two", False),
    ]  # fmt: skip


def test_labels_of_predictions(ask: Callable[..., str]) -> None:
    path = "/api/v1/models/tiny/predictions"
    both = {"inputs": [{"text": "cheap pills"}, {"text": "hello"}]}
    first = ask("", path, both, position=1, label="ham")
    ask("", path, {"inputs": [{"text": "win"}]}, thumb="up")
    ask("", path, {"inputs": [{"text": "lose"}]}, rating=2)
    corrected, liked = rows("--to", "classification")
    assert corrected == {"text": "hello", "label": "ham", "requests": [first]}
    assert liked["text"] == "win"  # its label is right
    assert rows("--to", "classification", "--rating", ">4")[0]["text"] == "win"
    ask("", path, {"inputs": [{"text": "seven"}]}, label=7)
    assert rows("--to", "classification")[-1]["label"] == "7"
    ask("", path, {"inputs": [{"text": "nice"}]}, label=4.5)
    assert rows("--to", "regression")[-1] | {"requests": []} == {
        "text": "nice", "rating": 4.5, "requests": [],
    }  # fmt: skip


def test_outcomes_filter_answers(ask: Callable[..., str]) -> None:
    reopened = {"reopened": {"value": True, "higher_is_better": False}}
    ask("one", outcomes=reopened)
    ask("two", outcomes={"reopened": {"value": False, "higher_is_better": False}})
    ask("three")
    (row,) = rows("--outcome", "reopened=false")
    assert row["messages"][0]["content"] == "two"


@pytest.mark.parametrize(
    ("path", "body", "row"),
    [
        (
            "/v1/responses",
            {
                "model": "tiny", "instructions": "Be kind.", "store": False, "input": [
                    user("Stock?"),
                    {"type": "function_call", "call_id": "c", "name": "stock", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "3"},
                ],
            },
            ["system", "user", "assistant", "tool", "assistant"],
        ),
        (
            "/model/tiny/converse-stream",
            {
                "system": [{"text": "Be kind."}],
                "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
            },
            ["system", "user", "assistant"],
        ),
        ("/model/tiny/invoke", {"prompt": "Once upon"}, None),
        ("/v1/completions", {"model": "tiny", "prompt": ["Once upon"]}, None),
    ],
)  # fmt: skip
def test_forms_of_requests(
    ask: Callable[..., str], path: str, body: dict[str, Any], row: list[str] | None
) -> None:
    ask("", path, body)
    (found,) = rows()
    if row is None:
        assert (found["prompt"], found["completion"]) == ("Once upon", TEXT)
    else:
        assert [turn["role"] for turn in found["messages"]] == row
        assert found["messages"][-1]["content"] == TEXT


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rating", "good"], '"good" is not a comparison'),
        (["--rating", ">=null"], '">=null" is not a comparison'),
        (["--since", "yesterday"], '"yesterday" is not a period'),
        (["--outcome", "sale"], "is not a comparison"),
        (["--to", "kto"], "The rows need thumbs"),
    ],
)
def test_refused_exports(ask: Callable[..., str], words: list[str], text: str) -> None:
    ask("one")
    code, refused = export(*words)
    assert code == 2 and text in refused["error"]["message"]


def test_job_on_invocation_logs(ask: Callable[..., str], running: Running) -> None:
    for number, team in enumerate(["a", "b", "a"]):
        body = {
            "messages": [{"role": "user", "content": [{"text": f"Question {number}"}]}],
            "requestMetadata": {"team": team, "kind": "faq"},
        }
        ask("", "/model/tiny/converse", body)
    logs = {
        "usePromptResponse": True,
        "invocationLogSource": {"s3Uri": "s3://luthier-capture/AWSLogs"},
        "requestMetadataFilters": {
            "andAll": [{"equals": {"kind": "faq"}}, {"notEquals": {"team": "b"}}]
        },
    }
    job: dict[str, Any] = {
        "jobName": "logged", "customModelName": "logged", "baseModelIdentifier": "luthier.tiny",
        "roleArn": ROLE, "trainingDataConfig": {"invocationLogsConfig": logs},
        "outputDataConfig": {"s3Uri": "s3://luthier-capture/out/"},
    }  # fmt: skip
    made = running.ask("/model-customization-jobs", job)
    assert made.status_code == 201, made.text
    with running.service.database.read() as session:
        (source,) = session.query(Job).one().details["sources"]
    file = running.service.openai.files.get(ONE, source.rpartition("/")[2])
    assert file is not None
    lines = b"".join(running.service.openai.files.read(file)).decode().splitlines()
    assert [json.loads(line)["messages"][0]["content"] for line in lines] == [
        "Question 0", "Question 2",
    ]  # fmt: skip
    for change in (
        {"usePromptResponse": False},
        {"invocationLogSource": {"s3Uri": "s3://nowhere/logs"}},
        {"requestMetadataFilters": {"equals": {"team": "c"}}},
    ):
        data = {"trainingDataConfig": {"invocationLogsConfig": {**logs, **change}}}
        refused = running.ask("/model-customization-jobs", {**job, **data, "jobName": "x"})
        assert refused.status_code == 400 and "Validation" in refused.headers["x-amzn-errortype"]
    assert running.ask("/model-customization-jobs", job).status_code == 400  # the name is in use
    assert [each.id for each in running.service.openai.files.list(ONE, 9) or ()] == [file.id]


def test_record_of_aws_with_tool_calls() -> None:
    call = {"toolUse": {"toolUseId": "t", "name": "stock", "input": {}}}
    spec = {"name": "stock", "inputSchema": {"json": {"type": "object"}}}
    record = {
        "requestId": "r",
        "input": {"inputBodyJson": {
            "messages": [{"role": "user", "content": [{"text": "Stock?"}]}],
            "toolConfig": {"tools": [{"toolSpec": spec}]},
        }},
        "output": {"outputBodyJson": {
            "output": {"message": {"role": "assistant", "content": [call]}}, "stopReason": "tool_use",
        }},
    }  # fmt: skip
    (answer,) = answers_of(record)
    assert answer.reply["content"] == [call] and answer.tools[0]["function"]["name"] == "stock"


HELLO = [user("Hello")]
PICTURE = {"type": "image_url", "image_url": {"url": ""}}
MESSAGE = {"role": "assistant", "content": [{"text": "Hi"}]}


def choice(reason: str | None, **members: Any) -> dict[str, Any]:
    return {"choices": [{"message": assistant("Hi"), "finish_reason": reason, **members}]}


@pytest.mark.parametrize(
    ("sent", "returned"),
    [
        ({"messages": HELLO}, choice("length")),
        ({"messages": HELLO}, choice(None)),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, choice("stop")),
        ({"prompt": [[1, 2, 3]]}, {"choices": [{"text": "Hi", "finish_reason": "stop"}]}),
        ({"prompt": [1, 2, 3]}, {"choices": [{"text": "Hi", "finish_reason": "stop"}]}),
        ({"prompt": "Hello"}, {"generation": "Hi", "stop_reason": "length"}),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hello"}]}]},
            {"output": {"message": MESSAGE}, "stopReason": "max_tokens"},
        ),
        (
            {"input": "Hello"},
            {"object": "response", "status": "incomplete", "output": [MESSAGE]},
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": ""}]}]},
            {"object": "response", "status": "completed", "output": [MESSAGE]},
        ),
        (
            {"input": "Hello", "tools": [{"type": "file_search", "vector_store_ids": ["v"]}]},
            {"object": "response", "status": "completed", "output": [MESSAGE]},
        ),
    ],
)  # fmt: skip
def test_records_without_answers(sent: dict[str, Any], returned: dict[str, Any]) -> None:
    record = {
        "requestId": "r",
        "input": {"inputBodyJson": sent},
        "output": {"outputBodyJson": returned},
    }
    assert not [*answers_of(record)]


def test_rejected_answer_with_reasoning_is_text() -> None:
    thought = {"reasoningContent": {"reasoningText": {"text": "Think"}}}
    reply = {"role": "assistant", "content": [thought, {"text": "Hi"}]}
    better = Feedback(name="corrected", position=0, value={"value": "Better"})
    (row,) = training_rows([CapturedAnswer("r", HELLO, reply, feedback=[better])], "dpo")
    assert (row["chosen"], row["rejected"]) == ("Better", "Hi")


def log(text: str) -> bytes:
    """Return a record as AWS writes it."""
    sent = {"messages": [{"role": "user", "content": [{"text": text}]}]}
    returned = {"output": {"message": MESSAGE}, "stopReason": "end_turn"}
    record = {
        "requestId": "r",
        "input": {"inputBodyJson": sent},
        "output": {"outputBodyJson": returned},
    }
    return gzip.compress(json.dumps(record).encode() + b"\n")


def logged(running: Running, key: str, content: bytes) -> list[CapturedAnswer]:
    objects = running.service.objects
    with objects.begin(ONE) as file:
        file.write(content)
        objects.put(ONE, "luthier-capture", key, file.finish(), ObjectMetadata())
    return [*logged_answers(objects, ONE, "luthier-capture", "", lambda record: True)]


def test_logs_below_a_folder_data(ask: Callable[..., str], running: Running) -> None:
    folder = f"/data/AWSLogs/{ONE}/BedrockModelInvocationLogs/us-east-1/2026/01/01/00"
    (answer,) = logged(running, f"copied{folder}/1.json.gz", log("Hello"))
    assert answer.prompt == HELLO
    assert len(logged(running, f"copied{folder}/data/1_input.json.gz", b"a body")) == 1


def test_large_body_of_a_log_is_left_out(ask: Callable[..., str], running: Running) -> None:
    folder = f"AWSLogs/{ONE}/BedrockModelInvocationLogs/us-east-1/2026/01/01/00"
    key = f"{folder}/data/1_input.json.gz"
    large = {"inputBodyS3Path": f"s3://luthier-capture/{key}"}
    logged(running, key, gzip.compress(b" " * (1 << 25)))
    record = json.dumps({"requestId": "r", "input": large}).encode()
    assert not logged(running, f"{folder}/1.json.gz", gzip.compress(record))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"plain text", id="not compressed"),
        pytest.param(log("Hello")[:-9], id="cut off"),
        pytest.param(gzip.compress(b"{"), id="not JSON"),
        pytest.param(gzip.compress(b"[1]"), id="not an object"),
        pytest.param(gzip.compress(b'{"output": {}}'), id="no input"),
        pytest.param(gzip.compress(b" " * (1 << 25)), id="too large"),
        pytest.param(
            gzip.compress(b'{"input": {"inputBodyS3Path": "s3://luthier-capture/gone"}}'),
            id="body is gone",
        ),
    ],
)
def test_damaged_logs(ask: Callable[..., str], running: Running, content: bytes) -> None:
    with pytest.raises(RefusedInput, match="s3://luthier-capture/"):
        logged(running, "1.json.gz", content)
