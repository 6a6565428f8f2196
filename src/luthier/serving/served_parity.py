"""Whether a model answers here as it did when it was trained.

The record of a model that writes has what it wrote greedily behind a few prompts
(:class:`~luthier.models.manifest.ReferenceAnswer`). A server that has it ready asks the same, through
all that its clients' requests go through: template, tokenizer, batches, adapters, backend. What lies
between are another machine, other versions of libraries, merged or stacked adapters and other kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from luthier.data.chat import DATE
from luthier.errors import LuthierError
from luthier.models.backends import chosen_backend
from luthier.models.manifest import ReferenceAnswer
from luthier.serving.derived_gguf import gguf_type
from luthier.serving.gguf_parity import largest_divergence
from luthier.serving.inference import (
    Chat,
    GenerationRequest,
    GenerationResult,
    InferenceFailed,
    InferenceRefused,
    Stream,
)
from luthier.serving.pool import ModelPool
from luthier.store.models import StoredModel
from luthier.types import Message, TemplateKwargs

_log = logging.getLogger("luthier.serving")
SAME_DIVERGENCE = 0.02
"""Nats a token beyond which a model in torch is refused: 5e-12 was seen on the processor that trained
it, and 0.12 between two adapters of a dozen steps each (docs/log/service.md)."""
_LIKELIEST = 5
"""Tokens that are told at each place; one that is not among them is taken as likely as the last."""


class NotAsTrained(LuthierError):
    """A model that answers otherwise than the one that was trained."""


@dataclass(frozen=True)
class ServedParity:
    """How answers here stand beside those of the trained network."""

    tokens: int
    """Places that were compared: of each prompt those up to the first other token, or the end."""
    agreement: float
    """Share of them with the same token."""
    divergence: float
    """Half the mean squared difference of the log-probabilities of the trained network's tokens, which
    is their KL divergence to the second order, in nats."""
    other_ends: int
    """Replies that end in another place than in training, where what was written before is the same."""
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
        NotAsTrained: with the first other token, where it is further away than rounding takes it, or
            where more than one reply ends elsewhere: a near tie may end one.
        InferenceFailed: where it cannot be asked now.
    """
    reference = stored.manifest.reference
    if not reference:
        return None
    try:
        for answer in reference:
            if pool.encode(stored.id, _prompt(answer)) != answer.prompt_ids:
                raise NotAsTrained(
                    f"the prompt {answer.prompt!r} becomes other tokens than in training: its template "
                    "or tokenizer has changed"
                )
        parity = measure_served(pool, stored.id, reference)
    except InferenceRefused as refused:  # by limits of this server
        _log.info("%s is not compared with what was trained: %s", stored.id, refused)
        return None
    allowed = SAME_DIVERGENCE
    if chosen_backend().open_file is not None:
        allowed += largest_divergence(gguf_type())
    if parity.other_ends > 1 or not parity.divergence <= allowed:
        ends = f"; {parity.other_ends} replies end elsewhere" if parity.other_ends else ""
        raise NotAsTrained(
            f"its answers are not those of the trained model: {parity.describe()}, where {allowed:g} "
            f"is rounding{ends}"
        )
    return parity


def measure_served(
    pool: ModelPool, model_id: str, reference: Sequence[ReferenceAnswer]
) -> ServedParity:
    """Ask all prompts at once, and compare the answers token by token."""
    results: list[GenerationResult] = []
    with ExitStack() as opened:
        streams: list[Stream] = []
        for answer in reference:
            # One token more than was written, to see whether it ends there.
            asked = GenerationRequest(
                _prompt(answer), max_tokens=len(answer.ids) + answer.stops, temperature=0.0,
                top_logprobs=_LIKELIEST,
            )  # fmt: skip
            try:
                streams.append(pool.submit(model_id, asked))
            except InferenceFailed as failed:
                if failed.code != "Throttling" or not streams:
                    raise
                # Fewer may wait than there are prompts.
                results += [stream.whole()[0] for stream in streams]
                streams = [pool.submit(model_id, asked)]
            opened.callback(streams[-1].close)
        results += [stream.whole()[0] for stream in streams]
    same: list[bool] = []
    apart: list[float] = []
    other_ends, difference = 0, ""
    for answer, result in zip(reference, results, strict=True):
        scores = [*result.reasoning_scores, *result.scores]
        texts = pool.token_bytes(model_id, answer.ids) if answer.ids else []
        for place, (own, logp) in enumerate(zip(texts, answer.logps, strict=True)):
            if place >= len(scores):
                other_ends += 1
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
        else:
            ended = result.reason == "stop" and len(scores) <= len(texts)
            same.append(ended == answer.stops or not answer.stops)
            if not same[-1]:
                other_ends += 1
                goes_on = "that the reply goes on"
                difference = difference or _difference(answer, len(texts), None, goes_on)
    divergence = float(np.square(apart).mean()) / 2 if apart else 0.0
    return ServedParity(len(same), float(np.mean(same)), divergence, other_ends, difference)


def _prompt(answer: ReferenceAnswer) -> Chat:
    # A server prints today's date, and the recorded tokens have the date of the training.
    printed: TemplateKwargs = {} if answer.date is None else {DATE: answer.date}
    return Chat((Message("user", answer.prompt),), template_kwargs=printed)


def _difference(answer: ReferenceAnswer, place: int, own: bytes | None, other: str) -> str:
    was = "the end of the reply" if own is None else repr(own.decode(errors="replace"))
    return f"behind {answer.prompt!r} token {place + 1} was {was} in training, and here is {other}"
