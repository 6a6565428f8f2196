"""Measurement of forgetting: a tuned model compared with its base.

* **Drift**, without data: the base answers our general prompts, sampled at temperature 1. For each
  token of the answers, the divergence ``KL(base || tuned)`` over the vocabulary is computed. The
  divergence is 0 for the base and large if the tuned model would not generate the answers.
* **Probes**: rows with choices, by log-likelihood (:mod:`luthier.evaluation.choices`).
* **Earlier task**: the score of the task of any rows (:mod:`luthier.workflows.earlier_task`).

Both models answer the same rows, so differences are paired, with Holm's correction over all
differences. Only one model is in memory at a time, with the base's hidden states and output head.
Not measured: bias, toxicity and refusals (lm-evaluation-harness has large data sets), languages
except English, and several turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.files.read import read_records
from luthier.data.files.sources import files_of
from luthier.data.rows import load_rows
from luthier.data.shapes import of_shape
from luthier.data.shapes.choices import MultipleChoice
from luthier.data.tree import READING_BUDGET
from luthier.errors import DataError, Problem, RecipeError
from luthier.evaluation.choices import choice_scores
from luthier.evaluation.significance import (
    RowScores,
    Statistic,
    perplexity_of,
)
from luthier.pages import summary_page
from luthier.types import Example, Message
from luthier.workflows.earlier_task import MetricChange, MetricChanges, plain_score
from luthier.workflows.evaluate import choice_likelihoods, fit_choices

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.inference.generation import Generator
    from luthier.library.models import StoredModel
    from luthier.models.networks.network import Network

SAMPLE_TOKENS = 48
"""Maximum tokens of a base answer to a general prompt."""
CHUNK = 128
"""Positions with distributions over the vocabulary in memory at once."""
OWN_PROBES = "general knowledge"


@dataclass(frozen=True, eq=False)
class OutputDrift:
    """Divergence of a model from its base, on answers of the base."""

    samples: int
    tokens: int
    kl: RowScores
    """``KL(base || tuned)`` in nats, averaged over tokens."""
    base_perplexity: Statistic
    tuned_perplexity: Statistic

    def plain(self) -> dict[str, Any]:
        """Return the drift in JSON types."""
        both = {"base": self.base_perplexity, "tuned": self.tuned_perplexity}
        values = {"samples": self.samples, "tokens": self.tokens, "kl": plain_score(self.kl)}
        return values | {"perplexity": {name: plain_score(each) for name, each in both.items()}}


@dataclass(frozen=True, eq=False)
class Forgetting(MetricChanges):
    """Comparison of a tuned model that generates text with its base."""

    drift: OutputDrift = field(kw_only=True)

    def verdict(self) -> str:
        """Return a summary in a few sentences."""
        kl = self.drift.kl
        low, high = kl.interval
        before, now = self.drift.base_perplexity.value, self.drift.tuned_perplexity.value
        drift = (
            f"Drift: {kl.value:.3f} nats per token ({low:.3f} to {high:.3f}). The perplexity of the "
            f"answers of the base changed from {before:.1f} to {now:.1f}."
        )
        return f"{drift} {super().verdict()}"

    def plain(self) -> dict[str, Any]:
        """Return the comparison in JSON types."""
        return {**super().plain(), "drift": self.drift.plain()}


def measure_forgetting(
    tuned: StoredModel,
    base: StoredModel,
    probes: Mapping[str, Sequence[MultipleChoice]] | None = None,
    note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Forgetting:
    """Compare ``tuned`` with ``base``.

    Args:
        tuned: a model that generates text.
        base: the model it was tuned from, with the same vocabulary.
        probes: rows with choices by the name of each set, in addition to ours.
        note: gets the name of each step.
        on_progress: gets the number of finished steps and of all steps.

    Raises:
        RecipeError: for models that generate no text, or have different vocabularies.
    """
    from luthier.engine.machine import open_network
    from luthier.inference.generation import Generator
    from luthier.library.models import check_writes

    for each in (tuned, base):
        check_writes(each)
    if base.chat.tokenizer.get_vocab() != tuned.chat.tokenizer.get_vocab():
        raise RecipeError(
            f"{tuned.id} and {base.id} have different vocabularies and cannot be compared. Use the "
            f"parent of {tuned.id}."
        )
    with as_file(files("luthier") / "evaluation" / "probes" / "choices.jsonl") as path:
        own_probes = of_shape(MultipleChoice, load_rows(path)) or ()
    sets = {OWN_PROBES: own_probes, **(probes or {})}
    remarks: list[str] = []
    answers: list[Example] = []
    states: list[_States] = []
    accuracy: list[dict[str, RowScores]] = []
    for stored in (base, tuned):
        note(f"Measuring {stored.id}")
        chat, network = stored.chat, open_network(stored, precise=True)
        try:
            if stored is base:
                answers = _answers(Generator(network, chat))
                on_progress(1, 4)
            states.append(_states(network, answers))
            accuracy.append(_accuracy(network, chat, sets, remarks if stored is base else []))
        finally:
            network.close()
        on_progress(2 * len(states), 4)
    changes = [
        MetricChange(name, "accuracy", before, accuracy[1][name])
        for name, before in accuracy[0].items()
    ]
    drift = _drift(states[0], states[1], len(answers))
    return Forgetting(tuned.id, base.id, changes, remarks, drift=drift)


def load_probes(paths: Sequence[str | Path]) -> dict[str, list[MultipleChoice]]:
    """Read rows with choices by file, or by the values of a column ``task``.

    Rows of ``text`` and ``target`` are clozes, as in LAMBADA.

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
                message = "the row is not a prompt with choices."
                fix = 'Write {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}.'
                raise DataError([Problem("row.objective", message, fix, row.location)])
            task = records.get(row.line, {}).get("task")
            name = task if isinstance(task, str) and task else path.name.partition(".")[0]
            sets.setdefault(name, []).append(row)
    return sets


