"""Training jobs: a recipe with the data, the base model and every setting resolved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from luthier import __version__
from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.data.augmentation import Augmentation
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.template_kwargs import DATE
from luthier.data.inputs import PLURAL, SINGULAR
from luthier.data.loader import RowOrder
from luthier.engine import defaults
from luthier.engine.dataset import Dataset, LikelyLabels, OpenedData, prepare
from luthier.engine.machine import Machine, available_memory
from luthier.engine.memory import (
    MemoryEstimate,
    TrainingSketch,
    check_memory,
    disk_needed,
    sharded_estimate,
    sketch_training,
    weight_bytes,
)
from luthier.engine.metrics import Reporter
from luthier.errors import RecipeError
from luthier.files import need_disk
from luthier.gate.checks.conversations import SEVERAL_REPLIES
from luthier.gate.inspect import LANGUAGE_ROWS, default_base
from luthier.gate.report import warnings
from luthier.gate.rules import MOSTLY_TRUNCATED, mostly_truncated
from luthier.library import models as store
from luthier.library.folders import base_folder
from luthier.models.base_kinds import sole_objective
from luthier.models.catalog import begins_random
from luthier.models.networks.classic import NETS
from luthier.models.networks.dropout import check_dropout
from luthier.models.networks.heads import HEADS, head_weights, hidden_size_of, scratch_rate
from luthier.models.networks.layers import layer_names
from luthier.models.networks.layouts import MOST_IMAGES, is_flat
from luthier.models.networks.modalities import text_fields
from luthier.models.tokenizer import check_vocabulary
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import OtherModel, RunModels, with_longest_completions
from luthier.recipe import Recipe
from luthier.types import Example

MANY_ROWS = 5_000
"""Minimum number of rows for progress reports of the data check."""
LARGE = 50_000_000
"""Minimum size of a data file for progress reports of reading, in bytes."""


@dataclass(frozen=True)
class Sample:
    """Indexes of the sampled rows of a trial run."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    of: int
    """Number of training examples before sampling."""


