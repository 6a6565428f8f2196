"""PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 2), a network without published weights.

A decoder with *parallel* layers, ``y = x + MLP(LN(x)) + Attention(LN(x))`` with one norm for both;
SwiGLU with four times the width; one key-value head for all query heads (multi-query attention);
rotary embeddings; no biases, also in norms; tied embeddings. Matrices are initialized with variance
``1 / fan-in``. No dropout (section 5).

The paper draws the embedding ``E`` from ``N(0, 1)`` and multiplies the logits by ``1 / sqrt(H)``.
This module stores ``E / sqrt(H)``, multiplies inputs by ``sqrt(H)``, and does not scale logits.
Function and initialization equal the paper's. One AdamW step size then fits all matrices (the
paper's Adafactor scales each step with its matrix).

Not implemented: the 8 to 540 billion sizes, Adafactor, z-loss, batch size growth, the 256k
SentencePiece vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import capture_outputs

from luthier.models.networks.classic.heads import TiedCausalLM


class PalmConfig(LlamaConfig):
    """Llama's configuration with PaLM's constants: one key-value head, no biases, tied embeddings."""

    model_type = "palm"
    layer_norm_eps: float = 1e-6
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Reject configurations that contradict PaLM."""
        super().__post_init__(**kwargs)
        if self.num_key_value_heads != 1 or self.attention_bias or self.mlp_bias:
            raise ValueError("PaLM has one key and value head (num_key_value_heads) and no biases")
        if not self.tie_word_embeddings:
            raise ValueError("PaLM requires tied embeddings: tie_word_embeddings must be true")


class PalmLayer(GradientCheckpointingLayer):
    """``x + MLP(LN(x)) + Attention(LN(x))``: both read the same norm and are added at once."""

    def __init__(self, config: PalmConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = LlamaAttention(config, layer_idx)  # multi-query: one key head
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, T, H]`` to the same shape."""
        normed = self.norm(hidden_states)
        attended, _ = self.self_attn(normed, **kwargs)
        summed: Tensor = hidden_states + self.mlp(normed) + attended
        return summed


class PalmPreTrainedModel(PreTrainedModel):
    """Common base class: configuration, supported features and initialization."""

    config: PalmConfig
    config_class = PalmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PalmLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": PalmLayer, "attentions": LlamaAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)


class PalmModel(PalmPreTrainedModel):
    """The network without a head."""

    def __init__(self, config: PalmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([PalmLayer(config, index) for index in layers])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, H]`` of ids ``[B, T]``, or of their embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # The stored table is E / sqrt(H).
        hidden = hidden * self.config.hidden_size**0.5
        cached = self.config.use_cache if use_cache is None else use_cache
        if cached and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotation,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


class PalmForCausalLM(TiedCausalLM, PalmPreTrainedModel, GenerationMixin):
    """The network with the input embedding as output head."""

    backbone = PalmModel


class PalmForSequenceClassification(GenericForSequenceClassification, PalmPreTrainedModel):
    """A classifier on the last token."""


class PalmForTokenClassification(GenericForTokenClassification, PalmPreTrainedModel):
    """A classifier of each token."""


Config = PalmConfig
CLASSES = {
    "AutoModel": PalmModel,
    "AutoModelForCausalLM": PalmForCausalLM,
    "AutoModelForSequenceClassification": PalmForSequenceClassification,
    "AutoModelForTokenClassification": PalmForTokenClassification,
}
"""Model of each automatic class of transformers."""
