"""Base class of reinforcement learning: generated completions with graded rewards.

A step samples completions of the rows' prompts with the current weights, grades the text, and lays
out prompts and completions as rows of a token tree. All completions of a prompt share the prompt in
the tree. A row needs a prompt. The reply of a row is never learned; graders compare completions
with the reply.

The "old" log-probabilities of an importance ratio come from the trainer, not from the sampler. Both
use the same weights and layers and differ by rounding alone, which every step reports
(``sampler_difference``). Therefore the ratio starts at exactly 1. No correction for an external
sampler is needed (TRL with vLLM multiplies by a truncated ratio of both).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from luthier.errors import RecipeError, line_field
from luthier.graders import Answer, AnyGrader, Exact, Grader, OnError, grade_answers
from luthier.objectives.base import (
    PreparedRows,
    ReplyObjective,
    RunModels,
    RunStart,
    StepReport,
    TrainingDefaults,
    chat_of,
    extra_of,
)
from luthier.objectives.reinforcement import rollout_checks
from luthier.objectives.reinforcement.scoring import LocalModels, check_grader_model, silent
from luthier.types import Example, FloatArray, IntArray, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.conversations.reasoning import DecodedReply
    from luthier.models.decoding.sampler import Completion
    from luthier.models.networks.network import Network, TreeBatch

MEASURED_SEED = 0
"""Random seed of measurements."""


def graded_answer(example: Example, reply: str) -> Answer:
    """Return ``reply`` to the prompt of an example, for a grader."""
    assert example.source_row is not None
    return Answer.of(example.source_row, reply)


def sample_record(row: Row, reply: DecodedReply, tokens: int, stopped: bool) -> dict[str, Any]:
    """Return the record of a generated text for ``samples.jsonl``."""
    return {
        **line_field(row.line),
        "prompt": row.prompt_turns()[-1].content,
        "expected": row.expected_reply(),
        **({"reasoning": reply.reasoning} if reply.reasoning else {}),
        "completion": reply.text,
        "tokens": tokens,
        "stopped": stopped,
    }


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt with the score."""

    prompt: Example
    completion: Completion
    reply: DecodedReply
    score: float

    def __len__(self) -> int:
        return len(self.completion.ids_T)

    def row(self, place: int, weight: float) -> Example:
        """Return prompt and completion as one row with number ``place`` and ``weight`` on each
        token."""
        written_T = self.completion.ids_T
        # The decoder of an encoder-decoder starts from one token; a decoder continues the prompt.
        before_T = self.prompt.ids_T[: 1 if self.prompt.source_T is not None else None]
        weight_T = np.zeros(len(before_T) + len(written_T), dtype=np.float32)
        weight_T[len(before_T) :] = weight
        ids_T = np.concatenate([before_T, written_T])
        return Example(ids_T, weight_T, place, source_T=self.prompt.source_T)


@dataclass(frozen=True)
class Rollouts:
    """The completions of one batch of rows: ``P`` prompts with ``G`` completions each."""

    each: list[Rollout]
    """All completions, grouped by prompt."""
    group: int
    """Completions per prompt, ``G``."""
    ungraded: int = 0
    """Number of completions with score 0 because of grader failures."""

    @cached_property
    def score_PG(self) -> FloatArray:
        """Scores, one row per prompt."""
        scores = np.array([rollout.score for rollout in self.each], dtype=np.float32)
        return scores.reshape(-1, self.group)

    @property
    def equal_P(self) -> Any:
        """True for prompts with equal scores, which teach nothing."""
        return self.score_PG.max(1) == self.score_PG.min(1)

    def report(self) -> dict[str, float]:
        """Return means over the completions."""
        count, lengths = len(self.each), [len(rollout) for rollout in self.each]
        return {
            "reward": float(self.score_PG.mean()),
            "reward_std": float(self.score_PG.std()),
            "equal_groups": float(self.equal_P.mean()) if self.group > 1 else 0.0,
            "completions": count,
            "completion_tokens": statistics.fmean(lengths),
            "truncated": sum(not r.completion.stopped for r in self.each) / count,
            "ungraded": self.ungraded,
        }


