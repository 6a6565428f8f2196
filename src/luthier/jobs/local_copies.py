"""Copies of the shared store on this machine: those of what was deleted go, and those long unused.

A server looks every few minutes. Whatever is dropped is in the shared store, or is of no use to
anybody, so that a server that never looks loses room and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import select

from luthier.errors import LuthierError, SharedStoreAway
from luthier.files import folder_size, luthier_home, sha256_of, verify
from luthier.jobs.folders import JobFolders
from luthier.jobs.traces import models_in
from luthier.models.manifest import MANIFEST
from luthier.store.custom_models import CustomModel
from luthier.store.database import Database
from luthier.store.exports import ModelExport
from luthier.store.imports import ModelImport, stored_name
from luthier.store.jobs import ENDED, Job, run_name
from luthier.store.model_folders import split_id
from luthier.store.models import StoredModel, custom_models
from luthier.store.objects import Objects
from luthier.store.removal import remove_side_files_and_log
from luthier.store.shared import SharedFolders, shared_folders
from luthier.store.shared_identity import check_identity
from luthier.store.shared_models import (
    MODELS,
    adopt_copy,
    copies,
    drop_copy,
    put_model,
    remove_model,
    shared_name,
    sweep_children,
    unmark_copy,
)

SECONDS = 300.0
"""Between two looks."""
SWEEP_SECONDS = 6 * 3600.0
"""Between two searches of the shared store for what killed uploads left."""
IDLE = 600.0
"""Seconds for which a copy was not used before it may be dropped: it may be being opened."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalCopy:
    """Something on this machine that the shared store has, too."""

    used: float
    """When it was last used, in seconds of the epoch."""
    size: int
    """Bytes."""
    drop: Callable[[], bool]
    """Drops it; whether that was possible."""


@dataclass(frozen=True)
class ModelRows:
    """What the database says of models."""

    stored: frozenset[str]
    """Ids of those that have a row."""
    unfinished: frozenset[str]
    """Names of the folders of unfinished jobs, of their runs and models, and of imports."""


