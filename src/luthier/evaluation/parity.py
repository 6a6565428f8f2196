"""Parity check: a custom model is stored only if the saved files compute like the trained network.

The saved files are loaded as in inference and compared with the network in memory:

- Loss on held-out rows. A whole network must give the same loss. A merged adapter differs by the
  rounding of each merged weight, so far by at most half a percent of the loss. (Rounding to
      nearest,
  which loses the adapter, gives 3 to 11 percent.) The engine compares the saved adapter bit for
      bit.
- Next-token probabilities at positions of the held-out rows, for decoders.
- Greedy generation after a few prompts, step by step as in inference: merged, and with a separate
  adapter if inference supports the adapter.

:func:`compare_backends` compares a backend with other kernels or weight types with torch in the
same way. A :class:`TokenComparison` accumulates the positions and finds the first position with a
different most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luthier.errors import LuthierError
from luthier.models.manifest import Parity, TokenDifference, TokenParity

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.decoding.backends import Backend, State
    from luthier.models.networks.network import Network
    from luthier.types import Example, IntArray

SAME = 0.005
"""Maximum difference for an unmerged network, in nats per token or as a share of the loss."""
ROUNDED = 0.03
"""Maximum difference for an adapter merged into weights of fewer than 32 bits."""
SAME_KL = 1e-3
"""Maximum mean KL divergence of the next token for an unmerged network, in nats. A merge in float32
measured 7e-12."""
ROUNDED_KL = 0.03
"""Maximum KL divergence for rounded merged weights, in nats. Measured: 0.0011; the base measures
3.2."""
STEPPED_KL = 5e-3
"""Maximum KL divergence for a separate adapter in fewer than 32 bits, in nats. Measured: 1.4e-4."""
OWN_ROUNDING = 10.0
"""Maximum ratio between the model's divergence and the rounding of its base, if the limit is larger
than the limits above: sharp logits amplify rounding."""
TAIL = 10.0
"""Maximum ratio between the mean divergence and the limit, if the median is within the limit. In
mixtures of experts, rounding sends single tokens to different experts: measured 0.15 nats on
average and 0.002 at the median. A lost adapter moves both by 0.5."""
MOST_LOGPS = 1 << 23
"""Maximum number of log-probabilities in memory for the comparison."""
GREEDY_TOKENS = 16
"""Number of tokens generated after each prompt."""
PROMPT_TOKENS = 128
"""Maximum length of a prompt, in tokens. Longer prompts are truncated at the end."""
REFERENCE_PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a dog that finds a key.",
    "Compute 12345 + 6789, and say how you did it.",
    "def add(a, b):\n    return a + b\n\nWhat does this  do?",
    "Wie heißt der höchste Berg der Welt? Est-ce l’Everest ?",
    "北京在哪里? どこですか 🙂",
)
"""Prompts for any decoder: words, numbers, code with indentation, other scripts."""


class TokenComparison:
    """Accumulates differences between the next-token predictions of two networks."""

    def __init__(self) -> None:
        self._same: list[bool] = []
        self._kl: list[float] = []
        self._first: TokenDifference | None = None

    def add(
        self,
        row: int,
        position: int,
        tokens: tuple[int, int],
        margins: tuple[float, float | None],
        kl: float | None,
    ) -> None:
        """Add a position.

        Args:
            tokens: most likely token of each network.
            margins: lead of the most likely token, as in :class:`TokenDifference`.
            kl: KL divergence; ``None`` if unknown.
        """
        self._same.append(tokens[0] == tokens[1])
        if kl is not None:
            self._kl.append(kl)
        first = self._first
        if tokens[0] == tokens[1] or (first and (first.row, first.position) < (row, position)):
            return
        self._first = TokenDifference(
            row=row,
            position=position,
            token=tokens[0],
            other_token=tokens[1],
            margin=margins[0],
            other_margin=margins[1],
        )

    def add_logps(
        self, places: Sequence[tuple[int, int]], logp_NV: Tensor, other_NV: Tensor
    ) -> None:
        """``N`` places, each a row and a position, from the log-probabilities of both."""
        kl_N = (logp_NV.double().exp() * (logp_NV.double() - other_NV.double())).sum(-1)
        token_N1, other_N1 = (logp.argmax(-1, keepdim=True) for logp in (logp_NV, other_NV))
        margin_N1 = logp_NV.gather(-1, token_N1) - logp_NV.gather(-1, other_N1)
        back_N1 = other_NV.gather(-1, other_N1) - other_NV.gather(-1, token_N1)
        columns = (each.flatten().tolist() for each in (token_N1, other_N1, margin_N1, back_N1))
        for (row, position), kl, token, other, margin, back in zip(
            places, kl_N.tolist(), *columns, strict=True
        ):
            self.add(row, position, (token, other), (margin, back), kl)

    @property
    def is_empty(self) -> bool:
        """True without any KL divergence."""
        return not self._kl

    def parity(self) -> TokenParity:
        """Return the accumulated differences. Requires at least one KL divergence."""
        return TokenParity(
            tokens=len(self._same),
            agreement=float(np.mean(self._same)),
            mean_kl=float(np.mean(self._kl)),
            max_kl=float(np.max(self._kl)),
            median_kl=float(np.median(self._kl)),
            first_difference=self._first,
        )


@dataclass(frozen=True, eq=False)
class TargetLogps:
    """Log-probabilities of the tokens that carry loss."""

    places: list[tuple[int, int]]
    """Row and position of each token."""
    logp_PV: Tensor

    def beside(self, other: TargetLogps) -> TokenParity:
        """Compare with the log-probabilities of another network at the same positions."""
        comparison = TokenComparison()
        comparison.add_logps(self.places, self.logp_PV, other.logp_PV)
        return comparison.parity()


def target_logps(network: Network, examples: Sequence[Example], budget: int) -> TargetLogps | None:
    """Compute log-probabilities at the first positions that carry loss, up to :data:`MOST_LOGPS`.

    Args:
        budget: number of tokens per micro-batch.

    Returns:
        ``None`` if no position carries loss.
    """
    import torch

    network.model.eval()
    places: list[tuple[int, int]] = []
    parts: list[Tensor] = []
    left = max(1, MOST_LOGPS // len(network.head_VH))
    with torch.no_grad():
        for batch in network.batches(examples, budget):
            if not left:
                break
            if len(batch.child_E):  # of prompts alone nothing is learned
                place_S = batch.source_S.unique()[:left]
                logits_SV = network.logits(network.hidden(batch, place_S)).float()
                parts.append(torch.log_softmax(logits_SV, -1).cpu())
                places += [batch.tree.place_of(node) for node in place_S.tolist()]
                left -= len(place_S)
    return TargetLogps([(row, at + 1) for row, at in places], torch.cat(parts)) if parts else None


@dataclass(frozen=True, eq=False)
class GreedyReference:
    """Greedy generation after a few prompts: the reference of a comparison."""

    prompts: Sequence[IntArray]
    tokens: list[list[int]]
    """Tokens after each prompt, including a final stop token."""
    logps: list[Tensor]
    """``[T, V]`` log-probabilities of each prompt's tokens."""


