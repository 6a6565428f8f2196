"""The recipe: base x data x objective x adaptation x optimizer x budget, as one frozen object.

A recipe is what is asked for; a field that is ``None`` is chosen later from the data and the model
and printed with its reason. The same object is read from TOML, from the command line and from
Python, and is stored with the custom model.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, Self, TypeVar

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
from luthier.data.sources import absolute, files_of
from luthier.data.template_kwargs import TemplateSettings
from luthier.errors import Problem, RecipeError
from luthier.escaping import did_you_mean, nearest_name
from luthier.files import read_toml
from luthier.objectives import OBJECTIVES, Objective
from luthier.trackers import TRACKERS
from luthier.validation import StrictModel, describe_constraint

Parsed = TypeVar("Parsed", bound=BaseModel)
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
NAME_RULE = "use 1-63 lower-case letters, digits, '.', '_' and '-'"
MOST_STEPS = 1_000_000_000
"""Optimizer steps of any run; what no machine reaches is a slip or an attack, and overflows later."""


def check_name(name: str) -> str:
    """``name`` where a model or a run can be called so; else a :class:`ValueError` with the rule."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(NAME_RULE)
    return name


ModelName = Annotated[str, AfterValidator(check_name)]
"""What a model or a run is called."""
SourceName = Annotated[
    str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)
]
"""What names data: a path, a folder, a pattern or an address (``luthier.data.sources``)."""


class MixSpec(StrictModel):
    """A further file to learn from beside the main one, and how much of it."""

    train: SourceName
    """Rows; all of them are for learning, nothing is held out."""
    weight: float = Field(gt=0, le=1000)
    """Rows drawn from it for each row of the main file."""


class DataSpec(StrictModel):
    """Which rows are learned from and which are held out."""

    train: SourceName
    """Rows to learn from: a file, folder or pattern, or ``s3://``; JSONL, CSV, Parquet or text."""
    validation: SourceName | None = None
    """Rows to measure on; without them, a part of the training rows is held out."""
    validation_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the training rows to hold out when no validation file is given; 0 for none."""
    test_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the training rows to keep out for a later test; the run folder says which."""
    train_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the rows left to learn from that is used, each label with its part; all if not given."""
    group_column: str | None = Field(default=None, min_length=1)
    """Column whose rows of one value are all learned from or all held out, such as a speaker."""
    long_rows: Literal["error", "drop", "truncate"] = "error"
    """What to do with rows longer than the model's context."""
    columns: dict[str, str] | None = None
    """What the data calls our keys, as ``{prompt = "question"}``; an empty name sets a key aside."""
    chat_template_kwargs: TemplateSettings | None = None
    """What the chat template reads beside the rows, ``{enable_thinking = false}``; kept for serving."""
    mix: tuple[MixSpec, ...] = ()
    """Further files to learn from, each with its ``train`` and ``weight``."""
    policy: Path | None = None
    """TOML file that says how serious a rule of the data gate is, and which checks to skip."""
    severity: dict[str, Any] | None = None
    """``off``, ``note``, ``warning`` or ``error`` by rule of the data gate, over the policy's."""
    augmentation: Augmentation | None = None
    """Random changes to training rows, drawn anew each time; off for texts when not given."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width that images are brought to; those of the base model when not given."""
    sampling_rate: int | None = Field(default=None, ge=1000, le=192_000)
    """Samples a second that sounds are brought to; those of the base model when not given."""
    max_seconds: float | None = Field(default=None, gt=0.05, le=60)
    """Seconds of each sound that are read, its middle; those of the base model when not given."""

    @property
    def files(self) -> list[Path]:
        """Every file that is read, those of ``s3://`` fetched."""
        given = (self.train, self.validation, *(m.train for m in self.mix))
        return [path for source in given if source for path in files_of(source)]

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
    """One name for the same source."""
    return source if "://" in source else str(Path(source).resolve())


