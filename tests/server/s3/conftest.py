"""Fixtures: a service over HTTP and HTTPS with an object store for unmodified clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from both_databases import new_database
from botocore.config import Config
from served import served
from trails import Remembered

from luthier.server.http.application import Api, Application
from luthier.server.http.messages import Caller, RequestHead, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.http.server import Ports
from luthier.server.s3.routes import s3_api
from luthier.server.sigv4 import Credential, verify
from luthier.server.stores.object_files import ObjectFiles
from luthier.server.stores.objects import Objects
from luthier.server.tables.database import now

ACCOUNTS = {"AKONE": "000000000001", "AKTWO": "000000000002"}
SECRET = "a secret of thirty letters, or so"


class Names:
    """Authentication of two users of separate accounts by signature."""

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        return verify(head, body, self.look_up, now())

    def recognize(self, head: RequestHead) -> Signed | None:
        return self.authenticate(head, b"")

    def look_up(self, access: str) -> Credential | None:
        account = ACCOUNTS.get(access)
        return (
            Credential(SECRET, Caller(account, "somebody", ("administrator",))) if account else None
        )


@dataclass
class Service:
    """A server with its object store."""

    url: str
    objects: Objects
    verify: Any = None
    """Certificate of an https server."""

    def client(self, access: str = "AKONE", **settings: Any) -> Any:
        """boto3's client."""
        config = Config(
            retries={"max_attempts": 1, "mode": "standard"}, max_pool_connections=20, **settings
        )
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=access,
            aws_secret_access_key=SECRET, config=config, verify=self.verify,
        )  # fmt: skip


def any_s3(objects: Objects) -> Api:
    """Return the API for unsigned requests, too."""
    return replace(s3_api(objects, "us-east-1"), serves=lambda head, service: True)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Over http."""
    home = tmp_path_factory.mktemp("service")
    database = new_database(f"sqlite:///{home}/luthier.db")
    objects = Objects(database, ObjectFiles(home / "objects"))

    app = Application(
        (any_s3(objects),),
        Names(),
        lambda caller: None,
        Metrics(dict),
        Remembered(),
        lambda: None,
    )
    with served(app) as url:
        found = Service(url, objects)
        found.app = app  # type: ignore[attr-defined]
        yield found
    database.close()


@pytest.fixture(scope="session")
def secure(service: Service, certificate: tuple[Path, Path]) -> Iterator[Service]:
    """Serve the service over HTTPS."""
    app = service.app  # type: ignore[attr-defined]
    # An application belongs to one event loop, so the second server has a separate application.
    other = Application(
        (any_s3(service.objects),),
        app.authenticator,
        app.admit,
        app.metrics,
        app.trail,
        app.ready,
    )
    with served(other, ports=Ports(tls_certificate=certificate[0], tls_key=certificate[1])) as url:
        yield replace(service, url=url, verify=str(certificate[0]))


@pytest.fixture(params=["http", "https"])
def either(request: pytest.FixtureRequest) -> Service:
    """Return the service over HTTP and over HTTPS, which differ in the encoding of bodies."""
    return request.getfixturevalue("service" if request.param == "http" else "secure")


@pytest.fixture
def bucket(service: Service) -> str:
    """A new bucket of the first account."""
    name = f"bucket-{time.monotonic_ns()}"
    service.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def refused() -> Callable[..., tuple[str, int]]:
    """Return a function that calls a client and returns code and status of the error."""
    return code_of


def code_of(call: Callable[..., Any], **arguments: Any) -> tuple[str, int]:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    answer = caught.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]