def _own_prompts() -> list[dict[str, Any]]:
    with as_file(files("luthier") / "evaluation" / "probes" / "prompts.jsonl") as path:
        return [record for _, record in read_records(path, [])]


def _answers(generator: Generator) -> list[Example]:
    """Return the answers of the base to our prompts, with weight 1 for sampled tokens."""
    from luthier.models.decoding.sampling import Sampling

    chat = generator.chat
    prompts = [[Message("user", str(each["prompt"]))] for each in _own_prompts()]
    # The divergence is an expectation over samples; greedy answers would underestimate the value.
    sampling = Sampling(max_tokens=SAMPLE_TOKENS, temperature=1.0, seed=7)
    examples: list[Example] = []
    for prompt, reply in zip(prompts, generator.answers(prompts, sampling), strict=True):
        if reply.reasoning:  # the template might render reasoning differently
            reply_T = np.array(reply.ids, dtype=np.int64)
            ids_T = np.concatenate([chat.encode_prompt(prompt), reply_T])
            weight_T = np.zeros(len(ids_T), dtype=np.float32)
            weight_T[len(ids_T) - len(reply_T) :] = 1.0
            examples.append(Example(ids_T, weight_T, len(examples)))
        elif reply.text.strip():
            encoded = chat.replies.encode_last([*prompt, Message("assistant", reply.text)])
            weight_T = encoded.learned_T.astype(np.float32)
            if not reply.finished:
                weight_T[np.flatnonzero(weight_T)[-1]] = 0.0  # the end token was not sampled
            if weight_T.any():
                examples.append(
                    Example(encoded.ids_T, weight_T, len(examples), source_T=encoded.source_T)
                )
    if not examples:
        raise RecipeError("The base model generates empty replies, so no drift can be measured.")
    return examples


