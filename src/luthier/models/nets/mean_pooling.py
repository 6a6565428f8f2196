"""BERT as a classifier that reads the mean of a text's states, as sentence encoders are trained to be.

Of transformers' own classes for BERT each reads the first token, through a pooler that sentence
encoders were not trained with (Reimers and Gurevych 2019, section 4.4, compares the two).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingBertConfig(BertConfig):
    """The configuration of BERT, under a name that transformers does not take for BERT's."""

    model_type = "mean_pooling_bert"


class MeanPoolingBertModel(BertModel):
    """The network without a head, and without the pooler."""

    config_class = MeanPoolingBertConfig

    def __init__(self, config: Any, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)


class MeanPoolingBertForSequenceClassification(BertPreTrainedModel):
    """A linear head on the mean of all tokens' states, brought to one length."""

    config_class = MeanPoolingBertConfig
    row_pooling = "mean"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MeanPoolingBertModel(config)
        # Such encoders compare texts by cosine: only the direction of a mean says something.
        self.score = nn.Sequential(
            nn.RMSNorm(config.hidden_size, elementwise_affine=False),
            nn.Linear(config.hidden_size, int(config.num_labels)),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores ``[R, C]``."""
        states_RTH = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            mean_RH = states_RTH.float().mean(1)
        else:
            mask_RT1 = attention_mask[..., None]
            mean_RH = (states_RTH.float() * mask_RT1).sum(1) / mask_RT1.sum(1)
        logits = self.score(mean_RH.to(states_RTH.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)


Config = MeanPoolingBertConfig
CLASSES = {
    "AutoModel": MeanPoolingBertModel,
    "AutoModelForSequenceClassification": MeanPoolingBertForSequenceClassification,
}
"""Model of each automatic class of transformers."""
