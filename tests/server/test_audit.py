"""The audit log of a running service."""

from __future__ import annotations

import pytest
from principals_of import FIRST

from luthier.server.audit import READ_ONLY, AuditTrail
from luthier.server.http.messages import Caller
from luthier.server.tables.audit import entries
from luthier.server.tables.database import Database

ANN = Caller(FIRST, "ann", ("administrator",))


def written(database: Database) -> list[tuple[str, str]]:
    with database.read() as session:
        return [(each.action, each.outcome) for each in reversed(entries(session))]


@pytest.mark.parametrize(
    ("action", "reads"),
    [
        ("luthier:openai.fine_tuning.jobs.list_events", True),
        ("luthier:openai.fine_tuning.jobs.list_checkpoints", True),
        ("luthier:openai.files.list", True),
        ("luthier:openai.files.content", True),
        ("luthier:openai.files.delete", False),
        ("luthier:openai.fine_tuning.jobs.cancel", False),
        ("luthier:CreateJob", False),
        ("luthier:Predict", True),
        ("luthier:ReconstructImages", True),
        ("luthier:openai.images.generate", True),
    ],
)
def test_actions_that_change_nothing(action: str, reads: bool) -> None:
    assert bool(READ_ONLY.fullmatch(action)) is reads


def test_changes_and_refusals_are_written_and_reads_are_not(database: Database) -> None:
    trail = AuditTrail(database)
    for action in ("bedrock:GetCustomModel", "bedrock:CreateCustomModel"):
        for outcome in ("ok", "Validation", "InternalServer", "AccessDenied"):
            trail.record(ANN, action, "arn:m", outcome, "r-1", "10.0.0.1")
    assert written(database) == [
        ("bedrock:GetCustomModel", "AccessDenied"),
        ("bedrock:CreateCustomModel", "ok"),
        ("bedrock:CreateCustomModel", "InternalServer"),
        ("bedrock:CreateCustomModel", "AccessDenied"),
    ]
    with database.read() as session:
        (last,) = entries(session, limit=1)
    assert (last.account, last.user, last.address) == (FIRST, "ann", "10.0.0.1")
    assert (last.request_id, last.resource) == ("r-1", "arn:m")
