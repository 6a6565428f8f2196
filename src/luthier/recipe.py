"""The recipe: base x data x objective x adaptation x optimizer x budget, as one frozen object.

A recipe is the user's request. A field that is ``None`` is chosen later from the data and the
model, and printed with a reason. The same object is read from TOML, the command line and Python,
and is stored with the custom model.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.data.augmentation import Augmentation
from luthier.data.conversations.chat_template import CHATML
from luthier.data.conversations.template_kwargs import TemplateSettings
from luthier.data.files.sources import absolute, files_of, is_address
from luthier.errors import Problem, RecipeError
from luthier.files import read_toml
from luthier.formatting import did_you_mean, nearest_name
from luthier.models import DEFAULT_BASE
from luthier.objectives import OBJECTIVES, Objective
from luthier.trackers import TRACKERS
from luthier.types import LongRows
from luthier.validation import StrictModel, describe_constraint

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

Parsed = TypeVar("Parsed", bound=BaseModel)
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
NAME_RULE = "use 1-63 lower-case letters, digits, '.', '_' and '-'"
MOST_STEPS = 1_000_000_000
"""Most optimizer steps of a run; more steps are a typo or an attack and would overflow."""


def check_name(name: str) -> str:
    """Return ``name`` if valid for a model or run; else raise :class:`ValueError`."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(NAME_RULE)
    return name


ModelName = Annotated[str, AfterValidator(check_name)]
"""Name of a model or run."""
SourceName = Annotated[
    str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)
]
"""Data source: a path, a folder, a pattern or an address (``luthier.data.files.sources``)."""


class MixSpec(StrictModel):
    """An additional training file with a mixing ratio."""

    train: SourceName
    """Rows to train on; no row is held out."""
    weight: float = Field(gt=0, le=1000)
    """Rows drawn from the file per row of the main file."""