def _accuracy(
    network: Network,
    chat: ChatFormat,
    sets: Mapping[str, Sequence[MultipleChoice]],
    remarks: list[str],
) -> dict[str, RowScores]:
    accuracy = dict[str, RowScores]()
    for name, rows in sets.items():
        fitted = fit_choices(rows, chat, network.context, "truncate")
        if fitted.truncated:
            remarks.append(f"{fitted.truncated:,} prompts of {name} were truncated to the context")
        likelihoods = choice_likelihoods(network, fitted.examples)
        correct = choice_scores(rows, likelihoods)[0]["accuracy"]
        assert isinstance(correct, RowScores)
        accuracy[name] = correct
    return accuracy


@dataclass(frozen=True, eq=False)
class _States:
    """Hidden states before the learned tokens of some rows, and the output head."""

    hidden_MH: Tensor
    target_M: Tensor
    row_M: NDArray[np.int64]
    head_VH: Tensor
    bias_V: Tensor | None
    cap: float | None


def _states(network: Network, rows: Sequence[Example]) -> _States:
    """Compute the hidden states before the learned tokens of ``rows``, in the order of the rows."""
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
    order_M = np.argsort(row_M, kind="stable")  # the batches of the two models may differ
    hidden_MH, target_M = (torch.cat(each)[order_M] for each in (states, targets))
    bias_V = None if network.head_bias_V is None else network.head_bias_V.detach()
    head_VH = network.head_VH.detach().clone()
    return _States(hidden_MH, target_M, row_M[order_M], head_VH, bias_V, network.logit_cap)


def _drift(base: _States, tuned: _States, samples: int) -> OutputDrift:
    import torch

    from luthier.objectives.logprobs import scores

    size = len(base.row_M)
    shared = min(len(base.head_VH), len(tuned.head_VH))  # embeddings are often padded
    kl_R, base_R, tuned_R, tokens_R = np.zeros((4, samples))
    with torch.no_grad():
        for start in range(0, size, CHUNK):
            part = slice(start, start + CHUNK)
            base_CV, tuned_CV = (
                scores(each.hidden_MH[part], each.head_VH, each.bias_V, cap=each.cap)[
                    :, :shared
                ].log_softmax(-1)
                for each in (base, tuned)
            )
            target_C1 = base.target_M[part, None]
            row_C = base.row_M[part]
            for sum_R, value_C in (
                (kl_R, (base_CV.exp() * (base_CV - tuned_CV)).sum(-1)),
                (base_R, -base_CV.gather(-1, target_C1)[:, 0]),
                (tuned_R, -tuned_CV.gather(-1, target_C1)[:, 0]),
            ):
                np.add.at(sum_R, row_C, value_C.double().cpu().numpy())
            np.add.at(tokens_R, row_C, 1.0)

    def perplexity(loss_R: NDArray[np.float64]) -> Statistic:
        return Statistic.of(
            lambda row_K: perplexity_of(float(loss_R[row_K].sum() / tokens_R[row_K].sum())),
            samples,
            is_share=False,
        )

    kl = RowScores.of(kl_R, tokens_R, is_share=False)
    return OutputDrift(samples, size, kl, perplexity(base_R), perplexity(tuned_R))


def forgetting_page(forgetting: MetricChanges) -> str:
    """Return the HTML page."""
    facts = []
    if isinstance(forgetting, Forgetting):
        drift = forgetting.drift
        low, high = drift.kl.interval
        facts = [
            ("drift, nats per token", f"{drift.kl.value:.4f}", f"{low:.4f} to {high:.4f}"),
            (
                "perplexity before",
                f"{drift.base_perplexity.value:.2f}",
                f"of {drift.tokens:,} tokens",
            ),
            (
                "perplexity after",
                f"{drift.tuned_perplexity.value:.2f}",
                f"{drift.samples:,} answers",
            ),
        ]
    return summary_page(
        f"{forgetting.model} compared with {forgetting.base}",
        [forgetting.verdict(), *forgetting.remarks], facts=facts, tables=forgetting.tables(),
        notes=["* not significant, corrected for all comparisons (Holm)"],
    )  # fmt: skip
