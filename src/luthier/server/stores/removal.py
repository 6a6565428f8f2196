"""Deletion of custom models and of their files.

The record is deleted first, then the files. A mark in the folder, written before the record is deleted,
lets :func:`finish_deletions` delete the files if the process dies in between. The mark also keeps the
folder of a deleted model that other models need.
"""

from __future__ import annotations

import shutil
from contextlib import suppress

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import CorruptFile, WrongState
from luthier.files import write_bytes
from luthier.library.folders import (
    custom_folders,
    folder_of,
    id_of,
    split_id,
)
from luthier.library.models import custom_models, lock_record
from luthier.library.removal import dependents_of, remove_side_files
from luthier.models.manifest import MANIFEST
from luthier.server.tables import exports, measurements, storage, tags
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import CREATING, RESERVED, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.endpoints import DEPLOYMENT, Endpoint, endpoint_that_uses
from luthier.server.tables.foundation import FoundationModel
from luthier.server.tables.imports import files_name, stored_name
from luthier.server.tables.jobs import Job, job_of_run, run_name
from luthier.server.tables.measurements import Measurement
from luthier.server.tables.queue import log_file
from luthier.server.tables.studies import Study

_REMOVED_MARK = ".removed"
"""Marker file in the folder of a model without a record."""


class ModelInUse(WrongState):
    """Error for the deletion of a custom model that is in use."""


def delete(database: Database, arns: Arns, model: CustomModel) -> None:
    """Delete the record and tags of ``model``, then its files.

    Raises:
        ModelInUse: see :func:`remove`.
    """
    folder = folder_of(model.stored_id)
    try:
        with database.write() as session:
            found = session.get(CustomModel, model.seq, with_for_update=True)
            if found is not None:
                remove(session, found, found.arn(arns))
                if folder is not None and folder.is_dir():
                    write_bytes(folder / _REMOVED_MARK, b"")
    except BaseException:
        if folder is not None:
            (folder / _REMOVED_MARK).unlink(missing_ok=True)
        raise
    # An import that fails unexpectedly leaves its log.
    log_file(files_name(model.id)).unlink(missing_ok=True)
    remove_files(model.stored_id)


def remove(session: Session, model: CustomModel, arn: str) -> None:
    """Delete the record of ``model``, which the session has locked, and the tags of ``arn``.

    Call :func:`remove_files` after the transaction.

    Raises:
        ModelInUse: if an endpoint, unfinished job, export, measurement or import uses the model.
    """
    if model.status == CREATING:
        text = f"The model {model.name} is Creating. Wait until it is Active or Failed."
        raise ModelInUse(text)
    endpoint = endpoint_that_uses(session, arn)
    if endpoint is not None and endpoint.kind == DEPLOYMENT:
        raise ModelInUse(
            f"The model {model.name} is deployed as {endpoint.name}. Call DeleteCustomModelDeployment "
            f"(customModelDeploymentIdentifier {endpoint.name}) first."
        )
    if endpoint is not None:
        raise ModelInUse(
            f"The model {model.name} has the provisioned throughput {endpoint.name}. Call "
            f"DeleteProvisionedModelThroughput (provisionedModelId {endpoint.name}) first."
        )
    started = select(Job.seq).where(
        Job.account == model.account, Job.base_model == arn, Job.is_unfinished()
    )
    if session.scalar(started.limit(1)) is not None:
        raise ModelInUse(f"The model {model.name} is the base of an unfinished job.")
    if exports.is_exported(session, arn):
        raise ModelInUse(f"The model {model.name} has a running export. Stop the export, or wait.")
    if measurements.is_measured(session, Study, model.account, arn):
        raise ModelInUse(f"A study trains the model {model.name}. Stop the study, or wait.")
    if measurements.is_measured(session, Measurement, model.account, arn):
        raise ModelInUse(f"The model {model.name} is evaluated now. Stop the evaluation, or wait.")
    tags.drop(session, arn)
    session.delete(model)
    session.flush()
    storage.release(session, model.account, stored_bytes=model.stored_bytes or 0)


