"""What an account has of each thing that there is a quota of, and counting anew what it stores."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from luthier.files import folder_size
from luthier.store import imports, queue
from luthier.store.accounts import Account
from luthier.store.batches import Batch
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import Database, count_rows
from luthier.store.endpoints import DEPLOYMENT, PROVISIONED, Endpoint
from luthier.store.evaluations import Eval, EvaluationRun
from luthier.store.exports import ModelExport
from luthier.store.imports import ModelImport
from luthier.store.jobs import Job
from luthier.store.model_folders import folder_of
from luthier.store.objects import UPLOADS, Bucket, ObjectPiece, StoredObject, Upload
from luthier.store.storage import COUNTED, Storage, lock, stored_by
from luthier.store.uploaded_files import UploadedFile


def quota_usage(session: Session, account: str) -> dict[str, int]:
    """By the fields of :class:`luthier.limits.AccountQuotas`."""
    kinds = select(Endpoint.kind, func.count()).where(Endpoint.account == account)
    endpoints = dict(session.execute(kinds.group_by(Endpoint.kind)).all())
    return {
        **stored_by(session, account),
        "jobs_in_flight": queue.in_flight(session, Job, account),
        "custom_models": count_rows(session, CustomModel.account == account),
        "imported_models": imports.count_imported_models(session, account),
        "imports_in_flight": queue.in_flight(session, ModelImport, account),
        "exports_in_flight": queue.in_flight(session, ModelExport, account),
        "batches_in_flight": queue.in_flight(session, Batch, account),
        "evaluations_in_flight": queue.in_flight(session, EvaluationRun, account),
        "deployments": endpoints.get(DEPLOYMENT, 0),
        "provisioned_throughputs": endpoints.get(PROVISIONED, 0),
    }


def measure_models(database: Database) -> None:
    """Note the sizes of models that have none: those of earlier versions."""
    unknown = select(CustomModel.seq, CustomModel.stored_id).where(
        CustomModel.status == ACTIVE, CustomModel.stored_bytes.is_(None)
    )
    with database.read() as session:
        models = session.execute(unknown).all()
    for seq, stored_id in models:
        folder = folder_of(stored_id)
        size = 0 if folder is None else folder_size(folder)
        with database.write() as session:
            found = update(CustomModel).where(CustomModel.seq == seq)
            session.execute(found.values(stored_bytes=size))


def recount(session: Session) -> list[str]:
    """Make every row what the tables say; the accounts whose rows were wrong."""
    known = set(session.scalars(select(Account.id))) | set(session.scalars(select(Storage.account)))
    # All rows are locked before anything is counted: what others change meanwhile comes after it.
    rows = {account: lock(session, account) for account in sorted(known)}
    every, pieces = func.count(), func.sum(ObjectPiece.size)
    counts: list[tuple[str, Select[Any, Any]]] = [
        ("objects", select(StoredObject.account, every)),
        ("files", select(UploadedFile.account, every).where(UploadedFile.deleted.is_(None))),
        ("buckets", select(Bucket.account, every).where(Bucket.name != UPLOADS)),
        ("uploads_in_progress", select(Upload.account, every)),
        ("stored_bytes", select(ObjectPiece.account, pieces)),
        ("stored_bytes", select(CustomModel.account, func.sum(CustomModel.stored_bytes))),
        ("stored_bytes", select(Eval.account, func.sum(Eval.stored_bytes))),
        ("stored_bytes", select(EvaluationRun.account, func.sum(EvaluationRun.stored_bytes))),
    ]
    found = {account: dict.fromkeys(COUNTED, 0) for account in rows}
    for name, query in counts:
        for account, number in session.execute(query.group_by(query.selected_columns[0])):
            if account in found:
                found[account][name] += int(number or 0)
    wrong = [account for account, row in rows.items() if row.counts() != found[account]]
    for account in wrong:
        for name, number in found[account].items():
            setattr(rows[account], name, number)
    session.flush()
    return wrong
