"""Width pruning: MLP neurons, attention heads, channels of the residual stream.

A *unit* is removed with every weight that writes or reads the unit, so the result is an ordinary
network of the same class (structured pruning: Fang et al. 2023, arXiv:2301.12900; Minitron,
Muralidharan et al. 2024, arXiv:2407.14679). The most important units stay:

    importance = max |writing weight| x max |reading weight|

The importance of a unit without effect is 0, and scaling between writer and reader has no
influence. The maximum is used instead of the norm: networks depend on few outlier weights (Yu et
al. 2024, arXiv:2411.07191), and norms chose neurons of SmolLM2-135M worse than random. No data is
needed. Minitron's activation-based ranking and shape search are not implemented. Removing units of
importance 0 preserves the function: norms are scaled for the removed channels, which is exact for
RMS norms. Layer norms subtract a mean over all channels and cannot be corrected; BERT's family is
still supported (:mod:`luthier.models.shrinking.width_bert`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.models.networks.modalities import head_size
from luthier.models.shrinking import width_bert
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
    from torch import Tensor, nn

_MLPS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),
    (("mlp.c_fc",), "mlp.c_proj", "n_inner"),
    (("intermediate.dense",), "output.dense", "intermediate_size"),
    (("DenseReluDense.wi_0", "DenseReluDense.wi_1"), "DenseReluDense.wo", "d_ff"),
    (("DenseReluDense.wi",), "DenseReluDense.wo", "d_ff"),
    (("ff.layer_1",), "ff.layer_2", "d_inner"),
)
"""Modules that output the neurons, the module that reads the neurons, and the configuration field."""
_LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families with RMS norms before each sublayer and a separate head size."""
_READERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Sizes:
    """Requested widths. ``None`` keeps the teacher's width."""

    heads: int | None
    intermediate: int | None
    hidden: int | None


def configure(model: Any, sizes: Sizes, config: Any, layers: Sequence[str]) -> None:
    """Set ``sizes`` in ``config``; raises with a reason for unsupported cuts."""
    kind = config.model_type
    if sizes.intermediate is not None:
        found = [_mlp(model, layer) for layer in layers]
        if not found:
            raise RecipeError(
                f"`--intermediate` requires several separate layers, but this {kind} has one "
                "layer or repeats one.",
                rule="student.intermediate",
            )
        set_size(config, found[0].field, sizes.intermediate, found[0].size, "--intermediate")
    if sizes.heads is None and sizes.hidden is None:
        return
    if kind in width_bert.FAMILY:
        width_bert.configure(config, sizes.heads, sizes.hidden)
        return
    if kind not in _LLAMA_LIKE:
        able = ", ".join(sorted(_LLAMA_LIKE | width_bert.FAMILY))
        raise RecipeError(
            f"`--heads` and `--hidden` support networks of type {able}, not {kind}, where "
            "both determine the head size or layer norms use all channels. Use `--layers` "
            "and `--intermediate`.",
            rule="student.network",
        )
    heads, groups, channels = (
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    )  # fmt: skip
    # After a cut, hidden size divided by heads is no longer the head size.
    config.head_dim = head_size(config)
    if sizes.heads is not None:
        share = heads // groups
        if sizes.heads % share:
            raise RecipeError(
                f"`--heads` {sizes.heads}: {share} heads share one key-value head in the "
                f"teacher. Use a multiple of {share}.",
                rule="student.heads",
            )
        set_size(config, "num_attention_heads", sizes.heads, heads, "--heads")
        config.num_key_value_heads = sizes.heads // share
    if sizes.hidden is not None:
        set_size(config, "hidden_size", sizes.hidden, channels, "--hidden")
        # g x / sqrt(|x|^2 / C + eps) is unchanged for h of C channels if removed channels are 0,
        # with eps C / h here and g sqrt(C / h) in the weights.
        config.rms_norm_eps *= channels / sizes.hidden
    if config.hidden_size % config.num_attention_heads:
        raise RecipeError(
            f"The hidden size {config.hidden_size} is not a multiple of "
            f"{config.num_attention_heads} heads, which {kind} requires. Use `--hidden` "
            f"{nearest_multiple(config.hidden_size, config.num_attention_heads)} or other "
            "`--heads`.",
            rule="student.hidden",
        )


def cut(
    model: Any, sizes: Sizes, state: dict[str, Tensor], layers: Sequence[str]
) -> dict[str, Tensor]:
    """``state`` with only the most important units of each of ``layers``."""
    for layer in layers:
        if sizes.intermediate is not None:
            _cut_mlp(_mlp(model, layer), sizes.intermediate, state)
        if sizes.heads is not None:
            _cut_heads(model, layer, sizes.heads, state)
    if sizes.hidden is not None and model.config.model_type in width_bert.FAMILY:
        width_bert.cut(model, sizes.hidden, state, layers)
    elif sizes.hidden is not None:
        _cut_channels(model, sizes.hidden, state, layers)
    return state


