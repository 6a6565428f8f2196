"""Prefix tuning: learned keys and values before every row, in every layer (Li & Liang 2021,
arXiv:2101.00190).

The network is frozen. The attention of each layer sees ``virtual_tokens`` additional keys and
values, which are trained. They start as the keys and values of tokens drawn from the vocabulary
(section 7.4 of the paper: much better than random numbers with few rows). File and numbers are
PEFT's. A prefix cannot be merged.

Omitted: the reparametrization by a two-layer network (section 4.3; Liu et al. 2022,
arXiv:2110.07602, find that the network helps some tasks and harms others), and PEFT's random start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from luthier.adaptations.base import Gradients, VirtualTokens, peft_config

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.networks.network import Network


class Prefix(VirtualTokens):
    """Train keys and values that every layer sees before each row.

    Use ``lora`` for merged exports and higher accuracy on Banking77, or ``prompt`` for T5 and
    XLNet.
    """

    method: Literal["prefix"] = "prefix"

    def adapt(self, model: nn.Module) -> None:
        """Put a prefix of zeros into each layer; freeze everything else."""
        from luthier.models.networks.prefix import add_prefix

        model.requires_grad_(False)
        add_prefix(model, self.virtual_tokens)

    def calibrate(self, network: Network, gradients: Gradients) -> None:
        """Start from the keys and values of tokens drawn from the vocabulary."""
        import torch

        from luthier.models.networks.prefix import fill_from_tokens

        vocabulary = int(network.model.config.vocab_size)
        fill_from_tokens(network, torch.randint(vocabulary, (self.virtual_tokens,)))

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Return PEFT's configuration of the prefix."""
        from luthier.models.networks.prefix import KeyValuePrefix

        prefix = next(m for m in model.modules() if isinstance(m, KeyValuePrefix))
        layers, heads, size = prefix.shape
        return peft_config(
            "PREFIX_TUNING",
            model,
            base,
            num_virtual_tokens=self.virtual_tokens,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * size,
            # PEFT reads this number for the reparametrization only.
            encoder_hidden_size=heads * size,
            num_transformer_submodules=1,
        )

    def stored_name(self, name: str) -> str:
        """Return PEFT's name of the stored prefix."""
        return "prompt_embeddings" if ".key_value_prefix." in name else super().stored_name(name)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return the upper end of the range of Liu et al. (2022), because no network computes the
        prefix."""
        return 1e-2, "a prefix is a few vectors, which need large steps (Liu et al. 2022)"
