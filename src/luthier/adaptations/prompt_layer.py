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
        """Ids that :class:`luthier.models.network.Network` prepends to each row."""
        self.prompt_embeddings = nn.Parameter(base.weight.new_empty(count, hidden))
        if not base.weight.is_meta:
            # Drawn on the CPU, so that a seed gives the same prompt on every device.
            drawn = torch.randint(vocabulary, (count,))
            with torch.no_grad():
                self.prompt_embeddings.copy_(base.weight[drawn.to(base.weight.device)])

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings ``[..., H]`` of ``ids [...]``."""
        vocabulary = len(self.base_layer.weight)
        # Both tables are read for all ids, so each index is clamped to the range of its table.
        embeddings: Tensor = self.base_layer(ids.clamp(max=vocabulary - 1))
        virtual = ids >= vocabulary
        if not virtual.any():
            return embeddings
        prompt = self.prompt_embeddings[(ids - vocabulary).clamp(min=0)]
        return torch.where(virtual[..., None], prompt, embeddings)
