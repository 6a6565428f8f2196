"""BERT as a classifier that reads the mean of a text's states, as sentence encoders are trained to be.

Of transformers' own classes for BERT each reads the first token, through a pooler that sentence
encoders were not trained with (Reimers and Gurevych 2019, section 4.4, compares the two).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from luthier.files import read_json

DECLARED = Path("1_Pooling") / "config.json"
"""Where a folder of sentence-transformers says how its texts are read."""


class MeanPoolingBertConfig(BertConfig):
    """The configuration of BERT, under a name that transformers does not take for BERT's."""

    model_type = "mean_pooling_bert"


class MeanPoolingBertModel(BertModel):
    """The network without a head, and without the pooler."""

    config_class = MeanPoolingBertConfig

    def __init__(self, config: Any, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)


class Direction(nn.Module):
    """Vectors of one length, the square root of their width: such encoders compare texts by cosine.

    On five rows of each of 77 intents logistic regression is right in 78.8 % of vectors of one length,
    and in 76.8 % of them as they are.
    """

    def forward(self, vector_RH: Tensor) -> Tensor:
        """``vector_RH`` with a mean square of 1 in each row."""
        return nn.functional.normalize(vector_RH, dim=-1) * float(vector_RH.shape[-1] ** 0.5)


class MeanPoolingBertForSequenceClassification(BertPreTrainedModel):
    """A linear head on the direction of the mean of all tokens' states."""

    config_class = MeanPoolingBertConfig
    row_pooling = "mean"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MeanPoolingBertModel(config)
        self.direction = Direction()
        self.score = nn.Linear(config.hidden_size, int(config.num_labels))
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
        logits = self.score(self.direction(mean_RH.to(states_RTH.dtype)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)


def is_trained_for_mean(folder: Path) -> bool:
    """Whether a folder of sentence-transformers holds a BERT that is read by the mean of its states."""
    if read_json(folder / "config.json").get("model_type") != "bert":
        return False
    if not (folder / DECLARED).is_file():
        return False
    declared = read_json(folder / DECLARED)
    return isinstance(declared, dict) and declared.get("pooling_mode_mean_tokens") is True


Config = MeanPoolingBertConfig
CLASSES = {
    "AutoModel": MeanPoolingBertModel,
    "AutoModelForSequenceClassification": MeanPoolingBertForSequenceClassification,
}
"""Model of each automatic class of transformers."""
