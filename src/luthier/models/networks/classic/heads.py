"""Heads of luthier's own networks. List each head before ``PreTrainedModel`` in the bases."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput


class TiedCausalLM(PreTrainedModel):
    """A causal language model with tied input and output embeddings.

    List this class before ``GenerationMixin`` in the bases.
    """

    backbone: ClassVar[type[PreTrainedModel]]
    """The network without a head."""
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[B, T, V]``, or only of the last ``logits_to_keep`` tokens if nonzero."""
        out = self.model(input_ids, **kwargs)
        # -0 is 0: the slice then contains all tokens.
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


class MeanPoolingClassifier(PreTrainedModel):
    """A text classifier on the mean of all tokens' states. The network defines ``score``."""

    row_pooling: ClassVar[str] = "mean"
    score: nn.Module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores ``[R, C]``."""
        state_RTH = self.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # float32 as in Network.row_states, so that both forward passes give equal scores.
        total_RH = (state_RTH.float() * mask_RT[..., None]).sum(1)
        mean_RH = total_RH / mask_RT.sum(1, keepdim=True)
        logits = self.score(mean_RH.to(state_RTH.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)
