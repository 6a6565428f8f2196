"""Drawing completions from the network that is being trained.

The weights are the very ones of the next step, adapters and soft prompts in place: nothing is copied,
merged or exported. How rows are run is in :mod:`luthier.models.decoding`.

A token is drawn where its cumulated probability passes a uniform number. All these numbers are drawn
before the first token, one for each place a token can come to: a completion does not depend on which
rows are run beside it or when they end, up to the rounding of matrix products of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.models import decoding, heads
from luthier.models.packing import packed, packed_weight
from luthier.models.prefix import prefix_tokens

if TYPE_CHECKING:
    from luthier.models.network import Network
    from luthier.types import FloatArray, IntArray

SHRINK = 0.75
"""Ended rows leave the batch once no more than this share of it is still written."""


@dataclass(frozen=True)
class Completion:
    """What the network wrote behind a prompt."""

    ids_T: IntArray
    """Its tokens, the stop token last where there is one."""
    logp_T: FloatArray
    """Log-probability of each under ``softmax(logits / temperature)`` over the whole vocabulary (under
    ``softmax(logits)`` where the temperature is 0): what a trainer that divides logits by the
    temperature computes again. ``top_p`` narrows what is drawn, not what is told here."""
    stopped: bool
    """Whether a stop token ended it, and not the limit of tokens."""


@dataclass(frozen=True)
class _Choice:
    """How the next token is chosen."""

    temperature: float
    top_p: float

    def __call__(self, logits_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        """Token and log-probability for each row."""
        logits_RV = logits_RV.float()
        if self.temperature not in (0.0, 1.0):
            logits_RV = logits_RV / self.temperature
        logp_RV = torch.log_softmax(logits_RV, -1)
        if self.temperature == 0:
            token_R = logits_RV.argmax(-1)
        else:
            token_R = draw(nucleus(logp_RV.exp(), self.top_p), uniform_R)
        return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def nucleus(probability_RV: Tensor, top_p: float) -> Tensor:
    """Zero for all but the most likely tokens that together reach ``top_p`` (Holtzman et al. 2020)."""
    if top_p >= 1:
        return probability_RV
    ordered_RV, index_RV = probability_RV.sort(-1, descending=True)
    # The first token whose predecessors already reach top_p, and all after it, are left out.
    ordered_RV[ordered_RV.cumsum(-1) - ordered_RV >= top_p] = 0.0
    return torch.zeros_like(probability_RV).scatter_(-1, index_RV, ordered_RV)


def draw(weight_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at which the cumulated weights pass ``uniform_R`` (in [0, 1)) of their sum.

    One number a row, where ``torch.multinomial`` takes one for each token of the vocabulary. A token
    of weight 0 is never drawn.
    """
    sum_RV = weight_RV.cumsum(-1)
    total_R1 = sum_RV[:, -1:]
    below_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    at_R1 = torch.minimum((uniform_R[:, None] * total_R1).to(sum_RV.dtype), below_R1)
    return torch.searchsorted(sum_RV, at_R1, right=True)[:, 0]