class DataSpec(StrictModel):
    """Training and held-out rows."""

    train: SourceName
    """Rows to learn from: a file, folder or pattern, or ``s3://``; JSONL, CSV, Parquet or text."""
    validation: SourceName | None = None
    """Validation rows; without a file, a part of the training rows is held out."""
    validation_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of training rows to hold out if no validation file is given; 0 for none."""
    test_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of training rows to keep for a later test; the run folder lists the rows."""
    train_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the remaining training rows to use, stratified by label; all by default."""
    decline_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of rows with passages that decline: other passages replace the right ones; default 0.1."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the split into training and held-out rows; ``training.seed`` by default."""
    group_column: str | None = Field(default=None, min_length=1)
    """Column whose equal values (a speaker, for example) stay on the same side of the split."""
    long_rows: LongRows | None = None
    """How to handle rows longer than the context; ``truncate`` for classifiers, else ``error``."""
    label_issues: Literal["keep", "leave_out", "relabel"] = "keep"
    """Training rows with a label issue: learn, leave out, or learn with the likely label."""
    columns: dict[str, str] | None = None
    """Column names by key, as ``{prompt = "question"}``; an empty name ignores the key."""
    chat_template: str | None = Field(default=None, min_length=1)
    """``chatml`` or a Jinja file, in place of the base model's chat template; also in serving."""
    chat_template_kwargs: TemplateSettings | None = None
    """Variables for the chat template, ``{enable_thinking = false}``; also used in serving."""
    mix: tuple[MixSpec, ...] = ()
    """Additional training files, each with ``train`` and ``weight``."""
    policy: Path | None = None
    """TOML file with the severity of data rules and the checks to skip."""
    severity: dict[str, Any] | None = None
    """``off``, ``note``, ``warning`` or ``error`` by rule of the data gate, over the policy's."""
    augmentation: Augmentation | None = None
    """Random changes to training rows in each epoch; off for text by default."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width of images in pixels; by default from the base model."""
    sampling_rate: int | None = Field(default=None, ge=1000, le=192_000)
    """Sampling rate of audio in Hz; by default from the base model."""
    max_seconds: float | None = Field(default=None, gt=0.05, le=60)
    """Seconds to use of each audio file, from the middle; by default from the base model."""

    @property
    def files(self) -> list[Path]:
        """All data files; ``s3://`` objects are downloaded."""
        sources = (self.train, self.validation, *(m.train for m in self.mix))
        return [path for source in sources if source for path in files_of(source)]

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Return the format of a base model with the template settings.

        Raises:
            RecipeError: for an invalid template or setting.
        """
        chat = chat.with_chat_template(self.chat_template)
        return replace(chat, template=chat.template.with_kwargs(self.chat_template_kwargs or {}))

    @model_validator(mode="after")
    def _groups_are_split(self) -> Self:
        if self.group_column and self.validation and not self.test_share:
            raise ValueError(
                "group_column says how the training rows are split, and with validation nothing of "
                "them is held out; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _each_file_once(self) -> Self:
        seen = {_place(source) for source in (self.train, self.validation) if source}
        for each in self.mix:
            if _place(each.train) in seen:
                raise ValueError(
                    f"{each.train} is named twice. Rows that are learned from or measured on already "
                    "cannot be mixed in; give another file"
                )
            seen.add(_place(each.train))
        return self


def _place(source: str) -> str:
    return source if is_address(source) else str(Path(source).resolve())


class Training(StrictModel):
    """Optimizer, schedule and budget. ``None`` is chosen from the data and the model."""

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Stop after this number of optimizer steps, regardless of ``epochs``."""
    batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Rows per optimizer step."""
    # A larger rate overflows float32; a rate that is merely too high reports divergence.
    learning_rate: float | None = Field(default=None, gt=0, le=1e32)
    """Highest learning rate of the schedule."""
    learning_rate_multiplier: float = Field(default=1.0, gt=0, le=10_000)
    """Factor of the default learning rate."""
    schedule: Literal["cosine", "linear", "constant", "step", "one_cycle"] = "cosine"
    """Learning-rate schedule after warm-up; ``one_cycle`` rises and falls."""
    step_size: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between two cuts of the rate with ``schedule=step``; a third of the run by default."""
    step_factor: float | None = Field(default=None, gt=0, lt=1)
    """Factor of the rate at each cut with ``schedule=step``; 0.1 by default."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of warmup steps: 0.05 by default, 0.45 for ``one_cycle``."""
    warmup_steps: int | None = Field(default=None, ge=0, le=MOST_STEPS)
    """Number of warmup steps; overrides ``warmup_ratio``."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each layer to the next lower layer; 1 is off."""
    head_rate_multiplier: float | None = Field(default=None, gt=0, le=10_000)
    """Factor of a head's rate; 10 for a new head with ``full`` at the default rate, else 1."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """``adam`` adds the weight decay to the gradient; equal to ``adamw`` without weight decay."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Weight decay, on matrices only: decoupled for ``adamw``, an L2 penalty for ``adam``."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to the optimizer's denominator."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share dropped wherever the network drops hidden states; the network's own when not given."""
    max_gradient_norm: float = Field(default=1.0, ge=0, le=1e9)
    """Largest global gradient norm, by scaling; 0 turns clipping off."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Distinct tokens per micro-batch; less saves memory with the same result."""
    evaluate_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between measurements on the validation rows."""
    patience: int = Field(default=3, ge=0, le=1_000_000)
    """Stop after this many measurements significantly above the best loss; 0 never stops early."""
    min_delta: float = Field(default=0.0, ge=0, lt=1)
    """Smallest improvement to reset ``patience``, as a share of the best loss or error; 0 for any."""
    refit: bool | None = None
    """Train again on all rows, held-out rows included, for the best number of steps."""
    baseline_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """Time limit of simple baselines to compare with, in seconds; 0 for none."""
    shuffle: bool = True
    """Shuffle the rows in each epoch; otherwise use the order of the file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the row order, of new weights and of dropout."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number type of matrix products; ``auto`` is bfloat16 on machines with native support."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads, shared by all processes on a machine; all cores by default."""
    fully_shard: bool = False
    """Shard the layers over all processes (FSDP2)."""
    track: tuple[str, ...] = ()
    """Trackers for the metrics: ``mlflow``, ``tensorboard``, ``wandb`` or a plugin's."""

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TRACKERS:
                hint = did_you_mean(name, TRACKERS, f"choose one of {', '.join(TRACKERS)}")
                raise ValueError(f"{name!r} is no tracker; {hint}")
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _steps_have_a_schedule(self) -> Self:
        for name in ("step_size", "step_factor"):
            if getattr(self, name) is not None and self.schedule != "step":
                raise ValueError(
                    f"`training.{name}` requires `training.schedule=step`, and the schedule is "
                    f"{self.schedule}"
                )
        return self


