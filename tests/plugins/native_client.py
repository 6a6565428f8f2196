"""A client of the native API over the application in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from starlette.testclient import TestClient
from trails import Remembered

from luthier.server.http.application import Application
from luthier.server.http.messages import Caller, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.native.operations import Context
from luthier.server.native.routes import native_api

ACCOUNT = "000000000000"


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
