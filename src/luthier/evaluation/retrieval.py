"""How well embeddings find the partner of each text among all partners of a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def retrieval_scores(
    anchors: Sequence[Sequence[float]], partners: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Recall at 1 and 10, and the mean reciprocal rank, by cosine (embeddings have length 1).

    A partner as near as the own one counts as nearer, so that equal embeddings find nothing.
    """
    anchor_PH, partner_PH = np.asarray(anchors), np.asarray(partners)
    ranks_P: NDArray[np.int64] = np.empty(len(anchor_PH), dtype=np.int64)
    for start in range(0, len(anchor_PH), 1024):
        scores_CP = anchor_PH[start : start + 1024] @ partner_PH.T
        own_C = scores_CP[np.arange(len(scores_CP)), start + np.arange(len(scores_CP))]
        ranks_P[start : start + len(scores_CP)] = (scores_CP >= own_C[:, None]).sum(1)
    return {
        "recall_at_1": float((ranks_P <= 1).mean()),
        "recall_at_10": float((ranks_P <= 10).mean()),
        "mean_reciprocal_rank": float((1.0 / ranks_P).mean()),
    }