class ForgettingLimits(StrictModel):
    """Limits of forgetting; a model outside of the limits is stored but not activated."""

    max_kl: float = Field(default=8.0, gt=0, le=1000)
    """Largest divergence from the base model, in nats per token of the base's output."""
    max_accuracy_loss: float = Field(default=0.1, ge=0, le=1)
    """Largest loss of accuracy on a probe set, beyond chance."""
    probes: tuple[SourceName, ...] = ()
    """Additional probe files: rows with choices."""
    accept: bool = False
    """Activate the model even outside of the limits; the model record notes the override."""


class Recipe(StrictModel):
    """All settings of a custom model."""

    base: str = DEFAULT_BASE
    """Base model, custom model, local directory or hub id to start from."""
    name: ModelName | None = None
    """Name of the custom model; the id is ``base:name``."""
    data: DataSpec
    """Training and held-out rows."""
    objective: SerializeAsAny[Objective] | None = None
    """Training objective; by default the first objective for the shape of the rows."""
    adaptation: SerializeAsAny[Adaptation] = Field(
        default_factory=lambda: ADAPTATIONS["lora"](method="lora")
    )
    """Trained weights: an adapter or all weights."""
    training: Training = Training()
    """Optimization settings."""
    forgetting: ForgettingLimits | None = None
    """Limits of forgetting; not measured by default."""

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> Any:
        return _from_table(value, OBJECTIVES, "objective")

    @field_validator("adaptation", mode="before")
    @classmethod
    def _adaptation(cls, value: Any) -> Any:
        return adaptation_of(value)

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values; :class:`RecipeError` names each bad field."""
        return parse(Recipe, fields)

    @staticmethod
    def read(path: Path) -> Recipe:
        """Read a TOML recipe; paths are relative to the recipe's folder."""
        return Recipe.parse(read_recipe(path))

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, unset fields left out."""
        return self.model_dump(mode="json", exclude_none=True)


def parse(kind: type[Parsed], fields: Mapping[str, Any]) -> Parsed:
    """Return a recipe of ``kind``; :class:`RecipeError` has one problem per invalid field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [_problem(item, kind) for item in error.errors()]
        lines = [
            f"  `{each.setting}`: {each.message}"
            if "." in (each.setting or "")
            else f"  {each.setting or 'recipe'}: {each.message}"
            for each in problems
        ]
        text = "\n".join(["the recipe cannot be used:", *lines])
        raise RecipeError.of_problems(problems, text) from error


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields of a TOML recipe, with the paths under ``[data]`` made absolute."""
    return with_paths(read_toml(path, "a recipe"), path.parent)


def fields_of(data: str | Path | Sequence[str | Path]) -> dict[str, Any]:
    """Return the fields of a TOML recipe, or of a recipe for any other data."""
    files = [data] if isinstance(data, str | Path) else list(data)
    if len(files) == 1 and str(files[0]).endswith(".toml"):
        return read_recipe(Path(files[0]))
    return {"data": {"train": str(data) if isinstance(data, str | Path) else files}}


def with_paths(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put ``folder`` before the paths of data and probes, but not before addresses, in place.

    Returns ``fields``.
    """
    return map_sources(
        fields, lambda source: source if is_address(source) else str(folder / source)
    )