@torch.no_grad()
def sample(
    network: Network,
    prompts: Sequence[IntArray],
    count: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[Completion]]:
    """``count`` completions of each of ``prompts`` (token ids), in their order.

    Runs in eval mode, without gradients, and leaves each module in the mode it found it in. At most
    ``batch_size`` rows are run at once; ``done`` hears how many are finished. ``generator`` is torch's
    global one where none is given, which checkpoints keep. Temperature 0 takes the most likely token.

    Raises:
        RecipeError: where the network writes no text, a prompt is empty or leaves no room in the
            context, or a setting means nothing.
    """
    _check(network, prompts, count, max_tokens, temperature, top_p)
    choice = _Choice(temperature, top_p)
    rows = len(prompts) * count
    uniform_RT = torch.empty(rows, 0)
    if temperature > 0:
        device = "cpu" if generator is None else generator.device
        uniform_RT = torch.rand(
            rows, max_tokens, dtype=torch.float64, generator=generator, device=device
        ).to(network.device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=network.device)
    found: list[list[Completion]] = [[] for _ in prompts]
    finished = 0
    with _answering(network.model), packed(network.model):
        for indices, first, copies in _parts([len(p) for p in prompts], count, batch_size):
            row_R = np.concatenate([i * count + first + np.arange(copies) for i in indices])
            written = _write(
                network,
                [prompts[index] for index in indices],
                copies,
                choice,
                uniform_RT[torch.from_numpy(row_R).to(network.device)],
                max_tokens,
                stops,
            )
            for place, completion in enumerate(written):
                found[indices[place // copies]].append(completion)
            finished += len(written)
            done(finished)
    return found


def _parts(
    lengths: Sequence[int], count: int, batch_size: int
) -> Iterator[tuple[list[int], int, int]]:
    """Which prompts are run together, from which of their completions on, and how many of each."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    together = max(1, batch_size // count)
    for start in range(0, len(order), together):
        for first in range(0, count, batch_size):
            yield order[start : start + together], first, min(batch_size, count - first)


def _write(
    network: Network,
    prompts: Sequence[IntArray],
    copies: int,
    choice: _Choice,
    uniform_RT: Tensor,
    max_tokens: int,
    stops: Tensor,
) -> list[Completion]:
    """``copies`` completions of each prompt, side by side."""
    rows, hidden_BH = decoding.begin(network, prompts, copies, max_tokens)
    count, device = len(prompts) * copies, network.device
    ids_RT = torch.zeros(count, max_tokens, dtype=torch.int64, device=device)
    logp_RT = torch.zeros(count, max_tokens, device=device)
    length_R = torch.full((count,), max_tokens, device=device)
    stopped_R = torch.zeros(count, dtype=torch.bool, device=device)
    row_B = torch.arange(count, device=device)  # which row each of the batch is
    for step in range(max_tokens):
        uniform_B = uniform_RT[row_B, step] if choice.temperature > 0 else uniform_RT
        token_B, logp_B = choice(_logits(network, hidden_BH), uniform_B)
        ids_RT[row_B, step], logp_RT[row_B, step] = token_B, logp_B
        ends_B = torch.isin(token_B, stops) & ~stopped_R[row_B]
        length_R[row_B[ends_B]] = step + 1
        stopped_R[row_B[ends_B]] = True
        alive_B = ~stopped_R[row_B].cpu().numpy()
        if step + 1 == max_tokens or not alive_B.any():
            break
        if alive_B.sum() <= SHRINK * len(alive_B):
            kept = torch.from_numpy(rows.keep(alive_B)).to(device)
            row_B, token_B = row_B[kept], token_B[kept]
        hidden_BH = rows.step(token_B)
    lengths, stopped = length_R.tolist(), stopped_R.tolist()
    ids, logp = ids_RT.cpu().numpy(), logp_RT.cpu().numpy()
    return [
        Completion(ids[row, :size].copy(), logp[row, :size].copy(), stopped[row])
        for row, size in enumerate(lengths)
    ]


def _logits(network: Network, hidden_BH: Tensor) -> Tensor:
    """Scores of every token of the vocabulary, ``[B, V]``."""
    head = packed_weight(network.model.get_output_embeddings())
    if head is None:
        return network.logits(hidden_BH)
    return head.product(network.before_vocabulary(hidden_BH))


def _check(
    network: Network,
    prompts: Sequence[IntArray],
    count: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    if count < 1 or max_tokens < 1:
        raise RecipeError("completions and their tokens must be at least 1")
    if not 0 <= temperature < math.inf:
        raise RecipeError("temperature must be 0 or more")
    if not 0 < top_p <= 1:
        raise RecipeError("top-p must be above 0 and at most 1")
    model = network.model
    if heads.task_of(model) != "causal_lm" or network.both_ways:
        raise RecipeError(
            f"networks of type {model.config.model_type} with this head do not write text, so "
            "there is nothing to sample. Take a base model that generates."
        )
    before = prefix_tokens(model) + len(heads.prompt_ids(model))
    context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
    beside = heads.decoder_of(model) is not None  # the encoder's prompt takes no room
    for index, prompt_T in enumerate(prompts):
        sizes = [before + len(prompt_T), max_tokens]
        if not len(prompt_T):
            raise RecipeError(f"prompt {index + 1} has no tokens to go on from")
        if (max(sizes) if beside else sum(sizes)) > context:
            raise RecipeError(
                f"prompt {index + 1} has {sizes[0]} tokens; with {max_tokens} for the completion that "
                f"is more than the model's context of {context}. Shorten it, or allow fewer tokens."
            )


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """The network in eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
