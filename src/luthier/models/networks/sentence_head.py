"""Pooling and linear layers of sentence encoders.

Formulas follow the library sentence-transformers. The linear layers are frozen; gradients pass
through to the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.data.sentence import (
    DENSE_WEIGHTS,
    Dense,
    PoolingMode,
    SentencePipeline,
    write_sentence_pipeline,
)
from luthier.errors import CorruptFile
from luthier.models.formats.tensors import load_tensors, save_tensors
from luthier.models.networks.heads import hidden_size_of, is_decoder
from luthier.models.networks.modalities import media_config

if TYPE_CHECKING:
    from luthier.models.networks.network import Network, TreeBatch


@dataclass(frozen=True)
class SentenceHead:
    """A pipeline with the weights of the linear layers."""

    pipeline: SentencePipeline
    weights: tuple[dict[str, Tensor], ...]
    """``linear.weight [out, in]`` and ``linear.bias [out]`` of each linear layer, in float32."""
    hidden: int
    """Values in a state of the network."""

    @property
    def width(self) -> int:
        """Values in a vector."""
        dense = self.pipeline.dense
        return dense[-1].outputs if dense else self.hidden * len(self.pipeline.pooling)

    def vectors(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the vectors ``[R, D]`` of the rows of ``batch`` in float32, in tree order."""
        states_NH = network.hidden(batch)
        vector_RD = torch.cat(
            [_pool(network, batch, mode, states_NH) for mode in self.pipeline.pooling], -1
        )
        layers = iter(self.weights)
        for step in self.pipeline.steps:
            if isinstance(step, Dense):
                vector_RD = _apply(step, next(layers), vector_RD)
            else:
                vector_RD = nn.functional.normalize(vector_RD, dim=-1)
        return vector_RD

    def save(self, folder: Path) -> None:
        """Save the files of sentence-transformers into the network's folder."""
        write_sentence_pipeline(self.pipeline, self.hidden, folder)
        for layer, tensors in zip(self.pipeline.dense, self.weights, strict=True):
            path = folder / layer.folder / DENSE_WEIGHTS
            save_tensors(tensors, path, metadata={"format": "pt"})


def attach_sentence_head(model: Any, pipeline: SentencePipeline | None, folder: Path) -> None:
    """Attach ``pipeline`` with the weights in ``folder`` to ``model``.

    Raises:
        CorruptFile: if the shapes of the weights contradict the pipeline.
    """
    head = None if pipeline is None else _load(pipeline, hidden_size_of(model), folder)
    # Not a module: frozen layers do not belong to the network's parameters and state_dict.
    model.luthier_sentence_head = head


def sentence_head(model: Any) -> SentenceHead | None:
    """Return the pipeline after the states of ``model``; ``None`` for other networks."""
    head: SentenceHead | None = getattr(model, "luthier_sentence_head", None)
    return head


def save_sentence_head(model: Any, folder: Path) -> None:
    """Save the files of sentence-transformers for a network of texts.

    A network without a pipeline has luthier's pooling: the mean, or the last token of a decoder.
    """
    if media_config(model.config) is not None:
        return
    if (head := sentence_head(model)) is None:
        mode: PoolingMode = "lasttoken" if is_decoder(model.config) else "mean"
        head = SentenceHead(SentencePipeline(pooling=(mode,)), (), hidden_size_of(model))
    head.save(folder)


def default_pooling(network: Network) -> str:
    """Return the pooling of a network without a sentence head."""
    return "mean" if network.is_bidirectional else "last"


def unit_embeddings(network: Network, batch: TreeBatch, pooling: str = "auto") -> Tensor:
    """Return embeddings ``[R, H]`` of length 1 in float32, in tree order.

    ``auto`` is the pooling of the base model, or else the mean (decoders: the last token).
    """
    head = sentence_head(network.model)
    if pooling == "auto" and head is not None:
        return nn.functional.normalize(head.vectors(network, batch), dim=-1)
    if pooling == "auto":
        pooling = default_pooling(network)
    return nn.functional.normalize(network.row_states(batch, pooling).float(), dim=-1)


def embedding_width(network: Network) -> int:
    """Return the number of values in an embedding of ``network``."""
    head = sentence_head(network.model)
    return network.width if head is None else head.width


def _load(pipeline: SentencePipeline, hidden: int, folder: Path) -> SentenceHead:
    weights = []
    width = hidden * len(pipeline.pooling)
    for layer in pipeline.dense:
        path = folder / layer.folder / DENSE_WEIGHTS
        tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (layer.outputs, layer.inputs)}
        if layer.bias:
            shapes["linear.bias"] = (layer.outputs,)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes or layer.inputs != width:
            raise CorruptFile(
                f"{path} has the shapes {found} instead of {shapes} for {width} input values.",
                rule="sentence.weights",
            )
        weights.append(tensors)
        width = layer.outputs
    return SentenceHead(pipeline, tuple(weights), hidden)


def _apply(layer: Dense, tensors: dict[str, Tensor], vector_RD: Tensor) -> Tensor:
    weight, bias = (tensors.get(f"linear.{name}") for name in ("weight", "bias"))
    assert weight is not None
    moved = None if bias is None else bias.to(vector_RD.device)
    out = nn.functional.linear(vector_RD, weight.to(vector_RD.device), moved)
    # The parser admits only known activations, so a file cannot name any other class.
    activated: Tensor = getattr(nn, layer.activation)()(out)
    return activated


def _pool(network: Network, batch: TreeBatch, mode: PoolingMode, states_NH: Tensor) -> Tensor:
    """Return one value per row and dimension, ``[R, H]``, in float32."""
    plain = {"cls": "first", "lasttoken": "last", "mean": "mean"}
    if mode in plain:
        return network.row_states(batch, plain[mode], states_NH).float()
    tree, device = batch.tree, states_NH.device
    length_R = torch.tensor([len(example) for example in tree.examples], device=device)
    states_MH = states_NH[torch.from_numpy(tree.node_M).to(device)].float()
    row_M = torch.repeat_interleave(torch.arange(len(length_R), device=device), length_R)
    shape = (len(length_R), states_MH.shape[-1])
    if mode == "max":
        least_RH = states_MH.new_full(shape, float("-inf"))
        index_MH = row_M[:, None].expand_as(states_MH)
        return least_RH.scatter_reduce(0, index_MH, states_MH, "amax")
    if mode == "mean_sqrt_len_tokens":
        # sum_t h_t / sqrt(T)
        share_M = length_R.float().rsqrt()[row_M]
    else:  # weightedmean: the first token counts 1, the second 2, …
        start_R = length_R.cumsum(0) - length_R
        place_M = torch.arange(len(row_M), device=device) - start_R[row_M] + 1
        share_M = (place_M / (length_R * (length_R + 1) / 2)[row_M]).float()
    return states_MH.new_zeros(shape).index_add(0, row_M, states_MH * share_M[:, None])
