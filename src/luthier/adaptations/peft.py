"""Import of PEFT's LoRA adapters as :class:`~luthier.adaptations.lora.LoRA`.

Names and shapes of weights are equal, so the import interprets ``adapter_config.json``. A setting
that changes the adapter's function and is not supported is rejected by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.adaptations.lora import LoRA
from luthier.adaptations.targets import linear_targets
from luthier.errors import ModelRefused, RecipeError
from luthier.models.formats.external import ADAPTER_CONFIG
from luthier.models.formats.save import outer_name

if TYPE_CHECKING:
    from torch import Tensor, nn

_READ = frozenset(
    (
        "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
        "target_parameters", "task_type", "base_model_name_or_path", "init_lora_weights",
        "layers_to_transform",
    )
)  # fmt: skip
_HARMLESS = frozenset(
    (
        "auto_mapping", "inference_mode", "revision", "peft_version", "fan_in_fan_out",
        "runtime_config", "ensure_weight_tying", "qalora_group_size", "megatron_core",
    )
)  # fmt: skip
"""Settings of training or loading, and settings without meaning unless others differ from their
defaults."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Supported initializations. Other initializations also change the base model's weights."""
_LORA_A = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")


def lora_of(fields: Mapping[str, Any], weights: Mapping[str, Tensor], model: nn.Module) -> LoRA:
    """Return the adaptation of a PEFT adapter on ``model`` from its configuration and weights.

    Raises:
        ModelRefused: for another method, unsupported settings, or unknown layers.
    """
    from peft import LoraConfig

    if fields.get("peft_type") != "LORA":
        raise _refusal(f"peft_type is {fields.get('peft_type')!r}; only LORA is supported.")
    if fields.get("task_type") not in ("CAUSAL_LM", None):
        raise _refusal(f"task_type is {fields.get('task_type')!r}; only CAUSAL_LM is supported.")
    if fields.get("init_lora_weights", True) not in _STARTS:
        text = (
            f"init_lora_weights is {fields['init_lora_weights']!r}, which changes the base model."
        )
        raise _refusal(text)
    # Defaults of the installed PEFT, because each version adds settings.
    usual = LoraConfig().to_dict()
    for name, value in fields.items():
        # Empty and default values change nothing; other unknown settings may change the function.
        if name in _READ or name in _HARMLESS or not value or value == usual.get(name):
            continue
        if name == "bias" and value == "none":
            continue
        raise _refusal(f"{name} is {str(value)[:100]!r}, which is not supported.")
    _check_rank(fields.get("r"), weights)
    _check_vocabulary(weights, model)
    try:
        return LoRA(
            rank=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            rslora=fields.get("use_rslora", False),
            dora=fields.get("use_dora", False),
            targets=_targets(weights, model),
        )
    except (KeyError, ValueError) as error:
        raise _refusal(f"Invalid values for LoRA: {str(error)[:300]}") from error
    except RecipeError as error:
        raise _refusal(f"The adapter belongs to another network: {error}") from error


def target_modules(names: Iterable[str]) -> list[str]:
    """Return the full names of the layers that a saved adapter changes, from the ``names`` of its
    weights."""
    matches = (match[1] for name in names if (match := _LORA_A.fullmatch(name)))
    # Each weight of the experts has a wrapper; the inner wrapper is the base layer of the outer.
    return sorted({name.removesuffix(".base_layer") for name in matches})


def _check_rank(rank: Any, weights: Mapping[str, Tensor]) -> None:
    """Check the rank against the weights, because matrices are allocated before the weights are
    loaded."""
    for name, weight in weights.items():
        if not _LORA_A.fullmatch(name):
            continue
        rows = weight.shape[0] if weight.dim() == 2 else 0
        if ".experts." in name and isinstance(rank, int) and rank and rows and rows % rank == 0:
            rows = rank  # one matrix has the rows of all experts
        if rows != rank:
            raise ModelRefused(
                "adapter_model.safetensors", "adapter.weights",
                f"r is {str(rank)[:20]}, and {name} has the shape {list(weight.shape)}.",
                "Take the adapter_config.json that belongs to the weights.",
            )  # fmt: skip


def _check_vocabulary(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Reject an adapter with embeddings, which PEFT saves after ``resize_token_embeddings``."""
    rows = int(getattr(model.config, "vocab_size", 0))
    for name, weight in weights.items():
        if re.search(r"(embed_tokens|word_embeddings|wte|shared|lm_head|embed_out)\.weight$", name):
            raise ModelRefused(
                "adapter_model.safetensors", "adapter.vocabulary",
                f"The adapter has embeddings for {weight.shape[0]:,} tokens ({name[:200]}); the base "
                f"model has {rows:,}.",
                "Merge the adapter into the base model (merge_and_unload), save model and "
                "tokenizer, and use the new folder.",
            )  # fmt: skip


def _targets(names: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """Return the adapted layers: by name endings if these match no other layers, otherwise by full
    names.

    ``target_modules`` may be a pattern or depend on PEFT's knowledge of a family; the names of
    weights are unambiguous.
    """
    layers = target_modules(names)
    if not layers:
        raise _refusal("adapter_model.safetensors has no weights of LoRA.")
    ends = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
    linear = linear_targets(model, ends, experts=True)
    short = sorted(outer_name(model, name) for name in linear) == layers
    return ends if short else tuple(layers)


def _refusal(message: str) -> ModelRefused:
    fix = "Merge the adapter into its model (merge_and_unload), save that and name its folder."
    return ModelRefused(ADAPTER_CONFIG, "adapter.config", message, fix)
