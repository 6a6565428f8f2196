"""Choosing the next token of one sequence: penalties, constraint, temperature, draw."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.models.sampler import draw
from luthier.serving.inference import InferenceFailed, Request

if TYPE_CHECKING:
    from luthier.serving.constraints import Matcher
    from luthier.types import IntArray

COLDEST = 1e-6
"""Temperatures below are 0: logits are divided by them, and would be infinite."""
LIKELIEST = 1024
"""Where a draw is narrowed, so many tokens are looked at before all of them are sorted."""


class Chooser:
    """Chooses for one answer. What it chooses depends on its own logits and seed alone."""

    def __init__(
        self, request: Request, seed: int, index: int, prompt_T: IntArray, matcher: Matcher | None
    ) -> None:
        self._request, self.matcher = request, matcher
        self._random = random.Random(f"{seed}/{index}")
        self._written: Counter[int] = Counter()
        self._read = (
            torch.from_numpy(prompt_T).unique() if request.repetition_penalty != 1 else None
        )
        self._cold = request.temperature < COLDEST
        bias = request.logit_bias
        self._biased_N = torch.tensor([*bias], dtype=torch.int64)
        self._bias_N = torch.tensor([*bias.values()], dtype=torch.float32)
        self._penalised = bool(
            request.frequency_penalty or request.presence_penalty or request.logit_bias
        )

    @property
    def likeliest(self) -> bool:
        """Whether it always takes the highest logit, so that many can be looked at together."""
        plain = self.matcher is None and self._read is None and not self._penalised
        return plain and self._cold

    def choose(self, logits_V: Tensor) -> int:
        """The next token.

        Raises:
            InferenceFailed: where the network gave no numbers to choose by.
        """
        logits_V = self._changed(logits_V.float())
        if self._cold:
            token = int(logits_V.argmax())
        else:
            token = self._drawn(logits_V / self._request.temperature)
        if not 0 <= token < len(logits_V):
            raise InferenceFailed("ModelError", "The model gave no probabilities.")
        self.took(token)
        return token

    def took(self, token: int) -> None:
        """Remember a token that was chosen."""
        if self._penalised or self._read is not None:
            self._written[token] += 1

    def _changed(self, logits_V: Tensor) -> Tensor:
        request = self._request
        if self._penalised or self._read is not None or self.matcher is not None:
            logits_V = logits_V.clone()
        if len(self._biased_N):
            at, bias = self._biased_N.to(logits_V.device), self._bias_N.to(logits_V.device)
            logits_V.index_add_(0, at, bias)
        written = list(self._written)
        if self._read is not None:
            known = torch.cat([self._read, torch.tensor(written, dtype=torch.int64)]).unique()
            known = known.to(logits_V.device)
            given, penalty = logits_V[known], request.repetition_penalty
            logits_V[known] = torch.where(given > 0, given / penalty, given * penalty)
        if written and (request.frequency_penalty or request.presence_penalty):
            at = torch.tensor(written, device=logits_V.device)
            times = torch.tensor([float(self._written[i]) for i in written], device=at.device)
            logits_V[at] -= request.frequency_penalty * times + request.presence_penalty
        if self.matcher is not None:
            logits_V.masked_fill_(
                ~self.matcher.allowed(len(logits_V)).to(logits_V.device), -torch.inf
            )
        return logits_V

    def _drawn(self, logits_V: Tensor) -> int:
        request = self._request
        uniform = torch.tensor([self._random.random()], dtype=torch.float64, device=logits_V.device)
        probability_V = torch.softmax(logits_V, -1)
        if request.top_p >= 1 and not request.top_k and not request.min_p:
            return int(draw(probability_V[None], uniform))
        count = len(probability_V)
        first = min(request.top_k or LIKELIEST, count)
        kept_K, index_K = probability_V.topk(first)
        if not request.top_k and self._wants_more(kept_K):
            kept_K, index_K = probability_V.sort(descending=True)
        before_K = kept_K.cumsum(-1) - kept_K
        total = kept_K.sum() if request.top_k else 1.0
        # The likeliest is always kept, also for top_p = 0.
        out_K = (before_K >= request.top_p * total) | (kept_K < request.min_p * kept_K[0])
        out_K[0] = False
        at = int(draw(kept_K.masked_fill(out_K, 0.0)[None], uniform))
        return int(index_K[at]) if at < len(index_K) else count

    def _wants_more(self, kept_K: Tensor) -> bool:
        """Whether tokens beyond the likeliest ones may be drawn too."""
        request = self._request
        enough = float(kept_K.sum()) >= request.top_p
        return not enough and float(kept_K[-1]) >= request.min_p * float(kept_K[0])
