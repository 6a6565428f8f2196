"""TF-IDF with logistic regression: a text as the weighted counts of words and bigrams.

Words, bigrams and buckets are fastText's (:mod:`luthier.models.networks.classic.fasttext`), but
ASCII punctuation marks are left out. The weight of a term is scikit-learn's inverse
document frequency ``ln((1 + N) / (1 + n)) + 1``, and each row has length 1. Terms without a training
row have weight 0: with a weight, the new words of a text shrink the known words, and the bias
decides (docs/log/evaluation.md).

:meth:`TfidfModel.fit_features` and logistic regression fit all weights, so training takes no steps.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from luthier.models.characters import character_tokenizer, token_ids
from luthier.models.networks.classic.fasttext import FastTextConfig, FastTextModel


@strict
class TfidfConfig(FastTextConfig):
    """Sizes of TF-IDF."""

    model_type = "tfidf"

    buckets: int = 1 << 17
    """Number of features, which words and bigrams share."""
    hidden_size: int = 1
    """Each feature has one number, the inverse document frequency."""


class TfidfPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and initialization."""

    config: TfidfConfig
    config_class = TfidfConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["embed_tokens", "score"]  # noqa: RUF012
    """The fit is stored as is: rounded to bfloat16, one of 70 rows got another label."""

    def get_input_embeddings(self) -> Any:
        """Nothing: tokens have no vectors."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.ones_(module.weight)


class TfidfModel(FastTextModel, TfidfPreTrainedModel):
    """The network without a head: a sparse row per text."""

    config: TfidfConfig
    config_class = TfidfConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        TfidfPreTrainedModel._init_weights(self, module)

    @cached_property
    def _marks(self) -> Tensor:
        # Special tokens precede the bytes, which are sorted (luthier.models.characters).
        first = self.config.special_tokens - ord("!")
        return torch.tensor([first + ord(mark) for mark in string.punctuation])

    @torch.no_grad()
    def row_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return a sparse row of length 1 per text, ``[R, V]``, in float32."""
        start_RT, word_K, pair_K, paired_K = self.known_terms(input_ids, attention_mask)
        row_K = start_RT.nonzero(as_tuple=True)[0]
        row_M = torch.cat([row_K, row_K[paired_K]])
        place_2M = torch.stack([row_M, torch.cat([word_K, pair_K[paired_K]])])
        size = (len(input_ids), self.config.buckets)
        counts = torch.sparse_coo_tensor(
            place_2M, torch.ones_like(row_M).float(), size, check_invariants=False
        )
        return self._weigh(counts.coalesce())

    def known_terms(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return :meth:`terms` without punctuation marks."""
        mask_RT = attention_mask.bool()
        start_RT = input_ids == self.config.word_start_id
        # A mark is a word of two tokens, the start and the mark.
        mark_RT = torch.isin(input_ids, self._marks.to(input_ids.device))
        mask_RT &= ~(mark_RT | (mark_RT.roll(-1, 1) & start_RT))
        return self.terms(input_ids, mask_RT)

    @torch.no_grad()
    def fit_features(self, features_NV: Tensor) -> Tensor:
        """Set the document frequencies, and return the features with the new weights.

        ``features_NV`` are features of the training rows before a fit or after :meth:`forget`.
        """
        features_NV, weight_V1 = features_NV.cpu().coalesce(), self.embed_tokens.weight
        count_V = torch.bincount(features_NV.indices()[1], minlength=len(weight_V1))
        idf_V = torch.log((1 + len(features_NV)) / (1 + count_V)) + 1
        weight_V1.copy_(torch.where(count_V > 0, idf_V, 0)[:, None])
        return self._weigh(features_NV)

    @torch.no_grad()
    def forget(self) -> None:
        """Give all terms the weight 1."""
        self.embed_tokens.weight.fill_(1)

    def _weigh(self, rows_RV: Tensor) -> Tensor:
        row_K, term_K = rows_RV.indices()
        weight_V = self.embed_tokens.weight[:, 0].float().to(rows_RV.device)
        value_K = rows_RV.values() * weight_V[term_K]
        square_R = value_K.new_zeros(len(rows_RV)).index_add_(0, row_K, value_K.square())
        value_K = value_K / square_R.sqrt().clamp(min=1e-12)[row_K]
        return torch.sparse_coo_tensor(
            rows_RV.indices(),
            value_K,
            rows_RV.shape,
            is_coalesced=True,
            check_invariants=False,
        )


class SparseRowLinear(nn.Linear):
    """A linear layer of sparse rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Return scores ``[R, C]`` of sparse ``input [R, V]``, in float32."""
        scores_RC: Tensor = torch.sparse.mm(input, self.weight.float().T) + self.bias.float()
        return scores_RC


class TfidfForSequenceClassification(TfidfPreTrainedModel):
    """A linear classifier of weighted words and bigrams."""

    def __init__(self, config: TfidfConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TfidfModel(config)
        self.score = SparseRowLinear(config.buckets, int(config.num_labels or 0))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores ``[R, C]``."""
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.score(self.model.row_features(input_ids, mask_RT))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)


CHUNK = 256
"""Number of texts that are padded to the same length."""


def text_features(texts: Sequence[str], asked: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the sparse features of training texts and of other texts, as the base model."""
    tokenizer = character_tokenizer(lowercase=True)
    sizes: dict[str, Any] = token_ids(tokenizer)
    model = TfidfModel(TfidfConfig(**sizes))

    def read(some: Sequence[str]) -> Tensor:
        found = list[Tensor]()
        for start in range(0, len(some), CHUNK):
            rows = tokenizer(
                list(some[start : start + CHUNK]), padding=True, truncation=True,
                max_length=model.config.max_position_embeddings, return_tensors="pt",
            )  # fmt: skip
            found.append(model.row_features(rows["input_ids"], rows["attention_mask"]))
        return torch.cat(found).coalesce()

    train_NV = model.fit_features(read(texts))
    return train_NV, read(asked)


Config = TfidfConfig
CLASSES = {
    "AutoModel": TfidfModel,
    "AutoModelForSequenceClassification": TfidfForSequenceClassification,
}
"""Model of each automatic class of transformers."""
