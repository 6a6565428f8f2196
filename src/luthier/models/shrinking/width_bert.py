"""Width pruning for BERT's family, where the heads fill the width, so channels and heads shrink
together.

Norms follow the sublayers and subtract a mean over all channels. A narrower network therefore never
equals the teacher, even without channels of nonzero value. It is an initialization that beats
random weights because embeddings are kept. Channels are ranked as in
:mod:`luthier.models.shrinking.width`; a norm's gain counts with the reading weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.models.shrinking.pruning import (
    gain,
    largest,
    nearest_multiple,
    select,
    select_outputs,
    set_size,
    unit_importance,
)

if TYPE_CHECKING:
    from torch import Tensor

FAMILY = frozenset({"bert", "roberta", "xlm-roberta", "mean_pooling_bert"})
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_WRITERS = ("attention.output.dense", "output.dense")
_TOPS = {
    "pooler.dense": (0, 1),
    "classifier": (1,),
    "score.1": (1,),
    "classifier.dense": (0, 1),
    "classifier.out_proj": (1,),
    "cls.predictions.transform.dense": (0, 1),
    "cls.predictions.transform.LayerNorm": (0,),
    "cls.predictions.decoder": (1,),
    "lm_head.dense": (0, 1),
    "lm_head.layer_norm": (0,),
    "lm_head.decoder": (1,),
}
"""Modules on the last layer, and the channel axes of their weights."""


def configure(config: Any, heads: int | None, hidden: int | None) -> None:
    """Write the width into ``config``."""
    wide = config.hidden_size // config.num_attention_heads
    if heads is not None:
        raise RecipeError(
            f"The heads of this {config.model_type} have {wide} channels each and fill the "
            f"width. Use `--hidden` {wide * heads} for {heads} heads.",
            rule="student.hidden",
        )
    assert hidden is not None
    if hidden % wide or hidden < wide:
        raise RecipeError(
            f"`--hidden` {hidden}: the heads of this {config.model_type} have {wide} channels "
            f"each. Use a multiple, such as {nearest_multiple(hidden, wide)}.",
            rule="student.hidden",
        )
    before = config.num_attention_heads
    set_size(config, "hidden_size", hidden, config.hidden_size, "--hidden")
    set_size(config, "num_attention_heads", hidden // wide, before, "--hidden")


def cut(model: Any, hidden: int, state: dict[str, Tensor], layers: Sequence[str]) -> None:
    """Remove heads and channels from all writing and reading weights, in place."""
    config = model.config
    wide = config.hidden_size // config.num_attention_heads
    for layer in layers:
        _cut_heads(layer, hidden // wide, wide, state)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    kept = largest(_importance(prefix, layers, state), hidden)
    for name in _TABLES:
        select(state, f"{prefix}embeddings.{name}.weight", 1, kept)
    select_outputs(state, f"{prefix}embeddings.LayerNorm", kept)
    for layer in layers:
        for name in (*_QKV, "intermediate.dense"):
            select(state, f"{layer}.{name}.weight", 1, kept)
        for name in _WRITERS:
            select_outputs(state, f"{layer}.{name}", kept)
            select_outputs(state, f"{layer}.{name.removesuffix('.dense')}.LayerNorm", kept)
    for name, axes in _TOPS.items():
        top = f"{prefix}{name}" if name.startswith("pooler") else name
        if 0 in axes:
            select_outputs(state, top, kept)
        if 1 in axes:
            select(state, f"{top}.weight", 1, kept)


def _cut_heads(layer: str, heads: int, wide: int, state: dict[str, Tensor]) -> None:
    import torch

    before = len(state[f"{layer}.{_QKV[0]}.weight"]) // wide
    written = unit_importance(state, f"{layer}.{_QKV[2]}", 0).view(before, wide).amax(1)
    read = (
        unit_importance(state, f"{layer}.{_WRITERS[0]}", 1, bias=False).view(before, wide).amax(1)
    )
    kept = largest(written * read, heads)
    rows = (kept[:, None] * wide + torch.arange(wide, device=kept.device)).flatten()
    for name in _QKV:
        select_outputs(state, f"{layer}.{name}", rows)
    select(state, f"{layer}.{_WRITERS[0]}.weight", 1, rows)


def _importance(prefix: str, layers: Sequence[str], state: dict[str, Tensor]) -> Tensor:
    """Return the importance of each channel: writing weights times reading weights after the norms."""
    written = [unit_importance(state, f"{prefix}embeddings.{_TABLES[0]}", 1, bias=False)]
    read, norm = [], f"{prefix}embeddings.LayerNorm"
    for layer in layers:
        written += [unit_importance(state, f"{layer}.{name}", 0) for name in _WRITERS]
        read += [
            unit_importance(state, f"{layer}.{n}", 1, bias=False) * gain(state, norm) for n in _QKV
        ]
        norm = f"{layer}.attention.output.LayerNorm"
        into = unit_importance(state, f"{layer}.intermediate.dense", 1, bias=False)
        read.append(into * gain(state, norm))
        norm = f"{layer}.output.LayerNorm"
    read.append(gain(state, norm))
    import torch

    return torch.stack(written).square().sum(0) * torch.stack(read).square().sum(0)
