"""Worker of an import: copies, tests and stores a model in the library.

    lock, lease → names and sizes → texts → memory → weights → trial → manifest → Active

The worker writes into a temporary folder and renames the folder at the end. The worker may be
killed anywhere: the next worker starts again. An import has its own process because malformed model
files may crash a library or exhaust memory, and the server must survive.
"""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from luthier import __version__
from luthier.data.sentence import MODULES, SENTENCE_FOLDERS
from luthier.engine.machine import available_memory, total_memory
from luthier.errors import (
    DoesNotFit,
    Interrupted,
    LeaseLost,
    LocationRefused,
    LuthierError,
    ModelRefused,
    QuotaExceeded,
    RefusedInput,
)
from luthier.files import (
    TEMPORARY,
    folder_size,
    hashes_of,
    need_disk,
    new_folder,
    sweep,
    without_home,
)
from luthier.library.models import StoredModel, find
from luthier.models.formats.external import MODEL_INDEX, ImportedFiles, is_weights, select_files
from luthier.models.formats.pipelines import PART_FOLDERS
from luthier.models.manifest import Manifest, created_now
from luthier.server.jobs.folders import ImportFolders
from luthier.server.jobs.import_checks import (
    AcceptedModel,
    accept_adapter,
    accept_network,
    memory_needed,
)
from luthier.server.jobs.worker import Heartbeat, Worker
from luthier.server.tables import imports, queue, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.imports import ModelImport
from luthier.workflows.certificate.certificate import certify

SECONDS = 3600
"""Time limit for a model, in seconds."""
MEMORY_SECONDS = 600.0
"""Time limit of the wait for free memory, in seconds."""

_log = logging.getLogger(__name__)