class Training(StrictModel):
    """Optimizer, schedule and budget. ``None`` is chosen from the data and the model."""

    epochs: float | None = Field(default=None, gt=0, le=10_000)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Stop after so many optimizer steps, whatever ``epochs`` says."""
    batch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Rows in one optimizer step."""
    # Beyond, a step is no number in float32; a rate that is only far too high diverges and says so.
    learning_rate: float | None = Field(default=None, gt=0, le=1e32)
    """Highest learning rate of the schedule."""
    learning_rate_multiplier: float = Field(default=1.0, gt=0, le=10_000)
    """Factor of the learning rate that is chosen where none is given."""
    schedule: Literal["cosine", "linear", "constant", "step", "one_cycle"] = "cosine"
    """Learning-rate schedule after warm-up; ``one_cycle`` rises and falls."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps in which the rate rises: 0.05 when not given, 0.45 for ``one_cycle``."""
    warmup_steps: int | None = Field(default=None, ge=0, le=MOST_STEPS)
    """The same as a number of steps; goes before ``warmup_ratio``."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the rate from each layer to the one below; heads have the full rate, 1 is off."""
    head_rate_multiplier: float | None = Field(default=None, gt=0, le=10_000)
    """Factor of the rate for a head; 10 for a new one with ``full`` at its default rate, else 1."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Decoupled weight decay, on matrices only."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to AdamW's denominator."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share dropped wherever the network drops hidden states; the network's own when not given."""
    max_gradient_norm: float = Field(default=1.0, ge=0, le=1e9)
    """Gradients of a larger global norm are scaled down to it; 0 turns clipping off."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Distinct tokens computed at once; smaller takes less memory, the result is the same."""
    evaluate_every: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Steps between measurements on the validation rows."""
    patience: int = Field(default=3, ge=0, le=1_000_000)
    """Stop after so many measurements further below the best than by chance; 0 never stops early."""
    min_delta: float = Field(default=0.0, ge=0, lt=1)
    """Least improvement, as a share of the best loss or error, that resets ``patience``; 0 for any."""
    refit: bool | None = None
    """Train once more on all rows, held-out ones too, for as long as these showed to be right."""
    baseline_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """Seconds for simple baselines that the model is compared with, where it reads; 0 for none."""
    shuffle: bool = True
    """Take the rows in a new random order each epoch; otherwise in the order of the file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the row order, of new weights and of dropout."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number type of matrix products; ``auto`` is bfloat16 where the machine has it natively."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads, which processes on one machine share; all cores when not given."""
    fully_shard: bool = False
    """Whether several processes cut the layers into shards (FSDP2), of which each holds one."""
    track: tuple[str, ...] = ()
    """Trackers that also receive the metrics: ``mlflow``, ``tensorboard``, ``wandb`` or a plugin's."""

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TRACKERS:
                hint = did_you_mean(name, TRACKERS, f"choose one of {', '.join(TRACKERS)}")
                raise ValueError(f"{name!r} is no tracker; {hint}")
        return tuple(dict.fromkeys(names))


class ForgettingLimits(StrictModel):
    """How much a tuned model may forget and still be activated: one outside is stored, and withheld."""

    max_kl: float = Field(default=8.0, gt=0, le=1000)
    """Largest drift from the base, in nats a token of what the base writes."""
    max_accuracy_loss: float = Field(default=0.1, ge=0, le=1)
    """Largest loss of accuracy on a set of probes, where it is more than chance."""
    probes: tuple[SourceName, ...] = ()
    """Files of rows with choices that are measured besides ours."""
    accept: bool = False
    """Activate the model although it is outside; its record says so."""


class Recipe(StrictModel):
    """Everything that decides what a custom model becomes."""

    base: str = "smollm2-135m-instruct"
    """Base model, custom model, local directory or hub id to start from."""
    name: ModelName | None = None
    """Name of the custom model; its id is ``base:name``."""
    data: DataSpec
    """What is learned from."""
    objective: SerializeAsAny[Objective] | None = None
    """What is learned; without one, the first objective that learns from rows of this shape."""
    adaptation: SerializeAsAny[Adaptation] = Field(
        default_factory=lambda: ADAPTATIONS["lora"](method="lora")
    )
    """Which weights move."""
    training: Training = Training()
    """How it is trained."""
    forgetting: ForgettingLimits | None = None
    """What it may forget and still be activated; not measured when not given."""

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
        """Read a TOML recipe; paths in it are relative to its folder."""
        return Recipe.parse(read_recipe(path))

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, unset fields left out."""
        return self.model_dump(mode="json", exclude_none=True)


def parse(kind: type[Parsed], fields: Mapping[str, Any]) -> Parsed:
    """Return a recipe of ``kind``; the :class:`RecipeError` has one problem per bad field."""
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
    """Fields of a TOML recipe; of any other data those of a recipe that learns from them."""
    files = [data] if isinstance(data, str | Path) else list(data)
    if len(files) == 1 and str(files[0]).endswith(".toml"):
        return read_recipe(Path(files[0]))
    return {"data": {"train": str(data) if isinstance(data, str | Path) else files}}


def with_paths(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put ``folder`` before the paths of data and probes, but not before addresses, in place.

    Returns ``fields``.
    """
    return map_sources(fields, lambda source: source if "://" in source else str(folder / source))


