"""The parity gate: a custom model is stored only if what is on disk is what was trained.

The saved files are loaded as serving loads them, adapters merged, and the loss on held-out rows is
compared with that of the network in memory. A whole network must give the same loss. A merged
adapter differs by the rounding of each merged weight, half a percent of the loss at most as seen so
far (rounding to nearest, which forgets, gives three to eleven). (The saved adapter itself is compared
bit for bit, by the engine.) Of a network that writes, the probabilities of the next token at places of
these rows are compared, too: :func:`learned_logps`.

A backend that computes with other kernels, or from a file with weights of another type, is compared
with torch token by token: :func:`compare_backends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.errors import LuthierError

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
MOST_LOGPS = 1 << 23
"""Log-probabilities of one network that are held for the comparison."""


@dataclass(frozen=True)
class TokenParity:
    """How a network answers beside another that should be the same."""

    tokens: int
    """Tokens that were compared, each behind the same ones."""
    agreement: float
    """Share of them of which both name the same one as likeliest."""
    mean_kl: float
    """KL divergence of the next token, in nats, on average."""
    max_kl: float

    @staticmethod
    def of(logp_NV: Tensor, other_NV: Tensor) -> TokenParity:
        """From log-probabilities of both at the same ``N`` places, at least one."""
        kl_N = (logp_NV.double().exp() * (logp_NV.double() - other_NV.double())).sum(-1)
        same_N = logp_NV.argmax(-1) == other_NV.argmax(-1)
        return TokenParity(
            len(kl_N), float(same_N.double().mean()), float(kl_N.mean()), float(kl_N.max())
        )


def learned_logps(network: Network, examples: Sequence[Example], budget: int) -> Tensor:
    """Log-probabilities ``[P, V]`` of the token behind the first ``P`` places that carry loss.

    There are as many places as :data:`MOST_LOGPS` allows; micro-batches have ``budget`` tokens.
    """
    import torch

    network.model.eval()
    parts: list[Tensor] = []
    left = max(1, MOST_LOGPS // len(network.head_VH))
    with torch.no_grad():
        for batch in network.batches(examples, budget):
            if not left:
                break
            if len(batch.child_E):  # of prompts alone nothing is learned
                place_S = batch.source_S.unique()[:left]
                logits_SV = network.logits(network.hidden(batch)[place_S]).float()
                parts.append(torch.log_softmax(logits_SV, -1).cpu())
                left -= len(place_S)
    return torch.cat(parts) if parts else torch.empty(0, 0)


@dataclass(frozen=True)
class Parity:
    """Loss on the same rows before and after saving, in nats per learned token."""

    rows: int
    trained: float
    reloaded: float
    rounded: bool = False
    """Whether weights were merged and rounded on the way."""
    next_tokens: TokenParity | None = None
    """Of a network that writes, what it says next in these rows."""

    def check(self) -> None:
        """Refuse a model that does not answer as the trained network does."""
        allowed = ROUNDED if self.rounded else SAME
        if not abs(self.trained - self.reloaded) <= allowed * max(1.0, abs(self.trained)):
            raise LuthierError(
                f"the saved model is not the trained one: loss {self.reloaded:.4f} after reloading, "
                f"{self.trained:.4f} before, on {self.rows} rows. It was not stored; the run and its "
                "checkpoints are kept."
            )
        most = ROUNDED_KL if self.rounded else SAME_KL
        if self.next_tokens is not None and not self.next_tokens.mean_kl <= most:
            raise LuthierError(
                f"the saved model is not the trained one: the probabilities of its next token are "
                f"{self.next_tokens.mean_kl:.2g} nats away, where {most:g} is rounding, and the "
                f"likeliest is the same at {self.next_tokens.agreement:.1%} of "
                f"{self.next_tokens.tokens} places. It was not stored; the run and its checkpoints "
                "are kept."
            )


def compare_backends(
    reference: Backend, other: Backend, prompts: Sequence[IntArray], tokens: int
) -> TokenParity:
    """Both read what ``reference`` writes behind each prompt, its likeliest ``tokens`` tokens.

    All sequences step together. What was opened in the backends is freed.
    """
    import torch

    from luthier.models.backends import read_prompts

    backends = (reference, other)
    states: list[list[State]] = [[] for _ in backends]
    logits_RV = [torch.empty(0) for _ in backends]
    found: list[TokenParity] = []
    try:
        for which, backend in enumerate(backends):
            states[which], logits_RV[which] = read_prompts(backend, prompts, 1)
        for place in range(tokens):
            logp_RV, other_RV = (torch.log_softmax(each.double().cpu(), -1) for each in logits_RV)
            found.append(TokenParity.of(logp_RV, other_RV))
            chosen_R = logp_RV.argmax(-1)
            if place + 1 < tokens:
                logits_RV = [
                    backend.step(own, chosen_R.tolist())
                    for backend, own in zip(backends, states, strict=True)
                ]
    finally:
        for backend, own in zip(backends, states, strict=True):
            for state in own:
                backend.free(state)
    # Each step has as many sequences.
    return TokenParity(
        sum(each.tokens for each in found),
        sum(each.agreement for each in found) / len(found),
        sum(each.mean_kl for each in found) / len(found),
        max(each.max_kl for each in found),
    )
