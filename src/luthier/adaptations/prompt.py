"""Prompt tuning: learned vectors before every row of a frozen network (Lester et al. 2021,
arXiv:2104.08691).

The soft prompt is the root of the token tree: ``virtual_tokens`` ids after the vocabulary, whose
embeddings are the prompt. A micro-batch computes the prompt once for all rows. The prompt starts as
the embeddings of tokens drawn from the vocabulary (section 3.2). The file has PEFT's format. A
prompt cannot be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from luthier.adaptations.base import VirtualTokens, peft_config
from luthier.errors import RecipeError
from luthier.models.networks.heads import prompt_ids, truncation_length
from luthier.models.networks.layers import replace_modules

if TYPE_CHECKING:
    from torch import nn


class Prompt(VirtualTokens):
    """Train a prompt of vectors.

    Use ``lora`` for merged exports, and for higher accuracy on Banking77.
    """

    method: Literal["prompt"] = "prompt"

    def adapt(self, model: nn.Module) -> None:
        """Put the prompt behind the vocabulary of the input embedding; freeze everything else."""
        from luthier.adaptations.prompt_layer import PromptEmbedding

        if prompt_ids(model):
            raise RecipeError(
                "the base model has a soft prompt already, and only one is possible. Train lora "
                "on this model, or a prompt on the original base.",
                rule="adapter.occupied",
            )
        if (reach := truncation_length(model)) is not None:
            kind = model.config.model_type  # type: ignore[union-attr]
            raise RecipeError(
                f"a soft prompt cannot be trained in networks of type {kind}: no gradient "
                f"crosses the segments of {reach} tokens. Use lora.",
                rule="adapter.network",
            )
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        if embedding is None:
            kind = model.config.model_type  # type: ignore[union-attr]
            raise RecipeError(
                f"a soft prompt requires token embeddings, and networks of type {kind} have "
                "none. Use full.",
                rule="prompt.no_tokens",
            )
        model.requires_grad_(False)
        # An encoder-decoder has an embedding for each side, with one weight. By default,
        # `named_modules` lists a shared module once, and the second name would keep the old module.
        names = [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, type(embedding)) and module.weight is embedding.weight
        ]
        prompt = PromptEmbedding(embedding, self.virtual_tokens)
        replace_modules(model, names, lambda _: prompt)

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Return PEFT's configuration of the prompt."""
        return peft_config(
            "PROMPT_TUNING",
            model,
            base,
            num_virtual_tokens=self.virtual_tokens,
            num_transformer_submodules=1,  # of an encoder-decoder, the encoder's
        )

    def stored_name(self, name: str) -> str:
        """Return PEFT's name of the stored prompt."""
        end = name.rpartition(".")[2]
        return end if end == "prompt_embeddings" else super().stored_name(name)

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return a rate far above other methods, as in the paper; AdamW moves each number by the
        rate."""
        return 1e-2, "a prompt is a few vectors, which need large steps (Lester et al. 2021)"
