"""What the service keeps of training data: objects, what jobs made of them, and who learned from them.

A data set is named by addresses, as jobs name it. Found are, of one account: the objects there, objects
with the same bytes elsewhere (copies, parts of uploads), every job that read an address, the files of
these jobs, and the models that learned from them, also through another model as base or teacher; models
of the command line, by the hashes that their records have of their data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.data.s3 import split_address
from luthier.errors import RefusedInput, UnknownModel, WrongState
from luthier.files import TEMPORARY, luthier_home
from luthier.jobs.folders import JobFolders
from luthier.jobs.outputs import OF_ROWS, artifact
from luthier.store.custom_models import IMPORTED, RESERVED, CustomModel
from luthier.store.jobs import ENDED, Job
from luthier.store.jobs import get as get_job
from luthier.store.models import custom_models, pretrained_models
from luthier.store.objects import (
    UPLOADS,
    Bucket,
    ObjectPiece,
    StoredObject,
    Upload,
    pieces_of,
)


@dataclass(frozen=True)
class FoundObject:
    """An object, or a part of an upload that was not completed."""

    address: str
    bucket: str
    key: str
    pieces: tuple[ObjectPiece, ...]
    upload: str | None = None


@dataclass(frozen=True)
class Traces:
    """What there is of some data."""

    addresses: tuple[str, ...]
    """Of the data, as they were asked for and as the job named them."""
    objects: tuple[FoundObject, ...]
    jobs: tuple[Job, ...]
    """Those that read the data."""
    further: tuple[Job, ...]
    """Those that had a base or a teacher which learned from the data."""
    models: tuple[CustomModel, ...]
    """Those that learned from the data; of jobs, what stands on another one comes first."""
    registered: tuple[CustomModel, ...]
    """Those of them that the command line made."""
    outside: tuple[str, ...]
    """Addresses that are not kept here: files of the machine, other S3 endpoints."""

    @property
    def stored_ids(self) -> list[str]:
        """Ids in the store of what learned from the data, also of jobs whose model has no row any more;
        what stands on another one comes first."""
        made = [job.result["stored_id"] for job in (*self.jobs, *self.further) if job.result]
        rows = [model.stored_id for model in self.models if model.stored_id]
        return [*dict.fromkeys([*rows, *reversed(made)])]

    @property
    def open_jobs(self) -> list[Job]:
        """Jobs that still read the data."""
        return [job for job in (*self.jobs, *self.further) if job.state not in ENDED]


def find_traces(
    session: Session,
    account: str,
    addresses: Sequence[str],
    job: str | None = None,
    external: bool = False,
) -> Traces:
    """All that an account has of some data.

    Args:
        session: one that reads.
        account: whose.
        addresses: ``s3://bucket/key``, with ``/`` at its end for all below it; ``file://…``; the id of
            a file that was uploaded through the OpenAI API.
        job: name or id of a job whose data are meant, too.
        external: whether ``s3://`` means another endpoint.

    Raises:
        RefusedInput: for what is no address, or where there is no such job.
    """
    locations = [_address(each) for each in addresses]
    if job is not None:
        found = get_job(session, account, job)
        if found is None:
            raise RefusedInput(f"there is no job {job!r}")
        locations += sources_of(found)
    own = [each for each in locations if _is_here(each, external)]
    chosen = {one.address: one for each in own for one in _objects_at(session, account, each)}
    everything = list(session.scalars(select(Job).where(Job.account == account).order_by(Job.seq)))
    for copy in _copies(session, account, chosen.values()):
        chosen.setdefault(copy.address, copy)
    wanted = [*locations, *chosen]
    jobs = [
        job
        for job in everything
        if any(_meet(source, each) for source in sources_of(job) for each in wanted)
    ]
    # As records of models have them: hashes, and paths of this machine.
    data = {piece.sha256 for one in chosen.values() for piece in one.pieces if piece.size}
    data |= {each.removeprefix("file://") for each in wanted if each.startswith("file://")}
    further, registered = _further(jobs, everything, _registered_models(session, account), data)
    for each in (*jobs, *further):
        for one in _outputs(session, each, external):
            chosen.setdefault(one.address, one)
    return Traces(
        tuple(dict.fromkeys(locations)),
        tuple(chosen.values()),
        tuple(jobs),
        tuple(further),
        (*registered, *_models(session, [*jobs, *further])),
        tuple(registered),
        tuple(dict.fromkeys(each for each in locations if not _is_here(each, external))),
    )


def sources_of(job: Job) -> list[str]:
    """Addresses of the rows that a job reads."""
    return [*job.details.get("sources", ()), *job.validators]


def files_of(job: Job) -> Iterator[Path]:
    """The files that are left of a job, its model's not among them."""
    folders = JobFolders(job.id)
    for path in (folders.log, folders.lock_file):
        if path.exists():
            yield path
    left = folders.parent.glob(f"{TEMPORARY}{job.id}~*")
    for folder in (folders.data, *folders.below("runs"), *folders.below("distillations"), *left):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())


def model_files(stored_id: str) -> dict[str, str]:
    """SHA-256 of the files of a model by their names below the store; none where they are gone."""
    from luthier.store.models import find

    try:
        model = find(stored_id)
    except UnknownModel:
        return {}
    files: Mapping[str, str] = model.manifest.files
    place = model.folder.relative_to(luthier_home())
    return {(place / name).as_posix(): digest for name, digest in files.items()}