@dataclass
class PolicyBatch:
    """Inputs of the loss of one micro-batch; ``M`` learned tokens, in row order."""

    rollouts: Rollouts
    weight_M: Tensor
    sampler_M: Tensor
    """Log-probabilities from the sampler."""
    advantage_M: Tensor
    old_M: Tensor | None = None
    """Log-probabilities before the first optimizer step on the batch."""
    reference_M: Tensor | None = None
    """Log-probabilities of the reference model."""
    value_M: Tensor | None = None
    return_M: Tensor | None = None
    part: int = 0
    """Index of the minibatch."""
    parts: int = 1
    """Number of minibatches."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums over the tokens of the last pass, by metric."""
    kl_R: dict[int, float] = field(default_factory=dict)
    """Divergence from the reference by completion, summed over tokens."""

    def note(self, name: str, value_M: Tensor) -> None:
        """Store the sum of a metric."""
        self.sums[name] = float(value_M.detach().sum())

    def diverges(self, batch: TreeBatch, kl_M: Tensor) -> None:
        """Store the divergence from the reference model for metrics and samples."""
        from luthier.objectives.logprobs import row_sums

        self.note("kl", kl_M)
        sums = row_sums(batch, kl_M.detach()).tolist()
        self.kl_R = {row.row: kl for row, kl in zip(batch.tree.examples, sums, strict=True)}

    def compare(self, logp_M: Tensor) -> Tensor:
        """Return the ratio of the policy to the policy before the first step on this batch."""
        if self.old_M is None:
            # First pass: no weight has moved, so these are the old log-probabilities. In bfloat16,
            # the sampler's differ by 0.03 nats on average, which is noise of 3 % on every ratio.
            self.old_M = logp_M.detach()
        self.note("sampler_difference", (self.old_M - self.sampler_M).abs())
        return (logp_M - self.old_M).exp()


@dataclass(frozen=True)
class _OpenGrader:
    """A named grader, and the same grader with opened models."""

    named: Grader
    grader: Grader


