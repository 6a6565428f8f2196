"""A classifier of texts that reads the mean of all tokens' states."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingClassifier(PreTrainedModel):
    """Goes before a network's own ``PreTrainedModel`` among the bases; the network sets ``score``."""

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
        total_RH = (state_RTH.float() * mask_RT[..., None]).sum(1)
        mean_RH = total_RH / mask_RT.sum(1, keepdim=True)
        logits = self.score(mean_RH.to(state_RTH.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)
