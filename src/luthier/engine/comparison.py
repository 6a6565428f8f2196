"""Baselines of a run: fitted on the base model before the first step, and compared at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.data.shapes.base import Labelled
from luthier.evaluation.baselines import (
    ComparedRows,
    Comparison,
    FittedBaselines,
    States,
    fit_and_score,
)
from luthier.evaluation.label_issues import find_label_issues
from luthier.models.networks.network import Network, TreeBatch
from luthier.objectives import Objective
from luthier.tasks import Task
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

LARGEST_STATES = 20_000_000
"""Maximum number of values in all stored hidden states of the base model."""
READING = 0.75
"""Share of the time limit for encoding the rows."""
CHUNK = 256
"""Maximum number of rows to encode between two checks of the time limit."""
PASSES = 8
"""Maximum number of full micro-batches between two checks of the time limit."""


def encode_cut(
    objective: Objective, rows: Sequence[Row], chat: ChatFormat, room: int
) -> list[Example]:
    """Encode the rows with ``objective`` and truncate each row to ``room`` tokens."""
    whole = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    return [objective.truncate(each, room) if len(each) > room else each for each in whole]


def fit_baselines(
    network: Network,
    encoder: Objective,
    task: Task,
    train: ComparedRows,
    held: ComparedRows,
    budget: int,
    seconds: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    label_issues: bool = False,
    roots: Collection[str] = (),
) -> FittedBaselines | None:
    """Fit the baselines of ``task`` and return the scores; ``None`` without baselines.

    Args:
        network: the network before the first step.
        encoder: the objective that encoded the rows.
        task: the task of the rows.
        train: training rows of the baselines.
        held: held-out rows.
        budget: maximum number of tokens per forward pass.
        seconds: time limit. No baseline starts after the limit. Most of the time is for hidden
            states; when the time ends, baselines use the rows encoded so far.
        on_progress: function that receives the number of encoded rows and the total.
        label_issues: whether to search both splits for wrong labels, if time is left.
        roots: root base models of the compared models.
    """
    if not train or not held or not seconds:
        return None
    until = time.monotonic() + seconds
    states = base_states(
        network, encoder, task, train, held, budget, seconds * READING, on_progress
    )
    fitted = fit_and_score(
        task,
        train.rows,
        held.rows,
        states,
        until,
        has_states=not network.has_sparse_rows,
        roots=roots,
    )
    if not label_issues or fitted is None or states is None or time.monotonic() > until:
        return fitted
    if not isinstance(held.rows[0], Labelled):
        return fitted
    both_NH = torch.cat([states.train_NH, states.held_QH])
    # Encoding may stop at the time limit, so only the first rows have states.
    issues = find_label_issues([*train.rows[: states.rows], *held.rows], both_NH)
    return replace(fitted, label_issues=issues)


@torch.no_grad()
def base_states(
    network: Network,
    encoder: Objective,
    task: Task,
    train: ComparedRows,
    held: ComparedRows,
    budget: int,
    seconds: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> States | None:
    """Return the hidden states of the rows (:meth:`Objective.states`).

    Returns ``None`` if the time ends before ``held`` is encoded, if the network overflows, or if the
    network has no hidden states (TF-IDF).
    """
    if network.has_sparse_rows:
        return None
    began = time.monotonic()
    network.model.eval()

    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, len(train) + len(held)), len(train) + len(held))

    read = partial(_states, network, partial(encoder.states, network), on_read)
    if task.embeds:
        views = encoder.views(_without_negatives(held.examples))
        both = read(views, budget, began + seconds)
        if len(both) < len(views):
            return None
        # Views alternate: anchor, positive.
        both_VH = torch.cat(both)
        return States(both_VH[:0], both_VH[::2], 0, time.monotonic() - began, both_VH[1::2])
    held_states = read(held.examples, budget, began + seconds)
    if len(held_states) < len(held):
        return None
    most = max(1, LARGEST_STATES // network.width)
    train_states = read(train.examples[:most], budget, began + seconds)
    if not train_states:
        return None
    train_NH, held_QH = torch.cat(train_states), torch.cat(held_states)
    if not (train_NH.isfinite().all() and held_QH.isfinite().all()):
        return None
    return States(train_NH, held_QH, len(train_states), time.monotonic() - began)


def _without_negatives(examples: Sequence[Example]) -> list[Example]:
    """Return rows without hard negatives: all methods rank the same candidates, the partners."""
    return [replace(each, partner=None) for each in examples]


def _states(
    network: Network,
    read: Callable[[TreeBatch], Sequence[Tensor]],
    on_read: Callable[[int], None],
    examples: Sequence[Example],
    budget: int,
    until: float,
) -> list[Tensor]:
    """Return the states ``[K, H]`` of each row in order, until the time or the memory limit is
    reached."""

    def read_batch(batch: TreeBatch) -> list[Tensor]:
        states = [state_KH.float().cpu() for state_KH in read(batch)]
        on_read(len(states))
        return states

    row_states: list[Tensor] = []
    numbers = 0
    for chunk in _chunks(examples, PASSES * budget):
        if time.monotonic() > until or numbers > LARGEST_STATES:
            break
        states = network.read_rows(chunk, budget, read_batch)
        numbers += sum(each.numel() for each in states)
        row_states += states
    return row_states


def _chunks(examples: Sequence[Example], most: int) -> Iterator[list[Example]]:
    """Yield the rows in order, at most ``most`` tokens and :data:`CHUNK` rows at once."""
    chunk, tokens = list[Example](), 0
    for example in examples:
        if chunk and (len(chunk) == CHUNK or tokens + example.tokens > most):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(example)
        tokens += example.tokens
    if chunk:
        yield chunk


@torch.no_grad()
def measure_tuned(
    network: Network,
    objective: Objective,
    held: ComparedRows,
    baselines: FittedBaselines,
    budget: int,
) -> Comparison:
    """Measure the tuned network and the baselines on the same rows."""
    network.model.eval()
    views = objective.views(_without_negatives(held.examples))
    answers = network.read_rows(views, budget, partial(objective.predict, network))
    return baselines.compare_with(objective.task.row_scores(held.rows, answers))