class Reinforcement(ReplyObjective):
    """Base class of the objectives that learn from rewards."""

    grader: AnyGrader = Exact()
    """Grader of the completions: a name, or a table of method and fields."""
    on_error: OnError = "fail"
    """Action on grader failures: stop the run, or score 0 and count the failure (``zero``)."""
    time_limit_s: float = Field(default=60.0, gt=0, le=86_400)
    """Time limit of a grader per completion, in seconds."""
    max_completion_tokens: int = Field(default=256, ge=1, le=10_000_000)
    """Maximum tokens per completion (TRL's default)."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """Divisor of the logits of sampler and trainer; 1 samples from the policy."""
    force: bool = False
    """Train although the check before the first step advises against training."""

    further_shapes: ClassVar[frozenset[str]] = frozenset({"prompt", "prompt_only", "messages"})
    same_each_epoch: ClassVar[bool] = False
    measure: ClassVar[str] = "reward"
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        learning_rate_multiplier=0.1,
        batch_rows=4,
        batch_reason="each row is many completions",
    )

    @property
    def generations(self) -> int:
        """Completions per prompt in a step, ``G``."""
        return 1

    @property
    def other_models(self) -> Mapping[str, str]:
        """Return the ids of the grader's models."""
        return {name: name for name in sorted(self.grader.models)}

    def bind(self, models: RunModels) -> Self:
        """Reject an incomplete grader, and a grader's model with the wrong task."""
        self.grader.check()
        for name, other in models.others.items():
            check_grader_model(name, self.grader.models[name], other.objective)
        return super().bind(models)

    @property
    def _tries(self) -> int:
        """Completions per prompt before the first step."""
        return max(4, self.generations)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the prompt with weight 0; reject a row without the reply that the grader needs."""
        self.grader.check_expected(row.expected_reply())
        ids_T = chat.encode_prompt(row.prompt_turns(), row.tools)
        source_T = None
        if chat.decoder is not None:
            ids_T, source_T = chat.decoder.opening, ids_T
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        return Example(ids_T, weight_T, index, source_T=source_T, source_row=row)

    @property
    def completions(self) -> tuple[int, int]:
        """``generations`` completions of at most ``max_completion_tokens``."""
        return self.generations, self.max_completion_tokens

    def truncate(self, example: Example, context: int) -> Example:
        """Return the example unchanged, which has nothing to learn: a truncated prompt is another
        question."""
        return example

    def roll_out(
        self,
        network: Network,
        examples: Sequence[Example],
        count: int,
        generator: torch.Generator | None = None,
    ) -> Rollouts:
        """Return ``count`` graded completions of each prompt; deterministic for weights and
        ``generator``."""
        from luthier.models.decoding.sampler import sample
        from luthier.models.decoding.sampling import Sampling
        from luthier.models.random_numbers import draw_seeds

        chat = chat_of(network)
        prompts = [e.ids_T if e.source_T is None else e.source_T for e in examples]
        completions = sample(
            network,
            prompts,
            count,
            Sampling(max_tokens=self.max_completion_tokens, temperature=self.temperature),
            stop_ids=chat.stop_ids,
            # A seed per prompt: a completion depends neither on the batch nor on the process.
            seeds=draw_seeds(len(prompts), generator),
        )
        pairs = [(e, c) for e, row in zip(examples, completions, strict=True) for c in row]
        replies = [
            chat.replies.decode_reply(prompt_T, c.text_ids)
            for prompt_T, row in zip(prompts, completions, strict=True)
            for c in row
        ]
        answers = [
            graded_answer(e, reply.text) for (e, _), reply in zip(pairs, replies, strict=True)
        ]
        processes = network.processes
        grades = grade_answers(
            self._open_grader(network),
            # Each process grades a share; `interleave` restores the order of all answers.
            answers[processes.rank :: processes.size],
            self.on_error,
            self.time_limit_s,
        )
        scores = processes.interleave(grades.scores)
        each = [
            Rollout(example, completion, reply, score)
            for (example, completion), reply, score in zip(pairs, replies, scores, strict=True)
        ]
        return Rollouts(each, count, int(processes.sum(len(grades.problems))))

    def _open_grader(self, network: Network, note: Callable[[str], None] = silent) -> Grader:
        """Return the grader with opened models, cached in the network with the grader's history."""
        # Frozen objectives are copied during a run; the network is one object for the whole run.
        opened = network.cache
        if not isinstance(opened, _OpenGrader) or opened.named is not self.grader:
            opened = _OpenGrader(
                self.grader, self.grader.with_models(LocalModels(network.others, note))
            )
            network.cache = opened
        return opened.grader

    def sample_step(self, network: Network, examples: Sequence[Example]) -> Rollouts:
        """Return the rollouts of a step, with random numbers from the checkpointed generator in
        training."""
        generator = None if network.model.training else fixed_generator()
        return self.roll_out(network, examples, self.generations, generator)

    def make_batches(
        self,
        network: Network,
        rollouts: Rollouts,
        rows: Sequence[Example],
        advantages: Sequence[FloatArray],
        budget: int,
    ) -> list[TreeBatch]:
        """Return micro-batches of ``rows`` with :class:`PolicyBatch`; ``advantages`` are by row
        number."""
        import torch

        def to_tensor(arrays: Iterable[FloatArray]) -> Tensor:
            array_M = np.concatenate(list(arrays)).astype(np.float32)
            return torch.from_numpy(array_M).to(network.device)

        batches = []
        for batch in network.batches(rows, budget):
            rows_R = batch.tree.examples
            # All arrays have one order, because every token of a completion has a weight.
            policy = PolicyBatch(
                rollouts,
                weight_M=to_tensor(row.weight_T[row.weight_T != 0] for row in rows_R),
                sampler_M=to_tensor(rollouts.each[row.row].completion.logp_T for row in rows_R),
                advantage_M=to_tensor(advantages[row.row] for row in rows_R),
            )
            batches.append(replace(batch, extra=policy))
        return batches

    def prepare(self, start: RunStart) -> PreparedRows:
        """Grade samples of a few prompts: rewards of 0, or near 1, leave nothing to learn."""
        count, first = self.verdicts(start)
        if count:
            start.note(
                f"the judge is called at most {count:,} times, {first:,} of which before the "
                "first step and again on each resume"
            )
        # A trial call finds a wrong key or model in a second, before any completion is sampled.
        if warning := self._open_grader(start.network, start.note).rehearse():
            start.note(f"warning: {warning}")
        chosen = rollout_checks.sample_evenly(start.examples)
        # A generator of fixed seed, because `prepare` must not advance torch's generator.
        rollouts = self.roll_out(start.network, chosen, self._tries, fixed_generator())
        verdict = rollout_checks.precheck(rollouts.score_PG, self.grader.is_share)
        if verdict.refused and not self.force:
            raise RecipeError(
                verdict.text + " Set `objective.force=true` to train anyway",
                rule="rollouts.no_reward",
            )
        start.note(verdict.text)
        return super().prepare(start)

    def verdicts(self, start: RunStart) -> tuple[int, int]:
        """Return the maximum number of a judge's verdicts in the run, and before the first step."""
        # The additional answer is the trial call of `rehearse`.
        first = rollout_checks.PROMPTS * self._tries + 1
        count = (start.rows_read + start.rows_calibrated) * self.generations
        each = self.grader.judgements
        return (count + start.rows_measured + first) * each, first * each

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, float]:
        """Return the mean reward of one completion per prompt, with a fixed seed.

        ``reward_error`` is the standard error of the mean.
        """
        with network.split_work():
            rollouts = self.roll_out(network, examples, 1, fixed_generator())
        score_P = rollouts.score_PG.astype(np.float64)
        reward = float(score_P.mean())
        # numpy's deviation divides by n, so sqrt(n - 1) gives the standard error of the mean.
        error = float(score_P.std()) / math.sqrt(max(1, score_P.size - 1))
        # The engine minimizes `loss`, so the reward changes sign.
        return {"loss": -reward, "reward": reward, "reward_error": error}

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the negative log-likelihood of the prompts, which is deterministic."""
        from luthier.objectives.logprobs import mean_nll

        return mean_nll(network, [_prompt_as_text(example) for example in examples], budget)

    def report(
        self,
        network: Network,
        batches: Sequence[TreeBatch],
        lines: Sequence[Mapping[str, Any]],
    ) -> StepReport:
        """Return rewards, lengths and token means, with the best and worst completions.

        The advice concerns rewards that stopped rising, and groups with equal scores.
        """
        policies = [extra_of(batch, PolicyBatch) for batch in batches]
        # Exchanges come before the early return: all processes must take part.
        metrics = self._step_metrics(network, policies)
        own = [item for policy in policies for item in policy.kl_R.items()]
        kl = {place: value for part in network.processes.gather(own) for place, value in part}
        advice = rollout_checks.advice(lines)
        if not policies:
            return StepReport(metrics, advice=advice)
        each = policies[0].rollouts.each
        order = sorted(range(len(each)), key=lambda place: (-each[place].score, place))
        chosen = rollout_checks.extremes(order)
        return StepReport(
            metrics, [_record(each[place], kl.get(place)) for place in chosen], advice
        )

    def _step_metrics(self, network: Network, policies: Sequence[PolicyBatch]) -> dict[str, float]:
        """Return the metrics of the step over the micro-batches of all processes."""
        own = [(len(policy.weight_M), policy.sums) for policy in policies]
        everywhere = [part for each in network.processes.gather(own) for part in each]
        tokens = sum(count for count, _ in everywhere)
        names = dict.fromkeys(name for _, sums in everywhere for name in sums)
        means = {
            name: sum(sums.get(name, 0.0) for _, sums in everywhere) / tokens for name in names
        }
        # A process may have no micro-batch; the first, which reports, has one.
        return (policies[0].rollouts.report() if policies else {}) | means


def fixed_generator() -> torch.Generator:
    """Return the random generator of measurements."""
    import torch

    return torch.Generator().manual_seed(MEASURED_SEED)


def _prompt_as_text(example: Example) -> Example:
    """Return the prompt as learned text. The last token is repeated, so that at least one is
    predicted."""
    prompt_T: IntArray = example.ids_T if example.source_T is None else example.source_T
    first_T = example.ids_T if example.source_T is None else example.ids_T[:1]
    ids_T = np.concatenate([first_T, prompt_T[-1:] if example.source_T is None else prompt_T])
    weight_T = np.ones(len(ids_T), dtype=np.float32)
    weight_T[0] = 0
    return Example(ids_T, weight_T, example.row, source_T=example.source_T)


def _record(rollout: Rollout, kl: float | None) -> dict[str, Any]:
    row, stopped = rollout.prompt.source_row, rollout.completion.stopped
    assert row is not None
    record = sample_record(row, rollout.reply, len(rollout), stopped)
    return {**record, "reward": rollout.score, "kl": kl}
