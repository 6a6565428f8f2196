"""The interface between training objectives and the engine.

An objective is one frozen object. The fields are the hyper-parameters of the paper, with vetted
defaults. Four methods define an objective:

    encode    rows to token ids with a loss weight for each token
    annotate  everything without a gradient: sampling, rewards, teacher or reference scores, noise
    turns     the optimizer steps of one batch; one step unless overridden
    loss      a **sum** over a micro-batch; only the engine divides, once, by the global weight

A preference loss needs ``loss`` alone (``objectives/preferences/simpo.py``). All other methods of
:class:`Objective` are hooks with defaults, in the order of a run. Objectives for image generation
have further methods: :class:`~luthier.media.objectives.generative.Generative`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np

from luthier.data.disk_sequence import concatenate
from luthier.data.inputs import PLURAL
from luthier.data.shapes import SHAPES
from luthier.errors import RecipeError, RowRefused
from luthier.models import DEFAULT_BASE
from luthier.models.networks.heads import Head
from luthier.objectives.means import loss_metrics, mean_loss
from luthier.tasks import GENERATION, Task
from luthier.types import Example, IntArray, LongRows, Loss, Row
from luthier.validation import StrictModel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.loader import MixedSet
    from luthier.models.folder import ModelFolder
    from luthier.models.networks.network import Network, TreeBatch


@dataclass(frozen=True)
class TrainingDefaults:
    """Default training settings of an objective."""

    learning_rate_multiplier: float = 1.0
    """Factor of the adaptation's learning rate."""
    pretrained_rate_multiplier: float = 1.0
    """Additional factor, unless all weights are random."""
    batch_rows: int | None = None
    """Batch size in rows; ``None`` derives the batch size from the number of rows."""
    batch_reason: str = ""
    """Reason for :attr:`batch_rows`, for the report."""
    min_epochs: int = 1
    """Minimum number of epochs, unless the rows are many."""
    max_epochs: int = 5
    """Maximum number of epochs to reach :attr:`min_steps` with few rows."""
    min_steps: int = 150
    """Target number of optimizer steps with few rows, if the number of epochs is open."""
    steps_per_class: int = 0
    """Additional steps per class of the head."""
    scratch_steps: int = 0
    """Target number of steps if all weights are random; the larger target applies."""
    scratch_epochs: int = 0
    """Maximum number of epochs to reach :attr:`scratch_steps`, if above :attr:`max_epochs`."""
    beta1: float | None = None
    """Decay of the optimizer's first moment; ``None`` for the usual decay."""
    patience: int | None = None
    """Measurements without a gain before early stopping; 0 disables early stopping."""
    bases: Mapping[str, str] = field(default_factory=dict)
    """Base model by kind of row, if the default base for the rows cannot train the objective."""


@dataclass(frozen=True)
class OtherModel:
    """A model next to the trained network, such as a teacher or a judge, before loading."""

    objective: Objective
    """Objective of the model's own training."""
    width: int
    """Hidden size."""
    chat: ChatFormat
    """Format of the model's rows."""


Changes = Literal["none", "fixed", "random"]
"""Changes to the rows of a step: none, fixed, or drawn from torch's global generator."""


@dataclass(frozen=True)
class RunModels:
    """The models of a run known so far, for :meth:`Objective.bind`."""

    chat: ChatFormat
    """Row format of the base model."""
    network: ModelFolder | None = None
    """Folder of the base model's network."""
    learned: Objective | None = None
    """Objective of the base model, if the base is a custom model."""
    others: Mapping[str, OtherModel] = field(default_factory=dict)
    """Models of :attr:`Objective.other_models`, by name."""


@dataclass(frozen=True)
class RunStart:
    """State before the first step, for :meth:`Objective.prepare`."""

    network: Network
    """Network at the initial weights."""
    examples: Sequence[Example]
    """All training rows."""
    budget: int
    """Maximum number of tokens of a micro-batch."""
    new_head: bool
    """True if the head is random because the base model has no matching head."""
    rows_read: int
    """Number of rows in all training steps."""
    rows_measured: int
    """Number of rows in all measurements."""
    rows_calibrated: int
    """Number of calibration rows of the adaptation."""
    note: Callable[[str], None]
    """Function to print a line."""
    mixed: Sequence[MixedSet] = ()
    """Sizes of the mixed-in sets, stored after the main set in ``examples``."""


