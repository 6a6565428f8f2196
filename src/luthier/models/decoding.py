"""Decoding: choosing tokens, and writing several completions side by side.

This is the one decoder of the package. Rollouts of reinforcement learning, judges and measurements
call :func:`sample` on the network they hold; a model that is asked on the command line or through the
SDK (:mod:`luthier.inference.generation`) and the server (:mod:`luthier.inference.decoder`) choose their
tokens with the same :class:`TokenSampler` over the same backend (:mod:`luthier.models.backends`).

The draws of a completion follow from its seed and its number among those of its prompt alone.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.models import heads
from luthier.models.backends import ReopenableBackend, backend_of, read_prompts, reply_room
from luthier.models.forward_backend import ForwardBackend

if TYPE_CHECKING:
    from luthier.models.backends import Backend, State
    from luthier.models.network import Network
    from luthier.models.sampling import Sampling
    from luthier.types import FloatArray, IntArray

COLDEST = 1e-6
"""Temperatures below are 0: logits are divided by them, and would be infinite."""
LIKELIEST = 1024
"""Where a draw is narrowed, so many tokens are looked at before all of them are sorted."""


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


class TokenMask(Protocol):
    """What a grammar lets be written next."""

    def allowed_mask(self, size: int) -> Tensor:
        """Whether each of ``size`` tokens may follow, ``[V]``."""
        ...

    def take(self, token: int) -> None:
        """Go on behind ``token``."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end may follow."""
        ...