def generate_greedily(
    backend: Backend, prompts: Sequence[IntArray], count: int, stop_ids: Collection[int] = ()
) -> GreedyReference:
    """Generate up to ``count`` tokens greedily after each prompt. ``stop_ids`` end a sequence."""
    import torch

    text = GreedyReference(prompts, [[] for _ in prompts], [])
    logps: list[list[Tensor]] = [[] for _ in prompts]

    def choose(row: int, logp_V: Tensor) -> int | None:
        token = int(logp_V.argmax())
        logps[row].append(logp_V)
        text.tokens[row].append(token)
        return None if len(text.tokens[row]) == count or token in stop_ids else token

    _follow(backend, prompts, choose)
    text.logps.extend(map(torch.stack, logps))
    return text


def compare_greedy(text: GreedyReference, backend: Backend) -> TokenParity:
    """Compare the next-token predictions of ``backend`` at each position of ``text``, step by step.

    After a different token, the comparison continues with the token of ``text``, so one near tie
    counts once.
    """
    comparison = TokenComparison()
    read = [0 for _ in text.prompts]

    def choose(row: int, logp_V: Tensor) -> int | None:
        at, own = read[row], text.tokens[row]
        place = row, len(text.prompts[row]) + at
        comparison.add_logps([place], text.logps[row][at][None], logp_V[None])
        read[row] += 1
        return own[at] if read[row] < len(own) else None

    _follow(backend, text.prompts, choose)
    return comparison.parity()


def compare_backends(
    reference: Backend, other: Backend, prompts: Sequence[IntArray], tokens: int
) -> TokenParity:
    """Compare two backends on the greedy generation of ``reference``, with ``tokens`` tokens per
    prompt.

    The sequences opened in the backends are freed.
    """
    return compare_greedy(generate_greedily(reference, prompts, tokens), other)


