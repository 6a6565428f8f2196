"""Whether a model answers here as it did when it was trained.

The record of a model that writes has what it wrote greedily behind a few prompts
(:class:`~luthier.models.manifest.ReferenceAnswer`). A server that has it ready asks the same, through
all that its clients' requests go through: template, tokenizer, batches, adapters, backend. What lies
between are another machine, other versions of libraries, merged or stacked adapters and other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.errors import LuthierError
from luthier.models.backends import chosen_backend
from luthier.models.manifest import ReferenceAnswer
from luthier.serving.derived_gguf import gguf_type
from luthier.serving.gguf_parity import largest_divergence
from luthier.serving.inference import TOP_LOGPROBS, Chat, GenerationRequest
from luthier.serving.pool import ModelPool
from luthier.store.models import StoredModel
from luthier.types import Message

SAME_DIVERGENCE = 0.02
"""Nats a token beyond which a model in torch is refused: 5e-12 was seen on the processor that trained
it, and 0.12 between two adapters of a dozen steps each (docs/log/service.md)."""


class NotAsTrained(LuthierError):
    """A model that answers otherwise than the one that was trained."""


@dataclass(frozen=True)
class ServedParity:
    """How answers here stand beside those of the trained network."""

    tokens: int
    """Places that were compared: of each prompt those up to the first other token."""
    agreement: float
    """Share of them with the same token."""
    divergence: float
    """Half the mean squared difference of the log-probabilities of the trained network's tokens, which
    is their KL divergence to the second order, in nats."""
    first_difference: str = ""
    """Prompt, place and both tokens, where there is one."""

    def describe(self) -> str:
        """In words."""
        text = (
            f"the same token at {self.agreement:.1%} of {self.tokens} places, {self.divergence:.2g} "
            "nats a token apart"
        )
        return f"{text}; {self.first_difference}" if self.first_difference else text


def check_served(pool: ModelPool, stored: StoredModel) -> ServedParity | None:
    """Ask a model that is in memory what its record has, and compare; ``None`` where that has nothing.

    Raises:
        NotAsTrained: with the first other token, where it is further away than rounding takes it.
        InferenceFailed: where it cannot be asked now.
    """
    reference = stored.manifest.reference
    if not reference:
        return None
    for answer in reference:
        ids = pool.encode(stored.id, _prompt(answer))
        if list(ids) != answer.prompt_ids:
            raise NotAsTrained(
                f"the prompt {answer.prompt!r} becomes other tokens than in training: its template or "
                "tokenizer has changed"
            )
    parity = measure_served(pool, stored.id, reference)
    allowed = SAME_DIVERGENCE
    if chosen_backend().open_file is not None:
        allowed += largest_divergence(gguf_type())
    if not parity.divergence <= allowed:
        raise NotAsTrained(
            f"its answers are not those of the trained model: {parity.describe()}, where {allowed:g} "
            "is rounding"
        )
    return parity


def measure_served(
    pool: ModelPool, model_id: str, reference: Sequence[ReferenceAnswer]
) -> ServedParity:
    """Ask all prompts at once, and compare the answers token by token."""
    streams = [
        pool.submit(
            model_id,
            GenerationRequest(
                _prompt(answer), max_tokens=len(answer.ids), temperature=0.0,
                top_logprobs=TOP_LOGPROBS,
            ),
        )
        for answer in reference
    ]  # fmt: skip
    same: list[bool] = []
    apart: list[float] = []
    difference = ""
    for answer, stream in zip(reference, streams, strict=True):
        (result,) = stream.whole()
        scores = [*result.reasoning_scores, *result.scores]
        texts = pool.token_bytes(model_id, answer.ids)
        for place, (own, logp) in enumerate(zip(texts, answer.logps, strict=True)):
            if place >= len(scores):  # it ended its reply, and tells nothing of that place
                same.append(False)
                difference = difference or _difference(answer, place, own, "the end of the reply")
                break
            score = scores[place]
            same.append(score.text == own)
            likely = dict(score.top)
            here = score.logprob if same[-1] else likely.get(own, min(likely.values()))
            apart.append(here - logp)
            if not same[-1]:
                other = f"{score.text.decode(errors='replace')!r}, {score.logprob - here:.2g} nats"
                difference = difference or _difference(answer, place, own, f"{other} likelier")
                break
    squares = np.square(apart) if apart else np.array([np.inf])
    return ServedParity(len(same), float(np.mean(same)), float(squares.mean()) / 2, difference)


def _prompt(answer: ReferenceAnswer) -> Chat:
    return Chat((Message("user", answer.prompt),))


def _difference(answer: ReferenceAnswer, place: int, own: bytes, other: str) -> str:
    return (
        f"behind {answer.prompt!r} token {place + 1} was {own.decode(errors='replace')!r} in training, "
        f"and here is {other}"
    )
