"""Networks in the form that llama.cpp computes: hyperparameters and weights of a GGUF file.

One table maps the fields of transformers' configurations to hyperparameters of all networks.
:data:`NETWORKS` lists the differences between the two implementations. The package ``gguf`` has the
names of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, RopeScalingType
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map
from numpy.typing import NDArray
from torch import Tensor

from luthier.errors import RecipeError
from luthier.models.networks.modalities import head_size, key_heads, layer_configs

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "attention_scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "clamp_kqv": ("clip_qkv",),
    "embedding_length": ("hidden_size",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "head_count": ("num_attention_heads",),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "layer_norm_rms_eps": ("rms_norm_eps", "norm_eps"),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "parallel_residual": ("use_parallel_residual",),
    "residual_scale": ("residual_multiplier",),
    "shared_kv_layers": ("num_kv_shared_layers",),
    "ssm_conv_kernel": ("linear_conv_kernel_dim",),
    "ssm_group_count": ("linear_num_key_heads",),
    "ssm_state_size": ("linear_key_head_dim",),
    "ssm_time_step_rank": ("linear_num_value_heads",),
    "vocab_size": ("vocab_size",),
}
"""Fields of transformers' configurations by ``GGUFWriter.add_*``. The first field with a value
counts."""
_UNTRUNCATED = "yarn without truncation"
"""YaRN of gpt-oss. llama.cpp rounds the bounds: 3e-4 nats after 3,000 tokens."""
_YARN_CHANGES = ("attention_factor", "mscale", "mscale_all_dim")
_LARGEST = {MODEL_ARCH.GEMMA2: 46, MODEL_ARCH.GEMMA3: 62}
"""Layers of the networks that scale attention by the mean width of a head; llama.cpp identifies
these networks by the number of layers."""
_NEVER = (1 << 31) - 1
_TANH = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})


@dataclass(frozen=True)
class GGUFNetwork:
    """A network of llama.cpp, and its differences from transformers' implementation."""

    arch: MODEL_ARCH
    activations: frozenset[str] = frozenset({"silu"})
    """Names of the activation in llama.cpp."""
    interleaved: bool = False
    """True if llama.cpp rotates neighbouring rows of a head, and transformers the two halves."""
    offset: bool = False
    """True if transformers multiplies by ``1 + weight`` after normalization."""
    period: int = 0
    """Default distance between layers without a window, in layers; 0 if llama.cpp has no windows."""
    scaling: tuple[str, ...] = ()
    """Supported types of scaled rotary embeddings."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Settings with a single value in llama.cpp."""