class TokenSampler:
    """Chooses the tokens of one completion: penalties, grammar, temperature, draw.

    What it chooses depends on its own logits, seed and number alone.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        index: int,
        prompt_T: IntArray,
        mask: TokenMask | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        """``index`` numbers the completions of ``prompt_T``; ``stop_ids`` end a completion."""
        self.sampling, self.mask = sampling, mask
        self.stop_ids = frozenset(stop_ids)
        self._random = random.Random(f"{seed}/{index}")
        self._written: Counter[int] = Counter()
        repeats = sampling.repetition_penalty != 1
        self._read = torch.from_numpy(prompt_T).unique() if repeats else None
        bias = sampling.logit_bias
        self._biased_N = torch.tensor([*bias], dtype=torch.int64)
        self._bias_N = torch.tensor([*bias.values()], dtype=torch.float32)
        self._penalised = bool(sampling.frequency_penalty or sampling.presence_penalty or bias)
        self.greedy = sampling.temperature < COLDEST
        """Whether it takes the highest logit and draws nothing."""
        self._adjusts = mask is not None or repeats or self._penalised
        self._stops_N = torch.tensor(sorted(self.stop_ids), dtype=torch.int64)
        self._barred = sampling.min_tokens if self.stop_ids else 0
        """Tokens to choose before a stop token may be chosen."""

    @property
    def plain(self) -> bool:
        """Whether it takes the next logits as they are."""
        return not (self._adjusts or self._barred)

    def choose(self, logits_V: Tensor) -> int:
        """The next token.

        Raises:
            RecipeError: where the network gave no numbers to choose by.
        """
        logits_V = self._adjust(logits_V.float())
        if self.greedy:
            (token,) = likeliest_tokens(logits_V[None])
        else:
            token = self._draw(logits_V / self.sampling.temperature)
        if not 0 <= token < len(logits_V):
            raise RecipeError("The model gave no probabilities.", rule="model.no_probabilities")
        if self._penalised or self._read is not None:
            self._written[token] += 1
        self._barred = max(0, self._barred - 1)
        return token

    def uniform(self) -> float:
        """The next of its random numbers."""
        return self._random.random()

    @property
    def narrows(self) -> bool:
        """Whether it draws among a part of the tokens only."""
        sampling = self.sampling
        return sampling.top_p < 1 or bool(sampling.top_k or sampling.min_p)

    def _adjust(self, logits_V: Tensor) -> Tensor:
        if self.plain:
            return logits_V
        sampling, logits_V = self.sampling, logits_V.clone()
        if len(self._biased_N):
            at, bias = self._biased_N.to(logits_V.device), self._bias_N.to(logits_V.device)
            logits_V.index_add_(0, at, bias)
        written = list(self._written)
        if self._read is not None:
            known = torch.cat([self._read, torch.tensor(written, dtype=torch.int64)]).unique()
            known = known.to(logits_V.device)
            given, penalty = logits_V[known], sampling.repetition_penalty
            logits_V[known] = torch.where(given > 0, given / penalty, given * penalty)
        if written and (sampling.frequency_penalty or sampling.presence_penalty):
            at = torch.tensor(written, device=logits_V.device)
            times = torch.tensor([float(self._written[i]) for i in written], device=at.device)
            logits_V[at] -= sampling.frequency_penalty * times + sampling.presence_penalty
        if (allowed_V := self._allowed(len(logits_V))) is not None:
            logits_V.masked_fill_(~allowed_V.to(logits_V.device), -torch.inf)
        return logits_V

    def _allowed(self, size: int) -> Tensor | None:
        """Return which of ``size`` tokens may be chosen next, ``[V]``; ``None`` for all."""
        allowed_V = None if self.mask is None else self.mask.allowed_mask(size)
        if not self._barred:
            return allowed_V
        kept_V = ~torch.isin(torch.arange(size), self._stops_N)
        if allowed_V is not None:
            kept_V &= allowed_V
        # A grammar may allow nothing but the end, and then the answer ends.
        return kept_V if allowed_V is None or kept_V.any() else allowed_V

    def _draw(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        uniform = torch.tensor([self.uniform()], dtype=torch.float64, device=logits_V.device)
        probability_V = torch.softmax(logits_V, -1)
        if not self.narrows:
            return int(draw(probability_V[None], uniform))
        count = len(probability_V)
        first = min(sampling.top_k or LIKELIEST, count)
        kept_K, index_K = probability_V.topk(first)
        if not sampling.top_k:
            # Tokens beyond the likeliest ones may be drawn too.
            enough = float(kept_K.sum()) >= sampling.top_p
            if not enough and float(kept_K[-1]) >= sampling.min_p * float(kept_K[0]):
                kept_K, index_K = probability_V.sort(descending=True)
        before_K = kept_K.cumsum(-1) - kept_K
        total = kept_K.sum() if sampling.top_k else 1.0
        # The likeliest is always kept, also for top_p = 0.
        out_K = (before_K >= sampling.top_p * total) | (kept_K < sampling.min_p * kept_K[0])
        out_K[0] = False
        at = int(draw(kept_K.masked_fill(out_K, 0.0)[None], uniform))
        return int(index_K[at]) if at < len(index_K) else count


def likeliest_tokens(logits_RV: Tensor) -> list[int]:
    """The token of the highest logit in each row, the first of equal ones.

    Behind all of them, which no token is, where one is not a number.
    """
    if logits_RV.device.type == "cpu":
        # NumPy finds it in a tenth of the time: 32 rows of 49,152 numbers of 16 bits take torch 2.9 ms,
        # as long as one of a step's 30 layers.
        best_R = torch.from_numpy(logits_RV.float().numpy().argmax(-1))
    else:
        best_R = logits_RV.argmax(-1)
    highest_R = logits_RV.gather(-1, best_R[:, None])[:, 0]
    best: list[int] = best_R.masked_fill(highest_R.isnan(), logits_RV.shape[-1]).tolist()
    return best


def choose_tokens(samplers: Sequence[TokenSampler], logits_RV: Tensor) -> list[int]:
    """The next token of each row, all at once where settings allow it: the same as one by one.

    The rows' settings may differ in the seed only.
    """
    first = samplers[0]
    if not first.plain or (first.narrows and not first.greedy):
        return [own.choose(row_V) for own, row_V in zip(samplers, logits_RV, strict=True)]
    if first.greedy:
        return _check_tokens(likeliest_tokens(logits_RV), logits_RV)
    probability_RV = torch.softmax(logits_RV.float() / first.sampling.temperature, -1)
    uniforms = [own.uniform() for own in samplers]
    uniform_R = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)
    return _check_tokens(draw(probability_RV, uniform_R).tolist(), logits_RV)


def _check_tokens(tokens: list[int], logits_RV: Tensor) -> list[int]:
    if max(tokens) >= logits_RV.shape[-1]:
        raise RecipeError("The model gave no probabilities.", rule="model.no_probabilities")
    return tokens


@dataclass(eq=False)
class RunningCompletion:
    """One completion on its way."""

    sampler: TokenSampler
    state: State
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether a stop token ended it, which is the last of its tokens then."""
    complete: bool = False
    """Whether its grammar lets nothing follow."""
    done: bool = False


