"""Models from outside that want the server's time and memory: only their own requests are refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError
from imported_models import BUCKET, deployed, ended
from luthier_server import BASE, Served, home_with_tiny, until
from resident_memory import Growth

pytestmark = pytest.mark.slow

LOOPS = "{% for a in range(99999) %}" * 4 + "{% set x = a %}" + "{% endfor %}" * 4
WHEN = "{% if messages[-1].content == 'WORD' %}BOMB{% endif %}"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
)
LARGE = (
    "{% set n = namespace(x='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


def bomb(word: str, what: str) -> str:
    return WHEN.replace("WORD", word).replace("BOMB", what)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(
        home_with_tiny(tmp_path_factory.mktemp("hostile"), tiny_model_folder), forked=False
    )
    made.start()
    made.client("s3").create_bucket(Bucket=BUCKET)
    yield made
    made.end()


def imported(server: Served, folder: Path, name: str, template: str) -> dict[str, Any]:
    """The model of ``folder`` with another chat template, once it is taken or not."""
    s3, bedrock = server.client("s3"), server.client("bedrock")
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            s3.put_object(Bucket=BUCKET, Key=f"{name}/{path.name}", Body=path.read_bytes())
    s3.put_object(Bucket=BUCKET, Key=f"{name}/chat_template.jinja", Body=template.encode())
    source = {"s3DataSource": {"s3Uri": f"s3://{BUCKET}/{name}/"}}
    arn = bedrock.create_custom_model(modelName=name, modelSourceConfig=source)["modelArn"]
    return ended(server, arn)


def says(server: Served, model: str, text: str) -> str:
    answer = server.client("bedrock-runtime").converse(
        modelId=model,
        messages=[{"role": "user", "content": [{"text": text}]}],
        inferenceConfig={"maxTokens": 8, "temperature": 0.0},
    )
    return str(answer["output"]["message"]["content"][0]["text"])


@pytest.fixture(scope="module")
def sleeper(server: Served, tiny_model_folder: Path) -> str:
    """A model whose template does as any other until it hears its word."""
    template = bomb("now", LOOPS) + bomb("much", LARGE) + TEMPLATE
    found = imported(server, tiny_model_folder, "sleeper", template)
    assert found["modelStatus"] == "Active", found
    return str(found["modelArn"])


def text_processes(server: Served) -> list[psutil.Process]:
    assert server.process is not None
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [c for c in children if "luthier.serving.sandboxed_text_child" in c.cmdline()]


def test_a_template_that_never_ends_is_refused_when_it_is_tried(
    server: Served, tiny_model_folder: Path
) -> None:
    found = imported(server, tiny_model_folder, "endless", LOOPS)
    assert found["modelStatus"] == "Failed"
    message = found["failureMessage"]
    assert message.startswith("chat_template: ") and "[model.template]" in message
    assert "10 seconds of processor time" in message and "Fix: " in message


def test_one_that_waits_for_its_word_hurts_nobody_else(server: Served, sleeper: str) -> None:
    model = deployed(server, "sleeper", sleeper)
    before = says(server, model, "Hello")
    usual = says(server, BASE, "Hello")
    refused: list[str] = []

    def asking(word: str) -> None:
        with pytest.raises(ClientError) as caught:
            says(server, model, word)
        refused.append(str(caught.value))

    threads = [threading.Thread(target=asking, args=(word,)) for word in ("now", "much")]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with Growth(server, children=False) as growth:
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            server.client("bedrock").list_custom_models()
            assert says(server, BASE, "Hello") == usual
            slowest = max(slowest, time.monotonic() - began)
    assert all("ValidationException" in text for text in refused) and len(refused) == 2, refused
    assert any("seconds of processor time" in text for text in refused), refused
    assert slowest < 5 and growth.most < 300 << 20
    assert says(server, model, "Hello") == before


def test_what_is_made_from_it_is_no_freer(server: Served, sleeper: str) -> None:
    bedrock, s3 = server.client("bedrock"), server.client("s3")
    rows = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(16)]
    s3.put_object(Bucket=BUCKET, Key="rows.jsonl", Body="\n".join(map(json.dumps, rows)).encode())
    job = bedrock.create_model_customization_job(
        jobName="heir", customModelName="heir", roleArn="arn:aws:iam::000000000000:role/tuner",
        baseModelIdentifier=sleeper, customizationType="FINE_TUNING",
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/rows.jsonl"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/out/"},
        hyperParameters={"epochCount": "1", "batchSize": "8"},
    )["jobArn"]  # fmt: skip
    get = bedrock.get_model_customization_job
    until(lambda: get(jobIdentifier=job)["status"] not in ("InProgress", "Scheduled"))
    job_view = get(jobIdentifier=job)
    assert job_view["status"] == "Completed", job_view.get("failureMessage")
    model = deployed(server, "heir", job_view["outputModelArn"])
    says(server, model, "Hello")
    with pytest.raises(ClientError, match=r"ValidationException.*seconds of processor time"):
        says(server, model, "now")


def test_processes_end_with_the_server(server: Served, sleeper: str) -> None:
    says(server, deployed(server, "asked", sleeper), "Hello")
    own = text_processes(server)
    assert own
    server.kill()
    _, alive = psutil.wait_procs(own, timeout=20)
    assert not alive
    server.start()
