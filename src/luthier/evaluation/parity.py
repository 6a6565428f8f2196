"""The parity gate: a custom model is stored only if what is on disk is what was trained.

The saved files are loaded as serving loads them, and held beside the network in memory:

- the loss on held-out rows. A whole network must give the same. A merged adapter differs by the
  rounding of each merged weight, half a percent of the loss at most as seen so far (rounding to
  nearest, which forgets, gives three to eleven). The saved adapter itself is compared bit for bit, by
  the engine;
- of a network that writes, the probabilities of the next token at places of these rows;
- and along what it writes greedily behind a few prompts, step by step, as it is served: merged, and
  where serving lets the adapter stand beside its base, so, too.

A backend that computes with other kernels, or from a file with weights of another type, is compared
with torch in the same way: :func:`compare_backends`. All of them add up their places in a
:class:`TokenComparison`, which also finds the first place where another token is likeliest.
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

    from luthier.models.backends import Backend, State
    from luthier.models.network import Network
    from luthier.types import Example, IntArray

SAME = 0.005
"""Largest difference for a network saved as it is, in nats per token or as a share of the loss."""
ROUNDED = 0.03
"""The same for an adapter that is merged into weights of fewer than 32 bits."""
SAME_KL = 1e-3
"""Largest mean KL divergence of the next token, in nats, for a network saved as it is; 7e-12 was seen
of a merge in float32."""
ROUNDED_KL = 0.03
"""The same where merged weights are rounded: 0.0011 was seen, where the base itself is 3.2 away."""
STEPPED_KL = 5e-3
"""The same where nothing is merged, but an adapter steps beside its base in fewer than 32 bits: 1.4e-4
was seen."""
OWN_ROUNDING = 10.0
"""Times the rounding of the base itself that a custom model may be from the trained network, where that
is more than the limits above: sharp logits carry the rounding further."""
TAIL = 10.0
"""Times the limit that the mean divergence may be where the median place is within the limit. In
mixtures of experts rounding gives single tokens other experts: 0.15 nats were seen on average and 0.002
at the median place, where an adapter that is lost moves both by 0.5."""
MOST_LOGPS = 1 << 23
"""Log-probabilities of one network that are held for the comparison."""
GREEDY_TOKENS = 16
"""Tokens that are written behind each prompt."""
PROMPT_TOKENS = 128
"""Tokens of a prompt that are read at most: the first ones."""
REFERENCE_PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a dog that finds a key.",
    "Compute 12345 + 6789, and say how you did it.",
    "def add(a, b):\n    return a + b\n\nWhat does this  do?",
    "Wie heißt der höchste Berg der Welt? Est-ce l’Everest ?",
    "北京在哪里? どこですか 🙂",
)
"""What every model that writes can be tried with: words, numbers, code with its spaces, other
scripts."""


class TokenComparison:
    """Adds up, place by place, how a network and another find the next token."""

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
        """A place with what both find likeliest and by how much, as :class:`TokenDifference` says.

        ``kl`` is ``None`` where the divergence is not known.
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
        """Whether no divergence is known of any place."""
        return not self._kl

    def parity(self) -> TokenParity:
        """What it comes to, of one divergence at least."""
        return TokenParity(
            tokens=len(self._same),
            agreement=float(np.mean(self._same)),
            mean_kl=float(np.mean(self._kl)),
            max_kl=float(np.max(self._kl)),
            median_kl=float(np.median(self._kl)),
            first_difference=self._first,
        )


@dataclass(frozen=True, eq=False)
class LearnedLogps:
    """Log-probabilities of the token behind places that carry loss."""

    places: list[tuple[int, int]]
    """Row and position of that token."""
    logp_PV: Tensor

    def beside(self, other: LearnedLogps) -> TokenParity:
        """How another network gives the same places."""
        comparison = TokenComparison()
        comparison.add_logps(self.places, self.logp_PV, other.logp_PV)
        return comparison.parity()


def learned_logps(
    network: Network, examples: Sequence[Example], budget: int
) -> LearnedLogps | None:
    """Of the first places that carry loss, as many as :data:`MOST_LOGPS` allows.

    ``None`` where there are none. Micro-batches have ``budget`` tokens.
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
    return LearnedLogps([(row, at + 1) for row, at in places], torch.cat(parts)) if parts else None


@dataclass(frozen=True, eq=False)
class GreedyText:
    """What a network writes greedily behind a few prompts, which others are held beside."""

    prompts: Sequence[IntArray]
    tokens: list[list[int]]
    """Behind each prompt; one that ends a reply is the last."""
    logps: list[Tensor]
    """``[T, V]`` of each prompt: what the network gives each next token."""


def write_greedily(
    backend: Backend, prompts: Sequence[IntArray], count: int, stop_ids: Collection[int] = ()
) -> GreedyText:
    """The likeliest ``count`` tokens behind each prompt, of which one of ``stop_ids`` is the last."""
    import torch

    text = GreedyText(prompts, [[] for _ in prompts], [])
    logps: list[list[Tensor]] = [[] for _ in prompts]

    def choose(row: int, logp_V: Tensor) -> int | None:
        token = int(logp_V.argmax())
        logps[row].append(logp_V)
        text.tokens[row].append(token)
        return None if len(text.tokens[row]) == count or token in stop_ids else token

    _follow(backend, prompts, choose)
    text.logps.extend(map(torch.stack, logps))
    return text


def compare_greedy(text: GreedyText, backend: Backend) -> TokenParity:
    """How ``backend`` goes on in each place of ``text``, which it reads step by step.

    As far as it agrees it would have written the same. Behind another token it reads on in ``text``, so
    that one near tie counts once.
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
    """Both read what ``reference`` writes behind each prompt, its likeliest ``tokens`` tokens.

    What was opened in the backends is freed.
    """
    return compare_greedy(write_greedily(reference, prompts, tokens), other)


def _follow(
    backend: Backend,
    prompts: Sequence[IntArray],
    choose: Callable[[int, Tensor], int | None],
) -> None:
    """Step all sequences together; ``choose`` gives the next token of a row, or ``None`` at its end."""
    import torch

    from luthier.models.backends import read_prompts

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
    """Prompts of ``examples``: what stands before the first learned token, or half of raw text.

    Different ones, ``count`` at most, each of ``room`` tokens at most.
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
    """Refuse a model that does not answer as the trained network does.

    ``text_of`` gives the text of a token for the message. ``base_rounding`` measures how far the next
    tokens of the base are from its own in float32; it is called for a model of rounded weights beyond
    the usual limits.

    Raises:
        LuthierError: with the difference.
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
        f"the saved model is not the trained one: {reason}{next(filter(None, texts), '')}. It was not "
        "stored; the run and its checkpoints are kept.",
        rule="model.not_saved",
    )


def _difference(parity: Parity, rounding: TokenParity | None) -> str:
    """Return the first difference that is more than rounding; empty if there is none."""
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
        ("in these rows", parity.next_tokens, most),
        ("along what it writes greedily", parity.greedy, most),
        ("along what it writes greedily beside its base", parity.greedy_beside_base, stepped),
    ):
        if found is None:
            continue
        typical, tail = found.mean_kl, limit
        if parity.rounded and found.median_kl is not None:
            typical, tail = found.median_kl, TAIL * most
            if rounding is not None:
                limit = max(limit, OWN_ROUNDING * (rounding.median_kl or 0.0))
        if not (typical <= limit and found.mean_kl <= max(tail, limit, own)):
            return f"{where} {found.describe()}, where {limit:g} is rounding"
    return ""