class Decoding:
    """Completions of a few prompts that are written side by side, a token of each in a step."""

    def __init__(
        self,
        backend: Backend,
        prompts: Sequence[IntArray],
        count: int,
        sampling: Sampling,
        seeds: Sequence[int],
        max_tokens: int,
        stop_ids: Collection[int],
        first: int = 0,
        together: bool = True,
        logps: bool = False,
        masks: Sequence[TokenMask] | None = None,
    ) -> None:
        """Read the prompts; ``seeds`` has one for each, and ``first`` numbers their first completions.

        ``together`` reads them as one, which is faster and rounds in other ways; ``logps`` keeps the
        log-probability of each token (see :class:`Completion`); ``masks`` are of their grammars,
        one for each completion.
        """
        self._backend, self._max_tokens, self._logps = backend, max_tokens, logps
        states, self._logits_RV = (
            backend.prefill_batch(prompts, count)
            if together
            else read_prompts(backend, prompts, count)
        )
        self.rows = [
            RunningCompletion(
                TokenSampler(sampling, seed, first + index, prompt_T, mask, stop_ids),
                states[place * count + index],
            )
            for place, (prompt_T, seed) in enumerate(zip(prompts, seeds, strict=True))
            for index in range(count)
            for mask in [masks[place * count + index] if masks else None]
        ]
        """In the order of the prompts, those of one prompt side by side."""
        self._alive = list(self.rows)

    def step(self) -> list[RunningCompletion]:
        """Write a token to each completion that is not done; those, or none where all are done."""
        self._alive = [row for row in self._alive if not row.done]
        if not (rows := self._alive):
            return []
        if rows[0].ids:  # the first tokens follow from the prompts
            states, last = [row.state for row in rows], [row.ids[-1] for row in rows]
            self._logits_RV = self._backend.step(states, last)
        tokens = choose_tokens([row.sampler for row in rows], self._logits_RV)
        if self._logps:
            temperature = 1.0 if rows[0].sampler.greedy else rows[0].sampler.sampling.temperature
            logp_RV = torch.log_softmax(self._logits_RV.float() / temperature, -1)
            chosen_R1 = torch.tensor(tokens, device=logp_RV.device)[:, None]
            for row, logp in zip(rows, logp_RV.gather(-1, chosen_R1)[:, 0].tolist(), strict=True):
                row.logps.append(logp)
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            row.stopped = token in row.sampler.stop_ids
            if (mask := row.sampler.mask) is not None and not row.stopped:
                mask.take(token)
                row.complete = mask.is_finished
            if row.stopped or row.complete or len(row.ids) == self._max_tokens:
                self.end(row)
        return rows

    def end(self, row: RunningCompletion) -> None:
        """Write no more of ``row``, and give its memory back."""
        if not row.done:
            row.done = True
            self._backend.free(row.state)

    def close(self) -> None:
        """End all rows."""
        for row in self.rows:
            self.end(row)


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

    @property
    def text_ids(self) -> list[int]:
        """Its tokens without the one that ended it."""
        ids: list[int] = self.ids_T[: len(self.ids_T) - self.stopped].tolist()
        return ids


