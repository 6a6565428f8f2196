"""Deletion of training data and of what was made of them, with a record that can be shown.

The audit log says before the first file goes what is to go, each file with its SHA-256 and size, and
says it again when all was looked for and is gone: the certificate is made of these last entries, which
are part of the log's chain. A deletion that a crash cut short is asked for again, and finds what is
left. Backups and what clients copied elsewhere are out of reach.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select, update

from luthier.errors import LuthierError, RefusedInput, WrongState
from luthier.files import luthier_home, sha256_of
from luthier.jobs.folders import JobFolders
from luthier.jobs.traces import Traces, files_of, find_traces, model_files
from luthier.serving.journal import forget, lines_of_runs
from luthier.store import removal
from luthier.store.arns import Arns
from luthier.store.audit import AuditEntry, Event, append
from luthier.store.database import Database
from luthier.store.ids import SMALL, random_id
from luthier.store.jobs import Job, JobEvent, run_name
from luthier.store.model_folders import working_folders
from luthier.store.models import custom_models
from luthier.store.multipart import MultipartUploads
from luthier.store.objects import UPLOADS, Objects
from luthier.store.snapshot import remove_orphaned_snapshots
from luthier.store.uploaded_files import UploadedFiles

Models = Literal["refuse", "keep", "delete"]
REMOVED = "(removed with the training data)"
"""Stands in place of messages, which may quote rows."""
BEGUN, DONE = "luthier:DeleteData.begun", "luthier:DeleteData.done"
FILES = "files"
"""Of an entry with :data:`BEGUN`: names of files in the object store."""
_AT_ONCE = 200
"""Items of one entry of the audit log."""


@dataclass(frozen=True)
class DeletionItem:
    """Something that is removed."""

    kind: str
    """``object``, ``job``, ``answers`` or ``model``."""
    name: str
    """Its address, or its file below the store."""
    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of the content for objects, otherwise of the file on the disk."""


@dataclass(frozen=True)
class DeletionRequest:
    """What is to be deleted, and who asks."""

    account: str
    user: str
    addresses: tuple[str, ...]
    job: str | None = None
    models: Models = "refuse"
    """What becomes of models that learned from them; ``refuse`` deletes nothing if there are any."""
    request_id: str = ""
    address: str = ""
    """Of the client."""


