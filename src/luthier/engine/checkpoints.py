"""Checkpoints: atomic, hashed, read back, and enough of them to survive a corrupt one.

``checkpoints/step-00000010/`` holds ``tensors.safetensors`` (masters, moments, best weights so
far) and ``state.json`` (progress, and the hash of the tensors). The newest that verifies
is resumed from; the two newest are kept.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import CorruptFile
from luthier.files import TEMPORARY, new_folder, read_json, sha256_of, sweep, write_json
from luthier.models.tensors import load_tensors, save_tensors

RETAINED = 2
FIRST_STEP = 10
"""Steps before the first checkpoint, which is written after :data:`FIRST_SECONDS` at the latest."""
FIRST_SECONDS = 45.0
FIRST_SHARE = 0.1
"""Part of the time until then that writing it may take, at :data:`FIRST_BYTES_PER_SECOND`."""
FIRST_BYTES_PER_SECOND = 400e6
"""As long as none was written; 1.6 GB took 3.9 s, hashed twice and read back (docs/log/engine.md)."""
SHARE_OF_TIME = 0.02
"""Later ones are spaced so that writing them takes at most this share of the time."""

log = logging.getLogger(__name__)


def first_seconds(cost: float) -> float:
    """Seconds that a run waits with its first checkpoint, which takes ``cost`` seconds."""
    return min(FIRST_SECONDS, cost / FIRST_SHARE)


@dataclass
class TrainingProgress:
    """Where a run stands: everything but tensors that an exact resume needs."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens of the rows trained on, shared prefixes counted in each row."""
    rows: int = 0
    seconds: float = 0.0
    """Training time so far, over all starts."""
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    """Validation loss of the best weights so far."""
    best_step: int | None = None
    worse: int = 0
    """Measurements in a row without a new best."""
    validation_loss: float | None = None
    metrics_lines: int = 0
    """Lines of the metrics file that belong to this state; later ones are cut on resume."""
    sample_lines: int = 0
    """The same of the file of samples."""


class Checkpoints:
    """The checkpoints of one run, in its folder ``checkpoints``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = time.monotonic()
        self._cost: float | None = None
        sweep(folder)

    def due(self, step: int, size: int) -> bool:
        """Whether a checkpoint of ``size`` bytes should be written after ``step``."""
        since = time.monotonic() - self._last
        if self._cost is None:
            seconds = first_seconds(size / FIRST_BYTES_PER_SECOND)
            return since >= (seconds if step >= FIRST_STEP else FIRST_SECONDS)
        return since >= max(10.0, self._cost / SHARE_OF_TIME)

    def write(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> Path:
        """Write one checkpoint, read it back, and drop all but the newest two."""
        started = time.monotonic()
        path = self.folder / f"step-{progress.step:08d}"
        with new_folder(path) as temporary:
            file = temporary / "tensors.safetensors"
            save_tensors({name: t.contiguous() for name, t in tensors.items()}, file)
            write_json(
                temporary / "state.json",
                {"progress": asdict(progress), "sha256": {file.name: sha256_of(file)}},
            )
        if self._cost is None:
            self._read(path)
        # What is newer was damaged, or this run would have gone on from it.
        present = sorted(self.folder.glob("step-*"))
        kept = [other for other in present if other <= path][-RETAINED:]
        for other in present:
            if other not in kept:
                _remove(other)
        self._cost, self._last = time.monotonic() - started, time.monotonic()
        return path

    def latest(self) -> tuple[TrainingProgress, dict[str, Tensor]] | None:
        """The newest checkpoint that verifies, or ``None`` when there is none at all."""
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        for path in paths:
            try:
                return self._read(path)
            except CorruptFile as error:
                log.warning("checkpoint %s is damaged and was skipped: %s", path.name, error)
        if paths:
            raise CorruptFile(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read",
                rule="checkpoint.none_readable",
            )
        return None

    @staticmethod
    def _read(path: Path) -> tuple[TrainingProgress, dict[str, Tensor]]:
        state: dict[str, Any] = read_json(path / "state.json")
        try:
            progress, hashes = TrainingProgress(**state["progress"]), state["sha256"]
        except (KeyError, TypeError) as error:
            raise CorruptFile(
                f"{path / 'state.json'} has not the fields of a checkpoint"
            ) from error
        for name, expected in hashes.items():
            if not (path / name).is_file() or sha256_of(path / name) != expected:
                raise CorruptFile(
                    f"{path / name} no longer has the bytes that were recorded",
                    rule="checkpoint.differs",
                )
        return progress, load_tensors(path / "tensors.safetensors")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of tensors: equal exactly when every bit is."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].detach().flatten().cpu()  # a single number has no bytes to be seen as
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    import os
    import shutil

    doomed = path.with_name(f"{TEMPORARY}{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