@dataclass(frozen=True)
class TrainingJob:
    """A recipe with every setting resolved, and the objects to train with."""

    recipe: Recipe
    original_recipe: Recipe
    """The original recipe, before defaults are filled in."""
    base: store.StoredModel
    chat: ChatFormat
    data: Dataset
    machine: Machine
    steps: int
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the manifest about the origin of the model."""
    others: Mapping[str, store.StoredModel] = field(default_factory=dict)
    """Additional models of the objective, such as a teacher, by name."""
    expected_memory: int = 0
    """Estimated peak memory in bytes, computed from the sizes of the network alone."""
    new_head: bool = False
    """True if the base model has no matching head, so that the head starts from random weights."""
    sample: Sample | None = None
    """Sampled rows of a trial run; ``None`` for all rows."""
    refit_steps: int = 0
    """Maximum number of steps of the refit; 0 without a refit."""
    until: int = 0
    """Step to stop after, if the schedule is longer; else 0."""
    steps_before: int = 0
    """Number of steps of the first training, for a refit."""
    usual_rate: float = 0.0
    """Default learning rate for the job."""
    label_issues: LikelyLabels | None = None
    """Label issues with changes of the training rows; ``None`` before the search."""

    @property
    def rows(self) -> int:
        """Number of training examples of the whole run."""
        return self.sample.of if self.sample else len(self.data.train)

    @property
    def unusual_settings(self) -> list[str]:
        """Warnings about settings that are probably mistakes."""
        return defaults.unusual_settings(self.recipe.training, self.usual_rate, self.rows)

    @property
    def all_steps(self) -> int:
        """Number of steps of the whole run, including a refit."""
        return self.steps_before + (self.until or self.steps) + self.refit_steps

    def with_sample(self, train: Sequence[int], validation: Sequence[int]) -> TrainingJob:
        """Return the job restricted to the given row indexes. Training keeps the order of
        ``train``."""
        training = self.recipe.training.model_copy(update={"shuffle": False})
        recipe = self.recipe.model_copy(update={"training": training})
        sample = Sample(tuple(train), tuple(validation), len(self.data.train))
        return replace(self, recipe=recipe, sample=sample)

    def with_rows(self, train: Sequence[Example]) -> TrainingJob:
        """Return the job with prepared training rows; a sampled job selects the sampled rows."""
        data = replace(self.data, train=train)
        if self.sample is not None:
            data = replace(
                data,
                train=[train[index] for index in self.sample.train],
                validation=[self.data.validation[index] for index in self.sample.validation],
                mixed=(),
            )
        return replace(self, data=data)

    def with_label_issues(self, likely: LikelyLabels) -> TrainingJob:
        """Return the job with the rows of ``likely`` changed as ``data.label_issues`` says.

        The number of epochs stays the same, so fewer rows give fewer steps.
        """
        relabel = self.recipe.data.label_issues == "relabel"
        data = self.data.with_label_issues(likely, self.chat, relabel)
        steps = defaults.steps_of(self.recipe, data.main, data.mixed)
        refit_steps = self.refit_steps
        if refit_steps:
            refit_steps = defaults.steps_of(
                self.recipe, data.main + len(data.validation), data.mixed
            )
        return replace(self, data=data, steps=steps, refit_steps=refit_steps, label_issues=likely)

    def request(self) -> dict[str, Any]:
        """Return the request to compare on resume."""
        chosen = self.recipe.data.chat_template
        return {
            "recipe": self.original_recipe.plain(),
            "data": self.data.hashes,
            **({"template": self.chat.template.sha256} if chosen is not None else {}),
            "luthier": __version__,
            **self.fixed_values(),
        }

    def fixed_values(self) -> dict[str, Any]:
        """Return the values chosen at the start of a run and fixed on resume."""
        return {
            "micro_batch_tokens": self.recipe.training.micro_batch_tokens,
            "template_date": self.chat.template.date,
        }


def with_base(recipe: Recipe, reporter: Reporter, data: OpenedData | None = None) -> Recipe:
    """Return the recipe with a default base model for the rows, if the recipe names no base."""
    if "base" in recipe.model_fields_set:
        return recipe
    data = data or OpenedData(recipe.data, recipe.objective)
    base, reason = default_base(data.train.first(LANGUAGE_ROWS), recipe.objective)
    reporter.settings([("base", base, reason)])
    return recipe.model_copy(update={"base": base})


def with_base_defaults(
    recipe: Recipe, base: store.StoredModel, chat: ChatFormat, reporter: Reporter
) -> Recipe:
    """Return the recipe with defaults for the kind of base model and rows.

    - A base with random weights is trained in full.
    - Images and audio are augmented, except when features are computed once, for a base that is
      fitted, or when the target is text: cropping would cut off part of the text.
    """
    choices: list[defaults.Choice] = []
    own = sole_objective(base.kind)
    if recipe.objective is None and own is not None:
        choices.append(("objective", own, f"the only objective for {base.id}"))
        recipe = recipe.model_copy(update={"objective": OBJECTIVES[own].model_validate({})})
    full = ADAPTATIONS["full"].model_validate({})
    learns_all = base.manifest.is_random or begins_random(base.root)
    if learns_all and "adaptation" not in recipe.model_fields_set:
        if not base.network.is_stepless:
            reason = f"all weights of {base.root} started from random numbers"
            choices.append(("adaptation.method", full.method, reason))
        recipe = recipe.model_copy(update={"adaptation": full})
    elif base.manifest.is_random and type(recipe.adaptation) is not type(full):
        reporter.note(
            f"warning: all weights of {base.id} are random, and {recipe.adaptation.method} "
            "trains few of the weights. Use `--adaptation full`"
        )
    if recipe.data.augmentation is None:
        usual = Augmentation()
        changes = recipe.objective is None or recipe.objective.allows_augmentation
        processor = None if chat.has_tokenizer else chat.media
        only_fits = recipe.adaptation.head_only or base.network.is_stepless
        if processor is not None and changes and not only_fits:
            contrasts = recipe.objective is not None and recipe.objective.contrasts_rows
            usual = (Augmentation.views if contrasts else Augmentation.usual)(processor.kind)
            reason = f"small random changes of each {SINGULAR[processor.kind]}"
            if contrasts:
                reason = f"two similar views of each {SINGULAR[processor.kind]}"
            amounts = usual.model_dump(exclude_defaults=True).items()
            if words := ", ".join(f"{name}={amount:g}" for name, amount in amounts):
                choices.append(("data.augmentation", words, reason))
        data = recipe.data.model_copy(update={"augmentation": usual})
        recipe = recipe.model_copy(update={"data": data})
    if choices:
        reporter.settings(choices)
    return recipe


def prepare_job(
    recipe: Recipe,
    base: store.StoredModel,
    machine: Machine,
    reporter: Reporter,
    fixed_values: Mapping[str, Any] | None = None,
    refit: bool = False,
    processes: int = 1,
    stored_bytes: int = 0,
    opened: OpenedData | None = None,
) -> TrainingJob:
    """Check the data against the base model and return the job of ``recipe``.

    ``fixed_values`` and ``stored_bytes`` (size of the checkpoints) are those of the resumed run. With
    ``refit``, held-out rows are trained too. ``opened`` are the row sources, if opened already.
    """
    fixed_values = fixed_values or {}
    reporter.stage("Checking the data")
    base.network.check()
    original = recipe
    recipe, chat = _with_template(recipe, base, fixed_values, reporter)
    recipe = with_base_defaults(recipe, base, chat, reporter)
    check_vocabulary(chat, base.network.fields, base.id)
    context, source = base.network.context_and_reason
    if source:
        reporter.note(f"context: {context:,} tokens, {source}")
    room = base.room - recipe.adaptation.added_tokens
    if room < 1:
        raise RecipeError(
            f"{context - room} added tokens leave no room in the model's context of {context}. "
            "Use fewer tokens"
        )
    objective = bind_models(recipe.objective, chat, reporter.stage)
    data = _read_data(recipe, objective, base, chat, room, reporter, refit, opened)
    reporter.note(f"data: {data.recognized}")
    if recipe.forgetting is not None and not data.objective.task.writes:
        raise RecipeError(
            "`forgetting` requires an objective for text generation, and objective "
            f"{data.objective.method} is not. Evaluate rows of the earlier task with `luthier "
            "evaluate`"
        )
    _note_rows(data, base, context, reporter)
    job = resolve_job(
        recipe, base, chat, data, machine, reporter, fixed_values, processes, stored_bytes
    )
    job = replace(job, original_recipe=original)
    origin: dict[str, Any] = {"parent": base.id, "root": base.root, "recipe": job.recipe.plain()}
    origin |= store.tokenizer_origin(base)
    if "template_approved" in origin and recipe.data.chat_template is not None:
        origin["template_approved"] = True  # the user's own template
    if job.others:
        origin["others"] = {name: other.id for name, other in job.others.items()}
    return replace(job, origin=origin)


def _with_template(
    recipe: Recipe, base: store.StoredModel, fixed_values: Mapping[str, Any], reporter: Reporter
) -> tuple[Recipe, ChatFormat]:
    """Return recipe and format with the template, date and media settings of the run."""
    kwargs, chat = recipe.data.chat_template_kwargs or {}, recipe.data.format(base.chat)
    if recipe.data.chat_template is not None:
        end = ", ".join(chat.text_tokenizer.stop_names)
        own = (
            "in place of the base's own"
            if base.chat.template.kind == "chat"
            else "the base has none"
        )
        reason = f"{own}; replies end with {end}"
        reporter.settings([("data.chat_template", recipe.data.chat_template, reason)])
    if chat.template.prints_date and chat.template.date is None:
        # Training rows, the parity check and a resumed run must have the same tokens on every day.
        printed = fixed_values.get("template_date")
        chat = replace(chat, template=chat.template.with_date(printed))
        kwargs = {**kwargs, DATE: str(chat.template.date)}
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"chat_template_kwargs": kwargs})}
        )
        reason = "the chat template prints a date; a server prints the current date"
        reporter.settings([(f"data.chat_template_kwargs.{DATE}", chat.template.date, reason)])
    chat = chat.with_media_settings(
        image_size=recipe.data.image_size,
        sampling_rate=recipe.data.sampling_rate,
        max_seconds=recipe.data.max_seconds,
    )
    return recipe, chat


def _read_data(
    recipe: Recipe,
    objective: Objective | None,
    base: store.StoredModel,
    chat: ChatFormat,
    room: int,
    reporter: Reporter,
    refit: bool,
    opened: OpenedData | None,
) -> Dataset:
    """Read and check the rows, with progress for large files and many rows."""
    media = chat.media

    def on_progress(done: int, size: int) -> None:
        if size >= LARGE and media is None:  # media files are read by the row check
            reporter.progress(done // 1_000_000, size // 1_000_000, "MB read")

    def on_row(done: int, count: int) -> None:
        if media is not None or count >= MANY_ROWS:
            what = "rows" if media is None else PLURAL[media.kind]
            reporter.progress(done, count, f"{what} checked")

    seed = recipe.data.split_seed
    seed = recipe.training.seed if seed is None else seed
    fields = base.network.fields
    # Words of fastText and ELMo have ids of their own behind the characters.
    size = None if fields.get("model_type") in NETS else text_fields(fields).get("vocab_size")
    return prepare(
        recipe.data, objective, chat, room, seed, on_progress, refit, on_row, opened, size
    )


def _note_rows(data: Dataset, base: store.StoredModel, context: int, reporter: Reporter) -> None:
    """Report ignored columns, shortened rows, findings, and held-out rows that the base knows."""
    if data.recognized and data.recognized.unread:
        reporter.note(f"ignored columns: {', '.join(data.recognized.unread)}")
    rows = data.counts["rows"] + data.counts["validation_rows"]
    for count, what in ((data.dropped, "dropped"), (data.truncated, "truncated")):
        if count:
            text = f"{count:,} rows longer than {context:,} tokens were {what}"
            if what == "truncated" and mostly_truncated(count, rows):
                text = f"warning: {text}, of {rows:,}. {MOSTLY_TRUNCATED.fix}"
            reporter.note(text)
    if data.report is not None:
        for line in warnings(data.report):
            reporter.note(line)
        if count := data.report.findings.counts[SEVERAL_REPLIES.id]:
            reporter.note(f"{count:,} rows have several replies; the first is learned")
    if learned_rows := rows_learned_by(base, data):
        reporter.note(
            f"warning: {base.id} was trained on {learned_rows:,} of {len(data.validation):,} held-out "
            "rows, so measurements are too good. Give new rows as `data.validation=FILE`, or use the "
            "`training.seed` of the base to hold out the same rows"
        )


def check_shardable(model: Any, objective: Objective, adaptation: Adaptation) -> None:
    """Reject networks, objectives and adaptations without support for sharded layers.

    With sharded layers, each micro-batch must be one independent forward and backward pass.

    Raises:
        RecipeError: with a supported alternative.
    """
    problem = ""
    if not objective.can_shard:
        able = ", ".join(name for name, kind in OBJECTIVES.items() if kind.can_shard)
        problem = f"does not support {objective.method}, only {able}"
    elif type(adaptation).calibrate is not Adaptation.calibrate:
        problem = f"does not support {adaptation.method}, which runs the network before training"
    elif any(buffer.dtype in (torch.uint8, torch.int8) for buffer in model.buffers()):
        problem = f"does not support the quantized weights of {adaptation.method}"
    elif not is_flat(model):
        kind = model.config.model_type
        problem = f"supports language models and text encoders, not {kind}"
    else:
        try:
            layer_names(model)
        except RecipeError as error:
            problem = f"shards layer by layer, and {error}"
    if problem:
        raise RecipeError(
            f"`training.fully_shard` {problem}. Remove the setting", rule="pair.impossible"
        )


def prepare_refit(
    job: TrainingJob,
    kept_step: int,
    steps_before: int,
    processes: int = 1,
    stored_bytes: int = 0,
) -> TrainingJob:
    """Return the job of the refit: training on all rows, including the held-out rows of ``job``.

    The refit repeats the settings and the schedule of ``job`` and stops after the number of passes
    that led to ``kept_step``. The first training took ``steps_before`` steps.
    """
    training = job.recipe.training
    settings = training.model_copy(update={"refit": False})
    original = job.original_recipe.model_copy(update={"training": settings})
    refit = prepare_job(
        original,
        job.base,
        job.machine,
        Reporter(),
        job.fixed_values(),
        True,
        processes,
        stored_bytes,
    )
    recipe = job.recipe.model_copy(update={"objective": refit.recipe.objective})
    if job.label_issues:
        refit = refit.with_label_issues(job.label_issues)
    return replace(
        refit,
        origin={**job.origin, "recipe": recipe.plain()},
        # The same share of the schedule: kept_step / job.steps, in steps over more rows.
        until=max(1, round(kept_step * refit.steps / job.steps)),
        steps_before=steps_before,
        label_issues=job.label_issues or {},
    )


def rows_learned_by(base: store.StoredModel, data: Dataset) -> int:
    """Return the number of held-out rows among the base model's training rows, by file hash and
    line."""
    record = base.manifest.data
    if record is None:
        return 0
    # By hash, so that a renamed or moved file still counts as learned.
    path_by_hash = {sha256: path for path, sha256 in record.sha256.items()}
    count = 0
    for path, lines in data.held_out.get("validation", {}).items():
        base_path = path_by_hash.get(data.hashes.get(path, ""))
        if base_path is not None:
            count += len({*lines} - {*record.held_out.get(base_path, ())})
    return count


@dataclass(frozen=True)
class NetworkPlan:
    """The network of a run by the sizes of its weights, before any weight is loaded."""

    sketch: TrainingSketch
    """Network without weights, completed adaptation and memory of the training."""
    others: Mapping[str, store.StoredModel]
    """Additional models of the objective, such as a teacher, by name."""
    new_head: bool
    """True if the base model has no matching head."""
    estimate: MemoryEstimate
    """Memory of all networks in each process."""


def resolve_job(
    recipe: Recipe,
    base: store.StoredModel,
    chat: ChatFormat,
    data: Dataset,
    machine: Machine,
    reporter: Reporter,
    fixed_values: Mapping[str, Any],
    processes: int = 1,
    stored_bytes: int = 0,
) -> TrainingJob:
    """Fill in every open setting and check every given setting, before any weight is loaded.

    ``fixed_values`` are from the resumed run; ``stored_bytes`` is the size of its checkpoints.
    """
    original = recipe
    learned_objective = base.objective if base.manifest.recipe else None
    bound = data.objective.bind(RunModels(chat, base.network, learned_objective))
    data = replace(data, objective=bound)
    plan = _plan_network(recipe, base, chat, bound, machine, reporter, processes)
    facts = _facts(base, data, plan)
    _check_settings(recipe, data, plan, facts)
    recipe = recipe.model_copy(update={"objective": bound, "adaptation": plan.sketch.adaptation})
    # The default rate is needed even if a rate is set: advice on divergence compares both.
    open_rate = recipe.training.model_copy(update={"learning_rate": None})
    usual, _ = defaults.choose(recipe.model_copy(update={"training": open_rate}), facts)
    recipe, choices = defaults.choose(recipe, facts)
    if recipe.training.fully_shard and processes == 1:
        reporter.note("`training.fully_shard` has no effect with one process")
    available = available_memory(machine.device)
    if recipe.training.micro_batch_tokens is None:
        budget, reason = _token_budget(
            recipe, chat, data, plan, machine, available, fixed_values.get("micro_batch_tokens")
        )
        training = recipe.training.model_copy(update={"micro_batch_tokens": budget})
        recipe = recipe.model_copy(update={"training": training})
        choices.append(("training.micro_batch_tokens", budget, reason))
    tokens = recipe.training.micro_batch_tokens or 0
    if facts.without_steps:
        choices = [choice for choice in choices if choice[0] == "training.refit"]
        given = original.training.model_fields_set & {*defaults.STEP_SETTINGS}
        if given:
            names = ", ".join(f"`training.{name}`" for name in sorted(given))
            reporter.note(
                f"warning: {names}: no effect, because {base.root} is fitted without steps"
            )
    check_memory(plan.estimate, tokens, data.longest, available)
    size = machine.dtype.itemsize
    disk_bytes = disk_needed(
        plan.sketch.model, size, recipe.adaptation, bool(recipe.training.refit)
    )
    # Checkpoints of a resumed run are on the disk already and must not be counted twice.
    need_disk(base_folder("x"), max(0, disk_bytes - stored_bytes), "this run")
    number_type = "bfloat16" if machine.dtype == torch.bfloat16 else "float32"
    reporter.settings([("precision", number_type, machine.reason), *data.choices, *choices])
    refit_steps = 0
    if recipe.training.refit:
        refit_steps = defaults.steps_of(recipe, data.main + len(data.validation), data.mixed)
    job = TrainingJob(
        recipe,
        original,
        base,
        bound.format(chat),
        data,
        machine,
        defaults.steps_of(recipe, data.main, data.mixed),
        others=plan.others,
        expected_memory=plan.estimate.peak(tokens),
        new_head=plan.new_head,
        refit_steps=refit_steps,
        usual_rate=usual.training.learning_rate or 0.0,
    )
    for warning in () if facts.without_steps else job.unusual_settings:
        reporter.note(f"warning: {warning}")
    return job


def sketch_of(
    base: store.StoredModel,
    chat: ChatFormat,
    objective: Objective,
    adaptation: Adaptation,
    machine: Machine,
) -> TrainingSketch:
    """Return the network of a training without weights.

    Raises:
        RefusedInput: if network, objective and adaptation are incompatible.
    """
    config = base.network.config(objective.head())
    reads = chat.media.shape if chat.media is not None else None
    return sketch_training(config, objective, adaptation, machine.dtype.itemsize, reads=reads)


def _plan_network(
    recipe: Recipe,
    base: store.StoredModel,
    chat: ChatFormat,
    objective: Objective,
    machine: Machine,
    reporter: Reporter,
    processes: int,
) -> NetworkPlan:
    """Return the trained network of ``objective``, with the memory of all networks."""
    size = machine.dtype.itemsize
    sketch = sketch_of(base, chat, objective, recipe.adaptation, machine)
    others = {
        name: store.find(each, reporter.stage) for name, each in objective.other_models.items()
    }
    # A custom model of the same head and classes keeps its head. So does a folder with a fixed number
    # of classes, such as a reader.
    head = objective.task.head
    brings = base.manifest.kind == head
    brings |= bool(HEADS[head].classes) and head == base.network.description.head
    one, other = base.objective.head(), objective.head()
    brings = brings and (one.labels, one.pooling) == (other.labels, other.pooling)
    sketches = (each.network.sketch(each.objective.head()) for each in others.values())
    estimate = sketch.memory.plus(sum(weight_bytes(each, size) for each in sketches))
    if recipe.training.fully_shard and processes > 1:
        estimate = sharded_estimate(estimate, sketch.model, size, processes)
    new_head = bool(head_weights(sketch.model)) and not brings
    return NetworkPlan(sketch, others, new_head, estimate)


def _check_settings(
    recipe: Recipe, data: Dataset, plan: NetworkPlan, facts: defaults.DataFacts
) -> None:
    """Raise :class:`RecipeError` for settings beyond the network or the rows."""
    training, model, objective = recipe.training, plan.sketch.model, data.objective
    if training.dropout is not None:
        check_dropout(model)
    if training.fully_shard:
        check_shardable(model, objective, plan.sketch.adaptation)
    if recipe.data.augmentation and facts.is_stepless:
        raise RecipeError(
            "`data.augmentation` changes rows in each step, and this base model is fitted without "
            "steps. Remove the setting, or choose a base model that is trained",
            rule="data.augmentation",
        )
    unfreezes = recipe.adaptation.unfreeze_steps is not None
    if unfreezes and training.fully_shard:
        raise RecipeError(
            "gradual unfreezing is not possible with sharded layers. Remove "
            "`adaptation.unfreeze_every` or `training.fully_shard`",
            setting="adaptation.unfreeze_every",
        )
    if unfreezes or training.layer_decay < 1:
        layer_names(model)  # raises for a network without separate layers
    if training.refit and not facts.held_out:
        raise RecipeError(
            "`training.refit` trains on rows held out of the training data, and no rows are "
            "held out. Remove the setting, or the validation file",
            rule="refit.no_held_out",
        )
    alone = training.batch_size == 1 and objective.contrasts_rows
    if alone and data.train[0].partner is None and not getattr(objective, "hard_negatives", 0):
        raise RecipeError(
            "a batch of 1 row has no other row to compare with. Use at least 2 rows, better 64, or "
            "remove the setting",
            setting="training.batch_size",
            rule="objective.batch",
        )


def _facts(base: store.StoredModel, data: Dataset, plan: NetworkPlan) -> defaults.DataFacts:
    """Return the figures behind the defaults."""
    model: Any = plan.sketch.model
    return defaults.DataFacts(
        data.main,
        data.longest,
        len(data.validation),
        hidden_size_of(model),
        plan.new_head,
        base.manifest.is_random,
        mixed=data.mixed,
        held_out=sum(map(len, data.held_out.get("validation", {}).values())),
        scratch_rate=scratch_rate(model) or defaults.SCRATCH_RATE,
        is_stepless=base.network.is_stepless,
        without_steps=base.network.is_stepless
        and (hasattr(model, "fit_rows") or (plan.new_head and data.objective.starts_head)),
    )


def _token_budget(
    recipe: Recipe,
    chat: ChatFormat,
    data: Dataset,
    plan: NetworkPlan,
    machine: Machine,
    available: int,
    before: int | None,
) -> tuple[int, str]:
    """Return the tokens of a micro-batch and the reason; ``before`` is that of the resumed run."""
    if before is not None:
        return int(before), "same as at the start of the run"
    budget, reason = defaults.token_budget(
        plan.estimate,
        _first_batches(recipe, data),
        data.longest,
        available,
        defaults.USUAL_BUDGET[machine.device.type],
        data.objective.contrasts_rows,
    )
    if chat.media is not None:
        return min(budget, MOST_IMAGES), f"{PLURAL[chat.reads]} at once; more are no faster"
    return budget, reason


def bind_models(
    objective: Objective | None, chat: ChatFormat, say: Callable[[str], None]
) -> Objective | None:
    """Return ``objective`` with settings from the objective's additional models, such as a teacher."""
    if objective is None:
        return None
    others = {}
    for name, each in objective.other_models.items():
        model = store.find(each, say)
        objective_of_model = model.objective
        width = hidden_size_of(model.network.sketch(objective_of_model.head()))
        others[name] = OtherModel(objective_of_model, width, model.chat)
    return objective.bind(RunModels(chat, others=others))


def _first_batches(recipe: Recipe, data: Dataset, count: int = 4) -> list[list[Example]]:
    training = recipe.training
    size = training.batch_size or 1
    order = RowOrder(data.main, size, training.seed, training.shuffle, data.mixed)
    steps = range(min(count, order.steps_per_epoch))
    chosen = [[data.train[index] for index in order.batch(step)] for step in steps]
    objective = data.objective
    return [
        with_longest_completions(objective, objective.views(batch, "fixed") or batch)
        for batch in chosen
    ]
