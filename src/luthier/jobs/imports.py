"""Models from outside: they are asked for here, and a process of its own takes each of them.

What is asked is on disk before it is acknowledged. The process copies the files, tries the model and
stores it (``luthier.jobs.import_worker``); a server that is killed leaves it at work, and the next one
finds it by its lease, or starts another where it died.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import NameInUse, QuotaExceeded
from luthier.files import luthier_home, sweep
from luthier.jobs import processes
from luthier.jobs.admission import Capacity, free
from luthier.jobs.folders import JobFolders
from luthier.jobs.submit import check_model_quota
from luthier.jobs.supervisor import Supervisor
from luthier.limits import AccountQuotas
from luthier.store import imports, leases
from luthier.store.custom_models import ACTIVE, CREATING, IMPORTED, CustomModel
from luthier.store.database import Database, lock_by_name, new_id, now
from luthier.store.imports import ModelImport
from luthier.store.models import custom_folder

AT_ONCE = 1
"""Models that one machine takes at a time: each may need much of its memory."""

_log = logging.getLogger(__name__)


def model_name(model_id: str) -> str:
    """Name in the store of the custom model with this id: no tenant's names ever meet there."""
    return f"model-{model_id}"


class ImportFolders(JobFolders):
    """The places of one import: lock and log, and the model that comes of it."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"import-{model_id}")
        self.model = custom_folder(IMPORTED, model_name(model_id))

    def drop(self, *, model: bool) -> None:
        """Remove what only the import needed; the ``model``, too, where none came of it.

        Whoever calls holds the lock, which goes last: where it is, there may be something to remove.
        """
        sweep(self.model.parent, self.model.name)
        if model:
            shutil.rmtree(self.model, ignore_errors=True)
        self.drop_working_files()


def submit_import(
    session: Session,
    account: str,
    name: str,
    source: str,
    request: Mapping[str, Any],
    limits: AccountQuotas | None = None,
) -> CustomModel:
    """Have a model copied from the folder ``source``, in the caller's transaction.

    ``request`` is what the face shows again.

    Raises:
        NameInUse: where the account has a model of that name.
        QuotaExceeded: where it has all the models that it may have, or too many imports under way.
    """
    limits = limits or AccountQuotas()
    lock_by_name(session, f"submit {account}")
    taken = select(CustomModel.id).where(CustomModel.account == account, CustomModel.name == name)
    if session.scalar(taken) is not None:
        raise NameInUse("model")
    check_model_quota(session, account, limits)
    if imports.waiting_of(session, account) >= limits.imports_in_flight:
        raise QuotaExceeded(
            f"the account has {limits.imports_in_flight} models that are being taken from outside, "
            "which is its quota. Wait until some of them are no longer Creating"
        )
    if imports.imported_by(session, account) >= limits.imported_models:
        raise QuotaExceeded(
            f"the account has {limits.imported_models} models from outside, which is its quota. Delete "
            "some of them"
        )
    model = CustomModel(
        id=new_id(),
        account=account,
        name=name,
        foundation=IMPORTED,
        root="",
        base_model="",
        status=CREATING,
        details={"request": dict(request)},
        created=now(),
    )
    session.add(model)
    session.flush()
    imports.begin(session, model, source)
    return model


class Importer(Supervisor[ModelImport]):
    """The thread of a server that has models from outside looked at."""

    who = "it"

    def __init__(
        self,
        database: Database,
        capacity: Capacity | None = None,
        *,
        command: Sequence[str] = (sys.executable, "-m", "luthier", "import-worker"),
        options: Sequence[str] = (),
    ) -> None:
        """Prepare; :meth:`start` begins.

        ``capacity`` is the scheduler's, the machine's when not given; ``options`` are what every
        process is told.
        """
        self.capacity = capacity or Capacity()
        told = ["--memory", str(self.capacity.memory)]
        super().__init__(database, [*command, *options, *told], "imports")

    def tick(self) -> None:
        """One look: who died, what is left to tidy, what can be started."""
        self._bury()
        self._tidy()
        while not self._ending and self._start_next():
            pass

    def _held(self, session: Session) -> list[ModelImport]:
        return imports.held(session)

    def _lapse(self, session: Session, found: ModelImport, why: str) -> str:
        again = imports.expire(session, found.model_id, str(found.lease), why)
        if not again:
            # Nobody else would: the process may have died before it locked its files.
            ImportFolders(found.model_id).log.unlink(missing_ok=True)
        what = "another one tries" if again else "it failed"
        return f"import of model {found.model_id}: {why}; {what}"

    def _tidy(self) -> None:
        """Remove what processes left that died as their imports ended."""
        for lock in sorted((luthier_home() / "jobs").glob("import-*.lock")):
            model_id = lock.stem.removeprefix("import-")
            folders = ImportFolders(model_id)
            with folders.locked() as free:
                if not free:
                    continue
                with self.database.read() as session:
                    if imports.unfinished(session, model_id):
                        continue
                    kept = select(CustomModel.id).filter_by(id=model_id, status=ACTIVE)
                    made = session.scalar(kept) is not None
                folders.drop(model=not made)
                # Its process died: the model's failure says more.
                folders.log.unlink(missing_ok=True)

    def _start_next(self) -> bool:
        """Start a process for the next import; whether there was one, and room for it."""
        # Until the process is there, the server stands for it.
        server = {**processes.this_process(), "starting": True}
        with self.database.write() as session:
            left = free(session, self.capacity)
            if left.imports >= AT_ONCE:
                return False
            late = leases.overdue(session, self.capacity.per_account)
            found = imports.claim(session, server, left.memory, idle=left.idle, before=late)
        if found is None:
            return False
        try:
            self.children[str(found.lease)] = self._spawn(found)
        except OSError as error:
            _log.error("no process could be started for model %s: %s", found.model_id, error)
            with self.database.write() as session:
                imports.release(session, found.model_id, str(found.lease))
            return False
        return True

    def _spawn(self, found: ModelImport) -> subprocess.Popen[bytes]:
        arguments = ["--model", found.model_id, "--lease", str(found.lease)]
        return self._run(arguments, ImportFolders(found.model_id))


def stored_at(model_id: str) -> tuple[str, Path]:
    """Id in the store and folder of the model with this id."""
    return f"{IMPORTED}:{model_name(model_id)}", ImportFolders(model_id).model
