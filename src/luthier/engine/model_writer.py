"""Storing of the trained model, and the parity check of the stored model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier import __version__
from luthier.adaptations import ADAPTATIONS
from luthier.engine.checkpoints import TrainingProgress, fingerprint
from luthier.engine.job import TrainingJob
from luthier.engine.machine import peak_memory, return_freed_memory
from luthier.engine.metrics import draw_curves
from luthier.engine.runs import Result, Run
from luthier.engine.verdict import Refit, RunVerdict
from luthier.errors import LuthierError
from luthier.evaluation.baselines import Comparison
from luthier.evaluation.label_issues import LabelIssueCounts
from luthier.evaluation.parity import (
    GREEDY_TOKENS,
    GreedyReference,
    TargetLogps,
    check_parity,
    compare_greedy,
    generate_greedily,
    greedy_prompts,
    target_logps,
)
from luthier.files import folder_size, hashes_of, new_folder
from luthier.gate.report import manifest_record
from luthier.library import models as store
from luthier.models.decoding.backends import Backend
from luthier.models.decoding.torch_backend import torch_backend
from luthier.models.formats.save import (
    adapter_tensors,
    read_adapter,
    save_adapter,
    save_format,
    save_network,
    stored_name,
)
from luthier.models.load import as_network
from luthier.models.manifest import (
    UNMEASURED,
    DataRecord,
    Manifest,
    Parity,
    TokenParity,
    created_now,
)
from luthier.models.networks.heads import prompt_ids
from luthier.models.networks.network import Network
from luthier.models.networks.prefix import prefix_tokens
from luthier.models.networks.probe import in_float32
from luthier.objectives import OBJECTIVES
from luthier.types import Example

PARITY_TOKENS = 1024
PARITY_ROWS: int = 16
"""Maximum number of rows for the parity check; beyond :data:`TOKEN_PARITY_ROWS`, the token limit
applies."""
TOKEN_PARITY_ROWS = 4
"""Number of rows for the comparison of next tokens, and number of prompts for greedy text."""


@dataclass(frozen=True, eq=False)
class NetworkOutputs:
    """Outputs of the trained network, to compare with the outputs of the stored model."""

    loss: float
    logps: TargetLogps | None
    """Next-token log-probabilities of a few rows; ``None`` for networks that generate no text."""
    greedy: GreedyReference | None
    """Greedy text for a few prompts."""
    greedy_skipped: str | None
    """Reason for missing greedy text."""


@dataclass(frozen=True)
class ModelWriter:
    """Writer of a job's trained model into the library."""

    job: TrainingJob
    run: Run
    progress: TrainingProgress
    lines: Sequence[Mapping[str, Any]]
    """Lines of the metrics file."""
    trained: int
    """Number of trained weights."""
    weights: int
    """Number of weights of the network."""
    verdict: RunVerdict
    comparison: Comparison | None = None
    """Comparison of the model with simple baselines."""
    label_issues: LabelIssueCounts | None = None
    """Number of possibly wrong labels."""
    refit: Refit | None = None
    """The second training, if the stored weights come from a refit."""

    def write(self, network: Network) -> Result:
        """Save the model, free the network, load the saved model, compare, and register the model
        last."""
        run = self.run
        trained = self._outputs(network)
        # The folder is renamed last: a model with a failed parity check never becomes visible.
        with new_folder(run.model_folder) as fresh:
            manifest = self._save(network, fresh)
            network.close()
            return_freed_memory()  # a second network is loaded next
            parity = self._parity(fresh, manifest, trained)
            pictures = draw_curves(self.lines, fresh, run.model_id)
            result = self._result(fresh)
            metrics = {k: v for k, v in asdict(result).items() if not k.endswith("_dir")}
            checked = {"parity": parity, "metrics": metrics, "files": hashes_of(fresh)}
            manifest.model_copy(update=checked).write(fresh)
        for name in pictures:
            shutil.copyfile(run.model_folder / name, run.folder / name)
        return result

    def _save(self, network: Network, folder: Path) -> Manifest:
        """Write weights and tokenizer, and return the manifest."""
        job, model = self.job, network.model
        adaptation = self.job.recipe.adaptation
        packages = (
            OBJECTIVES.package_of(job.data.objective.method),
            ADAPTATIONS.package_of(adaptation.method),
        )
        plugins = dict(package.rsplit(" ", 1) for package in packages if package)
        trained = adapter_tensors(model)
        # Hash of the weights in memory: the parity check compares it with the file as read back.
        weights = fingerprint({stored_name(model, adaptation, n): w for n, w in trained.items()})
        if adaptation.stores_network:
            save_network(model, job.chat, folder)
        else:
            config = adaptation.adapter_config(model, str(job.base.folder))
            save_adapter(model, adaptation, config, folder)
            save_format(job.chat, folder)
        data = DataRecord(
            sha256=job.data.hashes,
            dropped=job.data.dropped,
            truncated=job.data.truncated,
            held_out=job.data.held_out.get("validation", {}),
            mix=job.data.mix_record(job.recipe.data),
            mask=job.data.mask,
            **job.data.counts,
        )
        return Manifest(
            id=self.run.model_id,
            kind=job.data.objective.task.head,
            saved="network" if adaptation.stores_network else "adapter",
            **job.origin,
            withheld=None if job.recipe.forgetting is None else UNMEASURED,
            plugins=plugins or None,
            created=created_now(),
            luthier=__version__,
            torch=torch.__version__,
            precision=str(job.machine.dtype).removeprefix("torch."),
            data=data,
            data_report=manifest_record(job.data.report) if job.data.report else None,
            trained_weights_sha256=weights,
            format=store.text_format(job.chat),
        )

    def _result(self, stored: Path) -> Result:
        run, progress = self.run, self.progress
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
            peak_memory_bytes=peak_memory(self.job.machine.device),
            trained_weights=self.trained,
            weights=self.weights,
            saved_bytes=folder_size(stored, ".safetensors"),
            rows_seen=progress.rows,
            verdict=self.verdict,
            comparison=self.comparison,
            label_issues=self.label_issues,
            refit=self.refit,
        )

    def _sample(self) -> list[Example]:
        """Return the rows of the parity check, held-out rows first, numbered by their position.

        Row numbers are unique within a split only.
        """
        rows: list[Example] = []
        tokens = 0
        for row in islice(chain(self.job.data.validation, self.job.data.train), PARITY_ROWS):
            tokens += len(row)
            if len(rows) >= TOKEN_PARITY_ROWS and tokens > PARITY_TOKENS:
                break
            rows.append(replace(row, row=len(rows)))
        return rows

    @property
    def _budget(self) -> int:
        return self.job.recipe.training.micro_batch_tokens or 1

    def _loss(self, network: Network) -> float:
        with torch.no_grad():
            return self.job.data.objective.parity_loss(network, self._sample(), self._budget)

    def _logps(self, network: Network) -> TargetLogps | None:
        """Return next-token log-probabilities of a few rows; ``None`` for networks without
        generation."""
        if not self.job.data.objective.task.writes:
            return None
        return target_logps(network, self._few_rows(), self._budget)

    def _few_rows(self) -> list[Example]:
        return self._sample()[:TOKEN_PARITY_ROWS]

    def _outputs(self, network: Network) -> NetworkOutputs:
        loss, logps = self._loss(network), self._logps(network)
        task = self.job.data.objective.task
        if not task.writes or network.is_bidirectional:
            reason = f"a network for {task.head.replace('_', ' ')} cannot generate text"
            return NetworkOutputs(loss, logps, None, reason)
        # Soft prompts and prefixes use context too.
        room = network.context - network.tokens_before - GREEDY_TOKENS
        soft = list(prompt_ids(network.model))
        row_prompts = greedy_prompts(self._few_rows(), TOKEN_PARITY_ROWS, room)
        if not row_prompts:
            return NetworkOutputs(loss, logps, None, "no prompt fits the context")
        prompts = [np.array([*soft, *ids_T], dtype=np.int64) for ids_T in row_prompts]
        with _open_backend(network) as backend:
            written = generate_greedily(backend, prompts, GREEDY_TOKENS, self.job.chat.stop_ids)
        return NetworkOutputs(loss, logps, written, None)

    def _parity(self, folder: Path, manifest: Manifest, trained: NetworkOutputs) -> Parity:
        """Load the stored model as for serving, and compare the outputs."""
        parent = self.job.base if manifest.saved == "adapter" else None
        if parent and fingerprint(read_adapter(folder)) != manifest.trained_weights_sha256:
            raise LuthierError(
                "the saved adapter differs from the trained adapter", rule="model.not_saved"
            )
        stored = store.StoredModel(manifest.id, folder, manifest, parent)
        head = self.job.data.objective.head()
        device, dtype = self.job.machine.device, self.job.machine.dtype
        network = as_network(store.load(stored, dtype, device, head), device, dtype)
        network.chat = self.job.chat
        logps, greedy = self._logps(network), None
        if trained.greedy is not None:
            with _open_backend(network) as backend:
                greedy = compare_greedy(trained.greedy, backend)
        parity = Parity(
            rows=len(self._sample()),
            trained=trained.loss,
            reloaded=self._loss(network),
            # Merging into bfloat16 rounds, so merged adapters have a wider limit.
            rounded=parent is not None and dtype != torch.float32,
            next_tokens=trained.logps.beside(logps) if trained.logps and logps else None,
            greedy=greedy,
            greedy_skipped=trained.greedy_skipped,
        )
        # One network in memory at a time.
        network.close()
        if parent and trained.greedy is not None and store.can_share_base(stored):
            # A server keeps the adapter next to the base if possible, which rounds differently.
            below = as_network(store.load(parent, dtype, device, head), device, dtype)
            network = below.with_adapter(lambda model: store.attach_adapter(model, stored))
            with _open_backend(network) as backend:
                beside = compare_greedy(trained.greedy, backend)
            parity = parity.model_copy(update={"greedy_beside_base": beside})
            network.close()
            below.close()
        chat = self.job.chat
        check_parity(
            parity,
            (lambda token: chat.replies.decode([token])) if chat.has_tokenizer else None,
            self._base_rounding,
        )
        if stored.chat.stop_ids != chat.stop_ids:
            raise LuthierError(
                "the stop tokens of the saved tokenizer differ from training",
                rule="model.not_saved",
            )
        return parity

    def _base_rounding(self) -> TokenParity | None:
        """Compare next tokens of the base model with float32 on the rows of the parity check.

        Returns ``None`` if the base predicts no next tokens or runs on a GPU.
        """
        device, dtype = self.job.machine.device, self.job.machine.dtype
        if device.type != "cpu" or not self.job.data.objective.task.writes:
            return None
        head = self.job.data.objective.head()
        network = as_network(store.load(self.job.base, dtype, device, head), device, dtype)
        rounded = self._logps(network)
        with in_float32():
            precise = self._logps(network)
        network.close()
        return None if precise is None or rounded is None else precise.beside(rounded)


@contextmanager
def _open_backend(network: Network) -> Iterator[Backend]:
    """Yield a torch backend of the network, without a second copy of the weights."""
    network.model.eval()
    context = network.context - prefix_tokens(network.model)
    with closing(torch_backend(network, context, packs=False)) as backend, torch.no_grad():
        yield backend
