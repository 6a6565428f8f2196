"""Worker of an export: converts a custom model and uploads the files below an address.

    lock, lease → memory → merge, write, compare → upload, ``export.json`` last → Completed

The worker writes into a working folder first and may be killed anywhere: the next worker starts
again and uploads the same names. The file ``export.json`` exists only after all other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from luthier import __version__
from luthier.engine.machine import total_memory
from luthier.errors import DoesNotFit, QuotaExceeded, RecipeError, UnknownModel
from luthier.exports.export import Export, Format, export_model, memory_needed
from luthier.files import hashes_of, json_text
from luthier.library.models import find
from luthier.models.manifest import created_now
from luthier.server.jobs.folders import ExportFolders
from luthier.server.jobs.worker import ResultWorker, explain_error
from luthier.server.tables import storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.exports import ExportedFile, ExportResult, ModelExport

INDEX = "export.json"
"""Name of the last uploaded file, with the settings of the export and all hashes."""


class ExportWorker(ResultWorker[ModelExport]):
    """Worker of an export."""

    table = ModelExport
    folders_type = ExportFolders
    folders: ExportFolders

    def produce(self, row: ModelExport) -> ExportResult:
        """Write and upload the files."""
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
        written = export_model(model, target, form, row.merged, row.quantization, self.show)
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
        self.show("upload", done, size)
        for each in files:

            def put(name: str = each["name"]) -> None:
                self.locations.write(row.account, row.output, f"{below}/{name}", target / name)

            self.retry(put)
            done += each["bytes"]
            self.show("upload", done, size)
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

    def explain(self, error: Exception, row: ModelExport) -> str:
        """See :meth:`ResultWorker.explain`."""
        if isinstance(error, UnknownModel):
            return f"the model {row.model_name} does not exist any more."
        if isinstance(error, DoesNotFit):
            return "The server has no memory for the export now. Try again later."
        if isinstance(error, QuotaExceeded):
            return f"The files of the export exceed a quota: {error}"
        names = {row.stored_id: row.model_name, str(self.folders.target): row.output}
        return explain_error(error, names)