NETWORKS: Mapping[str, GGUFNetwork] = {
    "arcee": GGUFNetwork(MODEL_ARCH.ARCEE, frozenset({"relu2"}), interleaved=True),
    "cohere": GGUFNetwork(MODEL_ARCH.COMMAND_R),
    "cohere2": GGUFNetwork(MODEL_ARCH.COHERE2, period=4),
    "ernie4_5": GGUFNetwork(MODEL_ARCH.ERNIE4_5),
    "exaone4": GGUFNetwork(MODEL_ARCH.EXAONE4, scaling=("llama3",), only={"sliding_window": None}),
    "gemma": GGUFNetwork(MODEL_ARCH.GEMMA, _TANH, offset=True),
    "gemma2": GGUFNetwork(MODEL_ARCH.GEMMA2, _TANH, offset=True, period=2),
    "gemma3_text": GGUFNetwork(
        MODEL_ARCH.GEMMA3, _TANH, offset=True, period=6, scaling=("linear",)
    ),
    "gemma4_text": GGUFNetwork(
        MODEL_ARCH.GEMMA4,
        _TANH,
        period=6,
        scaling=("proportional",),
        only={"attention_k_eq_v": False, "enable_moe_block": False},
    ),
    "glm4": GGUFNetwork(MODEL_ARCH.GLM4),
    "gpt2": GGUFNetwork(
        MODEL_ARCH.GPT2,
        _TANH,
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": GGUFNetwork(MODEL_ARCH.GPTNEOX, _TANH | {"gelu"}),
    "gpt_oss": GGUFNetwork(MODEL_ARCH.GPT_OSS, period=2, scaling=("yarn", _UNTRUNCATED)),
    "granite": GGUFNetwork(MODEL_ARCH.GRANITE, interleaved=True),
    "granitemoe": GGUFNetwork(MODEL_ARCH.GRANITE_MOE, interleaved=True),
    "helium": GGUFNetwork(MODEL_ARCH.LLAMA),
    "hunyuan_v1_dense": GGUFNetwork(MODEL_ARCH.HUNYUAN_DENSE),
    "lfm2": GGUFNetwork(MODEL_ARCH.LFM2),
    "llama": GGUFNetwork(MODEL_ARCH.LLAMA, interleaved=True, scaling=("llama3", "linear", "yarn")),
    "mistral": GGUFNetwork(MODEL_ARCH.LLAMA, interleaved=True),
    "mixtral": GGUFNetwork(MODEL_ARCH.LLAMA, interleaved=True),
    "nemotron": GGUFNetwork(MODEL_ARCH.NEMOTRON, frozenset({"relu2"}), offset=True),
    "olmo": GGUFNetwork(MODEL_ARCH.OLMO, interleaved=True),
    "olmo2": GGUFNetwork(MODEL_ARCH.OLMO2),
    "olmo3": GGUFNetwork(MODEL_ARCH.OLMO2, period=4),
    "olmoe": GGUFNetwork(MODEL_ARCH.OLMOE, only={"norm_topk_prob": False}),
    "phi": GGUFNetwork(MODEL_ARCH.PHI2, _TANH, only={"qk_layernorm": False}),
    "phi3": GGUFNetwork(MODEL_ARCH.PHI3, scaling=("longrope",)),
    "qwen2": GGUFNetwork(MODEL_ARCH.QWEN2, scaling=("yarn",)),
    "qwen2_moe": GGUFNetwork(MODEL_ARCH.QWEN2MOE, only={"norm_topk_prob": False}),
    "qwen3": GGUFNetwork(MODEL_ARCH.QWEN3, scaling=("yarn",)),
    "qwen3_5_moe_text": GGUFNetwork(MODEL_ARCH.QWEN35MOE, offset=True),
    "qwen3_5_text": GGUFNetwork(MODEL_ARCH.QWEN35, offset=True),
    "qwen3_moe": GGUFNetwork(MODEL_ARCH.QWEN3MOE, only={"norm_topk_prob": True}),
    "seed_oss": GGUFNetwork(MODEL_ARCH.SEED_OSS),
    "smollm3": GGUFNetwork(MODEL_ARCH.SMOLLM3, interleaved=True),
    "stablelm": GGUFNetwork(MODEL_ARCH.STABLELM),
    "starcoder2": GGUFNetwork(MODEL_ARCH.STARCODER2, _TANH),
}
"""Supported networks by ``model_type``."""


@dataclass(frozen=True)
class Weight:
    """A weight under the file's name."""

    name: str
    weight: Tensor
    """A view of the parameter with the file's shape, ``[out, in]``."""
    order: Tensor | None = None
    """Indices of the rows in the file's order; ``None`` for the original order."""
    dim: int = 0
    """Dimension of ``order``; 1 for columns."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Function from the network's numbers to the file's numbers, for vectors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(self.weight.shape)

    def array(self) -> NDArray[np.float32]:
        """Return the numbers in the file's order."""
        rows = self.weight.detach().float().cpu()
        if self.order is not None:
            rows = rows.index_select(self.dim, self.order)
        if self.convert is not None:
            rows = self.convert(rows)
        return rows.contiguous().numpy()

    def replace(self, array: NDArray[np.float32]) -> None:
        """Copy numbers in the file's order to the network."""
        rows = torch.from_numpy(array).to(self.weight)
        if self.order is None:
            self.weight.copy_(rows)
        else:
            self.weight.index_copy_(self.dim, self.order.to(rows.device), rows)


def network_of(model_type: str, name: str) -> GGUFNetwork:
    """Return the network of ``model_type``.

    Raises:
        RecipeError: for other networks.
    """
    if model_type not in NETWORKS:
        raise RecipeError(
            f"{name} has the network type {model_type}, which GGUF export does not support. Use "
            "`--format safetensors`.",
            rule="gguf.network",
        )
    return NETWORKS[model_type]


def add_hyperparameters(
    writer: GGUFWriter, config: Any, weights: Sequence[Weight], name: str, limit: int | None
) -> None:
    """Write the hyperparameters for sequences of up to ``limit`` tokens.

    Raises:
        RecipeError: for settings that llama.cpp computes differently.
    """
    network = network_of(config.model_type, name)
    _check_settings(config, network, name)
    # The widths of the weights, because the configuration can name others (LFM2).
    names = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")
    dense, expert, shared = (
        [each.shape[-1] for each in weights if f".{part}.weight" in each.name] for part in names
    )
    writer.add_feed_forward_length(_one_or_all(dense or expert))
    if expert:
        writer.add_expert_feed_forward_length(expert[0])
    if shared:
        writer.add_expert_shared_feed_forward_length(shared[0])
    for key, fields in _FIELDS.items():
        values = (getattr(config, each, None) for each in fields)
        if (value := next((each for each in values if each is not None), None)) is not None:
            getattr(writer, f"add_{key}")(value)
    if network.arch == MODEL_ARCH.OLMO:
        writer.add_layer_norm_eps(1e-5)  # a constant in transformers
    types, layers = getattr(config, "layer_types", None) or [], layer_configs(config)
    if "linear_attention" in types:
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(types.index("full_attention") + 1)
    if "conv" in types:
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_head_count_kv([key_heads(config) * (each != "conv") for each in types])
    else:
        writer.add_head_count_kv(_one_or_all([key_heads(each) for each in layers]))
    sizes: dict[str, int] = dict(zip(types, map(head_size, layers), strict=False))
    size = sizes.get("full_attention", head_size(layers[0]))
    writer.add_key_length(size)
    writer.add_value_length(size)
    if (narrow := sizes.get("sliding_attention", size)) != size:
        writer.add_key_length_swa(narrow)
        writer.add_value_length_swa(narrow)
        writer.add_rope_dimension_count_swa(narrow)
    context, window = int(config.max_position_embeddings), _window(config)
    if window is not None and network.period:
        writer.add_sliding_window(window)
        windows = [each == "sliding_attention" for each in types]
        # Older versions of llama.cpp know the default only.
        if windows != [(place + 1) % network.period > 0 for place in range(len(types))]:
            writer.add_sliding_window_pattern(windows)
    elif window is not None and window < context:
        # Within one window, attention with and without a window are equal.
        context = window
        if limit is not None and limit > window:
            raise RecipeError(
                f"llama.cpp ignores the attention window of {name} ({window} of {limit} tokens).",
                rule="gguf.window",
            )
    writer.add_context_length(context)
    _add_rope(writer, config, size, limit)


def _one_or_all(values: Sequence[int]) -> int | Sequence[int]:
    """Return the value of all layers, or a list if layers differ."""
    return values[0] if len({*values}) == 1 else values


def _window(config: Any) -> int | None:
    """Return the number of tokens to which the layers with a window attend."""
    if not getattr(config, "use_sliding_window", True):
        return None
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in types else None


def _rope_of(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the rotary parameters of layers with full attention, and of layers with a window if
    these differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope), rope.get("sliding_attention")


def _check_settings(config: Any, network: GGUFNetwork, name: str) -> None:
    fields = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((getattr(config, each) for each in fields if hasattr(config, each)), "silu")
    if activation not in network.activations:
        raise RecipeError(
            f"llama.cpp does not support the activation {activation} of {name}.",
            rule="gguf.activation",
        )
    for part in _rope_of(config):
        if part is None:
            continue
        kind = part.get("rope_type", "default")
        kind = _UNTRUNCATED if part.get("truncate") is False else kind
        changed = [each for each in _YARN_CHANGES if "yarn" in kind and part.get(each) is not None]
        if kind not in ("default", *network.scaling) or changed:
            raise RecipeError(
                f"llama.cpp does not support the rotary embeddings of {name} "
                f"({', '.join((kind, *changed))}).",
                rule="gguf.rotary",
            )
    for key, value in {**network.only, **_computed_settings(config, network)}.items():
        if (own := getattr(config, key, value)) != value:
            raise RecipeError(
                f"{name} has `{key}` {own!r}, and llama.cpp supports only {value!r}.",
                rule="gguf.setting",
            )


def _computed_settings(config: Any, network: GGUFNetwork) -> dict[str, Any]:
    """Return the settings that llama.cpp derives from other settings."""
    found: dict[str, Any] = {}
    if network.arch == MODEL_ARCH.SMOLLM3:
        places = range(config.num_hidden_layers)
        found["no_rope_layers"] = [int((place + 1) % 4 > 0) for place in places]
    if network.arch == MODEL_ARCH.OLMOE:
        found["num_key_value_heads"] = config.num_attention_heads
    shared = getattr(config, "num_kv_shared_layers", 0)
    # llama.cpp takes the keys of the two layers before, and aborts if these have other types.
    if shared and config.layer_types[:-shared][-2:] != ["sliding_attention", "full_attention"]:
        found["num_kv_shared_layers"] = 0
    if network.arch in _LARGEST:
        largest = config.num_hidden_layers == _LARGEST[network.arch]
        width = config.hidden_size // config.num_attention_heads
        found["query_pre_attn_scalar"] = width if largest else head_size(config)
    return found


def _add_rope(writer: GGUFWriter, config: Any, size: int, limit: int | None) -> None:
    full, sliding = _rope_of(config)
    if not full:
        return
    kind = full.get("rope_type", "default")
    # A proportional embedding turns the whole head, most of it with frequency 0.
    share = 1.0 if kind == "proportional" else full.get("partial_rotary_factor", 1.0)
    turned = int(size * share)
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding is not None:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if config.model_type.startswith("qwen3_5"):
        # Sections differ in images only.
        writer.add_rope_dimension_sections([*full.get("mrope_section", (turned // 2, 0, 0)), 0])
    if kind not in ("linear", "yarn", "longrope"):
        return
    writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind != "longrope":
        writer.add_rope_scaling_factor(full["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(full.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(full.get("beta_slow") or 1.0)
    original: Any = full.get("original_max_position_embeddings")
    if original:
        border = original
        if kind == "longrope" and limit is not None:
            # llama.cpp selects the long factors by the size of the cache, which has room for
            # several sequences, and not by the length of a sequence.
            if limit > original:
                raise RecipeError(
                    f"llama.cpp does not change the LongRoPE factors of {config.model_type} with "
                    f"the length of a sequence ({original} of {limit} tokens).",
                    rule="gguf.rope",
                )
            border = _NEVER
        writer.add_rope_scaling_orig_ctx_len(border)
    if kind == "longrope":
        factor = full.get("factor") or config.max_position_embeddings / original
        plain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(full.get("attention_factor") or plain)


def network_weights(model: Any) -> list[Weight]:
    """Return each weight of ``model`` once, without tied heads."""
    config = model.config
    network = NETWORKS[config.model_type]
    names = get_tensor_name_map(network.arch, config.num_hidden_layers)
    found = []
    scalars = [each for each in model.named_buffers() if each[0].endswith(".layer_scalar")]
    for name, weight in [*model.named_parameters(), *scalars]:
        for part, view in _parts(config, name, weight):
            known = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise RecipeError(f"The GGUF format has no name for the weight {name}.")
            dim, order = row_order(config, known) or (0, None)
            found.append(Weight(known, view, order, dim, _conversion(network, known)))
    return [*found, *_rope_factors(model)]


def _parts(config: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight in the file's layout: two parts for fused gates of experts, else one."""
    name = name.replace("dt_bias", "dt_proj.bias").replace(
        "block_sparse_moe.experts", "mlp.experts"
    )
    name = name.replace("moe.router.weight", "moe.router.layer.weight")
    name = re.sub(r"(experts\.down_proj|\.sinks|\.layer_scalar)$", r"\1.weight", name)
    name = name.replace("down_proj_bias", "down_proj.bias")
    if weight.ndim == 3 and config.model_type == "gpt_oss":
        weight = weight.mT  # gpt-oss stores `[in, out]`
    stem, _, fused = name.rpartition("experts.gate_up_proj")
    kind = "bias" if fused == "_bias" else "weight"
    if stem and config.model_type == "gpt_oss":
        yield f"{stem}experts.gate_proj.{kind}", weight[:, ::2]
        yield f"{stem}experts.up_proj.{kind}", weight[:, 1::2]
    elif stem:
        gate, up = weight.chunk(2, dim=1)
        yield f"{stem}experts.gate_proj.weight", gate
        yield f"{stem}experts.up_proj.weight", up
    elif name.endswith((".conv1d.weight", ".conv.conv.weight")):
        yield name, weight.squeeze(1)
    elif config.model_type == "gpt2" and weight.ndim == 2 and ".h." in name:
        yield name, weight.T  # Conv1D stores `[in, out]`
    else:
        yield name, weight


def _conversion(network: GGUFNetwork, name: str) -> Callable[[Tensor], Tensor] | None:
    if name.endswith(".ssm_a"):
        return lambda rows: -rows.exp()
    is_norm = name.endswith("_norm.weight") and not name.endswith("ssm_norm.weight")
    return (lambda rows: rows + 1) if network.offset and is_norm else None


def interleaved_order(size: int, heads: int) -> Tensor:
    """Return the order of ``size`` rows of queries or keys in llama.cpp.

    transformers turns the first half of a head against the second (rotary embeddings of GPT-NeoX),
    llama.cpp each number against its neighbour, as Llama's authors do.
    """
    return torch.arange(size).view(heads, 2, -1).transpose(1, 2).flatten()


def row_order(config: Any, name: str) -> tuple[int, Tensor] | None:
    """Return the dimension and the order of a weight's rows or columns, if other than the
    network's."""
    network = NETWORKS[config.model_type]
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if network.interleaved and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else key_heads(config)
        return 0, interleaved_order(heads * head_size(config), heads)
    if network.arch == MODEL_ARCH.GPTNEOX and part == "attn_qkv":
        # transformers stores query, key and value by head.
        heads, size = config.num_attention_heads, head_size(config)
        return 0, torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).flatten()
    if part == "ssm_norm" or not part.startswith(("ssm_", "attn_qkv", "attn_gate")):
        return None
    if not hasattr(config, "linear_num_key_heads"):
        return None
    # Several value heads share a key head. transformers stores these value heads side by side;
    # llama.cpp stores the first value head of all key heads, then the second.
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    numbers = part in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta")
    width = 1 if numbers else config.linear_value_head_dim
    order = torch.arange(values * width).view(keys, -1, width).transpose(0, 1).flatten()
    if part in ("attn_qkv", "ssm_conv1d"):
        first = 2 * keys * config.linear_key_head_dim
        order = torch.cat((torch.arange(first), first + order))
    return int(part == "ssm_out"), order


def _rope_factors(model: Any) -> Iterator[Weight]:
    """Yield the factors of wavelengths of Llama 3.1, Gemma 4 and LongRoPE."""
    rope, _ = _rope_of(model.config)
    if rope.get("rope_type") in ("llama3", "proportional"):
        rotary = model.model.rotary_emb
        frequency = getattr(rotary, "full_attention_inv_freq", None)
        frequency = (rotary.inv_freq if frequency is None else frequency).detach().float().cpu()
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(frequency)) / len(frequency))
        # llama.cpp divides the plain frequency theta^(-2i/D) by this factor.
        yield Weight("rope_freqs.weight", (plain / frequency).clamp(max=1e30))
    elif rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            yield Weight(f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]))
