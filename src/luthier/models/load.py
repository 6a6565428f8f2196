"""Loading a network and its tokenizer from a Hugging Face directory. safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.data.chat import ChatFormat, Template
from luthier.data.tree import build_tree
from luthier.errors import CorruptFile, RecipeError, UnknownModel
from luthier.files import read_json
from luthier.models.attention import NAME, register
from luthier.models.fused import fuse
from luthier.models.network import Network
from luthier.types import Example


def check_folder(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; refuses folders without one or without safetensors."""
    if not (folder / "config.json").is_file():
        raise UnknownModel(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise UnknownModel(
            f"{folder} has no .safetensors file. Pickled weights (.bin, .pt) can run code and are "
            "never loaded; convert them with save_pretrained(..., safe_serialization=True)."
        )
    config: dict[str, Any] = read_json(folder / "config.json")
    return config


def context_length(config: dict[str, Any]) -> int:
    """Longest input in tokens that the configuration names."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise RecipeError("config.json names no context length (max_position_embeddings)")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def load_chat_format(folder: Path, template: Template = "auto") -> ChatFormat:
    """Tokenizer, template and stop tokens of a model folder.

    Stop tokens are those of ``generation_config.json`` and the tokenizer's own end-of-text token.
    """
    tokenizer = load_tokenizer(folder)
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return ChatFormat.of(tokenizer, template, listed)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model with plain attention, as transformers serves it."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = check_folder(folder)
    kind = config.get("model_type", "of unknown type")
    logging.disable_progress_bar()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, loaded = found
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UnknownModel(
            f"the network in {folder} ({kind}) cannot be loaded as a causal language model: {error}"
        ) from error
    except SafetensorError as error:
        raise CorruptFile(f"the weights in {folder} cannot be read: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would draw them at random, with no more than a warning.
        raise UnknownModel(
            f"{folder} ({kind}) has not all weights of a causal language model: {len(missing)} are "
            f"missing, {', '.join(missing[:3])} among them"
        )
    on_device: nn.Module = model.to(device)
    return on_device


def as_network(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Network:
    """Put a model of transformers on the flat layout, and check that it gives the same numbers."""
    register()
    probe = _Probe(model, device)
    expected = probe.plain()
    network = Network(model, device, dtype)
    network.model.set_attn_implementation(NAME)
    fuse(model)
    probe.check(network, expected)
    return network


class _Probe:
    """A few tokens through the network's own forward and through the flat layout.

    It catches what the flat layout does not do: scaled or capped logits, attention of another kind,
    positions that are not depths. Better a refusal here than a model trained on other mathematics.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        vocabulary = int(self.model.config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        self.ids_2T = torch.randint(0, vocabulary, (2, 12), generator=generator)
        self.ids_2T[1, :6] = self.ids_2T[0, :6]
        self.device = device

    @torch.no_grad()
    def plain(self) -> torch.Tensor:
        self.model.eval()
        logits_2TV: torch.Tensor = self.model(input_ids=self.ids_2T.to(self.device)).logits
        if not logits_2TV.isfinite().all():
            raise CorruptFile(
                "the network answers with numbers that are not finite: its weights are damaged"
            )
        return logits_2TV.float()

    @torch.no_grad()
    def check(self, network: Network, expected_2TV: torch.Tensor) -> None:
        rows = [
            Example(ids.numpy(), np.zeros(len(ids), dtype=np.float32), index)
            for index, ids in enumerate(self.ids_2T)
        ]
        tree = build_tree(rows)
        logits_NV = (network.hidden(network.batch(tree)) @ network.head_VH.t()).float()
        nodes = np.stack([tree.path(leaf) for leaf in tree.leaf_R])
        got_2TV = logits_NV[torch.from_numpy(nodes).to(self.device)]
        expected_2TV = expected_2TV[torch.from_numpy(tree.row_R).to(self.device)]
        error = float((got_2TV - expected_2TV).norm() / expected_2TV.norm())
        if not error < (0.1 if network.dtype == torch.bfloat16 else 1e-3):
            raise RecipeError(
                f"networks of type {self.model.config.model_type} cannot be trained here yet: on a "
                "probe, the token tree gave other logits than the network's own forward (relative "
                f"error {error:.2g})."
            )