def map_sources(fields: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Apply ``change`` to all paths of data, policy and probes in recipe fields, in place."""
    data = fields.get("data")
    mixed = data.get("mix", []) if isinstance(data, dict) else []
    for group in (data, *(mixed if isinstance(mixed, list) else [])):
        for key in (
            ("train", "validation", "policy", "chat_template") if isinstance(group, dict) else ()
        ):
            value = group.get(key)
            if isinstance(value, str) and (key, value) != ("chat_template", CHATML):
                group[key] = change(value)
            elif isinstance(value, list):
                group[key] = [change(str(each)) for each in value]
    limits = fields.get("forgetting")
    if isinstance(limits, dict) and isinstance(limits.get("probes"), list):
        limits["probes"] = [change(str(each)) for each in limits["probes"]]
    return fields


def parse_setting(assignment: str) -> tuple[str, Any]:
    """Parse one ``KEY=VALUE`` of the command line, for example ``adaptation.rank=8``.

    The value is parsed as TOML (numbers, true, lists), or is text if parsing fails.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set takes KEY=VALUE, for example adaptation.rank=8; got {assignment!r}",
            rule="option.form",
            value=assignment,
        )
    return key.strip(), toml_value(text)


def parse_mix(text: str) -> dict[str, Any]:
    """An entry of ``data.mix`` from ``FILE=RATIO`` of the command line."""
    file, _, ratio = text.rpartition("=")
    try:
        weight = float(ratio)
    except ValueError:
        file = ""
    if not file:
        raise RecipeError(
            "--mix takes FILE=RATIO, for example old.jsonl=0.25 for one row of old.jsonl with every "
            f"four rows of the data; got {text!r}",
            rule="option.form",
            value=text,
        )
    return {"train": file, "weight": weight}


def parse_columns(texts: Sequence[str] | None) -> dict[str, str]:
    """Return ``data.columns`` from each ``KEY=COLUMN`` of the command line."""
    columns: dict[str, str] = {}
    for text in texts or ():
        key, equals, column = text.partition("=")
        if not key.strip() or not column:
            advice = f"use `--ignore {key}`" if equals and key else "such as prompt=question"
            raise RecipeError(
                f"--map takes KEY=COLUMN; got {text!r}; {advice}",
                rule="option.form",
                value=text,
            )
        columns[key.strip()] = column
    return columns


def toml_value(text: str) -> Any:
    """Parse ``text`` as a TOML value (a number, true, a list); invalid TOML stays text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(fields: Mapping[str, Any]) -> str:
    """Return fields as TOML for :func:`read_recipe`: values first, then groups."""
    return "\n".join(_toml_lines(fields, ())) + "\n"


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return the set fields of a recipe for use in any folder: without name, with absolute paths."""
    fields = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    fields.pop("name", None)
    return map_sources(fields, absolute)


def _toml_lines(fields: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    groups = {key: value for key, value in fields.items() if isinstance(value, Mapping)}
    lines = [f"{_toml_key(k)} = {_toml_literal(v)}" for k, v in fields.items() if k not in groups]
    if path and (lines or not groups):
        lines = ["", f"[{'.'.join(map(_toml_key, path))}]", *lines]
    for key, value in groups.items():
        lines += _toml_lines(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_literal(key)


def _toml_literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_literal, value))}]"
    if isinstance(value, Mapping):  # in a list
        inside = ", ".join(f"{_toml_key(k)} = {_toml_literal(item)}" for k, item in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, float):
        return repr(value)
    # JSON and TOML write strings, integers and booleans alike, except for this character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def assign(fields: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the field at ``path``, making groups on the way; ``lora`` grows to ``{method: lora}``."""
    *groups, last = path
    for group in groups:
        child = fields.get(group)
        if not isinstance(child, dict):
            child = {"method": child} if isinstance(child, str) else {}
            fields[group] = child
        fields = child
    fields[last] = value


def adaptation_of(value: Any) -> Any:
    """Return the adaptation for a name or fields, before the validation of a recipe."""
    return _from_table(value, ADAPTATIONS, "adaptation")


