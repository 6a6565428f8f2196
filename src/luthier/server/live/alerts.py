"""Delivery of alerts: a line of the log, a metric, and a signed webhook.

One thread delivers all alerts, so that a webhook that does not answer delays nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import urllib.request
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from luthier.chat_models.base import is_loopback
from luthier.errors import RefusedInput
from luthier.server.periodic import PeriodicThread
from luthier.server.tables.database import Database
from luthier.server.tables.live.alerts import MOST_ATTEMPTS, Alert, claim_alert, finish_alert

POLL_SECONDS = 1.0
WEBHOOK_SECONDS = 5.0
"""Time limit for an answer of the webhook, in seconds."""
SIGNATURE = "X-Luthier-Signature"
"""Header with the HMAC-SHA-256 of the body, as ``sha256=HEX``."""
_log = logging.getLogger("luthier.server")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: the target may be a service of the internal network."""


_opener = urllib.request.build_opener(_NoRedirects())


def check_webhook(url: str, secret: str) -> None:
    """Raise :class:`RefusedInput` for an insecure address, or without a secret."""
    parts = urlsplit(url)
    secure = parts.scheme == "https" or (
        parts.scheme == "http" and is_loopback(parts.hostname or "")
    )
    if not secure or not parts.hostname:
        raise RefusedInput(
            f'The webhook "{url}" must be an https address, or http on this machine.'
        )
    if len(secret) < 16:
        raise RefusedInput(
            "The webhook needs a secret of at least 16 characters in LUTHIER_ALERT_SECRET."
        )


class Alerts:
    """Delivery of the alerts of all accounts."""

    def __init__(self, database: Database, webhook: str | None = None, secret: str = "") -> None:
        if webhook is not None:
            check_webhook(webhook, secret)
        self.database, self.webhook, self.secret = database, webhook, secret.encode()
        self.counts: Counter[str] = Counter()
        """Number of alerts by kind since the start, for the metrics."""
        self.thread = PeriodicThread(
            "alerts", self.deliver, POLL_SECONDS, "alerts could not be delivered"
        )

    def deliver(self) -> None:
        """Log new alerts, and deliver due alerts."""
        with self.database.read() as session:
            waiting = session.query(Alert.seq).filter(Alert.due.is_not(None)).first()
        # A read first: a write transaction every few seconds would lock SQLite for nothing.
        if waiting is None:
            return
        while not self.thread.closed.is_set():
            with self.database.write() as session:
                alert = claim_alert(session)
            if alert is None:
                return
            if alert.attempts == 1:
                self.counts[alert.kind] += 1
                _log.warning("alert (%s): %s: %s", alert.kind, alert.subject, alert.text)
            if self.webhook is None or self._post(alert):
                with self.database.write() as session:
                    finish_alert(session, alert)

    def _post(self, alert: Alert) -> bool:
        body = json.dumps(
            {
                "id": alert.seq, "account": alert.account, "kind": alert.kind,
                "subject": alert.subject, "text": alert.text, "created": alert.created.isoformat(),
            }
        ).encode()  # fmt: skip
        # Over the exact bytes that are sent, because a receiver that encodes JSON again gets other
        # bytes.
        signature = hmac.new(self.secret, body, hashlib.sha256).hexdigest()
        headers = {"Content-Type": "application/json", SIGNATURE: f"sha256={signature}"}
        request = urllib.request.Request(str(self.webhook), body, headers, method="POST")  # noqa: S310
        try:
            with _opener.open(request, timeout=WEBHOOK_SECONDS):
                return True
        except (OSError, ValueError) as error:  # a HTTP error is an OSError
            last = alert.attempts >= MOST_ATTEMPTS
            _log.warning(
                "alert %s was not delivered (%s)%s", alert.seq, error, "; no more attempts" * last
            )
            return last
