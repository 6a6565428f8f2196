"""The network of a run: a base model with a head, an adaptation and modules for training only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.engine.job import TrainingJob
from luthier.engine.machine import Machine, return_freed_memory
from luthier.engine.metrics import Reporter
from luthier.library import models as store
from luthier.models.formats.save import stored_bytes, trained_weights
from luthier.models.load import as_network, check_decoder_input
from luthier.models.networks.dropout import set_dropout
from luthier.models.networks.heads import new_weights
from luthier.models.networks.network import Network
from luthier.models.networks.probe import try_shared, try_training
from luthier.models.networks.sentence_head import attach_sentence_head
from luthier.models.process_group import ProcessGroup
from luthier.models.sharding import local_shard, shard_layers
from luthier.objectives.base import add_modules


@dataclass(frozen=True)
class TrainedNetwork:
    """A network ready for training, with sizes for reports and manifests."""

    network: Network
    trained: int
    """Number of trained weights."""
    weights: int
    """Number of weights of the network."""
    extra_modules: Sequence[str]
    """Names of the objective's modules for training only."""


def load_trained_network(
    job: TrainingJob, group: ProcessGroup, reporter: Reporter, whole: bool = False
) -> TrainedNetwork:
    """Load the base model of ``job`` with the adaptation; shard the layers if the recipe asks for
    shards.

    ``whole`` loads a network on the CPU without shards or notes, to gather the shards.
    """
    training, adaptation, objective = job.recipe.training, job.recipe.adaptation, job.data.objective
    machine = job.machine
    is_sharded = training.fully_shard and group.size > 1 and not whole
    # A refit loads the network a second time: its notes would repeat those of the first training.
    note = Reporter().note if whole or job.steps_before else reporter.note
    torch.manual_seed(training.seed)
    reporter.stage(f"Loading {job.base.id}{' to gather the shards' if whole else ''}")
    # A device may have no room for a network whose layers are sharded.
    device = torch.device("cpu") if is_sharded or whole else machine.device
    head = objective.head()
    model = store.load(job.base, machine.dtype, device, head)
    if new_weights(model):
        classes = f" of {len(head.labels)} classes" if len(head.labels) > 1 else ""
        why = f": {job.base.id} has no matching head"
        if old := job.base.objective.head().labels:
            some = ", ".join(old[:5]) + (", …" if len(old) > 5 else "")
            why = f", replacing the head with {some}"
        note(f"new head{classes}{why}")
    # The attention of the flat layout drops no weights (docs/log/engine.md).
    if getattr(model.config, "attention_dropout", 0):
        model.config.attention_dropout = 0.0  # type: ignore[union-attr]
    network = as_network(model, device, machine.dtype)
    network.chat = job.chat
    check_decoder_input(network)
    if head.kind == "embedding":
        attach_sentence_head(model, job.chat.sentence, job.base.network_folder)
    if training.dropout is not None:
        modules = ", ".join(set_dropout(network, training.dropout))
        note(f"dropout {training.dropout:g} in {modules}; attention weights are not dropped")
    if adaptation.shares_base:
        try_shared(network, adaptation.method, adaptation.attach)
    # Seed again: new adapter weights must not depend on what loading has drawn.
    torch.manual_seed(training.seed)
    before = sum(weight.numel() for weight in model.parameters())
    adaptation.attach(model)
    try_training(network, adaptation.method)
    # Before the objective adds modules, which are not stored.
    size = stored_bytes(model, adaptation)
    extra_modules = add_modules(model, objective.attach(model))
    return_freed_memory()  # loading and attaching leave copies behind
    trained = sum(weight.numel() for weight in trained_weights(model).values())
    # Quantized weights are buffers, so fewer parameters are left after attaching.
    weights = max(before, sum(weight.numel() for weight in model.parameters()))
    note(
        f"{trained:,} of {weights:,} weights are trained ({trained / weights:.2%}); stored size "
        f"{size / 1e6:,.2f} MB"
    )
    if job.refit_steps and not network.is_stepless:
        note(
            f"{job.all_steps:,} steps in all: {job.steps:,} measured on the held-out rows, then "
            f"up to {job.refit_steps:,} on all rows (`training.refit`)"
        )
    if is_sharded:
        shard_layers(network, group, machine.device)
        return_freed_memory()
        own = sum(local_shard(weight).nbytes for weight in model.parameters())
        note(
            f"the layers are sharded over {group.size} processes: each process stores "
            f"{own / 1e6:,.1f} of "
            f"{sum(weight.nbytes for weight in model.parameters()) / 1e6:,.1f} MB of weights"
        )
    network.others = {
        name: load_frozen(other, machine, reporter) for name, other in job.others.items()
    }
    return TrainedNetwork(network, trained, weights, extra_modules)


def load_frozen(stored: store.StoredModel, machine: Machine, reporter: Reporter) -> Network:
    """Load an additional model, such as a teacher, as for serving."""
    reporter.stage(f"Loading {stored.id}")
    model = store.load(stored, machine.dtype, machine.device)
    model.requires_grad_(False).eval()
    network = as_network(model, machine.device, machine.dtype)
    network.chat = stored.chat
    return network