class Deletions:
    """Deletes training data of the accounts of one service."""

    def __init__(
        self,
        database: Database,
        arns: Arns,
        objects: Objects,
        external: bool = False,
        forget_model: Callable[[str], None] = lambda stored_id: None,
    ) -> None:
        """``external`` is whether ``s3://`` means another endpoint.

        ``forget_model`` takes a model that was deleted out of the server's memory.
        """
        self.database, self.arns, self.objects = database, arns, objects
        self.external, self.forget_model = external, forget_model

    def find(self, deletion: DeletionRequest) -> tuple[Traces, list[DeletionItem]]:
        """What there is of the data, and each thing that would go; nothing is changed.

        Raises:
            RefusedInput: for what is no address, or where there is nothing of it.
        """
        with self.database.read() as session:
            traces = find_traces(
                session, deletion.account, deletion.addresses, deletion.job, self.external
            )
        return traces, list(_items(traces, deletion))

    def delete(self, deletion: DeletionRequest) -> dict[str, Any]:
        """Delete the data and look for them again; the certificate.

        Raises:
            RefusedInput: as :meth:`find`.
            WrongState: while a job reads the data, a model that is to go is deployed, or a model that
                is not to go learned from them.
            LuthierError: where something is still there afterwards; what is gone is in the log.
        """
        remove_orphans(self.database, self.objects, deletion.account)
        traces, items = self.find(deletion)
        self._check(traces, items, deletion)
        number, jobs = random_id(20, SMALL), _affected_jobs(traces, deletion)
        kept = () if deletion.models == "delete" else traces.models
        about = {
            "data": list(traces.addresses),
            "jobs": [job.id for job in jobs],
            "models_kept": [model.name for model in kept],
            "outside": list(traces.outside),
        }
        files = [piece.id for each in traces.objects for piece in each.pieces]
        self._record(number, BEGUN, deletion, items, about, files=files)
        if deletion.models == "delete":
            self._delete_models(traces)
        for job in jobs:
            _delete_files(job)
        for model in traces.registered:
            for folder in working_folders(str(model.stored_id)):
                shutil.rmtree(folder, ignore_errors=True)
        forget(deletion.account, {run_name(job.id) for job in jobs})
        self._delete_texts(jobs)
        self._delete_objects(traces, deletion.account)
        left = self._remaining(deletion, items, traces)
        if not self.database.scrub():
            left.append("the log of the database, which is in use")
        self._record(
            number, DONE, deletion, [each for each in items if each.name not in left], about, left
        )
        if left:
            raise LuthierError(
                f"deletion {number}: {len(left)} of {len(items)} things are still there, first "
                f"{min(left)}; ask again"
            )
        return self.certificate(deletion.account, number)

    def certificate(self, account: str, number: str) -> dict[str, Any]:
        """What the audit log says of a deletion.

        Raises:
            RefusedInput: where the account has none of this number.
        """
        resource = self.arns.of(account, "data-deletion", number)
        query = select(AuditEntry).where(
            AuditEntry.account == account,
            AuditEntry.resource == resource,
            AuditEntry.action == DONE,
        )
        with self.database.read() as session:
            entries = session.scalars(query.order_by(AuditEntry.seq)).all()
        if not entries:
            raise RefusedInput(f"there is no deletion {number!r}")
        first = entries[0]
        removed = [item for entry in entries for item in entry.details["removed"]]
        return {
            "deletion": number,
            "account": account,
            "user": first.user,
            "at": first.at.isoformat(),
            "verified": all(entry.outcome == "ok" for entry in entries),
            **{name: first.details[name] for name in ("data", "jobs", "models_kept", "outside")},
            "removed": removed,
            "bytes": sum(int(item["size"]) for item in removed),
            "audit": [{"seq": entry.seq, "hash": entry.hash} for entry in entries],
        }

    def _check(
        self, traces: Traces, items: Sequence[DeletionItem], deletion: DeletionRequest
    ) -> None:
        if not (items or traces.jobs or traces.objects or traces.models):
            raise RefusedInput(f"there is nothing of {', '.join(traces.addresses)} here")
        reading = [job for job in traces.open_jobs if job in _affected_jobs(traces, deletion)]
        if reading:
            names = ", ".join(job.name for job in reading)
            raise WrongState(f"jobs that have not ended read these data: {names}. Stop them first")
        if traces.models and deletion.models == "refuse":
            names = ", ".join(model.name for model in traces.models)
            raise WrongState(
                f"models learned from these data: {names}. Nothing was deleted; say whether they are "
                "to be kept or deleted, too"
            )
        if deletion.models == "delete":
            going = traces.stored_ids
            others = [
                each.id
                for each in custom_models()
                if each.manifest.parent in going
                and each.id not in going
                and not removal.is_removed(each.id)
            ]
            if others:
                raise WrongState(
                    f"{', '.join(others)} stands on a model that is to go, and belongs to others. "
                    "Nothing was deleted: have it removed first, or keep the models"
                )

    def _record(
        self,
        number: str,
        action: str,
        deletion: DeletionRequest,
        items: Sequence[DeletionItem],
        about: Mapping[str, Any],
        left: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> None:
        """Entries of the audit log, as many as the items need; ``files`` are of the first items."""
        events = []
        for start in range(0, max(1, len(items)), _AT_ONCE):
            removed = [asdict(each) for each in items[start : start + _AT_ONCE]]
            details = {
                "deletion": number,
                **about,
                "removed": removed,
                "left": list(left)[:_AT_ONCE],
            }
            if named := list(files[start : start + _AT_ONCE]):
                details[FILES] = named
            resource = self.arns.of(deletion.account, "data-deletion", number)
            outcome = "Incomplete" if left else "ok"
            events.append(
                Event(
                    action, resource, outcome, deletion.account, deletion.user, deletion.request_id,
                    deletion.address, details,
                )
            )  # fmt: skip
        with self.database.write() as session:
            append(session, *events)

    def _delete_models(self, traces: Traces) -> None:
        """The models, those that stand on others first: all of them, or none where one is in use."""
        with removal.mark_for_removal() as mark, self.database.write() as session:
            # All are locked before the first is counted out: see luthier.store.storage.
            held = [session.get(type(m), m.seq, with_for_update=True) for m in traces.models]
            for found in held:
                if found is not None:
                    removal.remove(session, found, found.arn(self.arns))
                    mark(found.stored_id)
        for stored_id in traces.stored_ids:
            removal.remove_files(stored_id)
            self.forget_model(stored_id)

    def _delete_texts(self, jobs: Sequence[Job]) -> None:
        """Replace what was said of the jobs in passing: messages and errors quote rows."""
        ids = [job.id for job in jobs]
        said = JobEvent.job_id.in_(ids), JobEvent.kind.in_(("message", "warning", "error"))
        failed = Job.id.in_(ids), Job.failure.is_not(None)
        with self.database.write() as session:
            session.execute(update(JobEvent).where(*said).values(message=REMOVED))
            session.execute(update(Job).where(*failed).values(failure=REMOVED))

    def _delete_objects(self, traces: Traces, account: str) -> None:
        files, uploads = UploadedFiles(self.database, self.objects), MultipartUploads(self.objects)
        for each in traces.objects:
            if each.upload is not None:
                uploads.abort(account, each.bucket, each.key, each.upload)
            elif not (each.bucket == UPLOADS and files.delete(account, each.key)):
                self.objects.delete(account, each.bucket, [each.key])

    def _remaining(
        self, deletion: DeletionRequest, items: Sequence[DeletionItem], traces: Traces
    ) -> list[str]:
        """Names of what is still there: looked for in the database, and on the disk."""
        with self.database.read() as session:
            again = find_traces(
                session, deletion.account, deletion.addresses, deletion.job, self.external
            )
        left = [item.name for item in _items(again, deletion)]
        files = (luthier_home() / item.name for item in items if item.kind in ("job", "model"))
        left += [path.relative_to(luthier_home()).as_posix() for path in files if path.exists()]
        stored = self.objects.files
        for name, file_id in (
            (each.address, piece.id)
            # As they were found at first: no row names their files now.
            for each in (*traces.objects, *again.objects)
            for piece in each.pieces
        ):
            if stored.exists(deletion.account, file_id):
                left.append(name)
        return sorted(set(left))


def _affected_jobs(traces: Traces, deletion: DeletionRequest) -> tuple[Job, ...]:
    """Jobs whose files go: also of those that learned through a model, where the models go."""
    return (*traces.jobs, *(traces.further if deletion.models == "delete" else ()))


def _items(traces: Traces, deletion: DeletionRequest) -> Iterator[DeletionItem]:
    for each in traces.objects:
        for piece in each.pieces:
            part = f"#part-{piece.number}" if len(each.pieces) > 1 else ""
            yield DeletionItem("object", f"{each.address}{part}", piece.size, piece.sha256)
    jobs = _affected_jobs(traces, deletion)
    for job in jobs:
        for path in files_of(job):
            yield _file("job", path)
    for stored_id in traces.stored_ids if deletion.models == "delete" else ():
        paths = [luthier_home() / name for name in model_files(stored_id)]
        yield from (_file("model", path) for path in paths if path.is_file())
    for model in traces.registered:
        for folder in working_folders(str(model.stored_id)):
            yield from (_file("job", path) for path in sorted(folder.rglob("*")) if path.is_file())
    runs = {run_name(job.id) for job in jobs}
    for path, size, digest in lines_of_runs(deletion.account, runs):
        yield DeletionItem("answers", path.relative_to(luthier_home()).as_posix(), size, digest)


def _file(kind: str, path: Path) -> DeletionItem:
    name = path.relative_to(luthier_home()).as_posix()
    return DeletionItem(kind, name, path.stat().st_size, sha256_of(path))


def _delete_files(job: Job) -> None:
    folders = JobFolders(job.id)
    with folders.hold() as free:
        if not free:
            raise WrongState(f"a process still works on the files of job {job.name}; ask again")
        folders.drop_working_files()
        for folder in folders.below("runs"):
            shutil.rmtree(folder, ignore_errors=True)
        folders.log.unlink(missing_ok=True)


def remove_orphans(database: Database, objects: Objects, account: str | None = None) -> None:
    """Remove the files of deletions that a crash cut short: at each start, and before the next one.

    No row names such files any more, so that nobody finds them who looks for the data; the audit log
    has their names, from before the first row went. What a killed backup left goes as well.

    Those that a row names stay: the deletion died before it, or is at work in another server. With an
    ``account``, only of its deletions.
    """
    remove_orphaned_snapshots(luthier_home())
    ended = select(AuditEntry.resource).where(AuditEntry.action == DONE, AuditEntry.outcome == "ok")
    begun = select(AuditEntry.account, AuditEntry.details).where(
        AuditEntry.action == BEGUN, AuditEntry.resource.not_in(ended)
    )
    if account is not None:
        begun = begun.where(AuditEntry.account == account)
    with database.read() as session:
        found = session.execute(begun).all()
    for owner, details in found:
        objects.remove_unnamed(owner, details.get(FILES, []))
