"""What a teacher says of the tokens a student learns from.

Both see the same rows, but not the same nodes: one may have a soft prompt, or not share prefixes. They
meet at the learned tokens, whose order is that of the rows.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from luthier.objectives.logprobs import scores

if TYPE_CHECKING:
    from luthier.models.network import Network, TreeBatch
    from luthier.objectives.divergence import Given


@torch.no_grad()
def whole_distribution(
    network: Network, teacher: Network, batch: TreeBatch, temperature: float
) -> Given:
    """The teacher's log-probabilities of all tokens at the positions of ``batch``.

    The teacher reads the rows here, one micro-batch at a time: the states of all rows of a measurement
    would not fit. Tokens that only one of both has embeddings for are left out.
    """
    (seen,) = teacher.batches(batch.tree.examples, sys.maxsize)
    states_SH = teacher.before_vocabulary(teacher.hidden(seen)[seen.source_S])
    place_S = torch.zeros_like(batch.source_S)
    place_S[batch.edge_source_E[batch.learned[1]]] = seen.edge_source_E[seen.learned[1]]
    states_SH = states_SH[place_S]
    shared = min(len(network.head_VH), len(teacher.head_VH))

    def given(rows: slice) -> tuple[None, torch.Tensor]:
        logits_CV = scores(states_SH[rows], teacher.head_VH, teacher.head_bias_V, temperature)
        return None, logits_CV[:, :shared].log_softmax(-1)

    return given
