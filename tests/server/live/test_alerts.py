"""Alerts: one per event, delivered signed and a limited number of times."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from both_databases import new_database
from sqlalchemy import select, update

from luthier.errors import RefusedInput
from luthier.server.live.alerts import SIGNATURE, Alerts, check_webhook
from luthier.server.tables.database import Database, now
from luthier.server.tables.live.alerts import MOST_ATTEMPTS, Alert, add_alert

SECRET = "0123456789abcdef"


class Webhook:
    """A server that stores the requests and answers with ``status``."""

    def __init__(self) -> None:
        self.status = 204
        self.received: list[tuple[str, bytes, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((self.path, body, self.headers[SIGNATURE]))
                self.send_response(outer.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def database(luthier_home: Path) -> Iterator[Database]:
    made = new_database()
    with made.write() as session:
        for _ in range(2):
            add_alert(session, "1", "drift", "support", "The inputs have drifted.", "drift 1")
    yield made
    made.close()


def due(database: Database) -> list[Any]:
    with database.read() as session:
        return list(session.scalars(select(Alert.due)))


def make_due(database: Database) -> None:
    with database.write() as session:
        session.execute(update(Alert).values(due=now() - timedelta(seconds=1)))


def test_signed_delivery_of_one_alert(
    database: Database, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = Alerts(database, webhook.url, SECRET)
    with caplog.at_level(logging.WARNING, "luthier.server"):
        alerts.deliver()
        alerts.deliver()
    ((path, body, signature),) = webhook.received
    assert path == "/hook" and json.loads(body)["text"] == "The inputs have drifted."
    expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    assert signature == f"sha256={expected}"
    assert alerts.counts == {"drift": 1} and due(database) == [None]
    assert "support: The inputs have drifted." in caplog.text


def test_failed_deliveries_end(database: Database, webhook: Webhook) -> None:
    alerts = Alerts(database, webhook.url, SECRET)
    webhook.status = 302
    for _ in range(MOST_ATTEMPTS + 2):
        alerts.deliver()
        if due(database) != [None]:
            alerts.deliver()  # not before the time of the next delivery
            make_due(database)
    assert [path for path, _, _ in webhook.received] == ["/hook"] * MOST_ATTEMPTS
    assert alerts.counts == {"drift": 1}


def test_log_without_webhook(database: Database) -> None:
    alerts = Alerts(database)
    alerts.deliver()
    assert alerts.counts == {"drift": 1} and due(database) == [None]


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("http://example.com/hook", SECRET), ("ftp://127.0.0.1", SECRET), ("https://", SECRET),
        ("https://example.com/hook", ""),
    ],
)  # fmt: skip
def test_insecure_webhook(url: str, secret: str) -> None:
    with pytest.raises(RefusedInput):
        check_webhook(url, secret)
    check_webhook("https://example.com/hook", SECRET)
    check_webhook("http://localhost:9/hook", SECRET)
