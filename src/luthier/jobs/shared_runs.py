"""What a worker on another machine needs to go on with a job: its rows, its run, its last checkpoint.

Put into the shared store when the rows were fetched and after each checkpoint, under the lease of the
job; taken from there by a worker whose own machine has none of it, or something older. What can be
computed again to the same bits is left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from luthier.encryption.memory import working
from luthier.engine.runs import ACTIVATIONS, PRECOMPUTED, Run
from luthier.files import (
    TEMPORARY,
    cached_sha256_of,
    luthier_home,
    names_below,
    need_disk,
    write_bytes,
)
from luthier.jobs.folders import JobFolders
from luthier.store.shared import Fence, FolderRecord, SharedFolders, shared_folders

_RECOMPUTED = frozenset({ACTIVATIONS, PRECOMPUTED, ".lock"})
_log = logging.getLogger(__name__)


class SharedRun:
    """The work on one job, as this machine and the shared store have it."""

    def __init__(self, folders: JobFolders, fence: Fence) -> None:
        self._folders, self._fence = folders, fence
        self._shared: SharedFolders | None = shared_folders()

    def share(self) -> None:
        """Put what there is now; nothing without a shared store, or once the model is made.

        The run has no checkpoints then: before the model itself is there, another machine goes on from
        the last one that was put.

        Raises:
            LeaseLost: where somebody else has the job by now.
            SharedStoreAway: where the shared store cannot be written.
        """
        if self._shared is None or self._has_model():
            return
        files = {name: luthier_home() / name for name in self._names()}
        record = self._shared.upload(
            self._folders.shared_run,
            files,
            cached_sha256_of,
            roots=[str(root) for root in _roots()],
        )
        self._shared.commit(self._folders.shared_run, record, self._fence)
        self._note(record)

    def _has_model(self) -> bool:
        """Whether training has ended, as :meth:`luthier.engine.runs.Run.begin` sees it."""
        runs = self._folders.below("runs")
        return any(Run(each.parent.name, each.name).has_ended() for each in runs)

    def share_checkpoint(self) -> None:
        """The same after a checkpoint: training goes on where the shared store is away for a while."""
        from luthier.errors import LeaseLost

        try:
            self.share()
        except LeaseLost:
            raise
        except Exception as error:
            _log.warning("the checkpoint is on this machine alone: %s", error)

    def restore(self) -> None:
        """Have on this machine what the worker before put, unless it was this machine's own.

        Raises:
            CorruptFile: where the shared store does not have what its record names.
            SharedStoreAway: where it cannot be read.
            DoesNotFit: where the disk has no room for it.
        """
        if self._shared is None:
            return
        name = self._folders.shared_run
        record = self._shared.read(name)
        if record is None:
            return
        if self._mark.is_file() and self._mark.read_text() == _digest(record):
            return
        need_disk(luthier_home(), record.size, "going on with a job of another machine")
        # What is here is older: the job went on elsewhere since.
        self._folders.drop_local()
        if not self._shared.fetch(name, record, luthier_home().joinpath):
            self._folders.drop_local()
            return  # the job ended meanwhile, which its lease says next
        _relocate(record, self._names())
        self._note(record)

    @property
    def _mark(self) -> Path:
        """File with the digest of the record that this machine's files come from, or are ahead of."""
        return self._folders.shared_mark

    def _note(self, record: FolderRecord) -> None:
        write_bytes(self._mark, _digest(record).encode())

    def _names(self) -> Iterator[str]:
        """Files of the job by their paths in the store."""
        home = luthier_home()
        for folder in (
            self._folders.data,
            *self._folders.below("runs"),
            *self._folders.below("distillations"),
        ):
            for name in names_below(folder) if folder.is_dir() else ():
                parts = name.split("/")
                if _RECOMPUTED.isdisjoint(parts) and not any(
                    part.startswith(TEMPORARY) for part in parts
                ):
                    yield f"{folder.relative_to(home).as_posix()}/{name}"


def _digest(record: FolderRecord) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(record.plain(), sort_keys=True).encode()).hexdigest()


def _roots() -> list[Path]:
    """Folders below which the files of a run name others: the store, and what it has in memory."""
    return [luthier_home(), working(luthier_home())]


def _relocate(record: FolderRecord, names: Iterator[str]) -> None:
    """Let requests and lists of rows name the files of this machine: they hold whole paths."""
    pairs: Mapping[bytes, bytes] = {
        _in_json(f"{before}/"): _in_json(f"{now}/")
        for before, now in zip(record.about["roots"], _roots(), strict=True)
    }
    for name in names:
        path = luthier_home() / name
        if name.startswith("jobs/") or path.suffix != ".json":
            continue
        content = text = path.read_bytes()
        for before, now in pairs.items():
            text = text.replace(before, now)
        if text != content:
            write_bytes(path, text)


def _in_json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()