@dataclass(frozen=True)
class PreparedRows:
    """Completed training rows, the result of :meth:`Objective.prepare`."""

    examples: Sequence[Example]
    head_fitted: bool = False
    """True if the new head was fitted to the rows."""
    separable: bool = False
    """True if a regression on each half of the rows is right on every row of the other half."""


@dataclass(frozen=True)
class StepReport:
    """Results of one optimizer step, in addition to the loss."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the rows of all processes, by name."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Records for ``samples.jsonl``: text generated in the step."""
    advice: str = ""
    """Advice derived from the last steps; empty without advice."""


@dataclass(frozen=True)
class Finished:
    """A completed objective, the result of :meth:`Objective.finish`."""

    objective: Objective
    rows: int = 0
    """Number of rows used for the settings."""
    wanted: int = 0
    """Sufficient number of held-out rows; with fewer, training rows were used too."""
    note: str = ""
    """Result on the held-out rows."""


class Objective(StrictModel):
    """Base class of all objectives: a file and a class per paper.

    Methods are in the order of a run. ``chat`` is the row format of the network. Letters of tensor
    shapes: ``R`` rows of a micro-batch, ``T`` tokens of a row, ``N`` distinct tokens of a
    micro-batch, ``M`` learned tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of a
    chunk or classes. ``budget`` is the maximum number of tokens of one micro-batch.
    """

    method: str
    """Name of the objective in recipes and in the CLI."""

    task: ClassVar[Task] = GENERATION
    """Task of the models (:mod:`luthier.tasks`)."""
    shapes: ClassVar[frozenset[str]] = frozenset()
    """Row shapes with this objective as default, by the names in ``luthier.data.shapes``."""
    further_shapes: ClassVar[frozenset[str]] = frozenset()
    """Additional row shapes, if a recipe names the objective."""
    mixed_shapes: ClassVar[frozenset[str]] = frozenset()
    """Additional row shapes for files of ``data.mix``."""
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({
        "choices", "messages", "passages", "preference", "prompt", "prompt_only", "rated", "text",
        "thumb",
    })  # fmt: skip
    """Row shapes for ``luthier evaluate`` with models of this objective."""
    same_each_epoch: ClassVar[bool] = True
    """True if the network computes the same tokens of a row in every epoch."""
    contrasts_rows: ClassVar[bool] = False
    """True if the loss compares the rows of a batch, so that the batch size matters."""
    allows_augmentation: ClassVar[bool] = False
    """True if words of a row may move or disappear without changing the label or target."""
    can_shard: ClassVar[bool] = False
    """True if each micro-batch is a single independent pass, so that layers can be sharded."""
    accepts_long_rows: ClassVar[bool] = False
    """True if :meth:`predict` divides rows longer than the context into windows."""
    truncates_long_rows: ClassVar[bool] = False
    """True if texts longer than the context are truncated by default."""
    measure: ClassVar[str] = "loss"
    """Metric of :meth:`validation_metrics` that selects the weights: ``loss``, or a score to
    maximize. For ``reward``, the loss is minus the reward."""
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults()
    """Default training settings."""

    @property
    def other_models(self) -> Mapping[str, str]:
        """Return the ids of additional models by name in ``network.others``."""
        return {}

    @property
    def uses_reference(self) -> bool:
        """True if the objective runs the network at the initial weights, ``network.at_start()``."""
        return False

    @property
    def completions(self) -> tuple[int, int]:
        """Completions per row generated in a step, and maximum tokens per completion."""
        return 0, 0

    @property
    def decision_threshold(self) -> float | None:
        """Score above which a pair is similar, or a row anomalous; ``None`` without a threshold."""
        return None

    @property
    def keeps_held_out(self) -> bool:
        """True if :meth:`finish` needs rows that the stored weights never learned."""
        return False

    @property
    def starts_head(self) -> bool:
        """True if :meth:`prepare` fits a new head to the rows with the current settings."""
        return False

    # 1. Before the rows are read.

    def bind(self, models: RunModels) -> Self:
        """Return the objective with settings derived from the models of a run.

        Called whenever more models are known: first with the format alone, as a compatibility
        check; next with the additional models; and after :meth:`fit` with the network.

        Raises:
            RecipeError: if a model is incompatible with the current settings, with an alternative.
        """
        return self

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Return the format for encoding rows and for serving the custom model."""
        return chat

    # 2. From rows to examples.

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows of one file regrouped for training, such as rated answers as pairs.

        Raises:
            DataError: for rows without a counterpart.
        """
        return rows

    def regroup_scored(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return rows regrouped for ``luthier evaluate``, with their targets."""
        return self.regroup(rows)

    def needs_other_rows(self, row: Row) -> bool:
        """Return whether :meth:`regroup` gives other rows for ``row`` alone than in its file."""
        return False

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Return the objective with settings derived from all training rows, such as labels.

        Raises:
            RowRefused: if the rows together teach nothing.
        """
        return self

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return token ids ``[T]`` and loss weights ``[T]`` of one row.

        Args:
            row: the row.
            index: the value of ``Example.row``.
            chat: the result of :meth:`format`.

        Raises:
            RowRefused: with the rule, the reason and the fix.
        """
        raise NotImplementedError

    def length_problem(self, example: Example, context: int) -> RowRefused | None:
        """Return the error for a row of more than ``context`` tokens; ``None`` if the row fits."""
        views = self.views([example])
        added = self.completions[1]
        # A completion lengthens `ids_T` only; the encoder's input has no completion.
        longest = max(max(view.longest, len(view) + added) for view in views)
        # An objective with its own `pack` cuts rows of any length into pieces that fit.
        if longest <= context or type(self).pack is not Objective.pack:
            return None
        text = f"the row has {longest} tokens, and the context of the model has {context}"
        if added:
            text += f", including {added} tokens for the completion"
        fix = "Shorten the row, or set `data.long_rows=drop` or `data.long_rows=truncate`."
        return RowRefused("row.too_long", f"{text}.", fix)

    def truncate(self, example: Example, context: int) -> Example:
        """Return ``example`` truncated to ``context`` tokens, for ``data.long_rows=truncate``."""
        # Text for a head keeps the closing token, such as [SEP]; generated text loses the end.
        cut = cut_end if self.task.writes else cut_text
        return cut(example, context)

    def long_rows(self, chosen: LongRows | None = None) -> LongRows:
        """Return how to handle rows longer than the context: ``chosen``, or the default."""
        return chosen or ("truncate" if self.truncates_long_rows else "error")

    def describe(self, example: Example) -> str:
        """Return the target of a row for reports, such as a label, if the tokens do not contain the
        target."""
        return ""

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the input rows of the network for ``examples``, such as both answers of a pair.

        Training steps use ``random`` changes, because checkpoints store the state of torch's
        generator. Measurements use ``fixed`` changes. Reports and data checks use rows without
        changes.
        """
        return list(examples)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Return the examples of one file regrouped into rows of at most ``context`` tokens.

        An objective with this method accepts rows of any length.
        """
        return examples

    # 3. The network, on the meta device first, and before the first step.

    def head(self) -> Head:
        """Return the head of the network; complete after :meth:`fit`."""
        return Head(self.task.head)

    def attach(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return modules for training only, by name in ``model``.

        Called after the adaptation is attached, when the trained weights are marked. ``model`` may
        be on the meta device. The engine adds the modules and removes the modules before the model
        is stored.

        Raises:
            RecipeError: if weights that this objective must train are frozen.
        """
        return {}

    def prepare(self, start: RunStart) -> PreparedRows:
        """Fit a new head, and complete the training rows with the network at the initial weights.

        Called without gradient or dropout at each start of a run, before the weights of a resumed
        run are restored. The method must not draw random numbers, and must keep the number and
        order of the rows.
        """
        return PreparedRows(start.examples)

    def precompute(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Compute values for all epochs from ``rows``, the training and held-out rows.

        Called after :meth:`prepare`, under the same conditions. Store the result in
        ``network.cache`` and files in ``folder``, which does not exist yet. A resumed run finds the
        files again; the engine deletes the folder at the end of the run.
        """

    # 4. Each step.

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Return the micro-batches of a batch of rows, with everything computed without a gradient.

        Examples: samples, rewards, teacher or reference scores, and noise. The results belong into
            ``TreeBatch.extra``. ``network.model.training`` is false in measurements.
        """
        # Fixed changes make measurements of different steps comparable.
        changes: Changes = "random" if network.model.training else "fixed"
        return [*network.batches(self.views(examples, changes), budget)]

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield the micro-batches of each optimizer step: one step unless overridden."""
        yield batches

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the loss of one micro-batch as a **sum** over rows or tokens, a scalar tensor.

        Only the engine divides, once, by the weight of all micro-batches of the step.
        """
        raise NotImplementedError

    def report(
        self,
        network: Network,
        batches: Sequence[TreeBatch],
        lines: Sequence[Mapping[str, Any]],
    ) -> StepReport:
        """Return additional metrics, samples and advice; called after the last turn of a step.

        Every process calls the method, so collective operations are allowed.

        Args:
            network: the network.
            batches: micro-batches of this process from :meth:`annotate`.
            lines: metrics of the previous steps, at most 200.
        """
        return StepReport()

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return metrics of held-out rows: ``loss`` and the metrics of :meth:`loss`.

        ``NAME_error`` is the standard error of a score, and ``rows`` contains row-level scores.
        """
        return loss_metrics(self, network, examples, budget)

    # 5. The custom model.

    def finish(
        self, network: Network, held: Sequence[Example], train: Sequence[Example], budget: int
    ) -> Finished:
        """Return the objective with settings derived from the trained network, such as a threshold.

        Called without gradient or dropout before the model is stored.
        """
        return Finished(self)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return a deterministic function of network and rows, equal before saving and after
        loading."""
        return mean_loss(self, network, examples, budget)

    def states(self, network: Network, batch: TreeBatch) -> Sequence[Tensor]:
        """Return the hidden states ``[K, H]`` of each row that baselines read, in tree order."""
        from luthier.models.networks.sentence_head import unit_embeddings

        states: Sequence[Tensor] = unit_embeddings(network, batch).split(1)
        return states

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the prediction for each row of the batch, in tree order.

        A prediction contains labels, numbers, an embedding, or the text of an image. Models of
        objectives without this method generate text for a prompt.
        """
        raise NotImplementedError

    def codes(self, network: Network, batch: TreeBatch) -> list[list[float]]:
        """Return the latents of each row, in tree order; for models with latents."""
        raise NotImplementedError


class ReplyObjective(Objective):
    """Base class of the objectives for networks that generate replies."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """Row format: the model's chat template, or prompt and reply as plain text."""
    encoder_alternative: ClassVar[str] = ""
    """Alternative objective for networks without text generation, followed by ``, or ``."""

    def bind(self, models: RunModels) -> Self:
        """Reject networks that cannot generate text."""
        check_writes(self, models.chat, self.encoder_alternative)
        return super().bind(models)

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Apply ``template``; ``auto`` keeps the base model's format."""
        return chat.with_template(self.template)

    def truncate(self, example: Example, context: int) -> Example:
        """Truncate each sequence, and drop sequences without learned tokens."""
        sides = [super(ReplyObjective, self).truncate(side, context) for side in example.sides]
        return Example.from_sides([side for side in sides if side.weight_T.any()] or sides[:1])

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return each sequence of the rows."""
        return [side for example in examples for side in example.sides]


def chat_of(network: Network) -> ChatFormat:
    """Return the row format of ``network``."""
    assert network.chat is not None
    return network.chat


Extra = TypeVar("Extra")


def extra_of(batch: TreeBatch, kind: type[Extra]) -> Extra:
    """Return the annotation of ``batch`` as type ``kind``."""
    assert isinstance(batch.extra, kind)
    return batch.extra


def with_longest_completions(objective: Objective, rows: Sequence[Example]) -> list[Example]:
    """Return ``rows`` at the maximum size of a step of ``objective``: all completions differ."""
    count, tokens = objective.completions
    if not tokens:
        return list(rows)
    # Each completion repeats a different token, so that the tree merges no two completions.
    written_GT = np.arange(count)[:, None].repeat(tokens, 1)
    return [
        Example(
            np.concatenate([row.ids_T, written_T]),
            np.zeros(len(row) + tokens, dtype=np.float32),
            row.row,
            source_T=row.source_T,
        )
        for row in rows
        for written_T in written_GT
    ]


def add_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Add the modules of :meth:`Objective.attach` to ``model`` and return the names."""
    for name, module in modules.items():
        model.add_module(name, module)
    return [*modules]


def predicts(objective: Objective | None) -> bool:
    """Return true if models of ``objective`` predict labels, numbers or embeddings."""
    return objective is not None and type(objective).predict is not Objective.predict


def has_codes(objective: Objective) -> bool:
    """Return true if models of ``objective`` have latents."""
    return type(objective).codes is not Objective.codes


def check_base(objective: Objective, chat: ChatFormat) -> None:
    """Reject a base model whose format is incompatible with ``objective``.

    Raises:
        RecipeError: with the reason and an alternative.
    """
    shapes = objective.shapes | objective.further_shapes
    modalities = {SHAPES[shape].reads for shape in shapes if shape in SHAPES}
    if modalities and chat.reads not in modalities:
        names = " and ".join(PLURAL[kind] for kind in sorted(modalities))
        raise RecipeError(
            f"the base model takes {PLURAL[chat.reads]} as input, and the objective requires "
            f"{names}.",
            rule="base.kind",
            setting="objective.method",
            value=objective.method,
            advice="Choose another objective, or a base for such rows (`luthier models list`).",
        )
    objective.task.check(chat)
    # For the errors only: the engine binds again when more models are known.
    objective.bind(RunModels(chat))


def check_writes(objective: Objective, chat: ChatFormat, instead: str = "") -> None:
    """Reject a network whose tokenizer has no end-of-text token, so that the network cannot
    generate.

    Raises:
        RecipeError: with the alternative ``instead`` for encoders.
    """
    if chat.stop_ids:
        return
    if chat.tokenizer.mask_token_id is None:
        raise RecipeError(
            f"objective {objective.method} requires an end-of-text token, and the model's "
            "tokenizer has none. Set `eos_token` in the model's tokenizer_config.json"
        )
    raise RecipeError(
        "the base model is an encoder and cannot generate text, which objective "
        f"{objective.method} requires. Use {instead}a base that generates text, such as "
        f"`base={DEFAULT_BASE}`",
        rule="objective.network",
    )


def rows_to_finish(
    held: Sequence[Example], train: Sequence[Example], minimum: int
) -> Sequence[Example]:
    """Return the held-out rows, and the training rows too if fewer than ``wanted`` are held out."""
    return held if len(held) >= minimum else concatenate([held, train])


def cut_end(example: Example, context: int) -> Example:
    """Return the first ``context`` tokens of ``example``. An encoder's input keeps the closing
    token."""
    source_T = example.source_T
    if source_T is not None and len(source_T) > context:
        source_T = np.append(source_T[: context - 1], source_T[-1])
    ids_T, weight_T = example.ids_T[:context], example.weight_T[:context]
    return replace(example, ids_T=ids_T, weight_T=weight_T, source_T=source_T)


def cut_text(example: Example, context: int) -> Example:
    """Return the first ``context - 1`` tokens and the last token, which closes the text for
    encoders."""
    if len(example) <= context:
        return example
    return take_tokens(example, np.r_[0 : context - 1, len(example) - 1])


def take_tokens(example: Example, places: slice | IntArray) -> Example:
    """Return ``example`` with the selected tokens and the same target."""
    segment_T = None if example.segment_T is None else example.segment_T[places]
    return replace(
        example,
        ids_T=example.ids_T[places],
        weight_T=example.weight_T[places],
        segment_T=segment_T,
    )