class LocalCopies:
    """The thread of a server that keeps its copies right; does nothing where nothing is shared."""

    def __init__(
        self,
        database: Database,
        objects: Objects,
        limit: int,
        in_memory: Callable[[], Iterable[str]] = tuple,
        forget: Callable[[str], None] = lambda stored_id: None,
    ) -> None:
        """Prepare; :meth:`start` begins.

        Args:
            database: which work is unfinished.
            objects: of the built-in buckets.
            limit: bytes of all copies, beyond which the least recently used are dropped.
            in_memory: ids of the models that the server has in memory.
            forget: takes a model that was deleted elsewhere out of the memory.
        """
        self.database, self.objects, self.limit = database, objects, limit
        self._in_memory, self._forget = in_memory, forget
        self._shared: SharedFolders | None = shared_folders()
        self._swept = -SWEEP_SECONDS
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="local copies", daemon=True)

    def start(self) -> None:
        """Tidy now, and from time to time, in a thread."""
        if self._shared is not None:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._ending.is_set():
            try:
                self.tidy()
            except Exception:
                # The shared store or the database is away; nothing but room depends on it.
                _log.exception("copies of the shared store could not be tidied")
            self._ending.wait(SECONDS)

    def tidy(self) -> None:
        """Tidy once: models deleted elsewhere, models made before, jobs gone on elsewhere, room.

        Raises:
            RefusedInput: where the shared store is not the one of the database.
        """
        if self._shared is None:
            return
        check_identity(self.database, self._shared.store)
        self._drop_deleted(self._shared)
        self._put_or_drop_unmarked(self._shared)
        self._drop_ended()
        self.objects.drop_deleted_copies()
        self.trim()
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            self.sweep()

    def sweep(self) -> int:
        """Remove from the shared store what killed uploads left there; how many blobs."""
        if self._shared is None:
            return 0
        found = self._shared.old_blobs()
        rows = self._rows()
        with_rows = set(map(shared_name, rows.stored))
        dropped = 0
        for name, blobs in found.items():
            if name.rpartition("/")[2] not in rows.unfinished:
                dropped += self._shared.drop_unnamed(name, blobs, name in with_rows)
        sweep_children(lambda child: child in rows.stored or split_id(child)[1] in rows.unfinished)
        return dropped

    def _rows(self) -> ModelRows:
        with self.database.read() as session:
            stored = {each for each in session.scalars(select(CustomModel.stored_id)) if each}
            jobs = {*session.scalars(select(Job.id).where(Job.is_unfinished()))}
            imported = {*session.scalars(select(ModelImport.id))}
        names = {*jobs, *map(run_name, jobs), *map(stored_name, imported)}
        return ModelRows(frozenset(stored), frozenset(names))

    def _put_or_drop_unmarked(self, shared: SharedFolders) -> None:
        """Put models from before there was a shared store; drop what a killed worker left of one."""
        marked = {stored_id for stored_id, _, _ in copies()}
        local = custom_models()
        rows = self._rows()
        needed = _with_those_below(rows.stored, local)
        for model in local:
            if model.id in marked or model.id not in needed or model.folder.name in rows.unfinished:
                continue
            try:
                self._put_or_drop(shared, model)
            except SharedStoreAway:
                raise
            except LuthierError:
                # It is damaged; the others are no worse for it.
                _log.exception("%s does not go into the shared store", model.id)

    def _put_or_drop(self, shared: SharedFolders, model: StoredModel) -> None:
        record = shared.read(shared_name(model.id))
        if record is None:
            verify(model.folder, model.manifest.files)
            _log.info("%s goes into the shared store", model.id)
            put_model(model.id, model.folder)
            if model.id not in _with_those_below(self._rows().stored, custom_models()):
                remove_model(model.id)  # deleted meanwhile
        elif sha256_of(model.folder / MANIFEST) == record.files[MANIFEST].sha256:
            adopt_copy(model.id)
        else:
            # Another machine made it anew, after the worker here was killed.
            self._forget(model.id)
            drop_copy(model.id)
            _log.info("%s is fetched as another machine made it", model.id)

    def _drop_deleted(self, shared: SharedFolders) -> None:
        """Drop the copies of what neither the shared store nor the database has any more.

        What only the shared store lacks is no copy: it is put there once more, and never dropped.
        """
        # Marked before it is looked what is there: what is put meanwhile is marked after.
        marked = [stored_id for stored_id, _, _ in copies()]
        present = shared.names(MODELS)
        missing = [stored_id for stored_id in marked if shared_name(stored_id) not in present]
        # Rows last: whoever deletes a model deletes its row before its files.
        rows, local = self._rows(), custom_models() if missing else []
        unmarked = {each.id for each in local} - {*marked}
        needed = _with_those_below(rows.stored | unmarked, local)
        for stored_id in missing:
            if stored_id in needed or split_id(stored_id)[1] in rows.unfinished:
                _log.error(
                    "the shared store does not have %s, though it was not deleted", stored_id
                )
                unmark_copy(stored_id)
                continue
            self._forget(stored_id)
            drop_copy(stored_id)
            remove_side_files_and_log(stored_id)
            _log.info("%s was deleted on another machine", stored_id)

    def _drop_ended(self) -> None:
        """Drop what is left here of jobs that went on, and ended, on another machine."""
        parent = luthier_home() / "jobs"
        here = {path.name for path in parent.glob("*") if path.is_dir()}
        here |= {path.stem for path in parent.glob("*.shared")}
        ended = select(Job.id).where(
            Job.id.in_(here), Job.state.in_(ENDED), Job.has_working_files.is_(False)
        )
        with self.database.read() as session:
            gone = [*session.scalars(ended)]
        for job_id in gone:
            folders = JobFolders(job_id)
            with folders.hold() as free:
                if free:
                    folders.drop_local()
                    folders.lock_file.unlink(missing_ok=True)

    def trim(self) -> int:
        """Drop the least recently used copies beyond the limit; how many bytes."""
        needed = self._find_needed()
        found, held = [*self._objects()], 0
        for stored_id, folder, used in copies():
            try:
                size = folder_size(folder)
            except FileNotFoundError:
                continue  # dropped meanwhile
            if stored_id in needed:
                held += size
            else:
                found.append(LocalCopy(used, size, partial(drop_copy, stored_id, used)))
        found.sort(key=lambda each: each.used)
        over, dropped = held + sum(each.size for each in found) - self.limit, 0
        for copy in found:
            if dropped >= over or time.time() - copy.used < IDLE:
                break
            dropped += copy.size if copy.drop() else 0
        if dropped:
            _log.info("%d bytes of copies of the shared store were dropped", dropped)
        return dropped

    def _find_needed(self) -> set[str]:
        """Ids of models in memory and of those that unfinished jobs and exports name, with those
        below them."""
        with self.database.read() as session:
            recipes = [*session.scalars(select(Job.recipe).where(Job.is_unfinished()))]
            exported = select(ModelExport.stored_id).where(ModelExport.is_unfinished())
            read = [*session.scalars(exported)]
        of_jobs = (name for recipe in recipes for name in models_in(recipe))
        named = {*self._in_memory(), *read, *of_jobs}
        # By the records that are here: nothing is fetched for it, and one that is damaged stays.
        return _with_those_below(named, custom_models())

    def _objects(self) -> Iterable[LocalCopy]:
        files = self.objects.files
        for path in files.folder.glob("*/??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            account, file_id = path.parent.parent.name, path.name

            def drop(account: str = account, file_id: str = file_id) -> bool:
                is_shared = files.is_shared(account, file_id)
                if is_shared:
                    files.path(account, file_id).unlink(missing_ok=True)
                return is_shared

            yield LocalCopy(found.st_mtime, found.st_size, drop)


def _with_those_below(stored_ids: Iterable[str], local: Iterable[StoredModel]) -> set[str]:
    """These ids with those of the models of this machine that they stand on; nothing is fetched."""
    parents = {model.id: model.manifest.parent for model in local}
    found: set[str] = set()
    for stored_id in stored_ids:
        each: str | None = stored_id
        while each is not None and each not in found:
            found.add(each)
            each = parents.get(each)
    return found
