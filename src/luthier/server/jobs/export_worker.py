"""The process that writes one custom model for other software, below an address of its account.

    lock, lease → memory → merge, write, compare → upload, ``export.json`` last
    → Completed, in one transaction

It writes into a working folder first, and may be killed anywhere: the next worker begins anew and
writes the same names. What is written in a bucket of this server by an export that fails or is
stopped is taken back; elsewhere it stays. ``export.json`` is there only when all other files are.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from luthier import __version__
from luthier.engine.machine import total_memory
from luthier.errors import (
    DoesNotFit,
    Interrupted,
    LeaseLost,
    LuthierError,
    QuotaExceeded,
    RecipeError,
    UnknownModel,
    WrongState,
)
from luthier.exports.export import Export, Format, export_model, memory_needed
from luthier.files import hashes_of, json_text, luthier_home, waits_for_disk
from luthier.library.models import find
from luthier.models.manifest import created_now
from luthier.server.jobs.folders import ExportFolders
from luthier.server.jobs.worker import BEAT, RENEWAL, Heartbeat, Worker
from luthier.server.tables import exports, queue, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.database import now
from luthier.server.tables.exports import ExportedFile, ExportProgress, ExportResult, ModelExport
from luthier.server.tables.jobs import STOPPING
from luthier.server.tables.locations import Locations

INDEX = "export.json"
"""The file that is written last: what was exported, and the hashes of the others."""

_log = logging.getLogger(__name__)


class ProgressEstimate:
    """Where the work stands, as its thread tells it and the heartbeat writes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: ExportProgress | None = None
        self._finish: datetime | None = None
        self._began = 0.0

    def update(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` of a part are done."""
        with self._lock:
            if self._progress is None or self._progress["phase"] != phase:
                self._began = time.monotonic()
            self._progress, self._finish = ExportProgress(phase=phase, done=done, total=total), None
            if 0 < done < total:
                left = (time.monotonic() - self._began) / done * (total - done)
                self._finish = now() + timedelta(seconds=left)

    def current(self) -> ExportProgress | None:
        """The newest; ``None`` before there was any. What takes longer than estimated has no end."""
        with self._lock:
            if self._finish is None or self._progress is None or self._finish < now():
                return self._progress
            return {**self._progress, "estimated_finish": self._finish.isoformat()}


class ExportWorker(Worker[ModelExport, Locations]):
    """One process and the export that it writes."""

    table = ModelExport
    folders_type = ExportFolders
    folders: ExportFolders

    def work(self, row: ModelExport) -> int:
        """Write it, or take back what was written of one that is stopped; the exit status."""
        self.progress = ProgressEstimate()
        self._stopping = row.state == STOPPING
        self._renewed = time.monotonic()
        self.heartbeat = Heartbeat(self.beat, BEAT)
        self.heartbeat.start()
        try:
            if self._stopping:
                self.ending = True
                self._remove(row)
                return 0
            return self._export(row)
        finally:
            self.heartbeat.finish()

    def beat(self) -> None:
        """Renew the lease, write the progress, and stop the main thread where that is wanted."""
        progress = self.progress.current()
        with self.database.read() as session:
            row = queue.read_leased(session, ModelExport, self.row_id, self.lease)
            state, written = row.state, row.progress
        if progress != written or time.monotonic() - self._renewed > RENEWAL:
            with self.database.write() as session:
                state = exports.renew(session, self.row_id, self.lease, progress).state
            self._renewed = time.monotonic()
        self._stopping = state == STOPPING
        if self._stopping and not self.ending:
            self.heartbeat.ask_to_stop()

    def _export(self, row: ModelExport) -> int:
        try:
            result = self._write(row)
            self.ending = True
            self._end(lambda s: exports.complete(s, self.row_id, self.lease, result))
        except (Interrupted, KeyboardInterrupt):
            self.ending = True
            if not self._stopping:
                self.heartbeat.finish()
                raise  # it is given back, and another worker begins anew
            self._remove(row)
        except WrongState:
            self.ending = True
            self._remove(row)  # stopped in the last moment
        except LeaseLost:
            raise
        except OperationalError:
            _log.exception("the database is away; another worker will go on")
            return 1
        except Exception as error:
            self.ending = True
            if waits_for_disk(error):
                self.heartbeat.finish()
                raise
            _log.exception("export %s failed", self.row_id)
            self._remove(row, self._explain(error, row))
        return 0

    def _write(self, row: ModelExport) -> ExportResult:
        """Everything up to the last transaction."""
        shutil.rmtree(self.folders.data, ignore_errors=True)  # of a worker that was killed
        model = self.retry(lambda: find(row.stored_id))
        form = cast("Format", row.format)
        size = memory_needed(model, form, row.merged, row.quantization)
        if size > total_memory():
            raise RecipeError(
                f"the export takes about {size >> 20:,} MiB of memory, and the server has "
                f"{total_memory() >> 20:,}. Export a smaller model, or the adapter alone"
            )
        self.reserve_memory(size)
        target = self.folders.target
        written = export_model(
            model, target, form, row.merged, row.quantization, self.progress.update
        )
        return self._upload(row, written, target)

    def _upload(self, row: ModelExport, written: Export, target: Path) -> ExportResult:
        """Write the files below the address of the export."""
        hashes = hashes_of(target)
        files = [
            ExportedFile(name=name, bytes=(target / name).stat().st_size, sha256=digest)
            for name, digest in sorted(hashes.items())
        ]
        size = sum(each["bytes"] for each in files)
        with self.database.read() as session:
            quotas = quotas_of(session, row.account, self.quotas)
            if row.output.startswith("s3:"):
                storage.check(session, row.account, quotas, stored_bytes=size)
        below = f"model-export-{row.id}"
        address = f"{row.output.rstrip('/')}/{below}"
        compared = None if written.record is None else written.record.describe()
        result = ExportResult(
            address=address, files=files, bytes=size, network=written.network, compared=compared
        )
        planned = [f"{address}/{name}" for name in (*sorted(hashes), INDEX)]
        self.write(lambda s: exports.plan_writing(s, self.row_id, self.lease, planned))
        done = 0
        self.progress.update("upload", done, size)
        for each in files:

            def put(name: str = each["name"]) -> None:
                self.locations.write(row.account, row.output, f"{below}/{name}", target / name)

            self.retry(put)
            done += each["bytes"]
            self.progress.update("upload", done, size)
        index = {
            "export": row.id,
            "model": row.model,
            "format": row.format,
            "merged": row.merged,
            "quantization": row.quantization,
            "luthier": __version__,
            "created": created_now(),
            **{key: value for key, value in result.items() if key != "address"},
        }
        content = json_text(index).encode()
        self.retry(
            lambda: self.locations.write(row.account, row.output, f"{below}/{INDEX}", content)
        )
        return result

    def _remove(self, row: ModelExport, failure: str | None = None) -> None:
        """End without files: those that were written are taken back first."""
        with self.database.read() as session:
            addresses = queue.read_leased(session, ModelExport, self.row_id, self.lease).written
        self.retry(lambda: self.locations.remove(row.account, addresses))
        self._end(lambda s: exports.fail(s, self.row_id, self.lease, failure))

    def _end(self, change: Callable[[Session], None]) -> None:
        """The last transaction; then what only the work needed goes."""
        self.heartbeat.finish()
        self.write(change)
        self.folders.drop_working_files()
        self.folders.log.unlink(missing_ok=True)

    def _explain(self, error: Exception, row: ModelExport) -> str:
        """Why there is no export, in words for its owner: without the server's own paths and names."""
        if isinstance(error, UnknownModel):
            return f"the model {row.model_name} is no longer there."
        if isinstance(error, DoesNotFit):
            return "The server has no room for the export now. Ask again later."
        if isinstance(error, QuotaExceeded):
            return f"The files of the export have no room: {error}"
        text = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
        for name, shown in (
            (row.stored_id, row.model_name), (str(self.folders.target), row.output),
            (f"{luthier_home()}/", ""),
        ):  # fmt: skip
            text = text.replace(name, shown)
        return text