def map_sources(fields: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Change what names data, a policy or probes in the plain values of a recipe, in place."""
    data = fields.get("data")
    mixed = data.get("mix", []) if isinstance(data, dict) else []
    for group in (data, *(mixed if isinstance(mixed, list) else [])):
        for key in ("train", "validation", "policy") if isinstance(group, dict) else ():
            value = group.get(key)
            if isinstance(value, str):
                group[key] = change(value)
            elif isinstance(value, list):
                group[key] = [change(str(each)) for each in value]
    limits = fields.get("forgetting")
    if isinstance(limits, dict) and isinstance(limits.get("probes"), list):
        limits["probes"] = [change(str(each)) for each in limits["probes"]]
    return fields


def parse_setting(assignment: str) -> tuple[str, Any]:
    """Parse one ``KEY=VALUE`` of the command line, for example ``adaptation.rank=8``.

    The value is parsed as TOML (numbers, true, lists), and is text if it is no TOML.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set takes KEY=VALUE, for example adaptation.rank=8; got {assignment!r}",
            rule="option.form",
            value=assignment,
        )
    return key.strip(), toml_value(text)


def set_field(fields: dict[str, Any], assignment: str) -> None:
    """Set the field that ``KEY=VALUE`` names."""
    key, value = parse_setting(assignment)
    assign(fields, key.split("."), value)


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
    """``data.columns`` from each ``KEY=COLUMN`` of the command line; nothing sets the key aside."""
    columns: dict[str, str] = {}
    for text in texts or ():
        key, equals, column = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(
                f"--map takes KEY=COLUMN, for example prompt=question, or text= ; got {text!r}",
                rule="option.form",
                value=text,
            )
        columns[key.strip()] = column
    return columns


def toml_value(text: str) -> Any:
    """What ``text`` is in TOML (a number, true, a list); the text itself where it is nothing there."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(fields: Mapping[str, Any]) -> str:
    """Plain values as TOML that :func:`read_recipe` reads back: first the values, then the groups."""
    return "\n".join(_toml_lines(fields, ())) + "\n"


def portable(recipe: Recipe) -> dict[str, Any]:
    """What was set of ``recipe``, for a file that works in any folder: no name, whole paths."""
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
    # JSON writes strings, whole numbers and truth values as TOML does, but for this one character.
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
    """An adaptation of a name or of its fields, for a recipe that is being read."""
    return _from_table(value, ADAPTATIONS, "adaptation")


def _from_table(value: Any, table: Mapping[str, type[Any]], kind: str) -> Any:
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, Mapping):
        return value
    method = value.get("method")
    if method is None:
        default = {"objective": "sft", "adaptation": "lora"}[kind]
        value, method = {"method": default, **value}, default
    if not isinstance(method, str) or method not in table:
        able = [name for name, part in table.items() if method in getattr(part, "model_fields", ())]
        if able:
            raise ValueError(
                f"{method} is no {kind} but a field of {able[0]}: use `{kind}.{method}=true`"
            )
        hint = did_you_mean(method, table, f"there are {', '.join(table)}")
        raise ValueError(f"unknown {kind} {method!r}; {hint}")
    return table[method].model_validate(value)


_INPUT = Repr()
"""What was given is quoted in part: a number may have thousands of digits."""
_INPUT.maxstring = _INPUT.maxlong = _INPUT.maxother = 100


def _problem(item: Mapping[str, Any], kind: type[BaseModel]) -> Problem:
    """Return what is wrong with one field, from an error of pydantic."""
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
"""What other trainers call fields."""


def _unknown_field(where: str, kind: type[BaseModel]) -> str:
    """That a field does not exist here, and what to write instead, by its full name."""
    tables: Mapping[str, Mapping[str, type[BaseModel]]] = {
        "objective": OBJECTIVES, "adaptation": ADAPTATIONS
    }  # fmt: skip
    known: dict[str, list[str]] = {
        name: list(info.annotation.model_fields)
        for name, info in kind.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    } | {
        name: sorted({field for part in table.values() for field in part.model_fields})
        for name, table in tables.items()
    }
    group, _, field = where.rpartition(".")
    group = group.split(".")[0]
    able = [name for name, part in tables.get(group, {}).items() if field in part.model_fields]
    if able:
        return f"belongs to {group} {' or '.join(able)}: add `{group}.method={able[0]}`"
    if not group and (homes := [name for name, fields in known.items() if field in fields]):
        return f"there is no such field; did you mean `{homes[0]}.{field}`?"
    if not group and (meant := _SYNONYMS.get(field)):
        return f"there is no such field; did you mean `{meant}`?"
    every = {
        name: f"{home}.{name}" for home in ("training", "data") for name in known.get(home, ())
    }
    names = known.get(group, list(kind.model_fields))
    if not group:
        near = nearest_name(field, [*names, *every])
        near = every.get(near, near) if near else None
    elif near := nearest_name(field, names):
        near = f"{group}.{near}" if group in known else near
    hint = f"did you mean `{near}`?" if near else f"there are {', '.join(names)}"
    return f"there is no such field; {hint}"
