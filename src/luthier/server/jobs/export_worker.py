"""Worker of an export: converts a custom model and uploads the files below an address.

    lock, lease → memory → merge, write, compare → upload, ``export.json`` last → Completed

The worker writes into a working folder first and may be killed anywhere: the next worker starts
again and uploads the same names. The file ``export.json`` exists only after all other files.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import cast

from sqlalchemy.exc import OperationalError

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
)
from luthier.exports.export import Export, Format, export_model, memory_needed
from luthier.files import hashes_of, json_text, luthier_home
from luthier.library.models import find
from luthier.models.manifest import created_now
from luthier.server.jobs.folders import ExportFolders
from luthier.server.jobs.worker import BEAT, RENEWAL, Heartbeat, Worker, is_shortage
from luthier.server.tables import exports, queue, storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.exports import ExportedFile, ExportProgress, ExportResult, ModelExport
from luthier.server.tables.jobs import STOPPING

INDEX = "export.json"
"""Name of the last uploaded file, with the settings of the export and all hashes."""

_log = logging.getLogger(__name__)


class ExportWorker(Worker[ModelExport]):
    """Worker of an export."""

    table = ModelExport
    folders_type = ExportFolders
    folders: ExportFolders
    progress: ExportProgress | None = None
    """Written by the main thread, stored by the heartbeat."""

    def work(self, row: ModelExport) -> int:
        """Write the files and end the export."""
        self._renewed = time.monotonic()
        self.heartbeat = Heartbeat(self.beat, BEAT)
        self.heartbeat.start()
        try:
            end: ExportResult | str = self._write(row)
        except (Interrupted, KeyboardInterrupt, LeaseLost, OperationalError):
            # Not failures of the export: another worker starts again, or the export was stopped.
            raise
        except Exception as error:
            if is_shortage(error):
                raise
            _log.exception("export %s failed", self.row_id)
            end = self._explain(error, row)
        finally:
            self.ending = True
            self.heartbeat.finish()
        # The row ends first. If the worker dies now, the scheduler removes the files of ended work.
        self.write(lambda s: exports.finish(s, self.row_id, self.lease, end))
        self.folders.remove_working_files()
        self.folders.log.unlink(missing_ok=True)
        return 0

    def beat(self) -> None:
        """Renew the lease, store the progress, and interrupt the main thread of a stopped export."""
        progress = self.progress
        # Most beats only read, because SQLite allows one writer at a time.
        with self.database.read() as session:
            row = queue.read_leased(session, ModelExport, self.row_id, self.lease)
            state, written = row.state, row.progress
        if progress != written or time.monotonic() - self._renewed > RENEWAL:
            with self.database.write() as session:
                state = exports.renew(session, self.row_id, self.lease, progress).state
            self._renewed = time.monotonic()
        if state == STOPPING and not self.ending:
            self.heartbeat.interrupt()

    def _show(self, phase: str, done: int, total: int) -> None:
        self.progress = ExportProgress(phase=phase, done=done, total=total)

    def _write(self, row: ModelExport) -> ExportResult:
        """Write and upload the files."""
        shutil.rmtree(self.folders.data, ignore_errors=True)  # files of a worker that was killed
        model = self.retry(lambda: find(row.stored_id))
        form = cast("Format", row.format)
        size = memory_needed(model, form, row.merged, row.quantization)
        if size > total_memory():
            raise RecipeError(
                f"the export needs about {size >> 20:,} MiB of memory, and the server has "
                f"{total_memory() >> 20:,} MiB. Export a smaller model, or only the adapter"
            )
        self.reserve_memory(size)
        target = self.folders.target
        written = export_model(model, target, form, row.merged, row.quantization, self._show)
        return self._upload(row, written, target)

    def _upload(self, row: ModelExport, written: Export, target: Path) -> ExportResult:
        """Upload the files below the address of the export."""
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
        done = 0
        self._show("upload", done, size)
        for each in files:

            def put(name: str = each["name"]) -> None:
                self.locations.write(row.account, row.output, f"{below}/{name}", target / name)

            self.retry(put)
            done += each["bytes"]
            self._show("upload", done, size)
        # Written last: clients recognize a complete export by this file.
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

    def _explain(self, error: Exception, row: ModelExport) -> str:
        """Return the failure for the owner, without paths and names of the server."""
        if isinstance(error, UnknownModel):
            return f"the model {row.model_name} does not exist any more."
        if isinstance(error, DoesNotFit):
            return "The server has no memory for the export now. Try again later."
        if isinstance(error, QuotaExceeded):
            return f"The files of the export exceed a quota: {error}"
        text = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
        for name, shown in (
            (row.stored_id, row.model_name), (str(self.folders.target), row.output),
            (f"{luthier_home()}/", ""),
        ):  # fmt: skip
            text = text.replace(name, shown)
        return text
