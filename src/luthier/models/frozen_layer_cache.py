"""The frozen bottom of a network, computed once for each row.

Where the embeddings and the first ``L`` layers do not train, what goes into layer ``L`` is the same
in every epoch. :class:`Bottom` computes it for all rows before the first step, and training starts
there: with half of the layers frozen each epoch skips half of the forward pass, with all of them
only the head is left. Rows are always computed in the same micro-batches, so a resumed run sees the
same bits. Dropout below layer ``L`` is off, as it must be for what is computed once.

Layers are swapped in the network's own list: its forward then runs through a module that gives what was
kept, so nothing needs to know how a family of transformers calls its layers.
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
    from luthier.models.network import Network, TreeBatch
    from luthier.types import Example


class _Given(nn.Module):
    """Stands in for the bottom, whose last layer was ``like``, and gives what it gave."""

    def __init__(self, hidden: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["like"] = like  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Some networks ask a layer of what kind its attention is."""
        return getattr(self.__dict__["like"], name)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


def frozen_layers(model: Any) -> int:
    """How many layers from the input on have no weight that trains; 0 where the embeddings do."""
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
    """The module that owns the list of layers, and the name of the list."""
    from luthier.models.layers import layer_names, parent_of

    return parent_of(model, layer_names(model)[0].rpartition(".")[0])


def is_frozen(module: nn.Module) -> bool:
    """Whether no weight of ``module`` trains."""
    return not any(weight.requires_grad for weight in module.parameters())


class Bottom:
    """What the first ``count`` layers make of each row; ``[tokens, H]`` in the network's type."""

    def __init__(self, network: Network, count: int, kept: Tensor, start: dict[bytes, int]) -> None:
        self.count, self._kept, self._start = count, kept, start
        self._owner, self._name = _stack(network.model)

    @staticmethod
    @torch.no_grad()
    def of(
        network: Network, count: int, examples: Sequence[Example], budget: int, file: Path | None
    ) -> Bottom:
        """Run ``examples`` through the bottom. With ``file`` the result lives there, not in memory."""
        network.model.eval()
        start: dict[bytes, int] = {}
        unique = {_key(example.ids_T): example for example in examples}
        size = sum(len(example) for example in unique.values())
        kept = new_activations((size, network.width), network.dtype, file)
        bottom = Bottom(network, count, kept, start)
        end = 0
        for batch in network.batches(list(unique.values()), budget):
            hidden_NH = bottom._compute(network, batch)
            rows_MH = hidden_NH[torch.from_numpy(batch.tree.node_M).to(hidden_NH.device)]
            kept[end : end + len(rows_MH)] = rows_MH.cpu()
            for example in batch.tree.examples:
                start[_key(example.ids_T)] = end
                end += len(example)
        return bottom

    @property
    def bytes(self) -> int:
        """Size of what is kept, in memory or on disk."""
        return self._kept.nbytes

    def _compute(self, network: Network, batch: TreeBatch) -> Tensor:
        seen: list[Tensor] = []
        layers = getattr(self._owner, self._name)[: self.count]
        tap = layers[-1].register_forward_hook(lambda _module, _given, out: seen.append(out))
        try:
            with self._layers(layers):
                network.hidden(batch)
        finally:
            tap.remove()
        return seen[0][0]

    @contextmanager
    def instead(self, batch: TreeBatch) -> Iterator[None]:
        """While open, the network starts above the bottom with what is kept for ``batch``."""
        tree = batch.tree
        slots = [
            np.arange(len(example)) + self._start[_key(example.ids_T)] for example in tree.examples
        ]
        rows_MH = self._kept[torch.from_numpy(np.concatenate(slots))].to(batch.ids_N.device)
        hidden_NH = rows_MH.new_zeros(len(batch.ids_N), rows_MH.shape[-1])
        hidden_NH[torch.from_numpy(tree.node_M).to(hidden_NH.device)] = rows_MH
        layers = getattr(self._owner, self._name)
        given = _Given(hidden_NH[None], layers[self.count - 1])
        with self._layers(nn.ModuleList([given, *layers[self.count :]])):
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
    """Space for the activations: in memory, or in a file that the system pages in as needed."""
    if file is None:
        return torch.empty(shape, dtype=dtype)
    kept: Tensor = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=dtype)
    return kept.view(shape)