class ImportWorker(Worker[ModelImport]):
    """Worker of an import."""

    table = ModelImport
    folders_type = ImportFolders
    folders: ImportFolders

    def work(self, row: ModelImport) -> int:
        """Import the model and return the exit status."""
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.alarm(SECONDS)
        self.heartbeat = Heartbeat(self.beat)
        self.heartbeat.start()
        try:
            self._import(row)
        finally:
            signal.alarm(0)
            self.heartbeat.finish()
        return 0

    def beat(self) -> None:
        """Renew the lease."""
        with self.database.write() as session:
            queue.renew(session, ModelImport, self.row_id, self.lease)

    def _import(self, row: ModelImport) -> None:
        sweep(self.folders.model.parent, self.folders.model.name)
        try:
            changes, details = self._store(row)
        except (Interrupted, LeaseLost):
            raise
        except Exception as error:
            self._fail(error, row)
            return
        try:
            self._end(
                lambda s: imports.complete(
                    s, self.row_id, self.lease, changes, details, self.quotas
                )
            )
        except QuotaExceeded as error:
            # Only after this error are the files removed: after others, the transaction may have
            # been committed.
            self._fail(error, row)
            return
        self.folders.remove_files(model=False)
        self.folders.log.unlink(missing_ok=True)

    def _fail(self, error: Exception, row: ModelImport) -> None:
        # Remove the files before the owner sees the failure.
        self.folders.remove_model()
        if not isinstance(error, RefusedInput):
            _log.exception("model %s failed", self.row_id, exc_info=error)
        failure = self._explain(error, row.source)
        self._end(lambda s: imports.fail(s, self.row_id, self.lease, failure))
        self.folders.remove_files(model=True)
        if isinstance(error, RefusedInput):
            self.folders.log.unlink(missing_ok=True)

    def _store(self, row: ModelImport) -> tuple[dict[str, Any], dict[str, Any]]:
        """Store the model. Returns changed columns and details of the model's row."""
        chosen = select_files(self._entries(row))
        with self.database.read() as session:
            quotas = quotas_of(session, row.account, self.quotas)
            storage.check(session, row.account, quotas, stored_bytes=chosen.size)
        need_disk(self.folders.model, chosen.size + (64 << 20), "copying the model")
        with new_folder(self.folders.model) as fresh:
            accepted = self._test(row, chosen, fresh)
            self._manifest(fresh, row, chosen, accepted).write(fresh)
        certify(self.folders.stored_id)
        size = folder_size(self.folders.model)
        changes: dict[str, Any] = {"stored_id": self.folders.stored_id, "stored_bytes": size}
        if accepted.parent is not None:
            base = foundation_model(accepted.parent.id)
            assert base is not None
            changes |= {"root": base.id, "base_model": self.arns.foundation_model(base.id)}
        else:
            changes["root"] = imports.root_name(self.row_id)
        return changes, {"kind": accepted.manifest.kind}

    def _entries(self, row: ModelImport) -> list[tuple[str, int]]:
        """Return the names and sizes of the files of a model, parts of a pipeline included."""
        entries = self.locations.folder(row.account, row.source)
        if MODEL_INDEX in dict(entries):
            for part in PART_FOLDERS:
                place = f"{row.source.rstrip('/')}/{part}"
                try:
                    below = self.locations.folder(row.account, place)
                except LocationRefused as error:
                    raise ModelRefused(
                        part, "model.pipeline", f"The folder cannot be read: {error}",
                        f"Copy the whole folder of the pipeline with {', '.join(PART_FOLDERS)}.",
                    ) from error  # fmt: skip
                entries += [(f"{part}/{name}", size) for name, size in below]
        if MODULES in dict(entries):
            for part in SENTENCE_FOLDERS:
                place = f"{row.source.rstrip('/')}/{part}"
                with suppress(LocationRefused):  # some models have no such folder
                    below = self.locations.folder(row.account, place)
                    entries += [(f"{part}/{name}", size) for name, size in below]
        return entries

    def _test(self, row: ModelImport, chosen: ImportedFiles, folder: Path) -> AcceptedModel:
        """Copy the model into ``folder``, the weights last, and try the model there."""
        texts = [each for each in chosen.files if not is_weights(each[0])]
        self._copy(row, texts, folder)
        size = memory_needed(folder, chosen, _find_base)
        # Before the weights are copied: a model without free memory costs no transfer.
        self._reserve(size)
        self._copy(row, [each for each in chosen.files if is_weights(each[0])], folder)
        with self.database.read() as session:
            trusted = imports.is_trusted(session, self.row_id)
        if chosen.adapter:
            return accept_adapter(folder, self.folders.stored_id, _find_base, trusted)
        return accept_network(folder, self.folders.stored_id, trusted)

    def _reserve(self, size: int) -> None:
        """Reserve ``size`` bytes and wait until ``size`` bytes are free.

        Raises:
            ModelRefused: if the machine has less memory.
            Interrupted: if other work uses the memory. The import is queued again.
            DoesNotFit: if served models use the memory for too long. The import fails.
        """
        if size > total_memory():
            raise ModelRefused(
                "*.safetensors", "model.memory",
                f"The import needs about {size >> 20:,} MiB of memory, more than the server has.",
                "Use a smaller model, or a server with more memory.",
            )  # fmt: skip
        self.reserve_memory(size)
        _wait_for_memory(size)

    def _manifest(
        self, fresh: Path, row: ModelImport, chosen: ImportedFiles, accepted: AcceptedModel
    ) -> Manifest:
        import torch

        return accepted.manifest.model_copy(
            update={
                "id": self.folders.stored_id,
                "source": row.source,
                "left_out": list(chosen.left),
                "created": created_now(),
                "luthier": __version__,
                "torch": torch.__version__,
                "files": hashes_of(fresh),
            }
        )

    def _copy(self, row: ModelImport, files: Iterable[tuple[str, int]], folder: Path) -> None:
        for name, size in files:
            fetch = partial(self.locations.fetch_from, row.account, row.source, name, folder / name)
            self.retry(fetch)
            if (copied := (folder / name).stat().st_size) != size:
                raise ModelRefused(
                    name, "model.changed",
                    f"The file size changed from {size:,} to {copied:,} bytes.",
                    "Create the model again after all writes to the folder have ended.",
                )  # fmt: skip

    def _explain(self, error: Exception, source: str) -> str:
        """Return the failure for the owner, without paths of the server."""
        if isinstance(error, DoesNotFit):
            text = "The server has no memory or disk space for the model now. Try again later."
        elif isinstance(error, LuthierError):
            text = str(error)
        else:
            text = f"{type(error).__name__}: the model cannot be imported."
        # Errors of libraries name files in the temporary folder of new_folder.
        temporary = re.escape(f"{self.folders.model.parent}/{TEMPORARY}{self.folders.model.name}~")
        text = re.sub(rf"{temporary}\w*", source.rstrip("/"), text)
        return without_home(text)

    def _end(self, change: Callable[[Session], None]) -> None:
        """Write the last transaction."""
        # Neither a signal nor the time limit may interrupt the last transaction.
        self.ending = True
        signal.alarm(0)
        self.heartbeat.finish()
        self.write(change)


def _find_base(name: str) -> StoredModel | None:
    """Return the base model of an adapter by name."""
    known = foundation_model(name)
    return find(known.base) if known else None


def _wait_for_memory(size: int) -> None:
    """Wait until memory without a lease, such as that of served models, is free."""
    deadline = time.monotonic() + MEMORY_SECONDS
    while available_memory() < size:
        if time.monotonic() > deadline:
            raise DoesNotFit("no memory for an imported model")
        time.sleep(1)


def _on_alarm(number: int, frame: Any) -> None:
    raise ModelRefused(
        "*", "model.time", f"The import exceeded {SECONDS} seconds.",
        "Import a smaller model, or use a faster address.",
    )  # fmt: skip
