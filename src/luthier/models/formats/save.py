"""Saving of adapters in PEFT's format and of whole Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.inputs import save_processor
from luthier.errors import CorruptFile
from luthier.files import write_bytes
from luthier.models.formats.pipelines import tokenizer_folder
from luthier.models.formats.tensors import load_tensors, save_tensors
from luthier.models.networks.heads import (
    INNER_HEADS,
    head_kind,
    head_weights,
    scores_letters,
    set_new_weights,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.adaptations.base import Adaptation
    from luthier.data.conversations.chat import ChatFormat

ADAPTER = "adapter_model.safetensors"


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter: trainable weights and their modules' buffers."""
    return trained_weights(model) | adapter_buffers(model)


def adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of modules with trainable weights, by name."""
    buffers = {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if any(weight.requires_grad for weight in module._parameters.values() if weight is not None)
        for name, buffer in module.named_buffers(recurse=False)
    }
    persistent = model.state_dict().keys() if buffers else ()
    return {name: buffer for name, buffer in buffers.items() if name in persistent}


def stored_bytes(model: nn.Module, adaptation: Adaptation) -> int:
    """Return the size of the tensors that a model trained from ``model`` stores, in bytes."""
    if adaptation.stores_network:
        persistent = model.state_dict().keys()
        buffers = sum(b.nbytes for name, b in model.named_buffers() if name in persistent)
        return buffers + sum(weight.nbytes for weight in model.parameters())
    return sum(tensor.nbytes for tensor in adapter_tensors(model).values())


def save_adapter(
    model: nn.Module, adaptation: Adaptation, config: dict[str, Any], folder: Path
) -> None:
    """Save the trained weights and ``adapter_config.json``, in PEFT's format for PEFT's methods."""
    kept = adapter_tensors(model).items()
    tensors = {stored_name(model, adaptation, n): t.contiguous().cpu() for n, t in kept}
    save_tensors(tensors, folder / ADAPTER, metadata={"format": "pt"})
    for key in {"target_modules", "modules_to_save"} & config.keys():
        config = {**config, key: [outer_name(model, name) for name in config[key]]}
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    write_bytes(folder / "adapter_config.json", text.encode())


def whole_model(model: Any) -> Any:
    """Return the model to save: the vision-language model of a text part, or ``model`` itself.

    The whole model gets the output head of ``model``, which adaptations replace.
    """
    whole: Any = getattr(model, "whole", None)
    if whole is None:
        return model
    whole.model.lm_head = model.lm_head
    return whole.model


def outer_name(model: Any, name: str) -> str:
    """Return the name in :func:`whole_model` of the module or weight ``name`` of ``model``."""
    if getattr(model, "whole", None) is None:
        return name
    prefix = f"{model.base_model_prefix}."
    return f"{prefix}text_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def stored_name(model: nn.Module, adaptation: Adaptation, name: str) -> str:
    """Return the name in the adapter file of the weight ``name`` of ``model``."""
    return adaptation.stored_name(outer_name(model, name))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter, by the names they have in the file."""
    return load_tensors(folder / ADAPTER)


def load_adapter(model: nn.Module, adaptation: Adaptation, folder: Path) -> None:
    """Attach ``adaptation`` to ``model`` and load the weights in ``folder``.

    A head with other classes or another task keeps its initial weights.
    """
    import torch

    from luthier.models.random_numbers import leave_undrawn

    saved = read_adapter(folder)
    # All new weights are replaced below; initializing them would take a third of the time.
    with torch.random.fork_rng([]), leave_undrawn():
        adaptation.attach(model)
    new = head_weights(model)
    if scores_letters(model):
        # Letters that a later training adds are the last rows, and keep their initial weights.
        for name in new & (own := adapter_tensors(model)).keys():
            stored = stored_name(model, adaptation, name)
            if stored in saved:
                saved[stored] = torch.cat([saved[stored], own[name][len(saved[stored]) :].cpu()])
    weights = {
        stored_name(model, adaptation, n): p
        for n, p in adapter_tensors(model).items()
        # An adapter of another task lacks this task's head, and a head for other classes has another
        # size.
        if n not in new or _fits(p, saved.get(stored_name(model, adaptation, n)))
    }
    kept = {n for n in new if stored_name(model, adaptation, n) not in weights}
    inside = stored_name(model, adaptation, getattr(model, "base_model_prefix", ""))
    # An adapter also contains the head of its own task, which this network lacks.
    others = tuple(f"{inside}.{name}." for name in INNER_HEADS)
    saved = {
        n: w
        for n, w in saved.items()
        if n in weights or (n.startswith(inside) and not n.startswith(others))
    }
    odd = sorted(saved.keys() ^ weights.keys())
    odd = odd or [n for n, weight in weights.items() if weight.shape != saved[n].shape]
    if odd:
        odd = odd[:3]
        raise CorruptFile(
            f"{folder / ADAPTER} does not match the network: {', '.join(odd)} …",
            rule="weights.layers",
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    set_new_weights(model, kept)


def _fits(weight: Tensor, saved: Tensor | None) -> bool:
    return saved is not None and saved.shape == weight.shape


def set_padding_token(model: Any, chat: ChatFormat) -> None:
    """Set the padding token of a network without one, with which transformers finds the last token
    of each row.
    """
    if chat.stop_ids and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = chat.stop_ids[0]


def save_network(model: Any, chat: ChatFormat, folder: Path) -> None:
    """Save a Hugging Face folder: weights, configuration, tokenizer, stop tokens.

    Networks of diffusers are saved in diffusers' format, with one subfolder per part.
    """
    stops = list(chat.stop_ids)
    if stops and head_kind(model) in ("causal_lm", "image_to_text"):
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = stops[0]
        if chat.decoder is not None and chat.media is None:
            model.generation_config.decoder_start_token_id = chat.decoder.start_id
            # generate() can force a single token after the start token.
            if len(chat.decoder.opening_ids) == 1:
                model.generation_config.forced_bos_token_id = chat.decoder.opening_ids[0]
    set_padding_token(model, chat)
    whole_model(model).save_pretrained(folder)
    if head_kind(model) == "embedding":
        from luthier.models.networks.sentence_head import save_sentence_head  # imports torch

        save_sentence_head(model, folder)
    save_format(chat, folder)


def save_format(chat: ChatFormat, folder: Path) -> None:
    """Save the processor and the tokenizer. Plain models get no chat template."""
    if (processor := chat.media or chat.template.images) is not None:
        save_processor(processor, folder)
    if not chat.has_tokenizer:
        return
    # The running model still uses this tokenizer, so the template is restored afterwards.
    template = chat.tokenizer.chat_template
    if chat.template.kind == "plain":
        chat.tokenizer.chat_template = None
    try:
        chat.tokenizer.save_pretrained(tokenizer_folder(folder))
    finally:
        chat.tokenizer.chat_template = template
