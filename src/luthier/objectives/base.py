"""The seam between what is learned and how it is trained.

An objective is one frozen object: its fields are the hyper-parameters of its paper, with the vetted
setting as default. Four methods define it:

    encode    rows to token ids with a loss weight for each token
    annotate  all that takes no gradient: sampling, rewards, teacher or reference scores, noise
    turns     the optimizer steps of one batch; one step unless overridden
    loss      a **sum** over a micro-batch; only the engine divides, once, by the global weight

A preference loss needs ``loss`` alone (``objectives/simpo.py``). All other methods of
:class:`Objective` are hooks with defaults, in the order in which a run calls them. Objectives that
make images have further methods: :class:`~luthier.media.objectives.generative.Generative`.
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
from luthier.models.heads import Head, Task
from luthier.objectives.means import loss_metrics, mean_loss
from luthier.types import Example, IntArray, Loss, Row
from luthier.validation import StrictModel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from luthier.data.chat import ChatFormat
    from luthier.models.folder import ModelFolder
    from luthier.models.network import Network, TreeBatch


@dataclass(frozen=True)
class TrainingDefaults:
    """What suits an objective where the recipe leaves the training open."""

    learning_rate_multiplier: float = 1.0
    """Share of the adaptation's learning rate."""
    pretrained_rate_multiplier: float = 1.0
    """A further share where not all weights start from random numbers."""
    batch_rows: int | None = None
    """Rows in a step, where the rows themselves say nothing."""
    batch_reason: str = ""
    """Why so many."""
    min_epochs: int = 1
    """Passes over the rows where they are not too many."""
    max_epochs: int = 5
    """Passes over few rows, to reach :attr:`min_steps`."""
    min_steps: int = 150
    """Optimizer steps to reach by passes over few rows, if the number of passes is open."""
    steps_per_class: int = 0
    """Further steps for each class of the head."""
    scratch_steps: int = 0
    """Steps to come to where all weights start from random numbers, if that is more."""
    scratch_epochs: int = 0
    """Passes over few rows for that, if more than :attr:`max_epochs`."""
    beta1: float | None = None
    """Decay of the optimizer's first moment, where the usual one does not suit it."""
    patience: int | None = None
    """Measurements without a gain that end a run; 0 where they say little of what is learned."""
    bases: Mapping[str, str] = field(default_factory=dict)
    """Base model by what rows hold, where the rows alone would name one that cannot learn it."""


@dataclass(frozen=True)
class OtherModel:
    """A model next to the network that trains, such as a teacher or a judge, before it is loaded."""

    objective: Objective
    """Objective that the model was trained for."""
    width: int
    """Numbers in a hidden state."""
    chat: ChatFormat
    """Format of the model's rows."""


Changes = Literal["none", "fixed", "random"]
"""Changes to the rows of a step: none, the same each time, or drawn from torch's global generator."""


@dataclass(frozen=True)
class RunModels:
    """The models of a run, as far as they are known, for :meth:`Objective.bind`."""

    chat: ChatFormat
    """Format of the rows of the base model."""
    network: ModelFolder | None = None
    """Folder of the network of the base model."""
    learned: Objective | None = None
    """Objective of the base model, if that is a custom model."""
    others: Mapping[str, OtherModel] = field(default_factory=dict)
    """Models of :attr:`Objective.other_models`, by name."""


@dataclass(frozen=True)
class RunStart:
    """A run before its first step, for :meth:`Objective.prepare`."""

    network: Network
    """Network at its starting weights."""
    examples: Sequence[Example]
    """All training rows."""
    budget: int
    """Tokens of one micro-batch."""
    new_head: bool
    """True if the head has random numbers, because the base model has no such head."""
    rows_read: int
    """Rows that all steps read."""
    rows_measured: int
    """Rows that all measurements read."""
    rows_calibrated: int
    """Rows that the adaptation reads before the first step."""
    note: Callable[[str], None]
    """Prints a line."""


@dataclass(frozen=True)
class PreparedRows:
    """Training rows that are complete, as :meth:`Objective.prepare` returns them."""

    examples: Sequence[Example]
    head_fitted: bool = False
    """True if the new head was set from the rows."""


