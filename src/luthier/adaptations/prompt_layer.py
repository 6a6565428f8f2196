"""The input embedding with a soft prompt after the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.models.wrapper import LayerWrapper


class PromptEmbedding(LayerWrapper):
    """Input embedding: ids below the vocabulary size are tokens, and higher ids are vectors of the
    prompt."""

    def __init__(self, base: nn.Embedding, count: int) -> None:
        super().__init__(base)
        vocabulary, hidden = base.weight.shape
        self.prompt_ids = tuple(range(vocabulary, vocabulary + count))
        """Ids that :class:`luthier.models.networks.network.Network` prepends to each row."""
        self.prompt_embeddings = nn.Parameter(base.weight.new_empty(count, hidden))
        if not base.weight.is_meta:
            # Drawn on the CPU, so that a seed gives the same prompt on every device.
            drawn = torch.randint(vocabulary, (count,))
            with torch.no_grad():
                self.prompt_embeddings.copy_(base.weight[drawn.to(base.weight.device)])

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings ``[..., H]`` of ``ids [...]``."""
        first, last = self.prompt_ids[0], self.prompt_ids[-1]
        virtual = (ids >= first) & (ids <= last)  # higher ids are image tokens
        # Both tables are read for all ids, so each index is in the range of its table.
        embeddings: Tensor = self.base_layer(ids.masked_fill(virtual, 0))
        if not virtual.any():
            return embeddings
        prompt = self.prompt_embeddings[ids.clamp(first, last) - first]
        return torch.where(virtual[..., None], prompt, embeddings)
