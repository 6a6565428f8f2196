"""BERT classifier with mean pooling, the pooling that sentence encoders are trained with.

transformers' BERT classifiers use the first token and a pooler, which sentence encoders do not
train (Reimers and Gurevych 2019, section 4.4, compares both).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from luthier.models.networks.classic.heads import MeanPoolingClassifier


class MeanPoolingBertConfig(BertConfig):
    """BERT's configuration under a separate ``model_type``."""

    model_type = "mean_pooling_bert"


class MeanPoolingBertModel(BertModel):
    """The network without a head, and without the pooler."""

    config_class = MeanPoolingBertConfig

    def __init__(self, config: Any, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)


class MeanPoolingBertForSequenceClassification(MeanPoolingClassifier, BertPreTrainedModel):
    """A linear head on the normalized mean."""

    config_class = MeanPoolingBertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MeanPoolingBertModel(config)
        # Sentence encoders train cosine similarity, so only the direction of the mean is meaningful.
        self.score = nn.Sequential(
            nn.RMSNorm(config.hidden_size, elementwise_affine=False),
            nn.Linear(config.hidden_size, int(config.num_labels)),
        )
        self.post_init()


Config = MeanPoolingBertConfig
CLASSES = {
    "AutoModel": MeanPoolingBertModel,
    "AutoModelForSequenceClassification": MeanPoolingBertForSequenceClassification,
}
"""Model of each automatic class of transformers."""
