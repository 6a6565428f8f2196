"""A real server with the Bedrock face, real clients of it, and a check of every answer they get."""

from __future__ import annotations

import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import boto3
import uvicorn
from answers import check_answer
from botocore.config import Config

from luthier.api.app import Application, Faces
from luthier.api.bedrock.activation import Activation
from luthier.api.bedrock.control import Control, Quotas
from luthier.api.bedrock.face import BedrockFace
from luthier.api.observability import Observer
from luthier.api.wire import Answer, Caller, Call, Fault, Head, Signed
from luthier.errors import CorruptFile, RefusedInput
from luthier.store import jobs as queue
from luthier.store import leases
from luthier.store.arns import Arns
from luthier.store.custom_models import CustomModel
from luthier.store.database import Base, Database
from luthier.store.jobs import Job

ALICE, BOB = "111111111111", "222222222222"
BASE = "huggingfacetb.smollm2-135m-instruct"
ENCODER = "sentence-transformers.all-minilm-l6-v2"
ROLE = f"arn:aws:iam::{ALICE}:role/tuner"


class ByAccessKey:
    """Stands for authentication: the access key is the account."""

    def authenticate(self, head: Head, body: bytes | None) -> Signed:
        found = re.search(r"Credential=([0-9]{12})/", dict(head.headers).get("authorization", ""))
        if found is None:
            raise Fault("MissingAuthenticationToken", "Missing Authentication Token")
        return Signed(Caller(found[1], "tester", ()), "bedrock")


class Places:
    """Stands for data locations: everything below ``s3://data/`` and ``file:///data/`` is there."""

    def __init__(self) -> None:
        self.checked: list[tuple[str, str]] = []

    def check(self, account: str, uri: str) -> None:
        self.checked.append((account, uri))
        if not uri.startswith(("s3://data/", "file:///data/")):
            raise RefusedInput(f"{uri} cannot be read.")


class Preparation:
    """Stands for loading: it can be held up, and it can fail."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.broken: set[str] = set()
        self.seen: list[str] = []

    def __call__(self, stored_id: str) -> None:
        self.seen.append(stored_id)
        assert self.free.wait(20)
        if stored_id in self.broken:
            raise CorruptFile(f"/secret/place/{stored_id} is missing")


@dataclass
class Service:
    """The server, and what stands behind it."""

    database: Database
    control: Control
    face: BedrockFace
    places: Places
    preparation: Preparation
    denied: set[tuple[str, str]]
    """Action and a pattern of resources that policies refuse."""
    url: str = ""
    calls: list[Call] = field(default_factory=list)

    def client(self, account: str = ALICE, **config: Any) -> Any:
        """boto3's ``bedrock``; each answer is held against the service model."""
        made = boto3.client(
            "bedrock",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=account,
            aws_secret_access_key="secret",  # noqa: S106
            config=Config(retries={"total_max_attempts": 1}, max_pool_connections=32, **config),
        )
        made.meta.events.register("before-parse.bedrock.*", check_answer)
        return made

    def job(self, account: str, name: str) -> Job:
        with self.database.read() as session:
            return session.query(Job).filter_by(account=account, name=name).one()

    def complete(self, account: str, name: str, **result: Any) -> CustomModel:
        """Let the job end as its worker would; the model that it made."""
        job = self.job(account, name)
        with self.database.write() as session:
            claimed = session.get(Job, job.seq)
            assert claimed is not None
            queue.move(session, claimed, queue.RUNNING, "started", lease="token", lease_ends=None)
        told = {"stored_id": f"smollm2:job-{job.id}", "train_loss": 1.5, "validation_losses": []}
        with self.database.write() as session:
            leases.complete(session, job.id, "token", {**told, **result})
        with self.database.read() as session:
            return session.query(CustomModel).filter_by(job_id=job.id).one()

    def fail(self, account: str, name: str, failure: str) -> None:
        job = self.job(account, name)
        with self.database.write() as session:
            claimed = session.get(Job, job.seq)
            assert claimed is not None
            queue.move(session, claimed, queue.FAILED, failure, failure=failure)

    def authorize(self, caller: Caller, action: str, resource: str) -> None:
        for refused, pattern in self.denied:
            if refused == action and re.fullmatch(pattern, resource):
                raise Fault(
                    "AccessDenied",
                    f"User: {caller.arn} is not authorized to perform: {action} on resource: "
                    f"{resource} because no identity-based policy allows the {action} action",
                )


class serving:  # noqa: N801  (a context manager)
    """A server on ``database``, as after each start."""

    def __init__(self, database: Database, quotas: Quotas | None = None, **handlers: Any) -> None:
        places, preparation = Places(), Preparation()
        self.service: Service

        def authorize(caller: Caller, action: str, resource: str) -> None:
            self.service.authorize(caller, action, resource)

        control = Control(
            database,
            Arns("us-east-1"),
            places,
            authorize,
            b"the server's own secret",
            Activation(database, preparation),
            graders,
            quotas or Quotas(),
        )
        face = BedrockFace(control, handlers)
        self.service = Service(database, control, face, places, preparation, set())
        unused = _Unused()
        faces = Faces(face, unused, unused, unused)
        app = Application(faces, ByAccessKey(), lambda caller: None, Observer(dict), lambda: None)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Service:
        self._thread.start()
        eventually(lambda: self._server.started)
        self.service.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        return self.service

    def __exit__(self, *error: Any) -> None:
        self.service.preparation.free.set()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self.service.control.activation.close()


def graders(account: str, function: str) -> dict[str, Any] | None:
    """One function is registered."""
    return {"method": "exact"} if function.endswith(":function:grade") else None


def eventually(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until it does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class _Unused:
    """A face that no test asks."""

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        raise AssertionError(fault)

    route = handle = refusal


def job_members(name: str = "job-1", **members: Any) -> dict[str, Any]:
    """Members of a request that is fine."""
    return {
        "jobName": name,
        "customModelName": f"model-of-{name}",
        "roleArn": ROLE,
        "baseModelIdentifier": BASE,
        "trainingDataConfig": {"s3Uri": "s3://data/train.jsonl"},
        "outputDataConfig": {"s3Uri": "s3://data/out/"},
        **members,
    }
