"""The process that takes one model from outside: files, rules, a trial, then the store.

    lock, lease → names and sizes → texts → memory → weights → trial → manifest
    → Active, in one transaction

It writes into a temporary folder that becomes the model's at the very end, and may be killed anywhere:
the next process begins anew. It is a process of its own because files from outside are read by
libraries that were not all made for that, and because a network may take much memory: what goes wrong
here ends no server.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from luthier import __version__
from luthier.encryption.keys import keys_for
from luthier.encryption.memory import new_plain_folder
from luthier.engine.memory import available_memory, total_memory
from luthier.errors import (
    DoesNotFit,
    Interrupted,
    LeaseLost,
    LuthierError,
    ModelRefused,
    QuotaExceeded,
    RefusedInput,
)
from luthier.files import (
    folder_size,
    hashes_of,
    luthier_home,
    need_disk,
    new_folder,
    sweep,
    write_json,
)
from luthier.jobs.admission import Capacity, free
from luthier.jobs.heart import LOST, RENEWAL, SILENCE
from luthier.jobs.imports import ImportFolders, stored_at
from luthier.jobs.processes import this_process
from luthier.limits import AccountQuotas
from luthier.models.catalog import MANIFEST
from luthier.models.outside import Chosen, choose, is_weights
from luthier.models.save import save_plain
from luthier.serving.acceptance import (
    Accepted,
    accept_adapter,
    accept_network,
    memory_needed,
)
from luthier.store import imports, storage
from luthier.store.accounts import quotas_of
from luthier.store.arns import Arns
from luthier.store.custom_models import IMPORTED
from luthier.store.database import Database
from luthier.store.foundation import foundation_model
from luthier.store.imports import ModelImport
from luthier.store.locations import Locations
from luthier.store.models import StoredModel, find

SECONDS = 3600
"""That one model may take."""
GRACE = 60.0
"""Seconds after which a process ends that did not hear of it."""
MEMORY_SECONDS = 600.0
"""How long memory is waited for that others have taken."""
TRIES = 5
"""How often copying a file is tried where that failed in passing."""

Done = TypeVar("Done")
_log = logging.getLogger(__name__)


class ImportWorker:
    """One process and the model it takes."""

    def __init__(
        self,
        database: Database,
        locations: Locations,
        arns: Arns,
        model_id: str,
        lease: str,
        capacity: Capacity,
        quotas: AccountQuotas | None = None,
    ) -> None:
        """``quotas`` are those of accounts without quotas of their own."""
        self.quotas = quotas or AccountQuotas()
        self.database, self.locations, self.arns = database, locations, arns
        self.model_id, self.lease, self.capacity = model_id, lease, capacity
        self.folders = ImportFolders(model_id)
        self.stored_id, self.folder = stored_at(model_id)
        self.plain: Path | None = None
        """Where the model lies in memory, where the store is encrypted."""

    def run(self) -> int:
        """Take the model; the exit status: 0 where the import ended or was given back.

        Call it from the main thread, whose signals it takes over.
        """
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            with self.folders.locked() as free:
                if not free:
                    _log.error("another process still works on model %s", self.model_id)
                    return LOST
                self._run()
        except LeaseLost as error:
            _log.error("%s", error)
            return LOST
        except Interrupted:
            with self.database.write() as session:
                imports.release(session, self.model_id, self.lease)
        return 0

    def _run(self) -> None:
        with self.database.write() as session:
            found = imports.renew(session, self.model_id, self.lease, this_process())
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(ended,), name="heart", daemon=True)
        heart.start()
        try:
            self._carry_out(found)
        finally:
            ended.set()
            heart.join(SILENCE)

    def _carry_out(self, found: ModelImport) -> None:
        sweep(self.folder.parent, self.folder.name)
        try:
            changes, told = self._taken(found)
        except (Interrupted, LeaseLost):
            raise
        except Exception as error:
            self._fail(error, found)
            return
        try:
            self._end(
                lambda s: imports.complete(s, self.model_id, self.lease, changes, told, self.quotas)
            )
        except QuotaExceeded as error:
            # Others of the account took the room meanwhile. After no other error are the files
            # dropped: the transaction may have been committed.
            self._fail(error, found)
            return
        self.folders.drop(model=False)
        self.folders.log.unlink(missing_ok=True)

    def _fail(self, error: Exception, found: ModelImport) -> None:
        # Nothing of it may be left when its owner reads that it failed.
        self.folders.drop(model=True)
        if not isinstance(error, RefusedInput):
            _log.exception("model %s failed", self.model_id, exc_info=error)
        failure = self._explained(error, found.source)
        self._end(lambda s: imports.fail(s, self.model_id, self.lease, failure))
        if isinstance(error, RefusedInput):
            self.folders.log.unlink(missing_ok=True)

    def _taken(self, found: ModelImport) -> tuple[dict[str, Any], dict[str, Any]]:
        """Store the model; what changes of its row, and what it tells."""
        chosen = choose(self.locations.folder(found.account, found.source))
        with self.database.read() as session:
            quotas = quotas_of(session, found.account, self.quotas)
            storage.check(session, found.account, quotas, stored_bytes=chosen.size)
        need_disk(self.folder, chosen.size + (64 << 20), "copying the model")
        with new_folder(self.folder) as fresh, self._working(fresh) as plain:
            accepted = self._tried(found, chosen, plain)
            if plain != fresh:
                save_plain(plain, fresh)
            write_json(fresh / MANIFEST, self._manifest(fresh, found, chosen, accepted))
        size = folder_size(self.folder)
        changes: dict[str, Any] = {"stored_id": self.stored_id, "stored_bytes": size}
        if accepted.parent is not None:
            base = foundation_model(accepted.parent.id)
            assert base is not None
            changes |= {"root": base.id, "base_model": self.arns.foundation_model(base.id)}
        else:
            changes["root"] = f"luthier.{IMPORTED}-{self.model_id}"
        return changes, {"kind": accepted.fields["kind"]}

    @contextmanager
    def _working(self, fresh: Path) -> Iterator[Path]:
        """Where the model is copied to and tried: ``fresh``, or memory where the store is encrypted."""
        if keys_for(fresh) is None:
            yield fresh
            return
        with new_plain_folder() as self.plain:
            yield self.plain

    def _tried(self, found: ModelImport, chosen: Chosen, folder: Path) -> Accepted:
        """Copy the model into ``folder``, the weights last, and try it there."""
        texts = [each for each in chosen.files if not is_weights(each[0])]
        self._copy(found, texts, folder)
        size = memory_needed(folder, chosen, _base)
        if folder == self.plain:
            # The copy is in memory as well.
            size += chosen.size
            need_disk(folder, chosen.size, "copying the model")
        self._have_memory(found, size)
        self._copy(found, [each for each in chosen.files if is_weights(each[0])], folder)
        if chosen.adapter:
            return accept_adapter(folder, self.stored_id, _base)
        return accept_network(folder, self.stored_id)

    def _have_memory(self, found: ModelImport, size: int) -> None:
        """Come back when the model may have ``size`` bytes, by the account of jobs and imports.

        Raises:
            ModelRefused: where the machine has not as much.
            Interrupted: where others have it: the import is started again when it fits.
        """
        if size > total_memory():
            raise ModelRefused(
                "*.safetensors", "model.memory",
                f"Trying the model takes about {size >> 20:,} MiB of memory, which are not there.",
                "Take a smaller model, or a server with more memory.",
            )  # fmt: skip
        if found.memory and size > found.memory:
            # It would be given back for ever.
            raise _changed(
                "*.safetensors", "The files were smaller when they were looked at first."
            )
        with self.database.write() as session:
            left = free(session, self.capacity, but=self.model_id)
            imports.needs(session, self.model_id, self.lease, size)
        if not (left.idle or size <= left.memory):
            raise Interrupted(f"{size >> 20:,} MiB are not free; the model waits for them")
        _wait_for_memory(size)

    def _manifest(
        self, fresh: Path, found: ModelImport, chosen: Chosen, accepted: Accepted
    ) -> dict[str, Any]:
        import torch

        return {
            "id": self.stored_id,
            "parent": None,
            **accepted.fields,
            "source": found.source,
            "left_out": list(chosen.left),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "luthier": __version__,
            "torch": torch.__version__,
            "files": hashes_of(fresh),
        }

    def _copy(self, found: ModelImport, files: Iterable[tuple[str, int]], folder: Path) -> None:
        for name, size in files:
            self._copy_file(found, name, size, folder / name)

    def _copy_file(self, found: ModelImport, name: str, size: int, target: Path) -> None:
        for number in range(1, TRIES + 1):
            try:
                self.locations.fetch_from(found.account, found.source, name, target)
                break
            except RefusedInput:
                raise
            except (LuthierError, OSError) as error:
                if number == TRIES:
                    raise
                _log.warning("trying again: %s", error)
                time.sleep(0.2 * 2**number)
        if (copied := target.stat().st_size) != size:
            raise _changed(name, f"It had {size:,} bytes at the beginning, and then {copied:,}.")

    def _explained(self, error: Exception, source: str) -> str:
        """Why there is no model, in words for its owner: without the server's own paths."""
        if isinstance(error, DoesNotFit):
            text = "The server has no room for the model now. Create it again later."
        elif isinstance(error, LuthierError):
            text = str(error)
        else:
            text = f"{type(error).__name__}: the model could not be taken."
        temporary = re.escape(f"{self.folder.parent}/.tmp-{self.folder.name}~")
        text = re.sub(rf"{temporary}\w*", source.rstrip("/"), text)
        if self.plain is not None:
            text = text.replace(str(self.plain), source.rstrip("/"))
        return text.replace(f"{luthier_home()}/", "")

    def _end(self, change: Callable[[Session], None]) -> None:
        """The last transaction, tried again for a while where the database is away."""
        signal.alarm(0)
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                with self.database.write() as session:
                    change(session)
                return
            except SQLAlchemyError as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("the database does not answer: %s", error)
                time.sleep(1)

    def _beat(self, ended: threading.Event) -> None:
        """Keep the lease until the work has ``ended``; end the process where the lease is lost."""
        began = heard = time.monotonic()
        while not ended.wait(RENEWAL):
            if time.monotonic() - began > SECONDS + GRACE:
                # Its main thread does not come back to Python, where the alarm would be heard.
                _log.error("model %s takes too long, and cannot be interrupted", self.model_id)
                os._exit(LOST)
            try:
                with self.database.write() as session:
                    imports.renew(session, self.model_id, self.lease)
                heard = time.monotonic()
            except LeaseLost:
                with self.database.read() as session:
                    if not imports.unfinished(session, self.model_id):
                        return  # it came to its end
                os._exit(LOST)
            except SQLAlchemyError as error:
                _log.warning("the database does not answer: %s", error)
                if time.monotonic() - heard > SILENCE:
                    os._exit(LOST)


def _base(name: str) -> StoredModel | None:
    """A base model of this server that an adapter may be for."""
    known = foundation_model(name)
    return find(known.base) if known else None


def _changed(file: str, what: str) -> ModelRefused:
    fix = "Create the model again when nobody writes to the folder any more."
    return ModelRefused(file, "model.changed", what, fix)


def _wait_for_memory(size: int) -> None:
    """Wait for memory that what is in no account has, such as models that answer."""
    deadline = time.monotonic() + MEMORY_SECONDS
    while available_memory() < size:
        if time.monotonic() > deadline:
            raise DoesNotFit("no memory for a model from outside")
        time.sleep(1)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted("ended by the server")


def _too_long(number: int, frame: Any) -> None:
    raise ModelRefused(
        "*", "model.time", f"The model was not taken after {SECONDS} seconds.",
        "Take a smaller model, or an address nearer to the server.",
    )  # fmt: skip
