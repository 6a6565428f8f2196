"""A client of the native API over the application in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from starlette.testclient import TestClient
from trails import Remembered

from luthier.inference.pool import ModelPool
from luthier.limits import AccountQuotas
from luthier.server.http.application import Application
from luthier.server.http.messages import Caller, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.live.capture import Capture
from luthier.server.native.operations import Context
from luthier.server.native.routes import native_api
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database

ACCOUNT = "000000000000"


def native_context(database: Database) -> Context:
    """Return the context of an API on ``database`` without models."""
    return Context(
        database=database,
        arns=Arns("us-east-1"),
        locations=Locations(database),
        pool=ModelPool(0),
        quotas=lambda account: AccountQuotas(),
        delete_model=lambda model: None,
        capture=Capture(Objects(database)),
    )


def native_client(context: Context, account: str = ACCOUNT) -> TestClient:
    """Return a client that acts as an administrator of ``account``."""
    signed = Signed(Caller(account, "anna", ("administrator",)))
    authenticator: Any = SimpleNamespace(
        authenticate=lambda head, body: signed, recognize=lambda head: signed
    )
    trail: Any = Remembered()
    return TestClient(
        Application(
            [native_api(context, "1")], authenticator, lambda caller: None,
            Metrics(lambda: {}), trail, lambda: None,
        )
    )  # fmt: skip
