"""Words or pixels that decided a label.

Networks: integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365). Each input has the
integral of the gradient of the label's score along the straight path from a baseline to the input,
times the difference of both. The baseline of a text is the mean embedding of the vocabulary: from an
embedding of zero, norms without a mean (Llama) jump at the start of the path. The baseline of an
image is 0, the mean colour of the network's training. The contributions add up to the difference of
both scores, up to the error of the quadrature.

TF-IDF and fastText are linear: the contribution of a word is weight times feature, exactly. A pair of
words counts for its second word.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.tree import READING_BUDGET
from luthier.errors import RecipeError
from luthier.pages import png_address
from luthier.types import Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.inference.prediction import Predictor
    from luthier.models.networks.network import Network, TreeBatch

Contributions = NDArray[np.float64]
POINTS = 50
"""Points of Gauss's quadrature, the default of captum."""
CELLS = 16
"""Largest number of rows and columns in the grid of an image."""


def explain(
    predictor: Predictor, row: Row, answer: dict[str, Any], pictures: bool = False
) -> dict[str, Any]:
    """Return the label of ``answer`` with the contribution of each word or cell to its score.

    ``rest`` is the contribution of special tokens. The contributions add up to ``score`` less
    ``baseline_score``. An image has ``cells``, a grid from top to bottom, and with ``pictures`` a heat
    map.

    Raises:
        RecipeError: for a model without labels of texts or images, or without token embeddings.
    """
    labels = predictor.objective.head().labels
    reads = predictor.chat.reads
    if "scores" not in answer or not labels or reads not in ("text", "image"):
        raise RecipeError(
            "`explain` needs a classifier of texts or images. Use a model of objective "
            "classification, such as one on all-minilm-l6-v2."
        )
    example = predictor.encode(row, 0)
    if len(example) > predictor.context:
        example = predictor.objective.truncate(example, predictor.context)
    (batch,) = predictor.network.batches([replace(example, row=0)], READING_BUDGET)
    label = max(answer["scores"], key=answer["scores"].__getitem__)
    index = labels.index(label)
    if reads == "image":
        return {"label": label, **_explain_image(predictor, batch, index, pictures)}
    kind = predictor.network.model.config.model_type
    by_word = _LINEAR.get(kind, _explain_tokens)
    score, baseline, total_N = by_word(predictor, batch, index)
    words, rest = _sum_words(predictor, row.plain_text(), total_N[batch.tree.node_M])
    return {
        "label": label, "score": score, "baseline_score": baseline, "words": words, "rest": rest,
    }  # fmt: skip


def _explain_tokens(
    predictor: Predictor, batch: TreeBatch, index: int
) -> tuple[float, float, Contributions]:
    """Return the scores of the text and of the baseline, and the contribution of each token."""
    import torch

    network = predictor.network
    embedding = network.model.get_input_embeddings()
    if embedding is None or not predictor.chat.text_tokenizer.is_fast:
        raise RecipeError(
            "`explain` needs an embedding for each token. Use a model on an encoder or a decoder, such "
            "as all-minilm-l6-v2."
        )

    def score_with(hook: Callable[..., Tensor | None]) -> Tensor:
        """Return the score of the label with a hook on the embeddings of the tokens."""
        handle = embedding.register_forward_hook(hook)
        try:
            return network.row_scores(batch).float()[0, index]
        finally:
            handle.remove()

    embedded: list[Tensor] = []
    with torch.no_grad():
        score = score_with(lambda module, inputs, output: embedded.append(output))
    if len(embedded) != 1 or embedded[0][..., 0].numel() != len(batch.tree.ids_N):
        raise RecipeError("`explain` does not support encoder-decoders and networks of characters.")
    start = embedding.weight.detach().mean(0).to(embedded[0]).expand_as(embedded[0])
    total = _integrate(lambda point: score_with(lambda *_: point), start, embedded[0])
    with torch.no_grad():
        baseline = score_with(lambda *_: start)
    return float(score), float(baseline), total.sum(-1).flatten().cpu().numpy()


def _integrate(
    score_of: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, power: int = 1
) -> Tensor:
    """Return the integrated gradients from ``start`` to ``end``, in float64.

    With ``power`` above 1, the points are dense near ``start``.
    """
    import torch

    step, total = end - start, torch.zeros_like(end, dtype=torch.float64)
    places, weights = np.polynomial.legendre.leggauss(POINTS)
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        # t = u^p, so dt = p u^(p-1) du.
        weight = weight * power * place ** (power - 1)
        point = (start + float(place**power) * step).requires_grad_()
        (slope,) = torch.autograd.grad(score_of(point), point)
        total += weight * (slope * step).double()
    return total


def _sum_words(
    predictor: Predictor, text: str, values: Contributions
) -> tuple[list[dict[str, Any]], float]:
    """Return the contribution of each word of ``text``, and of tokens that belong to no word."""
    offsets = predictor.chat.text_tokenizer.tokenizer(text, return_offsets_mapping=True)
    words = [*re.finditer(r"\S+", text)]
    word_of = {place: n for n, word in enumerate(words) for place in range(*word.span())}
    sums = np.zeros(len(words) + 1)
    # The text may be truncated.
    for (first, end), value in zip(offsets["offset_mapping"], values, strict=False):
        # Offsets of some tokenizers begin with the space before the word.
        sums[word_of.get(end - 1, len(words)) if end > first else len(words)] += value
    named = zip(words, sums[:-1].tolist(), strict=True)
    return [{"word": word[0], "contribution": value} for word, value in named], float(sums[-1])