def _follow(
    backend: Backend,
    prompts: Sequence[IntArray],
    choose: Callable[[int, Tensor], int | None],
) -> None:
    """Step all sequences together. ``choose`` returns the next token of a row, or ``None`` at the
    end."""
    import torch

    from luthier.models.decoding.backends import read_prompts

    states: list[State] = []
    try:
        states, logits_RV = read_prompts(backend, prompts, 1)
        rows = [*range(len(prompts))]
        while rows:
            logp_RV = torch.log_softmax(logits_RV.float().cpu(), -1)
            chosen = {row: choose(row, logp_V) for row, logp_V in zip(rows, logp_RV, strict=True)}
            going = {row: token for row, token in chosen.items() if token is not None}
            rows = [*going]
            if rows:
                logits_RV = backend.step([states[row] for row in rows], [*going.values()])
    finally:
        for state in states:
            backend.free(state)


def greedy_prompts(examples: Sequence[Example], count: int, room: int) -> list[IntArray]:
    """Return prompts from ``examples``: the tokens before the first learned token, or half of raw
    text.

    The prompts are distinct: at most ``count`` prompts of at most ``room`` tokens.
    """
    found: dict[bytes, IntArray] = {}
    for example in examples:
        learned_N = np.flatnonzero(example.weight_T)
        if example.source_T is not None:
            ids_T = example.source_T
        elif not len(learned_N):
            ids_T = example.ids_T
        else:
            end = int(learned_N[0])
            ids_T = example.ids_T[: end if end > 1 else max(1, len(example) // 2)]
        ids_T = np.asarray(ids_T[: max(0, min(room, PROMPT_TOKENS))], dtype=np.int64)
        if len(ids_T) and len(found) < count:
            found.setdefault(ids_T.tobytes(), ids_T)
    return [*found.values()]


def check_parity(
    parity: Parity,
    text_of: Callable[[int], str] | None = None,
    base_rounding: Callable[[], TokenParity | None] = lambda: None,
) -> None:
    """Reject a model that differs from the trained network.

    Args:
        text_of: returns the text of a token, for the message.
        base_rounding: measures the distance of the base's next tokens from float32. Called only for
            models with rounded weights beyond the usual limits.

    Raises:
        LuthierError: the difference.
    """
    reason = _difference(parity, None)
    if reason and parity.rounded and (rounding := base_rounding()) is not None:
        reason = _difference(parity, rounding)
    if not reason:
        return
    compared = (parity.next_tokens, parity.greedy, parity.greedy_beside_base)
    far_first = sorted(filter(None, compared), key=lambda each: each.describe() not in reason)
    texts = (each.difference_text(text_of) for each in far_first)
    raise LuthierError(
        f"the saved model differs from the trained model: {reason}{next(filter(None, texts), '')}. The "
        "model is not stored; the run and the checkpoints are kept.",
        rule="model.not_saved",
    )


def _difference(parity: Parity, rounding: TokenParity | None) -> str:
    """Return the first difference beyond rounding; empty without a difference."""
    own = OWN_ROUNDING * rounding.mean_kl if rounding is not None else 0.0
    allowed = max((ROUNDED if parity.rounded else SAME) * max(1.0, abs(parity.trained)), own)
    if not abs(parity.trained - parity.reloaded) <= allowed:
        return (
            f"loss {parity.reloaded:.4f} after reloading, {parity.trained:.4f} before, on "
            f"{parity.rows} rows"
        )
    most = ROUNDED_KL if parity.rounded else SAME_KL
    stepped = STEPPED_KL if parity.rounded else most
    for where, found, limit in (
        ("on held-out rows", parity.next_tokens, most),
        ("in greedy generation", parity.greedy, most),
        ("in greedy generation with a separate adapter", parity.greedy_beside_base, stepped),
    ):
        if found is None:
            continue
        typical, tail = found.mean_kl, limit
        if parity.rounded and found.median_kl is not None:
            typical, tail = found.median_kl, TAIL * most
            if rounding is not None:
                limit = max(limit, OWN_ROUNDING * (rounding.median_kl or 0.0))
        if not (typical <= limit and found.mean_kl <= max(tail, limit, own)):
            return f"{where} {found.describe()}; the limit for rounding is {limit:g}"
    return ""