@dataclass(frozen=True)
class _Mlp:
    writers: tuple[str, ...]
    reader: str
    field: str
    size: int
    transposed: bool
    """True for GPT-2's ``[in, out]`` weights."""


def _mlp(model: Any, layer: str) -> _Mlp:
    block: nn.Module = model.get_submodule(layer)
    inside = dict(block.named_modules())
    for writers, reader, field in _MLPS:
        for name in inside:
            before = name.removesuffix(writers[0])
            if name == before or (before and not before.endswith(".")):
                continue
            module: Any = inside[name]
            transposed = type(module).__name__ == "Conv1D"
            return _Mlp(
                tuple(f"{layer}.{before}{writer}" for writer in writers),
                f"{layer}.{before}{reader}",
                field,
                module.weight.shape[1 if transposed else 0],
                transposed,
            )
    raise RecipeError(
        f"`--intermediate` does not support networks of type {model.config.model_type}. Use "
        "`--layers`.",
        rule="student.intermediate",
    )


def _cut_mlp(mlp: _Mlp, size: int, state: dict[str, Tensor]) -> None:
    out, into = (1, 0) if mlp.transposed else (0, 1)
    score = unit_importance(state, mlp.reader, into, bias=False)
    for writer in mlp.writers:
        score = score * unit_importance(state, writer, out)
    kept = largest(score, size)
    for writer in mlp.writers:
        select(state, f"{writer}.weight", out, kept)
        select(state, f"{writer}.bias", 0, kept)
    select(state, f"{mlp.reader}.weight", into, kept)


def _cut_heads(model: Any, layer: str, heads: int, state: dict[str, Tensor]) -> None:
    """Remove whole groups: a key-value head with its query heads."""
    import torch

    config, attention = model.config, f"{layer}.self_attn"
    wide, groups = head_size(config), config.num_key_value_heads
    share = config.num_attention_heads // groups
    written = unit_importance(state, f"{attention}.v_proj", 0).view(groups, -1).amax(dim=1)
    read = unit_importance(state, f"{attention}.o_proj", 1, bias=False).view(groups, -1).amax(dim=1)
    kept = largest(written * read, heads // share)
    for name, size in (("q_proj", share * wide), ("k_proj", wide), ("v_proj", wide)):
        rows = (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
        select_outputs(state, f"{attention}.{name}", rows)
        if name == "q_proj":
            select(state, f"{attention}.o_proj.weight", 1, rows)


def _cut_channels(model: Any, hidden: int, state: dict[str, Tensor], layers: Sequence[str]) -> None:
    """Remove channels of the residual stream from all writing and reading weights."""
    tables, heads, last = _outside(model)
    written = [unit_importance(state, name, 1, bias=False) for name in tables]
    written += [
        unit_importance(state, f"{layer}.{name}", 0) for layer in layers for name in _WRITERS
    ]
    norms = [last, *(f"{layer}.{name}" for layer in layers for name in _NORMS)]
    # All weights after a norm; the norm's gain scales their input.
    read = [unit_importance(state, name, 1, bias=False) * gain(state, last) for name in heads]
    for layer in layers:
        for name in _READERS:
            norm = f"{layer}.{_NORMS[name.startswith('mlp')]}"
            read.append(
                unit_importance(state, f"{layer}.{name}", 1, bias=False) * gain(state, norm)
            )
    score = sum(n**2 for n in written) * sum(n**2 for n in read)
    kept = largest(score, hidden)  # type: ignore[arg-type]
    for name in {*tables, *heads}:
        select(state, f"{name}.weight", 1, kept)
    for layer in layers:
        for name in _READERS:
            select(state, f"{layer}.{name}.weight", 1, kept)
        for name in _WRITERS:
            select_outputs(state, f"{layer}.{name}", kept)
    # sqrt(C / h), the counterpart of the changed epsilon.
    scale = (model.config.hidden_size / hidden) ** 0.5
    for name in norms:
        select(state, f"{name}.weight", 0, kept)
        state[f"{name}.weight"] = (state[f"{name}.weight"].float() * scale).to(
            state[f"{name}.weight"].dtype
        )


def _outside(model: Any) -> tuple[list[str], list[str], str]:
    """Return the names of the embedding, of the modules on top, and of the last norm."""
    from torch import nn

    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    tops = [
        name
        for name, module in model.named_children()
        if isinstance(module, nn.Linear) and module.in_features == model.config.hidden_size
    ] if prefix else []  # fmt: skip
    return [f"{prefix}embed_tokens"], tops, f"{prefix}norm"
