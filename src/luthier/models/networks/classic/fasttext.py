"""fastText (Joulin et al. 2016, arXiv:1607.01759): a text as the mean of word and bigram vectors.

Input is characters (:mod:`luthier.models.characters`), so any language with spaces between words
works without vocabulary or pretraining. A hash selects the vector of each word and bigram (section
2.2). A linear classifier uses the mean. For languages without a matching encoder, the network
classifies better than an encoder with wrong subwords (docs/log/defaults.md).

The first character of a word has the state of the word and of the bigram that ends there. The state
is scaled such that the mean over all characters equals the mean over words and bigrams. Other
characters have zeros. Not implemented: subword vectors, hierarchical softmax, collision-free
vectors of frequent words.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from luthier.models.networks.classic.heads import MeanPoolingClassifier

PRIME = (1 << 31) - 1
"""Modulus of the hashes. The product of two hashes fits into 64 bits."""
FACTORS = (16_807, 48_271, 69_621)
"""Primitive roots of :data:`PRIME` (Park and Miller 1988; Fishman and Moore 1986)."""


@strict
class FastTextConfig(PreTrainedConfig):
    """Sizes of a fastText."""

    model_type = "fasttext"

    vocab_size: int = 260
    special_tokens: int = 4
    """Ids below are no part of any word."""
    word_start_id: int = 224
    """Token that starts a word."""
    buckets: int = 1 << 17
    """Number of vectors, which words and bigrams share."""
    hidden_size: int = 64
    num_hidden_layers: int = 1
    """1: the vectors are the only layer below the classifier."""
    max_position_embeddings: int = 8192
    """Longest row in characters; the network itself has no limit."""
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_architecture(self) -> None:
        """Reject invalid sizes."""
        if not 0 < self.buckets < PRIME:
            raise ValueError(f"buckets must be from 1 to {PRIME - 1:,}")


class FastTextPreTrainedModel(PreTrainedModel):
    """Common base class: configuration and initialization."""

    config: FastTextConfig
    config_class = FastTextConfig
    base_model_prefix = "model"
    scratch_rate: ClassVar[float] = 1e-2
    """Most vectors see a gradient in few steps only (docs/log/defaults.md)."""

    def get_input_embeddings(self) -> Any:
        """Nothing: tokens have no vectors, words and pairs have."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            bound = 1 / module.embedding_dim
            init.uniform_(module.weight, -bound, bound)


class FastTextModel(FastTextPreTrainedModel):
    """The network without a head."""

    def __init__(self, config: FastTextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.buckets, config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Return character states ``[R, T, H]`` whose mean is the mean over words and bigrams.

        Rows may have padding on both sides, with ``attention_mask`` 0.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask_RT = attention_mask.bool()
        start_RT, word_K, pair_K, paired_K = self.terms(input_ids, mask_RT)
        row_K, place_K = start_RT.nonzero(as_tuple=True)
        state_KH = self.embed_tokens(word_K) + self.embed_tokens(pair_K) * paired_K[:, None]
        # W words have W - 1 bigrams. T / (2 W - 1) turns the mean over T characters into the mean
        # over words and bigrams.
        terms_R = 2 * start_RT.sum(1) - start_RT.any(1).long()
        size_R = mask_RT.sum(1) / terms_R.clamp(min=1)
        states_RTH = state_KH.new_zeros(*input_ids.shape, self.config.hidden_size)
        scaled_KH = state_KH * size_R[row_K, None].to(state_KH.dtype)
        states_RTH = states_RTH.index_put((row_K, place_K), scaled_KH)
        return BaseModelOutput(last_hidden_state=states_RTH)

    def terms(self, ids_RT: Tensor, mask_RT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the word starts ``[R, T]``; for each word, in order, the bucket of the word, the
        bucket of the bigram that ends there, and whether the word ends a bigram."""
        start_RT, word_RT = self._hashes(ids_RT, mask_RT)
        row_K, place_K = start_RT.nonzero(as_tuple=True)
        word_K = word_RT[row_K, place_K]
        # The previous word of the same row; the first word ends no bigram.
        paired_K = torch.zeros_like(row_K, dtype=torch.bool)
        paired_K[1:] = row_K[1:] == row_K[:-1]
        # Two factors, so that the order of the words counts.
        pair_K = (word_K.roll(1) * FACTORS[1] % PRIME + word_K * FACTORS[2] % PRIME) % PRIME
        return start_RT, word_K % self.config.buckets, pair_K % self.config.buckets, paired_K

    @torch.no_grad()
    def _hashes(self, ids_RT: Tensor, mask_RT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the word starts, and the hash of each word: a polynomial of the bytes."""
        special_RT = ids_RT < self.config.special_tokens
        start_RT = (ids_RT == self.config.word_start_id) & mask_RT
        place_T = torch.arange(ids_RT.shape[1], device=ids_RT.device)
        first_RT = torch.where(start_RT, place_T, 0).cummax(1).values
        inside_RT = mask_RT & ~special_RT & (start_RT.cumsum(1) > 0)
        # sum_i byte_i g^i mod p, with i counted from the start of the word. Terms are below 2^31,
        # so their sum over a row fits into 64 bits.
        powers = [1]
        for _ in range(int((place_T - first_RT).max())):
            powers.append(powers[-1] * FACTORS[0] % PRIME)
        power_P = torch.tensor(powers, device=ids_RT.device)
        terms_RT = (ids_RT * power_P[place_T - first_RT] % PRIME) * inside_RT
        sums_RT = torch.zeros_like(ids_RT).scatter_add(1, first_RT, terms_RT)
        return start_RT, sums_RT % PRIME


class FastTextForSequenceClassification(MeanPoolingClassifier, FastTextPreTrainedModel):
    """A linear classifier of the mean of words and pairs."""

    def __init__(self, config: FastTextConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FastTextModel(config)
        self.score = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()


Config = FastTextConfig
CLASSES = {
    "AutoModel": FastTextModel,
    "AutoModelForSequenceClassification": FastTextForSequenceClassification,
}
"""Model of each automatic class of transformers."""
