"""The seam between what is learned and how it is trained.

An objective is one frozen object: its fields are the hyper-parameters of its paper, with the
vetted setting as default. The engine calls these methods and knows nothing else:

    check     whether it suits the network at all
    meet      what the further models it asks for were trained for
    cost      what it asks of others in a run, for people to know before
    gather    rows that are learned together: judged answers to one prompt are pairs
    fit       what it must know of all rows: the classes there are
    encode    rows to token ids with a loss weight for each token
    start_head  where a new head starts, by the training rows
    bind_base   what it must know of the base model: how its states are read
    begin     what the network, as it is before the first step, adds to the rows
    refer     what it says of rows as the reference model, where they are read more than once
    keep      what is computed ahead for all rows, held-out ones included, and kept in files
    annotate  all that takes no gradient: sampling, rewards, teacher or reference scores, noise
    turns     the optimizer steps of one batch; one, unless the method says otherwise
    loss      a **sum** over a micro-batch; only the engine divides, once, by the global weight

Methods that need more than the network that trains say so: ``refers`` for its starting weights
(the reference model), ``others`` for further models (a teacher), ``extend`` for weights that only
training needs (a value head). What is measured on held-out rows and compared after saving is the
loss, unless ``validation_metrics`` and ``parity_loss`` say otherwise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.significance import RowScores
from luthier.models.heads import Head, Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


MOST_ROW_SCORES = 2_000
"""Held-out rows whose single scores are noted; the scores of more are known well enough."""


class Objective(BaseModel):
    """Base of all objectives: one paper, one file, one class."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    method: str
    """Name of the objective in recipes and on the command line."""

    task: ClassVar[Task] = "causal_lm"
    """What the head of the network is for."""
    shapes: ClassVar[frozenset[str]]
    """Row shapes it can learn from, by their names in ``luthier.data.shapes``."""
    also: ClassVar[frozenset[str]] = frozenset()
    """Further shapes it learns from when it is asked for by name; another is chosen for these."""
    beside: ClassVar[frozenset[str]] = frozenset()
    """Further row shapes that the sets of ``data.mix`` may have."""
    evaluated_on: ClassVar[frozenset[str]] = frozenset(
        {"messages", "preference", "prompt", "prompt_only", "rated", "text", "thumb"}
    )
    """Row shapes that its models are measured on."""
    reads: ClassVar[bool] = False
    """Whether its models answer with labels (:meth:`answers`); the others write text."""
    fixed: ClassVar[bool] = True
    """Whether the network sees the same tokens of a row in every epoch."""
    together: ClassVar[bool] = False
    """Whether the rows of a batch are learned against each other, so that its size matters."""
    augments: ClassVar[bool] = False
    """Whether words of a row may move or fall away without changing what it teaches."""
    packs: ClassVar[bool] = False
    """Whether ``arrange`` cuts rows to size, so that no row is too long."""
    by_itself: ClassVar[bool] = True
    """Whether it may be chosen by the shape of the rows alone, where no objective was asked for."""
    measure: ClassVar[str] = "loss"
    """Which of :meth:`validation_metrics` decides what weights are kept: ``loss``, or a score, of which
    more is better (where it is ``reward``, the loss is minus it)."""
    rate_factor: ClassVar[float] = 1.0
    """Share of the adaptation's learning rate that suits it, where no rate is given."""
    batch_rows: ClassVar[int | None] = None
    """Rows in a step, where no batch size is given and the rows themselves say nothing."""
    least_epochs: ClassVar[int] = 1
    """Passes over the rows where they are not too many, if no number of passes is given."""
    most_epochs: ClassVar[int] = 5
    """Passes over few rows, to come to :attr:`least_steps`."""

    @property
    def least_steps(self) -> int:
        """Optimizer steps to come to by passes over few rows, if no number of passes is given."""
        return 150

    @property
    def refers(self) -> bool:
        """Whether it runs the network at its starting weights, ``network.at_start()``."""
        return False

    @property
    def others(self) -> Mapping[str, str]:
        """Ids of further models it needs, by the name they have in ``network.others``."""
        return {}

    def head(self) -> Head:
        """The head the network needs; complete after :meth:`fit`."""
        return Head(self.task)

    def check(self, chat: ChatFormat) -> None:
        """Refuse networks that cannot learn this, as far as their tokenizer and format tell.

        Raises:
            RecipeError: with the reason, and what to use.
        """

    def meet(self, name: str, other: Objective, width: int) -> Self:
        """This objective with what a model of :attr:`others` was trained for taken in.

        Called before :meth:`fit` with the objective of the model ``name`` (a teacher has classes) and
        the width of its hidden states.

        Raises:
            RecipeError: where the model is for something else, with what to use.
        """
        return self

    def cost(self, rows: int, measured: int, calibrated: int) -> str:
        """What a run asks of others at most (verdicts of a judge), for people; empty for nothing.

        ``rows`` is how many the steps read in all, ``measured`` those of all measurements, and
        ``calibrated`` those that the adaptation reads before.
        """
        return ""

    def check_other(self, name: str, other: ChatFormat, chat: ChatFormat) -> None:
        """Refuse a model of :attr:`others` that does not go with the network of format ``chat``.

        Raises:
            RecipeError: with the reason, and what to use.
        """

    def extend(self, model: nn.Module) -> None:
        """Add weights to the network that are trained with it and not part of the custom model.

        Called after the adaptation was attached; ``model`` may be on the meta device.
        """

    def strip(self, model: nn.Module) -> None:
        """Take away what :meth:`extend` added, before the model is stored."""

    def gather(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of one file as they are learned from: judged answers become pairs.

        Raises:
            DataError: for rows that cannot be brought together.
        """
        return rows

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """This objective with what it learns from all training rows filled in.

        Raises:
            RowRefused: when the rows together cannot teach it anything.
        """
        return self

    def format(self, chat: ChatFormat) -> ChatFormat:
        """The format rows are encoded with and the custom model is served with."""
        return chat

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Token ids and loss weights of one row; ``index`` becomes ``Example.row``."""
        raise NotImplementedError

    def arrange(self, examples: Sequence[Example], context: int) -> list[Example]:
        """Regroup encoded rows, for objectives that pack them. ``context`` is the model's limit."""
        return list(examples)

    def begin(
        self,
        network: Network,
        examples: Sequence[Example],
        budget: int,
        note: Callable[[str], None],
    ) -> Sequence[Example]:
        """The training rows, with what the network at its starting weights adds to them.

        Called without a gradient or dropout, once for each start of a run. A run that goes on calls it
        again before its weights are restored, so it must draw nothing at random and keep the number
        and order of the rows. ``budget`` is the tokens read at once; ``note`` tells people something.
        """
        return examples

    def bind_base(self, folder: Path, learned: Objective | None) -> Self:
        """This objective with what follows from the base model.

        Args:
            folder: the Hugging Face directory of its network.
            learned: what it was tuned for, where it is a custom model.

        Raises:
            RecipeError: where the network cannot be read as asked.
        """
        return self

    @property
    def starts_head(self) -> bool:
        """Whether :meth:`start_head` sets a new head, which then does not start at random."""
        return False

    def start_head(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Set a head that would start at random by what the network says of the training rows.

        Called as :meth:`begin` is and right before it, where the base model has no such head. Returns
        what was done, for people; empty for nothing.
        """
        return ""

    def keep(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Compute ahead what is needed of all ``rows``, training and held-out ones, in every epoch.

        Called after :meth:`begin`, likewise without a gradient and once for each start. What is left in
        ``network.kept`` stays there while it trains. Files belong into ``folder`` (not made yet): a run
        that goes on finds them again, and they go when it is done.
        """

    def refer(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> Sequence[Example]:
        """Rows that are read more than once, with what the reference model says of each.

        Called as :meth:`begin` is, right before the first step, for training and for validation rows.
        """
        return examples

    def views(self, example: Example) -> list[Example]:
        """The rows the network is to see for one example: itself, unless the method says otherwise."""
        return [example]

    def room(self, view: Example) -> list[Example]:
        """What a row may have become by the time the network learns from it: its largest.

        Itself, unless the network writes something behind it in the step.
        """
        return [view]

    def seen(self, examples: Sequence[Example], training: bool = False) -> list[Example]:
        """All rows the network is to see for ``examples`` in one step.

        A method that draws them anew each time (noise, augmentation) draws from torch's global
        generator while ``training``, as checkpoints keep its state, and else always the same.
        """
        return [view for example in examples for view in self.views(example)]

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """The micro-batches of a batch of rows, with what is computed without a gradient.

        Each holds at most ``budget`` tokens. ``network.model.training`` tells whether it is for a step
        or for a measurement.
        """
        return network.batches(self.seen(examples, network.model.training), budget)

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield the micro-batches of each optimizer step that one batch of rows gives."""
        yield batches

    def report(self, batches: Sequence[TreeBatch]) -> dict[str, float]:
        """What :meth:`annotate` found out about a batch, for the metrics: means, by name."""
        return {}

    def advice(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """What people should know of the course of a run so far, from its metrics; empty for nothing.

        Asked for from time to time; ``lines`` are the records of the last training steps, 200 at most.
        """
        return ""

    def samples(self, batches: Sequence[TreeBatch]) -> list[dict[str, Any]]:
        """What the network wrote in a step, one record for each text, to be looked at later."""
        return []

    def cut(self, example: Example, context: int) -> Example:
        """``example`` with at most ``context`` tokens, its end cut off."""
        return cut_end(example, context)

    def refused_length(self, example: Example, context: int) -> RowRefused | None:
        """Why a row has no room in ``context`` tokens; ``None`` where it has, or needs none."""
        views = self.views(example)
        longest = max(room.longest for view in views for room in self.room(view))
        if longest <= context or self.packs:
            return None
        text = f"{longest} tokens are more than the model's context of {context}; "
        if written := longest - max(view.longest for view in views):
            text += f"{written} of them are for what the network is to write."
            return RowRefused(
                "row.too_long",
                text,
                "Shorten the prompt, write less, or choose `data.long_rows=drop`.",
            )
        weight = sum(view.weight for view in views)
        if example.source_T is not None and len(example.source_T) == longest:
            text += f"cutting the prompt would lose {1 - context / longest:.0%} of it."
        elif max(np.count_nonzero(view.weight_T) for view in views) > 1:
            lost = sum(float(view.weight_T[context:].sum()) for view in views) / weight
            text += f"cutting the row would lose {lost:.0%} of what it teaches."
        else:  # what it teaches is one label, rating or partner of the whole text
            text += f"cutting the row would lose {1 - context / longest:.0%} of its longest text."
        fix = "Shorten the row, or choose `data.long_rows=drop`, or `data.long_rows=truncate`."
        return RowRefused("row.too_long", text, fix)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed loss of one micro-batch."""
        raise NotImplementedError

    def mean_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """The loss on ``examples`` without dropout or a gradient, averaged over their weight."""
        return self._means(network, examples, budget).values()["loss"]

    def _means(self, network: Network, examples: Sequence[Example], budget: int) -> Means:
        import torch

        network.model.eval()
        means = Means()
        with torch.no_grad():
            for batch in self.annotate(network, examples, budget):
                means.add(self.loss(network, batch), batch.weight)
        return means

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """What is measured on held-out rows: ``loss``, and the further metrics of :meth:`loss`.

        The best by :attr:`measure` are kept. Where the loss tells its rows apart, the standard error
        is given, too, and under ``rows`` what each of at most :data:`MOST_ROW_SCORES` rows adds.
        """
        means = self._means(network, examples, budget)
        found: dict[str, Any] = means.values()
        scores = means.row_scores()
        if self.measure in scores:
            found[f"{self.measure}_error"] = scores[self.measure].error
        if scores and len(examples) <= MOST_ROW_SCORES:
            found["rows"] = {name: each.plain() for name, each in scores.items()}
        return found

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """What must be the same before and after saving: a function of network and rows alone."""
        return self.mean_loss(network, examples, budget)

    def described(self, example: Example) -> str:
        """What one row teaches beside its tokens, for people; empty where tokens are all."""
        return ""

    def answers(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """What a trained network says of each row of the batch, in the order of its tree."""
        raise NotImplementedError


class Means:
    """Means of the loss and of all metrics over micro-batches, from their sums."""

    def __init__(self) -> None:
        self._weights: list[float] = []
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._ratios: defaultdict[str, list[RowScores]] = defaultdict(list)

    def add(self, loss: Loss, weight: float) -> None:
        """Count in a micro-batch of ``weight``."""
        self._weights.append(weight)
        self._sums["loss"] += float(loss.total.detach())
        for name, value in loss.metrics.items():
            self._sums[name] += value
        for name, pair in loss.ratios.items():
            self._ratios[name].append(RowScores.of(*pair, is_share=name != "loss"))

    def values(self) -> dict[str, float]:
        """``loss`` and each metric by its name."""
        weight = math.fsum(self._weights)
        found = {name: total / weight for name, total in self._sums.items()}
        scores = self.row_scores()
        return found | {name: each.value for name, each in scores.items() if name != "loss"}

    def row_scores(self) -> dict[str, RowScores]:
        """What each row adds to the scores, in the order of the micro-batches."""
        return {name: RowScores.joined(each) for name, each in self._ratios.items()}


def check_writes(objective: Objective, chat: ChatFormat, instead: str = "") -> None:
    """Refuse a network that cannot learn to write, as its tokenizer has no token that ends a text.

    Raises:
        RecipeError: saying whether it is one that reads; ``instead`` is what it can learn.
    """
    if chat.stop_ids:
        return
    if chat.tokenizer.mask_token_id is None:
        raise RecipeError(
            f"objective {objective.method} learns to write, and this model's tokenizer names no token "
            "that ends a text (eos_token). Name it in the model's tokenizer_config.json"
        )
    raise RecipeError(
        f"this base reads, it does not write: objective {objective.method} learns to write, and its "
        "tokenizer names no token that ends a text, as those of encoders do not. "
        f"Use {instead}a base that writes, such as `base=smollm2-135m-instruct`"
    )


def cut_end(example: Example, context: int) -> Example:
    """The first ``context`` tokens of ``example``. What an encoder reads keeps its closing token."""
    source_T = example.source_T
    if source_T is not None and len(source_T) > context:
        source_T = np.append(source_T[: context - 1], source_T[-1])
    ids_T, weight_T = example.ids_T[:context], example.weight_T[:context]
    return replace(example, ids_T=ids_T, weight_T=weight_T, source_T=source_T)
