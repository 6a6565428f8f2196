"""The audit log of a running service."""

from __future__ import annotations

from principals_of import FIRST

from luthier.server.audit import AuditTrail
from luthier.server.http.messages import Caller
from luthier.server.roles import CHANGES, PERMISSIONS, Permission
from luthier.server.tables.audit import entries
from luthier.server.tables.database import Database

ANN = Caller(FIRST, "ann", ("administrator",), key="key-1")


def written(database: Database) -> list[tuple[str, str]]:
    with database.read() as session:
        return [(each.action, each.outcome) for each in reversed(entries(session))]


def test_only_actions_with_changes_are_audited() -> None:
    reads = {Permission.IDENTIFY, Permission.INVOKE, Permission.READ}
    assert not {action for action in CHANGES if PERMISSIONS[action] in reads}
    assert CHANGES.isdisjoint({"luthier:InspectData", "luthier:EstimateJob"})
    assert {"s3:PutObject", "luthier:DeleteJob", "luthier:openai.files.delete"} < CHANGES


def test_successful_reads_are_not_audited(database: Database) -> None:
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
    assert last.details == {"key": "key-1"}