@dataclass(frozen=True)
class StepReport:
    """Results of one step that are known after its last turn, beyond the loss."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over the rows of all processes, by name."""
    samples: Sequence[Mapping[str, Any]] = ()
    """One record for each text of ``samples.jsonl`` that the network wrote in the step."""
    advice: str = ""
    """Advice from the last steps; empty for none."""


@dataclass(frozen=True)
class Finished:
    """An objective that is complete, as :meth:`Objective.finish` returns it."""

    objective: Objective
    rows: int = 0
    """Rows that its settings were drawn from."""
    wanted: int = 0
    """Held-out rows that suffice; with fewer, training rows were read too."""


class Objective(StrictModel):
    """Base of all objectives: one paper, one file, one class.

    Methods follow in the order of a run. ``chat`` is the format of the network's rows. Letters of
    shapes: ``R`` rows of a micro-batch, ``T`` tokens of a row, ``N`` distinct tokens of a micro-batch,
    ``H`` numbers of a hidden state. ``budget`` is the number of tokens of one micro-batch.
    """

    method: str
    """Name of the objective in recipes and on the command line."""

    task: ClassVar[Task] = "causal_lm"
    """Purpose of the network's head."""
    shapes: ClassVar[frozenset[str]] = frozenset()
    """Row shapes for which this objective may be chosen, by their names in ``luthier.data.shapes``."""
    further_shapes: ClassVar[frozenset[str]] = frozenset()
    """Further row shapes that the objective learns from, if a recipe names the objective."""
    mixed_shapes: ClassVar[frozenset[str]] = frozenset()
    """Row shapes of the files of ``data.mix``, in addition to the others."""
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset(
        {"choices", "messages", "preference", "prompt", "prompt_only", "rated", "text", "thumb"}
    )
    """Row shapes that ``luthier evaluate`` measures models of this objective on."""
    same_each_epoch: ClassVar[bool] = True
    """True if the network sees the same tokens of a row in every epoch."""
    contrasts_rows: ClassVar[bool] = False
    """True if the loss compares the rows of a batch, so that the batch size matters."""
    allows_augmentation: ClassVar[bool] = False
    """True if words of a row may be moved or removed without a change of its label or target."""
    can_shard: ClassVar[bool] = False
    """True if each micro-batch is one pass that needs no other pass, so that layers can be sharded."""
    generates_images: ClassVar[bool] = False
    """True if the network generates images (:mod:`luthier.media.image_generation`)."""
    measure: ClassVar[str] = "loss"
    """Metric of :meth:`validation_metrics` that chooses the weights: ``loss``, or a score where more is
    better. If the score is ``reward``, the loss is minus the reward."""
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults()
    """Training settings for recipes that leave them open."""

    @property
    def other_models(self) -> Mapping[str, str]:
        """Ids of the models next to the network, by their names in ``network.others``."""
        return {}

    @property
    def uses_reference(self) -> bool:
        """True if the objective runs the network at its starting weights, ``network.at_start()``."""
        return False

    @property
    def completions(self) -> tuple[int, int]:
        """Completions per row that the network writes in a step, and tokens of each at most."""
        return 0, 0

    @property
    def starts_head(self) -> bool:
        """True if :meth:`prepare` sets a new head from the rows with the current settings."""
        return False

    # 1. Before the rows are read.

    def bind(self, models: RunModels) -> Self:
        """Return this objective with the settings that follow from the models of a run.

        Called whenever more of the models is known: with the format alone, to see whether a network
        can learn the objective, then with the other models, and after :meth:`fit` with the network.

        Raises:
            RecipeError: if a model cannot be used with the current settings, with an alternative.
        """
        return self

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Return the format that rows are encoded with and that the custom model is served with."""
        return chat

    # 2. From rows to examples.

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows of one file as the objective learns from them, such as answers as pairs.

        Raises:
            DataError: for rows without a counterpart.
        """
        return rows

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Return this objective with the settings that follow from all training rows, such as labels.

        Raises:
            RowRefused: if nothing can be learned from the rows together.
        """
        return self

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return token ids ``[T]`` and loss weights ``[T]`` of one row.

        ``chat`` is the result of :meth:`format`, and ``index`` becomes ``Example.row``.

        Raises:
            RowRefused: with the rule, the reason and the fix.
        """
        raise NotImplementedError

    def length_problem(self, example: Example, context: int) -> RowRefused | None:
        """Return the error for a row of more than ``context`` tokens; ``None`` if the row fits."""
        views = self.views([example])
        added = self.completions[1]
        longest = max(max(view.longest, len(view) + added) for view in views)
        if longest <= context or type(self).pack is not Objective.pack:
            return None
        text = f"{longest} tokens are more than the model's context of {context}"
        if added:
            text += f"; at most {added} of them are for the completion"
        fix = "Shorten the row, or choose `data.long_rows=drop`, or `data.long_rows=truncate`."
        return RowRefused("row.too_long", f"{text}.", fix)

    def truncate(self, example: Example, context: int) -> Example:
        """Return ``example`` cut to ``context`` tokens; called for ``data.long_rows=truncate``."""
        return cut_end(example, context)

    def describe(self, example: Example) -> str:
        """Return the target of a row that its tokens do not show, such as a label, for reports."""
        return ""

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the rows that the network reads for ``examples``, such as both answers of a pair.

        A step reads ``random`` changes, because checkpoints store the state of torch's generator, and
        a measurement ``fixed`` changes. Reports and checks of the data read rows without changes.
        """
        return list(examples)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Return the examples of one file regrouped into rows of at most ``context`` tokens.

        No row is too long for an objective that overrides this method.
        """
        return examples

    # 3. The network, on the meta device first, and before the first step.

    def head(self) -> Head:
        """Return the head of the network; complete after :meth:`fit`."""
        return Head(self.task)

    def attach(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Return the modules that only training needs, by their names in ``model``.

        Called after the adaptation is attached, when the weights that train are marked. ``model`` may
        be on the meta device. The engine adds the modules and removes them before the model is stored.

        Raises:
            RecipeError: if weights that this objective must train are frozen.
        """
        return {}

    def prepare(self, start: RunStart) -> PreparedRows:
        """Set a new head, and complete the training rows from the network at its starting weights.

        Called without a gradient or dropout at each start of a run, before the weights of a resumed
        run are restored. The method must not draw random numbers, and must keep the number and order
        of the rows.
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
        """Compute once what every epoch needs of ``rows``, the training and held-out rows.

        Called after :meth:`prepare`, under the same conditions. The result belongs into
        ``network.cache``. Files belong into ``folder``, which does not exist yet: a resumed run finds
        the files again, and the engine deletes the folder at the end of the run.
        """

    # 4. Each step.

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Return the micro-batches of a batch of rows, with everything that takes no gradient.

        Such are samples, rewards, scores of a teacher or of the reference model, and noise; they
        belong into ``TreeBatch.extra``. ``network.model.training`` tells a step from a measurement.
        """
        changes: Changes = "random" if network.model.training else "fixed"
        return [*network.batches(self.views(examples, changes), budget)]

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield the micro-batches of each optimizer step: one step unless overridden."""
        yield batches

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the loss of one micro-batch as a **sum** over rows or tokens, a scalar tensor.

        The engine alone divides, once, by the weight of all micro-batches of the step.
        """
        raise NotImplementedError

    def report(
        self,
        network: Network,
        batches: Sequence[TreeBatch],
        lines: Sequence[Mapping[str, Any]],
    ) -> StepReport:
        """Return further metrics, samples and advice; called after the last turn of a step.

        ``batches`` are the micro-batches of this process as :meth:`annotate` returned them, and
        ``lines`` the metrics of at most 200 steps before. Every process calls the method, so it may
        exchange numbers with the other processes.
        """
        return StepReport()

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return metrics of held-out rows: ``loss`` and the metrics of :meth:`loss`.

        ``NAME_error`` is the standard error of a score, and ``rows`` has the scores of single rows.
        """
        return loss_metrics(self, network, examples, budget)

    # 5. The custom model.

    def finish(
        self, network: Network, held: Sequence[Example], train: Sequence[Example], budget: int
    ) -> Finished:
        """Return this objective with settings drawn from the trained network, such as a threshold.

        Called without a gradient or dropout before the model is stored.
        """
        return Finished(self)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return a function of network and rows alone, which must be equal after saving and loading."""
        return mean_loss(self, network, examples, budget)

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the answer to each row of the batch, in the order of its tree.

        An answer has labels, numbers, an embedding, or the text of an image. Models of an objective
        without this method write text after a prompt.
        """
        raise NotImplementedError


class WritesReplies(Objective):
    """Base of the objectives whose networks write replies to prompts."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """How a row becomes text: the model's chat template, or prompt and reply as they are."""
    instead_of_writing: ClassVar[str] = ""
    """Objective to name where a network does not write, followed by ``, or ``."""

    def bind(self, models: RunModels) -> Self:
        """Reject networks that do not write."""
        check_writes(self, models.chat, self.instead_of_writing)
        return super().bind(models)

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Apply ``template``, keeping the base model's own choice for ``auto``."""
        return chat.with_template(self.template)


def chat_of(network: Network) -> ChatFormat:
    """How texts become tokens of ``network``, and images or sounds what it reads."""
    assert network.chat is not None
    return network.chat


Extra = TypeVar("Extra")


def extra_of(batch: TreeBatch, kind: type[Extra]) -> Extra:
    """Return the annotation of ``batch``, which is of type ``kind``."""
    assert isinstance(batch.extra, kind)
    return batch.extra


def with_completions(objective: Objective, rows: Sequence[Example]) -> list[Example]:
    """Return ``rows`` as large as a step of ``objective`` can make them: all completions differ."""
    count, tokens = objective.completions
    if not tokens:
        return list(rows)
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
    """Add the modules of :meth:`Objective.attach` to ``model`` and return their names."""
    for name, module in modules.items():
        model.add_module(name, module)
    return [*modules]


def threshold_of(objective: Objective) -> float | None:
    """Return the score above which an answer stands out, for objectives that draw such a threshold."""
    drawn = type(objective).finish is not Objective.finish
    found: float | None = getattr(objective, "threshold", None) if drawn else None
    return found


def room_of(objective: Objective, chat: ChatFormat, context: int) -> int:
    """Return the largest number of tokens of a row for a network of ``context`` tokens."""
    return chat.longest_embedded(context) if objective.task == "embedding" else context


def predicts(objective: Objective | None) -> bool:
    """Return whether models of ``objective`` answer with labels, numbers or embeddings."""
    return objective is not None and type(objective).predict is not Objective.predict


def check_base(objective: Objective, chat: ChatFormat) -> None:
    """Refuse a base model that cannot learn ``objective``, as far as its format tells.

    Raises:
        RecipeError: with the reason, and what to use.
    """
    shapes = objective.shapes | objective.further_shapes
    known = {SHAPES[shape].reads for shape in shapes if shape in SHAPES}
    if known and chat.reads not in known:
        learned = " and ".join(PLURAL[kind] for kind in sorted(known))
        raise RecipeError(
            f"this base model reads {PLURAL[chat.reads]}, and the objective learns from {learned}.",
            rule="base.kind",
            setting="objective.method",
            value=objective.method,
            advice="Choose another objective, or a base for such rows (`luthier models list`).",
        )
    if objective.task == "causal_lm":
        chat.check_decoder()
    if objective.task == "embedding":
        chat.check_sentence()
    objective.bind(RunModels(chat))


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


def rows_to_finish(
    held: Sequence[Example], train: Sequence[Example], wanted: int
) -> Sequence[Example]:
    """Return the held-out rows, and the training rows too if fewer than ``wanted`` are held out."""
    return held if len(held) >= wanted else concatenate([held, train])


def cut_end(example: Example, context: int) -> Example:
    """The first ``context`` tokens of ``example``. What an encoder reads keeps its closing token."""
    source_T = example.source_T
    if source_T is not None and len(source_T) > context:
        source_T = np.append(source_T[: context - 1], source_T[-1])
    ids_T, weight_T = example.ids_T[:context], example.weight_T[:context]
    return replace(example, ids_T=ids_T, weight_T=weight_T, source_T=source_T)


def cut_text(example: Example, context: int) -> Example:
    """Its first ``context - 1`` tokens and the last, which closes the text for encoders."""
    if len(example) <= context:
        return example
    return take_tokens(example, np.r_[0 : context - 1, len(example) - 1])


def take_tokens(example: Example, places: slice | IntArray) -> Example:
    """``example`` with some of its tokens; its target stays."""
    return replace(
        example,
        ids_T=example.ids_T[places],
        weight_T=example.weight_T[places],
        word_T=None if example.word_T is None else example.word_T[places],
    )
