"""Two servers that share PostgreSQL and S3 alone: one queue, random kills, the same models."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from job_checks import check_history
from luthier_server import BASE, Served, home_with_tiny, until
from moto_server import KEYS, moto_client, moto_server

from luthier.store.database import Database
from luthier.store.jobs import ENDED, Job, JobEvent
from luthier.store.schema import METADATA

BUCKET = "luthier-shared"
KILLS = 10
STEPS = 120
GREEDY = {"maxTokens": 8, "temperature": 0.0}


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with moto_server() as port:
        yield port


class Machines:
    """Servers with a store each, on one database and one bucket."""

    def __init__(self, folder: Path, url: str, moto: int, model_folder: Path) -> None:
        assert METADATA.tables
        self.database, self.moto = Database(url), moto
        self.bucket = moto_client(moto)
        self.bucket.create_bucket(Bucket=BUCKET)
        self.prefix = secrets.token_hex(4)  # a shared store belongs to one database
        self.options = ["--database", url, "--shared-store", f"s3://{BUCKET}/{self.prefix}"]
        self.variables = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{moto}",
            "LUTHIER_SERVER_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
        }
        homes = (home_with_tiny(folder / name, model_folder) for name in ("one", "two"))
        self.servers = [Served(home) for home in homes]

    def start(self, number: int, *options: str) -> Served:
        self.servers[number].start(*self.options, *options, **self.variables)
        return self.servers[number]

    def jobs(self) -> list[Job]:
        with self.database.read() as session:
            return list(session.query(Job).order_by(Job.seq))

    def kill_workers(self, dice: random.Random | None = None) -> int:
        """Kill the workers that have jobs, or one of them; how many."""
        pids = [
            job.worker["pid"]
            for job in self.jobs()
            if job.worker and not job.worker.get("starting")
        ]
        if dice is not None and pids:
            pids = [dice.choice(pids)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def keys(self, below: str = "") -> list[str]:
        pages = self.bucket.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/{below}")
        return [each["Key"] for page in found for each in page.get("Contents", ())]


@pytest.fixture
def machines(
    tmp_path: Path, moto: int, postgres: Any, tiny_model_folder: Path
) -> Iterator[Machines]:
    made = Machines(tmp_path, postgres.new_database(), moto, tiny_model_folder)
    yield made
    for server in made.servers:
        if server.process is not None:
            server.kill()
    made.kill_workers()
    made.database.close()


def submit(server: Served, name: str, rows: str, method: str) -> None:
    training = {"max_steps": STEPS, "batch_size": 4, "precision": "float32", "threads": 1}
    status, body = server.ask("POST", "/api/v1/jobs", {
        "name": name, "model_name": name, "base": "tiny", "training": [rows],
        "settings": {"training": training, "adaptation": {"method": method}},
    })  # fmt: skip
    assert status == 201, body


def converse(server: Served, arn: str, name: str) -> str:
    bedrock = server.client("bedrock")
    deployment = bedrock.create_custom_model_deployment(modelDeploymentName=name, modelArn=arn)
    asked = {"customModelDeploymentIdentifier": deployment["customModelDeploymentArn"]}
    until(lambda: bedrock.get_custom_model_deployment(**asked)["status"] != "Creating")
    assert bedrock.get_custom_model_deployment(**asked)["status"] == "Active"
    answer = server.client("bedrock-runtime").converse(
        modelId=deployment["customModelDeploymentArn"], inferenceConfig=GREEDY,
        messages=[{"role": "user", "content": [{"text": "number 3?"}]}],
    )  # fmt: skip
    bedrock.delete_custom_model_deployment(**asked)
    return str(answer["output"]["message"]["content"][0]["text"])


def trained_weights(server: Served, name: str) -> Any:
    status, body = server.ask("GET", f"/api/v1/models/{name}/certificate")
    assert status == 200, body
    return body["certificate"]["record"]["trained_weights_sha256"]


@pytest.mark.slow
def test_a_mixed_queue_under_random_kills_loses_nothing(
    machines: Machines, tiny_model_folder: Path
) -> None:
    dice = random.Random(7)
    one = machines.start(0)
    s3 = one.client("s3")
    s3.create_bucket(Bucket="training")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket="training", Key="rows.jsonl", Body=body)
    for path in tiny_model_folder.iterdir():
        s3.upload_file(str(path), "training", f"tiny/{path.name}")
    methods = ("lora", "full", "adapters")
    for method in methods:
        submit(one, f"whole-{method}", "s3://training/rows.jsonl", method)
    until(lambda: all(job.state in ENDED for job in machines.jobs()), 600)
    machines.start(1)
    imported = one.client("bedrock").create_custom_model(
        modelName="imported", modelSourceConfig={"s3DataSource": {"s3Uri": "s3://training/tiny/"}}
    )["modelArn"]
    for number in range(2):
        for method in methods:
            submit(
                machines.servers[number], f"{method}-{number}", "s3://training/rows.jsonl", method
            )
    kills = 0
    while kills < KILLS:
        time.sleep(dice.uniform(1, 6))
        number = dice.randrange(3)
        if number < 2:
            machines.servers[number].kill()
            kills += 1 + machines.kill_workers(dice)
            machines.start(number)
        else:
            kills += machines.kill_workers(dice)
        if all(job.state in ENDED for job in machines.jobs()):
            break
    until(lambda: all(j.state in ENDED and not j.has_working_files for j in machines.jobs()), 900)

    jobs = machines.jobs()
    assert [(job.name, job.state, job.failure) for job in jobs if job.state != "Completed"] == []
    for job in jobs:
        with machines.database.read() as session:
            found = session.query(JobEvent).filter_by(job_id=job.id).order_by(JobEvent.seq)
            check_history(job, list(found))
    assert machines.keys("records/jobs") == [] and machines.keys("blobs/jobs") == []
    for method in methods:
        names = [f"whole-{method}", f"{method}-0", f"{method}-1"]
        shas = {trained_weights(server, n) for server in machines.servers for n in names}
        assert len(shas) == 1, names
    one, two = machines.servers
    get = two.client("bedrock").get_custom_model
    until(lambda: get(modelIdentifier=imported)["modelStatus"] != "Creating")
    arns = [get(modelIdentifier=name)["modelArn"] for name in ("lora-0", "full-1", "imported")]
    for number, arn in enumerate(arns):
        assert converse(one, arn, f"at-one-{number}") == converse(two, arn, f"at-two-{number}")
    assert converse(two, imported, "again") == two.client("bedrock-runtime").converse(
        modelId=BASE, inferenceConfig=GREEDY,
        messages=[{"role": "user", "content": [{"text": "number 3?"}]}],
    )["output"]["message"]["content"][0]["text"]  # fmt: skip

    stored = {job.name: job.result["stored_id"] for job in jobs if job.result}["lora-0"]
    base, _, name = stored.partition(":")
    assert machines.keys(f"blobs/models/{base}/{name}/")
    two.client("bedrock").delete_custom_model(modelIdentifier="lora-0")
    assert not machines.keys(f"blobs/models/{base}/{name}/")
    assert one.ask("GET", "/api/v1/models/lora-0/certificate")[0] == 404


@pytest.mark.slow
def test_a_job_of_one_machine_goes_on_on_the_other(machines: Machines) -> None:
    one = machines.start(0)
    s3 = one.client("s3")
    s3.create_bucket(Bucket="training")
    lines = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    s3.put_object(Bucket="training", Key="rows.jsonl", Body=body)
    submit(one, "whole", "s3://training/rows.jsonl", "lora")
    until(lambda: machines.jobs()[0].state == "Completed", 300)
    submit(one, "broken", "s3://training/rows.jsonl", "lora")
    progress = lambda: machines.jobs()[1].details.get("progress", {}).get("step", 0)  # noqa: E731
    until(lambda: progress() >= 12, 300)
    one.kill()
    machines.kill_workers()
    two = machines.start(1)
    until(lambda: machines.jobs()[1].state in ENDED, 300)
    job = machines.jobs()[1]
    assert (job.state, job.attempts) == ("Completed", 2), job.failure
    assert (two.home / "jobs" / f"{job.id}.log").exists()
    assert trained_weights(two, "whole") == trained_weights(two, "broken")
    machines.start(0)
    arn = two.client("bedrock").get_custom_model(modelIdentifier="broken")["modelArn"]
    assert converse(one, arn, "at-one") == converse(two, arn, "at-two")
