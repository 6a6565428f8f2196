"""Atomic, hashed checkpoints of a training.

``checkpoints/step-00000010/`` contains ``tensors.safetensors`` (masters, moments, best weights) and
``state.json`` (progress, and the hash of the tensors). A resumed run starts from the newest
checkpoint that verifies. The two newest checkpoints are kept, so that one damaged checkpoint loses
little work.
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
from luthier.models.formats.tensors import load_tensors, save_tensors

RETAINED = 2
FIRST_STEP = 10
"""Steps before the first checkpoint, unless :data:`FIRST_SECONDS` pass earlier."""
FIRST_SECONDS = 45.0
FIRST_SHARE = 0.1
"""Maximum share of the time before the first checkpoint for writing, at
:data:`FIRST_BYTES_PER_SECOND`."""
FIRST_BYTES_PER_SECOND = 400e6
"""Assumed speed of the first write; 1.6 GB took 3.9 s, hashed twice and read back
(docs/log/engine.md)."""
SHARE_OF_TIME = 0.02
"""Maximum share of the training time for writing later checkpoints."""

log = logging.getLogger(__name__)


def first_seconds(cost: float) -> float:
    """Return the seconds before the first checkpoint, if writing takes ``cost`` seconds."""
    return min(FIRST_SECONDS, cost / FIRST_SHARE)


@dataclass
class TrainingProgress:
    """Progress of a run: all state for an exact resume, except tensors."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens of the training rows. Shared prefixes count in each row."""
    rows: int = 0
    seconds: float = 0.0
    """Training time in seconds, over all starts."""
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int | None = None
    worse: int = 0
    """Consecutive measurements without a new best."""
    validation_loss: float | None = None
    metrics_lines: int = 0
    """Number of lines of the metrics file up to this state. A resumed run removes later lines."""
    sample_lines: int = 0
    """Number of lines of the samples file up to this state."""


class Checkpoints:
    """The checkpoints of one run, in the folder ``checkpoints``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = time.monotonic()
        self._cost: float | None = None
        sweep(folder)

    def due(self, step: int, size: int) -> bool:
        """Return true if a checkpoint of ``size`` bytes is due after ``step``."""
        since = time.monotonic() - self._last
        if self._cost is None:
            seconds = first_seconds(size / FIRST_BYTES_PER_SECOND)
            return since >= (seconds if step >= FIRST_STEP else FIRST_SECONDS)
        return since >= max(10.0, self._cost / SHARE_OF_TIME)

    def write(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint and remove all but the newest two. The first checkpoint is read back."""
        started = time.monotonic()
        # Zero-padded, because checkpoints are ordered by name.
        path = self.folder / f"step-{progress.step:08d}"
        # new_folder renames after fsync, so a checkpoint exists completely or not at all.
        with new_folder(path) as temporary:
            file = temporary / "tensors.safetensors"
            # safetensors rejects tensors that are not contiguous.
            save_tensors({name: t.contiguous() for name, t in tensors.items()}, file)
            write_json(
                temporary / "state.json",
                {"progress": asdict(progress), "sha256": {file.name: sha256_of(file)}},
            )
        # Read back the first checkpoint: a faulty disk shows early, at the cost of one read.
        if self._cost is None:
            self._read(path)
        # Newer checkpoints are damaged: this run would have resumed from an intact one.
        present = sorted(self.folder.glob("step-*"))
        retained = [checkpoint for checkpoint in present if checkpoint <= path][-RETAINED:]
        for checkpoint in present:
            if checkpoint not in retained:
                _remove(checkpoint)
        self._cost, self._last = time.monotonic() - started, time.monotonic()
        return path

    def latest(self) -> tuple[TrainingProgress, dict[str, Tensor]] | None:
        """Return the newest intact checkpoint, or ``None`` without checkpoints."""
        paths = sorted(self.folder.glob("step-*"), reverse=True)
        for path in paths:
            try:
                return self._read(path)
            except CorruptFile as error:
                log.warning("checkpoint %s is damaged and was skipped: %s", path.name, error)
        if paths:
            raise CorruptFile(
                f"none of the {len(paths)} checkpoints in {self.folder} is readable",
                rule="checkpoint.none_readable",
            )
        return None

    @staticmethod
    def _read(path: Path) -> tuple[TrainingProgress, dict[str, Tensor]]:
        state: dict[str, Any] = read_json(path / "state.json")
        try:
            progress, hashes = TrainingProgress(**state["progress"]), state["sha256"]
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{path / 'state.json'} lacks fields of a checkpoint") from error
        for name, expected in hashes.items():
            if not (path / name).is_file() or sha256_of(path / name) != expected:
                raise CorruptFile(
                    f"{path / name} differs from the recorded hash",
                    rule="checkpoint.differs",
                )
        return progress, load_tensors(path / "tensors.safetensors")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names and bytes of tensors. The hash is equal only for bit-identical
    tensors."""
    digest = hashlib.sha256()
    # Sorted: the hash must not depend on the order of the modules.
    for name in sorted(tensors):
        digest.update(name.encode())
        # Flat first: `view(torch.uint8)` fails for tensors without a dimension.
        flat = tensors[name].detach().flatten().cpu()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    import os
    import shutil

    doomed = path.with_name(f"{TEMPORARY}{path.name}")
    # Rename first: a kill during rmtree must not leave a checkpoint that looks complete.
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
