"""Words that decided a label: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365).

Each token has the integral of the gradient of the label's score along the straight path from a
baseline to the token's embedding, times the difference of both. The baseline is the mean embedding
of the vocabulary: from an embedding of zero, norms without a mean (Llama) jump at the start of the
path. The attributions add up to the difference of both scores, up to the error of the quadrature.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.shapes.media import MediaRow
from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError
from luthier.types import Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.inference.prediction import Predictor

POINTS = 50
"""Points of Gauss's quadrature, the default of captum."""


def explain(predictor: Predictor, row: Row, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the label of ``answer`` with the contribution of each word of ``row`` to its score.

    ``rest`` is the contribution of special tokens. The contributions add up to ``score`` less
    ``baseline_score``.

    Raises:
        RecipeError: for a model without labels of texts or without token embeddings.
    """
    import torch

    network, chat = predictor.network, predictor.chat
    labels = predictor.objective.head().labels
    is_able = "scores" in answer and labels and not isinstance(row, MediaRow)
    embedding = network.model.get_input_embeddings()
    if not is_able or embedding is None or not chat.text_encoder.is_fast:
        raise RecipeError(
            "`explain` needs a text classifier with an embedding for each token. Use a model of "
            "objective classification on an encoder or a decoder, such as all-minilm-l6-v2."
        )
    example = predictor.encode(row, 0)
    if len(example) > predictor.context:
        example = predictor.objective.truncate(example, predictor.context)
    (batch,) = network.batches([replace(example, row=0)], READING_BUDGET)
    label = max(answer["scores"], key=answer["scores"].__getitem__)

    def score_with(hook: Callable[..., Tensor | None]) -> Tensor:
        """Return the score of the label with a hook on the embeddings of the tokens."""
        handle = embedding.register_forward_hook(hook)
        try:
            return network.row_scores(batch).float()[0, labels.index(label)]
        finally:
            handle.remove()

    embedded: list[Tensor] = []
    with torch.no_grad():
        score = score_with(lambda module, inputs, output: embedded.append(output))
    if len(embedded) != 1 or embedded[0][..., 0].numel() != len(batch.tree.ids_N):
        raise RecipeError("`explain` does not support encoder-decoders and networks of characters.")
    start = embedding.weight.detach().mean(0).to(embedded[0])
    step, total_N = embedded[0] - start, np.zeros(len(batch.tree.ids_N))
    places, weights = np.polynomial.legendre.leggauss(POINTS)
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        point = (start + float(place) * step).requires_grad_()
        (slope,) = torch.autograd.grad(score_with(lambda *_: point), point)  # noqa: B023
        total_N += weight * (slope * step).sum(-1).flatten().double().cpu().numpy()
    with torch.no_grad():
        baseline = score_with(lambda *_: start.expand_as(step))
    text = row.plain_text()
    offsets = chat.text_encoder.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    words = [*re.finditer(r"\S+", text)]
    word_of = {place: n for n, word in enumerate(words) for place in range(*word.span())}
    sums = np.zeros(len(words) + 1)
    # The text may be truncated.
    for (first, end), value in zip(offsets, total_N[batch.tree.node_M], strict=False):
        # Offsets of some tokenizers begin with the space before the word.
        sums[word_of.get(end - 1, len(words)) if end > first else len(words)] += value
    return {
        "label": label,
        "score": float(score),
        "baseline_score": float(baseline),
        "words": [
            {"word": word[0], "contribution": float(value)}
            for word, value in zip(words, sums[:-1], strict=True)
        ],
        "rest": float(sums[-1]),
    }