def _from_table(value: Any, table: Mapping[str, type[Any]], kind: str) -> Any:
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        return value
    method = value.get("method")
    if method is None:
        method = _method_of(value, table, {"objective": "sft", "adaptation": "lora"}[kind])
        value = {"method": method, **value}
    if not isinstance(method, str) or method not in table:
        fields = ((name, getattr(part, "model_fields", {})) for name, part in table.items())
        owners = [
            name for name, each in fields if method in each and each[method].annotation is bool
        ]
        if owners:
            raise ValueError(
                f"{method} is no {kind} but a field of {owners[0]}: use `{kind}.{method}=true`"
            )
        hint = did_you_mean(method, table, f"there are {', '.join(table)}")
        raise ValueError(f"unknown {kind} {method!r}; {hint}")
    return table[method].model_validate(value)


def _method_of(fields: Mapping[str, Any], table: Mapping[str, type[Any]], default: str) -> str:
    """Return the default method, or the first objective with the fields if all such objectives have
    one task.

    Only objectives that are a default for a row shape count.
    """
    owners = {name: part for name, part in table.items() if fields.keys() <= {*part.model_fields}}
    tasks = {part.task for part in owners.values() if getattr(part, "shapes", ())}
    return default if default in owners or len(tasks) != 1 else next(iter(owners))


_INPUT = Repr()
"""Truncation of values in messages: a number may have thousands of digits."""
_INPUT.maxstring = _INPUT.maxlong = _INPUT.maxother = 100


def _problem(item: Mapping[str, Any], kind: type[BaseModel]) -> Problem:
    """Return the problem of one field from a pydantic error."""
    setting = ".".join(str(part) for part in item["loc"])
    rule, message = "recipe.invalid", describe_constraint(item)
    if item["type"] == "extra_forbidden":
        rule, message = "recipe.unknown_field", _unknown_field(setting, kind)
    elif item["type"] != "missing" and not isinstance(item["input"], Mapping):
        message += f" (got {_INPUT.repr(item['input'])})"
    return Problem(rule, message, setting=setting or None, value=item["input"])


_SYNONYMS: Mapping[str, str] = {
    "lr": "training.learning_rate",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "model": "base",
    "peft": "adaptation",
}
"""Field names of other trainers."""


def _unknown_field(where: str, kind: type[BaseModel]) -> str:
    """Return the message for an unknown field, with the full name of a likely field."""
    tables: Mapping[str, Mapping[str, type[BaseModel]]] = {
        "objective": OBJECTIVES, "adaptation": ADAPTATIONS
    }  # fmt: skip
    fields_of_group: dict[str, list[str]] = {
        name: list(info.annotation.model_fields)
        for name, info in kind.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    } | {
        name: sorted({field for part in table.values() for field in part.model_fields})
        for name, table in tables.items()
    }
    group, _, field = where.rpartition(".")
    group = group.split(".")[0]
    owners = [name for name, part in tables.get(group, {}).items() if field in part.model_fields]
    if owners:
        choice = f"add `{group}.method={owners[0]}`"
        if len(owners) > 1:
            choice = f"set `{group}.method` to one of them"
        return f"belongs to {group} {' or '.join(owners)}: {choice}"
    if not group and (
        homes := [name for name, fields in fields_of_group.items() if field in fields]
    ):
        return f"there is no such field; did you mean `{homes[0]}.{field}`?"
    if not group and (meant := _SYNONYMS.get(field)):
        return f"there is no such field; did you mean `{meant}`?"
    every = {
        name: f"{home}.{name}"
        for home in ("training", "data")
        for name in fields_of_group.get(home, ())
    }
    names = fields_of_group.get(group, list(kind.model_fields))
    if not group:
        near = nearest_name(field, [*names, *every])
        near = every.get(near, near) if near else None
    elif near := nearest_name(field, names):
        near = f"{group}.{near}" if group in fields_of_group else near
    hint = f"did you mean `{near}`?" if near else f"there are {', '.join(names)}"
    return f"there is no such field; {hint}"
