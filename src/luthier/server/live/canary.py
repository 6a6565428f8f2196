"""Canaries: comparison of a new model with the serving model, on a share of the requests.

Answers are recorded behind the response. One thread writes the answers and judges all canaries every
:data:`JUDGE_SECONDS`. The test is valid at any time (:mod:`luthier.evaluation.sequential`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.evaluation.sequential import Observation, evidence_of_harm, needed_evidence
from luthier.server.http.metrics import RequestRecord
from luthier.server.live.capture import OUTAGES
from luthier.server.live.feedback import OUTCOME
from luthier.server.periodic import PeriodicThread
from luthier.server.tables.database import Database, find_row
from luthier.server.tables.endpoints import CANARY, DeploymentChange, Endpoint, open_change
from luthier.server.tables.live.alerts import add_alert
from luthier.server.tables.live.canaries import CanaryAnswer, answers_of, feedback_of
from luthier.server.tables.live.captures import Feedback

ANSWERS = 500
"""Default number of the canary's answers before the promotion. In simulations with a share of 0.1,
9 of 10 canaries with 5 % errors instead of 1 %, or 30 % bad ratings instead of 20 %, were found."""
LATENCY_SLACK = 1.2
"""Factor by which a canary may be slower without evidence against the canary."""
JUDGE_SECONDS = 0.5
USER = "luthier"
"""User of automatic promotions and rollbacks in the audit log."""
_FAILURES = ("ModelError", "ModelTimeout", "ModelNotReady", "InternalServer", "ServiceUnavailable")
_RATINGS = ("thumb", "rating")


@dataclass(frozen=True)
class HarmTest:
    """A measure of the canary and of the serving model."""

    measure: str
    observations: Sequence[Observation]
    share: float
    sign: int
    """-1 if a higher value of the measure is better."""
    number: int
    """Number of the test; see :func:`needed_evidence`."""

    @property
    def evidence(self) -> float:
        """Evidence for a worse canary; 1 is none."""
        return evidence_of_harm(self.observations, self.share)

    @property
    def needed(self) -> float:
        """Evidence for a rollback."""
        return needed_evidence(self.number)

    def plain(self) -> dict[str, Any]:
        """Return the comparison for people."""
        return {
            "measure": self.measure,
            "canary": self._summary(True),
            "serving": self._summary(False),
            "evidence": round(self.evidence, 1),
            "needed": round(self.needed),
        }

    def _summary(self, is_new: bool) -> str:
        values = [each.badness * self.sign for each in self.observations if each.is_new == is_new]
        if not values:
            return "none"
        if self.measure == "latency":
            return f"median {median(values) * (LATENCY_SLACK if is_new else 1):.0f} ms"
        mean = sum(values) / len(values)
        share = f"{100 * mean:.1f} %" if self.measure == "errors" else f"mean {mean:.2f}"
        return f"{share} of {len(values)}"


class Canaries:
    """Recorder and judge of canaries. Safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._queue: deque[tuple[str, str, dict[str, Any]]] = deque()
        self._judged: dict[str, int] = {}
        """Number of the last feedback when a deployment was judged."""
        self.thread = PeriodicThread(
            "canaries", self.judge, JUDGE_SECONDS, "canaries could not be judged", once_more=True
        )

    def add(self, record: RequestRecord, seconds: float) -> None:
        """Queue the answer of a request to a deployment with a canary.

        Requests that no model has answered, such as invalid requests, do not count.
        """
        routing = record.routing
        failed = routing.failed or record.status >= 500 or record.error in _FAILURES
        if routing.deployment and (failed or not record.error):
            answer = {
                "request_id": record.request_id, "unit": routing.unit, "is_new": routing.is_new,
                "failed": failed,
                "milliseconds": round((seconds - (record.queue_seconds or 0)) * 1000),
            }  # fmt: skip
            self._queue.append((routing.deployment, routing.canary, answer))

    def judge(self) -> None:
        """Write the waiting answers, and end worse canaries and canaries with enough answers."""
        waiting = [self._queue.popleft() for _ in range(len(self._queue))]
        try:
            with self.database.read() as session:
                running = select(Endpoint.id).where(Endpoint.canary_share.is_not(None))
                endpoints = session.scalars(running).all()
                feedback = session.scalar(select(func.max(Feedback.seq))) or 0
            for endpoint in endpoints:
                fresh = [each[1:] for each in waiting if each[0] == endpoint]
                if fresh or self._judged.get(endpoint) != feedback:
                    with self.database.write() as session:
                        self._judge(session, endpoint, fresh)
                    self._judged[endpoint] = feedback
                waiting = [each for each in waiting if each[0] != endpoint]
        except OUTAGES:
            self._queue.extendleft(reversed(waiting))
            raise

    def _judge(
        self, session: Session, endpoint_id: str, fresh: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        endpoint = find_row(session, select(Endpoint).filter_by(id=endpoint_id), lock=True)
        change = open_change(session, endpoint_id)
        if endpoint is None or change is None or change.state != CANARY:
            return
        for canary, answer in fresh:
            if canary == change.model:  # not an answer of an earlier canary
                session.add(CanaryAnswer(change=change.seq, **answer))
        session.flush()
        count, found = harm_tests(session, endpoint.account, change)
        worse = next((each for each in found if each.evidence >= each.needed), None)
        if worse is not None:
            text = (
                "Rolled back for {measure}: {canary} for the canary, {serving} for the serving model; "
                "evidence {evidence}, needed {needed}."
            )
            note = text.format(**worse.plain())
            endpoint.end_change(session, note, USER)
            add_alert(
                session, endpoint.account, "rollback", endpoint.name, note, f"rollback {change.seq}"
            )
        elif count >= (change.answers or ANSWERS):
            text = f"Promoted after {count} answers without evidence of harm."
            endpoint.switch(session, text, USER)


def harm_tests(
    session: Session, account: str, change: DeploymentChange
) -> tuple[int, list[HarmTest]]:
    """Return the number of counted answers of the canary, and the tests for harm."""
    answers = answers_of(session, change.seq)
    first = {each.unit: each for each in reversed(answers)}
    ordered = sorted(first.values(), key=lambda each: each.seq)
    errors = [Observation(each.is_new, each.failed) for each in ordered]
    latencies = [
        Observation(each.is_new, each.milliseconds / (LATENCY_SLACK if each.is_new else 1))
        for each in answers
        if not each.failed
    ]
    streams = {"errors": (1, errors), "latency": (1, latencies)}
    rated = set[tuple[str, str]]()
    for answer, feedback in feedback_of(session, account, change.seq):
        name, value = feedback.name, feedback.value["value"]
        if (name, answer.unit) in rated or not (name in _RATINGS or name.startswith(OUTCOME)):
            continue
        rated.add((name, answer.unit))
        sign, stream = streams.setdefault(
            name, (-1 if feedback.value.get("higher_is_better", True) else 1, [])
        )
        value = value == "up" if name == "thumb" else value
        stream.append(Observation(answer.is_new, sign * value))
    share = change.share or 0
    return sum(each.is_new for each in ordered), [
        HarmTest(name, stream, share, sign, number)
        for number, (name, (sign, stream)) in enumerate(streams.items())
    ]