def unregister(session: Session, model: CustomModel, arns: Arns) -> None:
    """Remove ``model``, created with the CLI, from the account. The files stay.

    The caller has locked the row. The name is free afterwards, and the model no longer counts in
    quotas.

    Raises:
        WrongState: for a model that the service created or imported, whose files belong to the
            account.
        ModelInUse: see :func:`remove`.
    """
    own = model.job_id is not None or split_id(model.stored_id or "")[1] in (
        "",
        stored_name(model.id),
    )
    if own:
        raise WrongState(
            f"{model.name} was created or imported by account {model.account}, not registered. Its "
            "clients can delete the model; `luthier models export` writes a copy"
        )
    remove(session, model, model.arn(arns))


def users_of_base(database: Database, base: FoundationModel) -> list[str]:
    """Return descriptions of accounts' models, unfinished jobs and endpoints that use ``base``."""
    models = select(CustomModel).where(CustomModel.root == base.id, CustomModel.status != RESERVED)
    jobs = select(Job).where(Job.foundation == base.id, Job.is_unfinished())
    endpoints = select(Endpoint).where(Endpoint.foundation == base.id)
    with database.read() as session:
        return [
            f"{what} {each.name} of account {each.account}"
            for what, query in (
                ("the custom model", models.order_by(CustomModel.seq)),
                ("the job", jobs.order_by(Job.seq)),
                ("the endpoint", endpoints.order_by(Endpoint.seq)),
            )
            for each in session.scalars(query)
        ]


def finish_deletions(database: Database) -> None:
    """Delete the files of models without a record, left by interrupted deletions."""
    for folder in custom_folders(_REMOVED_MARK):
        stored_id = id_of(folder)
        if owner_of(database, stored_id) is not None:
            (folder / _REMOVED_MARK).unlink(missing_ok=True)
        else:
            remove_files(stored_id)


def owner_of(database: Database, stored_id: str) -> str | None:
    """Return the account of a stored model; ``None`` for a model of the CLI."""
    with database.read() as session:
        owner = select(CustomModel.account).where(CustomModel.stored_id == stored_id).limit(1)
        return session.scalar(owner)


def is_removed(stored_id: str) -> bool:
    """Return whether a model was deleted while other models still need its files."""
    folder = folder_of(stored_id)
    return folder is not None and (folder / _REMOVED_MARK).exists()


def count_without_account(database: Database) -> int:
    """Return the number of custom models on this machine without an account."""
    here = {
        id_of(folder)
        for folder in custom_folders(MANIFEST)
        # Models of jobs appear here shortly before their record.
        if not folder.name.startswith((".", run_name("")))
    }
    with database.read() as session:
        own = here.difference(session.scalars(select(CustomModel.stored_id)))
    return sum(not is_removed(stored_id) for stored_id in own)


def remove_files(stored_id: str | None) -> None:
    """Delete the files, run and job log of a model without a record.

    If another model needs the model's folder, the folder stays with a marker file.
    """
    if stored_id is None or folder_of(stored_id) is None:
        return
    remove_side_files(stored_id)
    log_file(job_of_run(split_id(stored_id)[1])).unlink(missing_ok=True)
    found = next((each for each in custom_models() if each.id == stored_id), None)
    if found is None:
        return
    if dependents_of(stored_id).models:
        write_bytes(found.folder / _REMOVED_MARK, b"")
        return
    # Under the lock: a process that changes the record would recreate the folder.
    with suppress(CorruptFile), lock_record(found):
        shutil.rmtree(found.folder, ignore_errors=True)
    shutil.rmtree(found.folder, ignore_errors=True)  # without a record, too
    remove_unneeded(found.manifest.parent)


def remove_unneeded(stored_id: str | None) -> None:
    """Delete the files of a deleted model, unless another model needs the files."""
    found = next((each for each in custom_models() if each.id == stored_id), None)
    # Models of the CLI have neither record nor marker.
    if found is not None and (found.folder / _REMOVED_MARK).is_file():
        remove_files(stored_id)
