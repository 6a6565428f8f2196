"""Cache of the activations below the first trained layer.

If the embeddings and the first ``L`` layers are frozen, the input of layer ``L`` is the same in
every epoch. :class:`FrozenLayerCache` computes this input for all rows before the first step. With
half of the layers frozen, each epoch skips half of the forward pass; with all layers frozen, only
the head runs. The micro-batches are deterministic, so a resumed run computes the same bits. Dropout
below layer ``L`` is off.

The layer list of the network is replaced: the forward pass of the family then runs through a module
that returns cached activations. No knowledge of the family's layer names is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.types import Example


class _Given(nn.Module):
    """A stand-in for the frozen layer ``like`` that returns cached activations."""

    def __init__(self, hidden: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["like"] = like  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the replaced layer: some networks read a layer's attention type."""
        return getattr(self.__dict__["like"], name)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


def frozen_layers(model: Any) -> int:
    """Return the number of frozen layers from the input on; 0 if the embeddings train."""
    if getattr(model.config, "num_kv_shared_layers", 0):  # upper layers use keys of lower layers
        return 0
    try:
        owner, name = _stack(model)
    except RecipeError:
        return 0
    layers: nn.ModuleList = getattr(owner, name)
    inside = {id(weight) for weight in layers.parameters()}
    first = next(iter(layers.parameters()))
    for weight in model.base_model.parameters():  # in the order of the forward pass
        if id(weight) in inside:
            break
        if weight.requires_grad:
            return 0
    assert first is not None
    count = 0
    for layer in layers:
        if any(weight.requires_grad for weight in layer.parameters()):
            break
        count += 1
    return count


def _stack(model: Any) -> tuple[Any, str]:
    """Return the parent module and the name of the layer list."""
    from luthier.models.networks.layers import layer_names, parent_of

    return parent_of(model, layer_names(model)[0].rpartition(".")[0])


def is_frozen(module: nn.Module) -> bool:
    """Return True if no weight of ``module`` trains."""
    return not any(weight.requires_grad for weight in module.parameters())


class FrozenLayerCache:
    """Activations ``[tokens, H]`` after the first ``count`` layers for every row, in the network's
    data type."""

    def __init__(self, network: Network, count: int, kept: Tensor, start: dict[bytes, int]) -> None:
        self.count, self._kept, self._start = count, kept, start
        self._owner, self._name = _stack(network.model)

    @staticmethod
    @torch.no_grad()
    def of(
        network: Network, count: int, examples: Sequence[Example], budget: int, file: Path | None
    ) -> FrozenLayerCache:
        """Run ``examples`` through the bottom. With ``file`` the result lives there, not in memory."""
        network.model.eval()
        start: dict[bytes, int] = {}
        unique = {_key(example.ids_T): example for example in examples}
        size = sum(len(example) for example in unique.values())
        kept = new_activations((size, network.width), network.dtype, file)
        bottom = FrozenLayerCache(network, count, kept, start)
        end = 0
        # A separate pass over all rows: a cache filled during the first epoch would depend on the
        # step at which a run resumes.
        for batch in network.batches(list(unique.values()), budget):
            hidden_NH = bottom._compute(network, batch)
            # Stored per row, because other micro-batches share other prefixes.
            rows_MH = hidden_NH[torch.from_numpy(batch.tree.node_M).to(hidden_NH.device)]
            kept[end : end + len(rows_MH)] = rows_MH.cpu()
            for example in batch.tree.examples:
                start[_key(example.ids_T)] = end
                end += len(example)
        return bottom

    @property
    def bytes(self) -> int:
        """Size of the cache in memory or on disk, in bytes."""
        return self._kept.nbytes

    def _compute(self, network: Network, batch: TreeBatch) -> Tensor:
        seen: list[Tensor] = []
        layers = getattr(self._owner, self._name)[: self.count]
        # A hook, because the network's output is behind the final norm.
        tap = layers[-1].register_forward_hook(lambda _module, _given, out: seen.append(out))
        try:
            # Only the frozen layers run: the forward pass iterates over the replaced list.
            with self._layers(layers):
                network.hidden(batch)
        finally:
            tap.remove()
        return seen[0][0]

    @contextmanager
    def instead(self, batch: TreeBatch) -> Iterator[None]:
        """Replace the frozen layers by the cached activations of ``batch`` inside the context."""
        tree = batch.tree
        slots = [
            np.arange(len(example)) + self._start[_key(example.ids_T)] for example in tree.examples
        ]
        rows_MH = self._kept[torch.from_numpy(np.concatenate(slots))].to(batch.ids_N.device)
        hidden_NH = rows_MH.new_zeros(len(batch.ids_N), rows_MH.shape[-1])
        hidden_NH[torch.from_numpy(tree.node_M).to(hidden_NH.device)] = rows_MH
        layers = getattr(self._owner, self._name)
        # One stand-in per layer, because some networks select masks by the index of a layer.
        given = [_Given(hidden_NH[None], layer) for layer in layers[: self.count]]
        with self._layers(nn.ModuleList([*given, *layers[self.count :]])):
            yield

    @contextmanager
    def _layers(self, chosen: nn.ModuleList) -> Iterator[None]:
        whole = getattr(self._owner, self._name)
        setattr(self._owner, self._name, chosen)
        try:
            yield
        finally:
            setattr(self._owner, self._name, whole)


def _key(ids_T: np.ndarray[Any, Any]) -> bytes:
    """Rows of the same tokens have the same activations."""
    return ids_T.tobytes()


def new_activations(shape: tuple[int, int], dtype: torch.dtype, file: Path | None) -> Tensor:
    """Return an empty activation tensor: in memory, or a memory-mapped file."""
    if file is None:
        return torch.empty(shape, dtype=dtype)
    kept: Tensor = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=dtype)
    return kept.view(shape)
