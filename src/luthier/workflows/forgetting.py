"""What tuning took away: a tuned model beside the model that it was tuned from.

* **Drift** without any data: the base answers general prompts of ours, drawn at temperature 1, and of
  each token of its answers the divergence ``KL(base || tuned)`` is computed over the whole
  vocabulary. It is 0 for the base itself, and large where the tuned model would not write such
  answers any more.
* **Probes**: rows with choices, by log-likelihood (:mod:`luthier.evaluation.choices`).

Both models answer the same rows, so differences are known row by row; which are more than chance is
said with Holm's correction for all at once. One model is in memory at a time: of the base its
states and its output head stay. Left out: bias, toxicity and refusals (lm-evaluation-harness has
data sets of thousands of rows), languages other than English for our prompts, and changes over
several turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.read import read_records
from luthier.data.rows import load_rows
from luthier.data.shapes import of_shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.sources import files_of
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.choices import choice_scores
from luthier.evaluation.significance import (
    Difference,
    RowScores,
    Statistic,
    as_gain,
    paired_differences,
    perplexity_of,
)
from luthier.types import Example, Message
from luthier.workflows.evaluate import choice_likelihoods, fit_choices

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.evaluation.choices import ChoiceLikelihood
    from luthier.inference.generation import Generator
    from luthier.library.models import StoredModel
    from luthier.models.network import Network

SAMPLE_TOKENS = 48
"""Tokens of an answer of the base to a general prompt."""
CHUNK = 128
"""Positions of which two distributions over the vocabulary are there at once."""
OWN_PROBES = "general knowledge"


@dataclass(frozen=True, eq=False)
class Drift:
    """How far a model's distributions moved from its base's, on answers of the base."""

    samples: int
    tokens: int
    kl: RowScores
    """``KL(base || tuned)`` in nats, a mean over tokens."""
    base_perplexity: Statistic
    tuned_perplexity: Statistic

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        both = {"base": self.base_perplexity, "tuned": self.tuned_perplexity}
        found = {"samples": self.samples, "tokens": self.tokens, "kl": _plain(self.kl)}
        return found | {"perplexity": {name: _plain(each) for name, each in both.items()}}


@dataclass(frozen=True, eq=False)
class MetricChange:
    """One measure of the base and of the tuned model on the same rows."""

    name: str
    measure: str
    base: RowScores
    tuned: RowScores

    @property
    def rows(self) -> int:
        """Of how many rows."""
        return len(self.base)


@dataclass(frozen=True, eq=False)
class Forgetting:
    """A tuned model beside its base."""

    model: str
    base: str
    drift: Drift
    changes: list[MetricChange] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What was left out, and what the figures do not say."""

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How the tuned model differs, by the names of the changes."""
        return paired_differences({each.name: (each.base, each.tuned) for each in self.changes})

    @property
    def regressions(self) -> list[MetricChange]:
        """What is worse than before, by more than chance."""
        return [each for each in self.changes if self._improvement(each) < 0]

    @property
    def improvements(self) -> list[MetricChange]:
        """What is better than before, by more than chance."""
        return [each for each in self.changes if self._improvement(each) > 0]

    def _improvement(self, change: MetricChange) -> float:
        found = self.differences[change.name]
        return as_gain(change.measure, found.value) * found.significant

    def verdict(self) -> str:
        """What tuning took away, in a few sentences."""
        kl = self.drift.kl
        low, high = kl.interval
        before, now = self.drift.base_perplexity.value, self.drift.tuned_perplexity.value
        said = [
            f"Drift: {kl.value:.3f} nats a token ({low:.3f} to {high:.3f}); the perplexity of what the "
            f"base writes went from {before:.1f} to {now:.1f}."
        ]
        for title, changes in (("Worse", self.regressions), ("Better", self.improvements)):
            if changes:
                said.append(f"{title} than the base: {'; '.join(map(self.describe, changes))}.")
        if self.changes and not self.regressions:
            count = len(self.changes)
            said.append(
                f"Of {count} measures beside it none is worse than before by more than chance."
                if count > 1
                else f"{self.changes[0].name} is not worse than before by more than chance."
            )
        return " ".join(said)

    def describe(self, change: MetricChange) -> str:
        """A change in words."""
        found = self.differences[change.name]
        texts = (_text(change.base), _text(change.tuned))
        apart = f"{_number(found.value, change.base, '+')} ± {_number(found.error, change.base)}"
        return f"{change.name}, {change.measure} {texts[0]} to {texts[1]} ({apart})"

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        changes = []
        for each in self.changes:
            found = self.differences[each.name]
            changes.append(
                {
                    "name": each.name, "measure": each.measure, "rows": each.rows,
                    "base": _plain(each.base), "tuned": _plain(each.tuned),
                    **found.plain(),
                }
            )  # fmt: skip
        return {
            "model": self.model, "base": self.base, "drift": self.drift.plain(), "changes": changes,
            "verdict": self.verdict(), "remarks": self.remarks,
        }  # fmt: skip


def _plain(score: RowScores | Statistic) -> dict[str, Any]:
    return {"value": score.value, "error": score.error, "interval": list(score.interval)}


def _number(value: float, like: RowScores, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if like.is_share else f"{value:{sign}.3f}"


def _text(score: RowScores) -> str:
    return _number(score.value, score)


def measure_forgetting(
    tuned: StoredModel,
    base: StoredModel,
    probes: Mapping[str, Sequence[MultipleChoice]] | None = None,
    note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Forgetting:
    """Hold ``tuned`` beside ``base``.

    Args:
        tuned: a model that writes.
        base: what it was tuned from, with the same tokens.
        probes: rows with choices, by the name of each set; ours are measured besides.
        note: hears what is done.
        on_progress: hears how many parts are done, and of how many.

    Raises:
        RecipeError: for models that do not write, or with other tokens.
    """
    from luthier.engine.machine import open_network
    from luthier.inference.generation import Generator
    from luthier.library.models import check_writes

    for each in (tuned, base):
        check_writes(
            each,
            "so it has no distributions over texts to drift. What a model that reads forgot, `luthier "
            "evaluate` says on rows of the earlier task",
        )
    chats = base.chat, tuned.chat
    if chats[0].tokenizer.get_vocab() != chats[1].tokenizer.get_vocab():
        raise RecipeError(
            f"{tuned.id} and {base.id} have other tokens, so their distributions are not "
            "comparable; name the model that it was tuned from"
        )
    sets = {OWN_PROBES: _own_choices(), **(probes or {})}
    remarks: list[str] = []
    sides: list[_Side] = []
    answers: list[Example] = []
    total = 4
    for stored, chat in zip((base, tuned), chats, strict=True):
        note(f"Measuring {stored.id}")
        network = open_network(stored, precise=True)
        try:
            generator = Generator(network, chat)
            if not sides:
                answers = _answers(generator)
                on_progress(1, total)
            side = _Side(network, chat, sets, remarks if not sides else [])
            side.read(answers)
            on_progress(2 * len(sides) + 2, total)
        finally:
            network.close()
        sides.append(side)
    on_progress(total, total)
    return Forgetting(
        tuned.id,
        base.id,
        _drift(sides[0].states, sides[1].states, len(answers)),
        list(_changes(*sides)),
        remarks,
    )


def load_probes(paths: Sequence[str | Path]) -> dict[str, list[MultipleChoice]]:
    """Rows with choices of each file, parted by a column ``task`` where there is one.

    Rows of ``text`` and ``target`` are read as clozes, which is how LAMBADA is kept.

    Raises:
        DataError: for rows of another shape.
    """
    sets: dict[str, list[MultipleChoice]] = {}
    for path in (path for source in paths for path in files_of(str(source))):
        records = dict(read_records(path, []))
        keys = next(iter(records.values()), {}).keys()
        columns = {"prompt": "text", "choices": "target"} if {"text", "target"} <= keys else None
        for row in load_rows(path, columns):
            if not isinstance(row, MultipleChoice):
                message = "the row is no prompt with choices, which a probe is made of."
                fix = 'Write {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}.'
                raise DataError([Problem("row.objective", message, fix, row.location)])
            task = records.get(row.line, {}).get("task")
            name = task if isinstance(task, str) and task else path.name.partition(".")[0]
            sets.setdefault(name, []).append(row)
    return sets


def _own_prompts() -> list[dict[str, Any]]:
    """Return our general prompts."""
    with as_file(files("luthier") / "evaluation" / "probes" / "prompts.jsonl") as path:
        return [record for _, record in read_records(path, [])]


def _own_choices() -> list[MultipleChoice]:
    with as_file(files("luthier") / "evaluation" / "probes" / "choices.jsonl") as path:
        return [*(of_shape(MultipleChoice, load_rows(path)) or ())]


def _answers(generator: Generator) -> list[Example]:
    """What the base answers to our prompts, the tokens that it drew of weight 1."""
    from luthier.models.sampling import Sampling

    chat = generator.chat
    prompts = [[Message("user", str(each["prompt"]))] for each in _own_prompts()]
    # Greedy answers stand where the base is surest; drawn ones are what the divergence is a mean over.
    replies = generator.answers(
        prompts, Sampling(max_tokens=SAMPLE_TOKENS, temperature=1.0, seed=7)
    )
    found: list[Example] = []
    for prompt, reply in zip(prompts, replies, strict=True):
        if (
            reply.reasoning
        ):  # whether or not it came to an end: the template might write it otherwise
            ids_T = np.concatenate(
                [chat.encode_prompt(prompt), np.array(reply.ids, dtype=np.int64)]
            )
            weight_T = np.zeros(len(ids_T), dtype=np.float32)
            weight_T[len(ids_T) - len(reply.ids) :] = 1.0
            found.append(Example(ids_T, weight_T, len(found)))
            continue
        if not reply.text.strip():
            continue
        encoded = chat.encode_reply([*prompt, Message("assistant", reply.text)])
        weight_T = encoded.learned_T.astype(np.float32)
        if not reply.finished:
            weight_T[np.flatnonzero(weight_T)[-1]] = 0.0  # the limit ended it, not the base
        if weight_T.any():
            found.append(Example(encoded.ids_T, weight_T, len(found), source_T=encoded.source_T))
    if not found:
        raise RecipeError("the base answers nothing to any prompt, so there is nothing to compare")
    return found


@dataclass(frozen=True, eq=False)
class _States:
    """Hidden states before each token of some rows, and what makes distributions of them."""

    hidden_MH: Tensor
    target_M: Tensor
    row_M: NDArray[np.int64]
    head_VH: Tensor
    bias_V: Tensor | None


class _Side:
    """One of both models, and what it says."""

    def __init__(
        self,
        network: Network,
        chat: ChatFormat,
        sets: Mapping[str, Sequence[MultipleChoice]],
        remarks: list[str],
    ) -> None:
        self.network, self.chat, self.remarks = network, chat, remarks
        self.sets = sets
        self.states: _States
        self.correct: dict[str, RowScores] = {}
        """Accuracy by the name of the probes."""

    def read(self, answers: Sequence[Example]) -> None:
        """Measure drift and probes."""
        self.states = _states(self.network, answers)
        for name, rows in self.sets.items():
            correct = choice_scores(rows, self._likelihoods(name, rows))[0]["accuracy"]
            assert isinstance(correct, RowScores)
            self.correct[name] = correct

    def _likelihoods(
        self, name: str, rows: Sequence[MultipleChoice]
    ) -> list[list[ChoiceLikelihood]]:
        fitted = fit_choices(rows, self.chat, self.network.context, "truncate")
        if fitted.truncated:
            self.remarks.append(f"{fitted.truncated:,} prompts of {name} were cut to the context")
        return choice_likelihoods(self.network, fitted.examples)


def _states(network: Network, rows: Sequence[Example]) -> _States:
    """What ``network`` says before each learned token of ``rows``, one row after the other."""
    import torch

    rows_of: list[NDArray[np.int64]] = []
    states: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad():
        for batch in network.batches(rows, READING_BUDGET):
            hidden_SH = network.before_vocabulary(network.hidden(batch, batch.source_S))
            place_M, edge_M = batch.learned_edges
            rows_of.append(batch.tree.row_R[place_M.cpu().numpy()])
            states.append(hidden_SH.flatten(0, -2)[batch.edge_source_E[edge_M]])
            targets.append(batch.target_E[edge_M])
    row_M = np.concatenate(rows_of)
    order_M = np.argsort(row_M, kind="stable")  # both models' tokens in the same order
    hidden_MH, target_M = (torch.cat(each)[order_M] for each in (states, targets))
    bias_V = network.head_bias_V
    head_VH = network.head_VH.detach().clone()
    return _States(
        hidden_MH, target_M, row_M[order_M], head_VH, None if bias_V is None else bias_V.detach()
    )


def _drift(base: _States, tuned: _States, samples: int) -> Drift:
    """Divergence and perplexities of the same tokens."""
    import torch

    from luthier.objectives.logprobs import scores

    size = len(base.row_M)
    shared = min(len(base.head_VH), len(tuned.head_VH))  # embeddings are often padded
    kl_R, base_R, tuned_R, tokens_R = np.zeros((4, samples))
    with torch.no_grad():
        for start in range(0, size, CHUNK):
            part = slice(start, start + CHUNK)
            both = [
                scores(each.hidden_MH[part], each.head_VH, each.bias_V)[:, :shared].log_softmax(-1)
                for each in (base, tuned)
            ]
            kl_C = (both[0].exp() * (both[0] - both[1])).sum(-1)
            target_C1 = base.target_M[part, None]
            row_C = base.row_M[part]
            losses = [-each.gather(-1, target_C1)[:, 0] for each in both]
            sums = zip((kl_R, base_R, tuned_R), (kl_C, *losses), strict=True)
            for sum_R, value_C in sums:
                np.add.at(sum_R, row_C, value_C.double().cpu().numpy())
            np.add.at(tokens_R, row_C, 1.0)

    def perplexity(loss_R: NDArray[np.float64]) -> Statistic:
        return Statistic.of(
            lambda row_K: perplexity_of(float(loss_R[row_K].sum() / tokens_R[row_K].sum())),
            samples,
            is_share=False,
        )

    return Drift(
        samples,
        size,
        RowScores.of(kl_R, tokens_R, is_share=False),
        perplexity(base_R),
        perplexity(tuned_R),
    )


def _changes(base: _Side, tuned: _Side) -> list[MetricChange]:
    return [
        MetricChange(name, "accuracy", correct, tuned.correct[name])
        for name, correct in base.correct.items()
    ]
