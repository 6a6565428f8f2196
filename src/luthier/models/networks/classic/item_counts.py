"""Item-to-item collaborative filtering (Linden et al. 2003) as embeddings of items.

The similarity of two items is the cosine over the histories that have them. A truncated singular
value decomposition of the histories gives each item a vector, so that inner products are these
similarities. A history is the sum of the vectors of its items. Each line of a text is an item, and
a hash selects its vector (:mod:`luthier.models.networks.classic.fasttext`). Items without a
training row have zeros. Training takes no steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from luthier.models.networks.classic.fasttext import FastTextConfig, FastTextModel
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.models.networks.network import Network


@strict
class ItemCountsConfig(FastTextConfig):
    """Sizes of item counts."""

    model_type = "item_counts"

    buckets: int = 1 << 15
    """Number of vectors. Of 300 items, about one pair shares a vector."""
    hidden_size: int = 128


class ItemCountsModel(FastTextModel):
    """Vectors of items."""

    config: ItemCountsConfig
    config_class = ItemCountsConfig
    _keep_in_fp32_modules_strict = ["embed_tokens"]  # noqa: RUF012

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Return character states ``[R, T, H]``: an item's vector at its first character."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        start_RT, item_K, _, _ = self.terms(input_ids, attention_mask.bool())
        state_KH = self.embed_tokens(item_K)
        states_RTH = state_KH.new_zeros(*input_ids.shape, self.config.hidden_size)
        return BaseModelOutput(
            last_hidden_state=states_RTH.index_put(start_RT.nonzero(as_tuple=True), state_KH)
        )

    def fit_rows(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Fit the vectors to histories and their next items, and describe the fit."""
        ids = [np.concatenate([each.ids_T, np.asarray(each.target)]) for each in examples]
        return f"vectors of {self.fit(ids):,} items fitted to {len(ids):,} histories"

    @torch.no_grad()
    def fit(self, histories: Sequence[NDArray[np.int64]]) -> int:
        """Set the vectors of the items of ``histories``, token ids, and return their number."""
        from scipy.sparse import csr_array
        from sklearn.preprocessing import normalize
        from sklearn.utils.extmath import randomized_svd

        items = []
        for ids_T in histories:
            ids_1T = torch.from_numpy(np.asarray(ids_T, np.int64))[None]
            _, item_K, _, _ = self.terms(ids_1T, torch.ones_like(ids_1T).bool())
            items.append(np.unique(item_K.numpy()))
        row_M = np.repeat(np.arange(len(items)), [len(each) for each in items])
        bucket_V, column_M = np.unique(np.concatenate(items), return_inverse=True)
        counts_NV = csr_array((np.ones(len(row_M)), (row_M, column_M)), (len(items), len(bucket_V)))
        width = min(self.config.hidden_size, *counts_NV.shape)
        _, size_H, vector_HV = randomized_svd(
            normalize(counts_NV, axis=0), width, random_state=0, n_iter=7
        )
        self.embed_tokens.weight.zero_()
        vectors_VH = torch.from_numpy((vector_HV * size_H[:, None]).T.copy()).float()
        self.embed_tokens.weight[torch.from_numpy(bucket_V), :width] = vectors_VH
        return len(bucket_V)


Config = ItemCountsConfig
CLASSES = {"AutoModel": ItemCountsModel}
"""Model of each automatic class of transformers."""