def _address(text: str) -> str:
    if re.fullmatch(r"file-[A-Za-z0-9]+", text):
        return f"s3://{UPLOADS}/{text}"
    parts = split_address(text)
    if (parts and parts[1]) or text.startswith("file:///"):
        return text
    raise RefusedInput(
        f"{text!r} names no data: write s3://bucket/key, s3://bucket/folder/, file:///path, or the id "
        "of an uploaded file"
    )


def _is_here(address: str, external: bool) -> bool:
    parts = split_address(address)
    return parts is not None and (not external or parts[0] == UPLOADS)


def _objects_at(session: Session, account: str, address: str) -> list[FoundObject]:
    """The objects that an address names; of one that ends with ``/``, all below it."""
    bucket, key = split_address(address) or ("", "")
    mine = Bucket.account == account, Bucket.name == bucket
    at = StoredObject.key.startswith(key, autoescape=True)
    query = select(StoredObject).join(Bucket, Bucket.seq == StoredObject.bucket_seq).where(*mine)
    query = query.where(at if key.endswith("/") else StoredObject.key == key)
    found = session.scalars(query.order_by(StoredObject.key)).all()
    return [_found_object(session, bucket, each) for each in found]


def _found_object(session: Session, bucket: str, stored: StoredObject) -> FoundObject:
    address = f"s3://{bucket}/{stored.key}"
    return FoundObject(address, bucket, stored.key, tuple(pieces_of(session, stored)))


def _copies(session: Session, account: str, of: Iterable[FoundObject]) -> Iterator[FoundObject]:
    """Objects and parts of uploads of the account that hold a file of the same bytes."""
    hashes = {piece.sha256 for each in of for piece in each.pieces if piece.size}
    known = {piece.id for each in of for piece in each.pieces}
    for digest in sorted(hashes):
        same = select(ObjectPiece).where(
            ObjectPiece.account == account, ObjectPiece.sha256 == digest
        )
        for piece in session.scalars(same).all():
            if piece.id in known:
                continue
            if piece.object_seq is not None:
                stored = session.get_one(StoredObject, piece.object_seq)
                bucket = session.get_one(Bucket, stored.bucket_seq)
                yield _found_object(session, bucket.name, stored)
            elif piece.upload_id is not None:
                upload = session.get_one(Upload, piece.upload_id)
                bucket = session.get_one(Bucket, upload.bucket_seq)
                address = f"s3://{bucket.name}/{upload.key}?uploadId={upload.id}"
                pieces = tuple(pieces_of(session, upload))
                yield FoundObject(address, bucket.name, upload.key, pieces, upload.id)


def _meet(one: str, other: str) -> bool:
    """Whether two addresses name something in common."""
    if one == other:
        return True
    return (one.endswith("/") and other.startswith(one)) or (
        other.endswith("/") and one.startswith(other)
    )


def _registered_models(session: Session, account: str) -> dict[str, CustomModel]:
    """The models of an account that the command line made, by their ids in the store."""
    query = select(CustomModel).where(
        CustomModel.account == account,
        CustomModel.job_id.is_(None),
        CustomModel.stored_id.is_not(None),
        CustomModel.stored_id.not_like(f"{IMPORTED}:%"),
    )
    return {str(each.stored_id): each for each in session.scalars(query.order_by(CustomModel.seq))}


def _further(
    jobs: Sequence[Job],
    everything: Sequence[Job],
    registered: Mapping[str, CustomModel],
    data: Set[str],
) -> tuple[list[Job], list[CustomModel]]:
    """Jobs that learned from a model of ``jobs``, or of one of them; and those of ``registered`` that
    did, or that learned from ``data``: hashes and paths of files, as records of models have them.

    Raises:
        WrongState: where the record of a registered model cannot be read, so that nobody knows.
    """
    known = {job.id for job in jobs}
    stored = {job.result["stored_id"] for job in jobs if job.result}
    further: list[Job] = []
    # Models that no account has may stand between two that one has.
    records = [*custom_models(), *pretrained_models()] if registered else []
    for each in records:
        if each.damaged and each.id in registered:
            raise WrongState(
                f"the record of the model {registered[each.id].name} cannot be read, so nobody knows "
                f"whether it learned from these data: {each.damaged}. Restore it, or delete the model"
            )
    named = {each.id: set(models_in(each.manifest.plain())) for each in records}
    size = -1
    while size != len(stored) + len(further):
        size = len(stored) + len(further)
        stored |= {each for each, texts in named.items() if texts & stored or texts & data}
        # In the order they were made: none learns from a later one.
        for job in everything:
            if job.id not in known and stored & set(models_in(job.recipe)):
                known.add(job.id)
                further.append(job)
                stored |= {job.result["stored_id"]} if job.result else set()
    return further, [model for stored_id, model in registered.items() if stored_id in stored]


def models_in(value: Any) -> Iterator[str]:
    """Every text of a recipe or record that may be the id of a model: base, teacher, reward, ..."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)  # what a soup is made of
            yield from models_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from models_in(each)
    elif isinstance(value, str):
        yield value


def _outputs(session: Session, job: Job, external: bool) -> Iterator[FoundObject]:
    if job.output is None or not _is_here(job.output, external):
        return
    for name in OF_ROWS.values():
        place = artifact(job.id, name)
        yield from _objects_at(session, job.account, f"{job.output.rstrip('/')}/{place}")


def _models(session: Session, jobs: Sequence[Job]) -> tuple[CustomModel, ...]:
    query = select(CustomModel).where(
        CustomModel.job_id.in_([job.id for job in jobs]), CustomModel.status != RESERVED
    )
    return tuple(session.scalars(query.order_by(CustomModel.seq.desc())))
