"""Storing what was trained, and making sure that what is stored is what was trained."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from luthier import __version__
from luthier.engine.checkpoints import Progress, fingerprint
from luthier.engine.devices import peak_memory, return_freed_memory
from luthier.engine.job import Job
from luthier.engine.metrics import draw_curves
from luthier.engine.runs import Result, Run
from luthier.engine.verdict import judge_run
from luthier.errors import LuthierError
from luthier.evaluation.baselines import Comparison
from luthier.evaluation.parity import Parity
from luthier.files import hashes_of, new_folder, write_json
from luthier.gate.report import manifest_record
from luthier.models.catalog import MANIFEST
from luthier.models.load import as_network
from luthier.models.network import Network
from luthier.models.save import (
    adapter_tensors,
    read_adapter,
    save_adapter,
    save_format,
    save_network,
)
from luthier.store import models as store
from luthier.types import Example

PARITY_ROWS = 16


@dataclass(frozen=True)
class Storing:
    """A job that has been trained, on its way into the store."""

    job: Job
    run: Run
    progress: Progress
    lines: list[dict[str, Any]]
    """Those of the metrics."""
    trained: int
    """Numbers that trained."""
    weights: int
    """All of the network."""
    comparison: Comparison | None = None
    """The model beside simple baselines."""
    fitted_head: bool = False
    """Whether its head started from logistic regression."""

    def store(self, network: Network) -> Result:
        """Save, let go of the network, load what was saved, compare, and only then make it a model."""
        run = self.run
        trained = self._loss(network)
        with new_folder(run.model_folder) as fresh:
            manifest = self._save(network, fresh)
            network.close()
            return_freed_memory()  # of the activations, before a second network is loaded
            manifest["parity"] = asdict(self._parity(fresh, manifest, trained))
            pictures = draw_curves(self.lines, fresh, run.model_id)
            result = self._result(fresh)
            metrics = {k: v for k, v in asdict(result).items() if not k.endswith("_dir")}
            manifest["metrics"] = metrics
            manifest["files"] = hashes_of(fresh)
            write_json(fresh / MANIFEST, manifest)
        for name in pictures:
            shutil.copyfile(run.model_folder / name, run.folder / name)
        return result

    def _save(self, network: Network, folder: Path) -> dict[str, Any]:
        """Write weights and tokenizer; what the manifest says of them and of where they came from."""
        job, model = self.job, network.model
        adaptation = self.job.recipe.adaptation
        trained = adapter_tensors(model)
        weights = fingerprint({adaptation.stored_name(n): w for n, w in trained.items()})
        if adaptation.stores_network:
            save_network(model, job.chat, folder)
        else:
            config = adaptation.adapter_config(model, str(job.base.folder))
            save_adapter(model, adaptation, config, folder)
            save_format(job.chat, folder)
        return {
            "id": self.run.model_id,
            "kind": job.data.objective.task,
            "saved": "network" if adaptation.stores_network else "adapter",
            **job.origin,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "luthier": __version__,
            "torch": torch.__version__,
            "precision": str(self.job.machine.dtype).removeprefix("torch."),
            "data": {
                "sha256": job.data.hashes,
                "dropped": job.data.dropped,
                "truncated": job.data.truncated,
                "held_out": job.data.held_out.get("validation", {}),
                **job.data.counts,
                "mix": job.data.mix_record(self.job.recipe.data),
            },
            **({"data_report": manifest_record(job.data.report)} if job.data.report else {}),
            "trained_weights_sha256": weights,
            "format": {
                "template": job.chat.template,
                "stop_ids": list(job.chat.stop_ids),
                "start_id": job.chat.start_id,
            },
        }

    def _result(self, stored: Path) -> Result:
        run, progress = self.run, self.progress
        measure = self.job.data.objective.measure
        return Result(
            model_id=run.model_id,
            run_dir=str(run.folder),
            model_dir=str(run.model_folder),
            rows=self.job.data.counts["rows"],
            tokens=progress.tokens,
            steps=progress.step,
            train_loss=float(progress.last_loss or 0.0),
            validation_loss=progress.best_loss,
            seconds=round(progress.seconds, 3),
            peak_memory_bytes=peak_memory(),
            trained_weights=self.trained,
            weights=self.weights,
            saved_bytes=sum(file.stat().st_size for file in stored.glob("*.safetensors")),
            verdict=judge_run(
                self.lines,
                measure,
                self.job.recipe.training,
                self.job.steps,
                len(self.job.data.validation),
                self.fitted_head,
                untold=self.comparison is not None and self.comparison.untold,
            ),
            comparison=self.comparison,
        )

    def _sample(self) -> list[Example]:
        """The rows that parity is measured on, held-out ones first."""
        return list(islice(chain(self.job.data.validation, self.job.data.train), PARITY_ROWS))

    def _loss(self, network: Network) -> float:
        budget = self.job.recipe.training.micro_batch_tokens or 1
        with torch.no_grad():
            return self.job.data.objective.parity_loss(network, self._sample(), budget)

    def _parity(self, folder: Path, manifest: dict[str, Any], trained: float) -> Parity:
        """Load what was written as serving will, and compare."""
        parent = self.job.base if manifest["saved"] == "adapter" else None
        if parent and fingerprint(read_adapter(folder)) != manifest["trained_weights_sha256"]:
            raise LuthierError("the saved adapter has not the bits of the trained one")
        stored = store.StoredModel(manifest["id"], folder, manifest, parent)
        head = self.job.data.objective.head()
        again = store.load(stored, self.job.machine.dtype, self.job.machine.device, head)
        network = as_network(again, self.job.machine.device, self.job.machine.dtype)
        rounded = parent is not None and self.job.machine.dtype != torch.float32
        parity = Parity(len(self._sample()), trained, self._loss(network), rounded)
        parity.check()
        if store.chat_format(stored).stop_ids != self.job.chat.stop_ids:
            raise LuthierError(
                "the saved tokenizer has other stop tokens than the one trained with"
            )
        return parity