def _explain_fasttext(
    predictor: Predictor, batch: TreeBatch, index: int
) -> tuple[float, float, Contributions]:
    """Return the exact contributions of fastText, a linear classifier of a mean over the places."""
    import torch

    network, head = predictor.network, predictor.network.model.score
    with torch.no_grad():
        states_NH = network.hidden(batch).double()
        total_N = states_NH @ head.weight[index].double() / len(batch.tree.examples[0])
        score = float(network.row_scores(batch)[0, index])
    return score, head.bias[index].item(), _to_last_character(batch, total_N.cpu().numpy())


def _explain_tfidf(
    predictor: Predictor, batch: TreeBatch, index: int
) -> tuple[float, float, Contributions]:
    """Return the exact contributions of TF-IDF: the feature of a term times the weight of the term,
    in equal parts for all places of the term."""
    import torch

    network, model = predictor.network, predictor.network.model
    ids_RT = batch.ids_N[torch.from_numpy(batch.tree.node_M)][None]
    with torch.no_grad():
        mask_RT = torch.ones_like(ids_RT)
        feature_V = model.model.row_features(ids_RT, mask_RT).to_dense()[0].double()
        start_RT, word_K, pair_K, paired_K = model.model.known_terms(ids_RT, mask_RT)
        terms = torch.cat([word_K, pair_K[paired_K]])
        count_V = torch.bincount(terms, minlength=len(feature_V)).clamp(min=1)
        value_V = feature_V / count_V * model.score.weight[index].double()
        value_K = value_V[word_K] + value_V[pair_K] * paired_K
        total_M = torch.zeros(ids_RT.shape[1], dtype=torch.float64, device=value_K.device)
        total_M[start_RT[0]] = value_K
        score = float(network.row_scores(batch)[0, index])
    total_N = np.zeros(len(batch.tree.ids_N))
    total_N[batch.tree.node_M] = total_M.cpu().numpy()
    return score, model.score.bias[index].item(), _to_last_character(batch, total_N)


def _to_last_character(batch: TreeBatch, total_N: Contributions) -> Contributions:
    """Return the contributions at the character behind the start of each word.

    The start is a token of its own, with no character of the text.
    """
    node_M, moved_N = batch.tree.node_M, np.zeros_like(total_N)
    moved_N[node_M[1:]] = total_N[node_M[:-1]]
    return moved_N


_LINEAR: Mapping[str, Callable[[Predictor, TreeBatch, int], tuple[float, float, Contributions]]] = {
    "fasttext": _explain_fasttext,
    "tfidf": _explain_tfidf,
}
"""Explanations of linear classifiers by type of the network."""


def _explain_image(
    predictor: Predictor, batch: TreeBatch, index: int, pictures: bool
) -> dict[str, Any]:
    """Return the scores of the image and of the mean colour, and the contribution of each cell."""
    import torch

    network: Network = predictor.network
    processor: Any = predictor.chat.media

    def score_of(pixels: Tensor) -> Tensor:
        return network.row_scores(replace(batch, plan=pixels)).float()[0, index]

    end: Any = batch.plan
    start = torch.zeros_like(end)
    # Group norms scale a nearly constant image up, so the score jumps close to the mean colour.
    total_HW = _integrate(score_of, start, end, power=4)[0].sum(0).cpu().numpy()
    with torch.no_grad():
        score, baseline = float(score_of(end)), float(score_of(start))
    high, wide = total_HW.shape
    rows, columns = (
        np.linspace(0, size, min(CELLS, size) + 1).astype(int) for size in (high, wide)
    )
    cells = np.add.reduceat(np.add.reduceat(total_HW, rows[:-1], 0), columns[:-1], 1)
    found = {"score": score, "baseline_score": baseline, "cells": cells.tolist()}
    if pictures:
        found["picture"] = _heat_map(processor.to_pixels(end[0].float().cpu().numpy()), cells)
    return found


def _heat_map(pixels: NDArray[np.uint8], cells: NDArray[np.float64]) -> str:
    """Return the image next to the image under its cells as an address: blue raises the score of the
    label, red lowers the score."""
    from PIL import Image

    size = pixels.shape[1], pixels.shape[0]
    # Cells, because the gradients of single pixels are noise.
    smooth = Image.fromarray((cells / (np.abs(cells).max() or 1)).astype(np.float32))
    strength = np.asarray(smooth.resize(size, Image.Resampling.BICUBIC)).clip(-1, 1)[..., None]
    colour = np.where(strength > 0, np.array([30, 90, 255]), np.array([235, 40, 40]))
    grey = pixels.mean(-1, keepdims=True) * 0.6 + 100
    share = np.abs(strength) ** 0.7 * 0.8
    marked = (grey * (1 - share) + colour * share).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, marked], axis=1)).save(stream, format="PNG")
    return png_address(stream.getvalue())