@torch.no_grad()
def sample(
    network: Network,
    prompts: Sequence[IntArray],
    count: int,
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    encoded_RSH: Tensor | None = None,
    batch_size: int = 64,
    done: Callable[[int], None] = lambda count: None,
) -> list[list[Completion]]:
    """``count`` completions of each of ``prompts`` (token ids), in their order.

    The weights are the very ones of the next training step, adapters and soft prompts in place: nothing
    is merged or exported. Runs in eval mode, without gradients, and leaves each module in the
    mode it found it in. ``seeds`` has one for each prompt; without them all have that of ``sampling``.
    Where an encoder has read the prompts already (images), its states are ``encoded_RSH``, and a prompt
    is the number of its row there.
    At most ``batch_size`` rows run at once; ``done`` hears how many are finished. Where processes share
    the work, each writes behind a part of the prompts, and all come to know all completions.

    Raises:
        RecipeError: where the network writes no text, a prompt is empty or leaves no room in the
            context, or there is no number of tokens.
    """
    max_tokens = sampling.max_tokens
    if count < 1 or max_tokens is None:
        raise RecipeError(
            "the number of completions and max_tokens must be at least 1", rule="sampling.too_few"
        )
    if sampling.constraint is not None:
        raise RecipeError("what is sampled here follows no schema, regex or grammar")
    context = _check(network, prompts, max_tokens)
    if seeds is None:
        seeds = [seed_of(sampling)] * len(prompts)
    if network.processes.size > 1:
        return _share_prompts(network, prompts, count, sampling, stop_ids, seeds, batch_size)
    soft = np.array(heads.prompt_ids(network.model), dtype=np.int64)
    found: list[list[Completion]] = [[] for _ in prompts]
    finished = 0
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    together = max(1, batch_size // count)
    with _eval_mode(network.model), _open_backend(network, context, encoded_RSH) as backend:
        for start, first in itertools.product(
            range(0, len(order), together), range(0, count, batch_size)
        ):
            chosen, copies = order[start : start + together], min(batch_size, count - first)
            decoding = Decoding(
                backend,
                [np.concatenate([soft, prompts[index]]) for index in chosen],
                copies,
                sampling,
                [seeds[index] for index in chosen],
                max_tokens,
                stop_ids,
                first=first,
                logps=True,
            )
            while decoding.step():
                pass
            for place, row in enumerate(decoding.rows):
                ids_T = np.array(row.ids, dtype=np.int64)
                logp_T = np.array(row.logps, dtype=np.float32)
                found[chosen[place // copies]].append(Completion(ids_T, logp_T, row.stopped))
            finished += len(decoding.rows)
            done(finished)
    return found


def _share_prompts(
    network: Network,
    prompts: Sequence[IntArray],
    count: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    seeds: Sequence[int],
    batch_size: int,
) -> list[list[Completion]]:
    """:func:`sample` by all processes, each with every so many-th prompt."""
    processes = network.processes
    own = slice(processes.rank, None, processes.size)
    with network.whole_work():
        written = sample(
            network,
            prompts[own],
            count,
            sampling,
            stop_ids=stop_ids,
            seeds=seeds[own],
            batch_size=batch_size,
        )
    plain = [[(c.ids_T.tolist(), c.logp_T.tolist(), c.stopped) for c in row] for row in written]
    return [
        [
            Completion(np.array(ids, dtype=np.int64), np.array(logps, dtype=np.float32), stopped)
            for ids, logps, stopped in row
        ]
        for row in processes.interleave(plain)
    ]


def seed_of(sampling: Sampling) -> int:
    """The seed of ``sampling``, or a random one."""
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


@contextmanager
def _open_backend(network: Network, context: int, encoded_RSH: Tensor | None) -> Iterator[Backend]:
    """Yield the backend of ``network``, and close it afterwards.

    A backend that can be opened again stays with the network: comparing a faster forward pass with the
    network's modules takes as long as a short completion, in each step of a reinforcement learner.
    """
    if encoded_RSH is not None:
        backend: Backend = ForwardBackend(network, context, encoded_RSH)
    elif network.backend is not None:
        backend = network.backend
        network.backend.reopen()
    else:
        backend = backend_of(network, context)
        if isinstance(backend, ReopenableBackend):
            network.backend = backend
    with closing(backend):
        yield backend


def _check(network: Network, prompts: Sequence[IntArray], max_tokens: int) -> int:
    """The context of ``network``, which has to write text and to hold every prompt."""
    model = network.model
    if heads.task_of(model) not in ("causal_lm", "image_to_text") or network.both_ways:
        raise RecipeError(
            f"networks of type {model.config.model_type} with this head do not write text, so "
            "there is nothing to sample. Take a base model that generates.",
            rule="model.cannot_write",
        )
    before, context = network.tokens_before, network.context
    beside = heads.decoder_of(model) is not None
    for index, prompt_T in enumerate(prompts):
        size = before + len(prompt_T)
        if not len(prompt_T):
            raise RecipeError(
                f"prompt {index + 1} has no tokens to go on from", rule="prompt.empty"
            )
        if max_tokens > reply_room(size, context, beside):
            raise RecipeError(
                f"prompt {index + 1} has {size} tokens; with {max_tokens} for the completion that "
                f"is more than the model's context of {context}. Shorten it, or allow fewer tokens.",
                rule="prompt.too_long",
            )
    return context


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """The network in eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
