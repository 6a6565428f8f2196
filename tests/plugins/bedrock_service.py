"""A real server with the Bedrock API, real clients, and validation of every response."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import uvicorn
from answers import check_answer
from botocore.config import Config
from worker_forks import NoUploads

from luthier.errors import CorruptFile, RefusedInput
from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.audit import AuditTrail
from luthier.server.bedrock.activation import Activation
from luthier.server.bedrock.control import Control
from luthier.server.bedrock.routes import bedrock_api
from luthier.server.http.application import Application
from luthier.server.http.messages import Caller, Fault, RequestHead, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.live.capture import Capture
from luthier.server.stores.objects import Objects
from luthier.server.stores.removal import delete
from luthier.server.tables import jobs as queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import Job

ALICE, BOB = "111111111111", "222222222222"
BASE = "huggingfacetb.smollm2-135m-instruct"
ENCODER = "sentence-transformers.all-minilm-l6-v2"
ROLE = f"arn:aws:iam::{ALICE}:role/tuner"


class ByAccessKey:
    """Stands for authentication: the access key is the account."""

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        found = re.search(r"Credential=([0-9]{12})/", dict(head.headers).get("authorization", ""))
        if found is None:
            raise Fault("MissingAuthenticationToken", "Missing Authentication Token")
        return Signed(Caller(found[1], "tester", ("administrator",)), "bedrock")

    def recognize(self, head: RequestHead) -> Signed | None:
        return self.authenticate(head, b"")


class Places:
    """Stands for data locations: everything below ``s3://data/`` is there."""

    def __init__(self) -> None:
        self.checked: list[tuple[str, str]] = []
        self.uploads = NoUploads()

    def check(self, account: str, uri: str) -> None:
        self.checked.append((account, uri))
        if not uri.startswith("s3://data/"):
            raise RefusedInput(f"{uri} cannot be read.")

    def peek(self, account: str, uri: str, folder: Path, most: int) -> tuple[str, Path]:
        target = folder / "rows.jsonl"
        row = {"text": "a", "label": "b"} if "labels" in uri else {"prompt": "a", "completion": "b"}
        target.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
        return uri, target

    def folder(self, account: str, uri: str) -> list[tuple[str, int]]:
        self.check(account, uri)
        return [("config.json", 2)]

    def check_writable(self, account: str, uri: str) -> None:
        if not uri.startswith("s3://data/"):
            raise RefusedInput(f"{uri} cannot be written.")


class Preparation:
    """A stub for loading that can block and fail."""

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


class Service:
    """The components behind the server."""

    def __init__(
        self, server: Server, database: Database, quotas: AccountQuotas, handlers: Any
    ) -> None:
        self.server, self.client, self.url = server, server.client, server.url
        self.database = database
        self.places, self.preparation = Places(), Preparation()
        self.told_of = threading.Event()
        """Set when the scheduler is notified of a job."""
        self.trail = AuditTrail(database)
        self.deleted: list[str | None] = []
        """Library ids of the models that the control plane deleted."""
        self.control = Control(
            database=database,
            arns=Arns("us-east-1"),
            locations=self.places,
            pool=ModelPool(0),
            quotas=lambda account: quotas,
            delete_model=self.delete,
            capture=Capture(Objects(database)),
            wake=self.told_of.set,
            activation=Activation(database, self.preparation),
            grader=graders,
        )
        self.api = bedrock_api(self.control, handlers)

    def job(self, account: str, name: str) -> Job:
        with self.database.read() as session:
            return session.query(Job).filter_by(account=account, name=name).one()

    def complete(self, account: str, name: str, **result: Any) -> CustomModel:
        """Complete the job like a worker, and return the model."""
        job = self.job(account, name)
        with self.database.write() as session:
            claimed = session.get(Job, job.seq)
            assert claimed is not None
            queue.move(session, claimed, queue.RUNNING, "started", lease="token", lease_ends=None)
        record = {
            "stored_id": f"smollm2:job-{job.id}",
            "steps": 10,
            "tokens": 100,
            "train_loss": 1.5,
            "validation_losses": [],
        }
        with self.database.write() as session:
            queue.complete(session, job.id, "token", {**record, **result})
        with self.database.read() as session:
            return session.query(CustomModel).filter_by(job_id=job.id).one()

    def delete(self, model: CustomModel) -> None:
        delete(self.database, Arns(), model)
        self.deleted.append(model.stored_id)

    def fail(self, account: str, name: str, failure: str) -> None:
        job = self.job(account, name)
        with self.database.write() as session:
            claimed = session.get(Job, job.seq)
            assert claimed is not None
            queue.move(session, claimed, queue.FAILED, failure, failure=failure)


class Server:
    """One uvicorn server for all tests of a process, with a replaceable application."""

    def __init__(self) -> None:
        self.app: Application | None = None
        # asyncio sets TCP_NODELAY only for sockets known to be TCP.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self._call,
            interface="asgi3",
            log_level="critical",
            lifespan="off",
            # Clients leave connections open.
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()
        eventually(lambda: self._server.started)
        self._clients: dict[str, Any] = {}

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        assert self.app is not None
        await self.app(scope, receive, send)

    def client(self, account: str = ALICE) -> Any:
        """Return boto3's ``bedrock`` client; each response is validated against the service model."""
        if account not in self._clients:
            made = boto3.client(
                "bedrock",
                endpoint_url=self.url,
                region_name="us-east-1",
                aws_access_key_id=account,
                aws_secret_access_key="secret",
                config=Config(retries={"total_max_attempts": 1}, max_pool_connections=32),
            )
            made.meta.events.register("before-parse.bedrock.*", check_answer)
            self._clients[account] = made
        return self._clients[account]

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    @contextmanager
    def serving(
        self, database: Database, quotas: AccountQuotas | None = None, handlers: Any = None
    ) -> Iterator[Service]:
        """Start the service on ``database``."""
        made = Service(self, database, quotas or AccountQuotas(), handlers or {})
        self.app = Application(
            (made.api,),
            ByAccessKey(),
            lambda caller: None,
            Metrics(dict),
            made.trail,
            lambda: None,
        )
        try:
            yield made
        finally:
            made.preparation.free.set()
            made.control.activation.close()


def graders(account: str, function: str) -> dict[str, Any] | None:
    """Return the only registered function."""
    return {"method": "exact"} if function.endswith(":function:grade") else None


def eventually(holds: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until ``holds`` returns a true value."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def job_members(name: str = "job-1", **members: Any) -> dict[str, Any]:
    """Return the members of a valid request."""
    rows = "labels" if members.get("baseModelIdentifier") == ENCODER else "train"
    return {
        "jobName": name,
        "customModelName": f"model-of-{name}",
        "roleArn": ROLE,
        "baseModelIdentifier": BASE,
        "trainingDataConfig": {"s3Uri": f"s3://data/{rows}.jsonl"},
        "outputDataConfig": {"s3Uri": "s3://data/out/"},
        **members,
    }
