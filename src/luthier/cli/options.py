"""Arguments and options that several commands take, and the recipe that they make.

Nothing heavy is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from luthier.cli.bridge import FromText, KeywordOptions
from luthier.errors import RecipeError
from luthier.models.sampling import MOST_TOKENS, Sampling, limited_fields

if TYPE_CHECKING:
    from luthier.cli.model import Model
    from luthier.library.models import StoredModel
    from luthier.recipe import Recipe

_OBJECTIVES = (
    "sft, sdft, causal_lm, masked_lm, span_corruption, bilm, classification, semi_supervised, "
    "regression, token_classification, contrastive, dpo, listwise_dpo, kto, orpo, simpo, "
    "reward_model, grpo, ppo, vae, gan, diffusion or image_to_text; chosen by the rows when not "
    "given. With a teacher (--set objective.teacher=ID): logit_distillation, "
    "on_policy_distillation, encoder_distillation or embedding_distillation."
)
_ADAPTATIONS = (
    "lora, qlora, full, freeze, feature_extraction, bitfit, sparse, adapters, prompt or prefix."
)
Data = Annotated[
    str,
    typer.Argument(
        help="File, folder, 'pattern*' or s3:// with rows or text, or a recipe (.toml)."
    ),
]
Validation = Annotated[str | None, typer.Option(help="Rows to measure on.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="KEY=COLUMN",
        help="What the data calls a key: prompt=question; text= sets a column aside. May be repeated.",
    ),
]
LongRows = Annotated[
    Literal["error", "drop", "truncate"] | None,
    typer.Option(
        help="What becomes of rows longer than the context: refuse all, leave them out, cut them."
    ),
]
Mix = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE=RATIO",
        help="Further rows, so many for each row of the main file.",
    ),
]
Base = Annotated[str | None, typer.Option(help="Model to start from.")]
Objective = Annotated[str | None, typer.Option(help=_OBJECTIVES)]
Adaptation = Annotated[str | None, typer.Option(help=_ADAPTATIONS)]
Epochs = Annotated[float | None, typer.Option(help="Passes over the rows.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows in one step.")]
LearningRate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any field of the recipe, e.g. adaptation.rank=8."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the custom model.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of a reply at most.")]
Documents = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Texts that answers should be true to; again for more."),
]
Html = Annotated[Path | None, typer.Option(help="Write it as one HTML page.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes of this machine that share the rows of each step.")
]
InferenceProcesses = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that share the rows of a file, each with the model; the same command goes on "
        "where it was cut short. On a cluster one for each node if not given.",
    ),
]
RayAddress = Annotated[str | None, typer.Option(metavar="HOST:PORT")]
RayGpus = Annotated[float, typer.Option(help="GPUs that each process or trial reserves on a node.")]
Prices = Annotated[
    Path | None, typer.Option(help="Price table (TOML); prices.toml of LUTHIER_HOME if not given.")
]
Graders = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A grader's name, such as exact, or a TOML file; again for more. The first decides.",
    ),
]
GraderSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME.FIELD=VALUE", help="A field of a grader, by its name."),
]
Attach = Annotated[
    bool, typer.Option("--attach", help="Keep the result with the model, for its certificate.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

FIELDS: Mapping[str, str] = {
    "base": "base",
    "student": "base",
    "name": "name",
    "method": "method",
    "objective": "objective.method",
    "adaptation": "adaptation.method",
    "validation": "data.validation",
    "columns": "data.columns",
    "mix": "data.mix",
    "long_rows": "data.long_rows",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "track": "training.track",
    "size": "network.size",
    "family": "network.family",
    "config": "network.config",
    "context": "network.context",
    "from_base": "network.base",
    "vocabulary": "tokenizer.vocabulary",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "grader": "insights.grader",
}
"""Field of the recipe by the parameter of a command."""


def recipe_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a command was given of the recipe, by field; ``parameters`` are its ``locals()``."""
    return {
        field: parameters[name]
        for name, field in FIELDS.items()
        if parameters.get(name) is not None
    }


def recipe_fields(
    data: str | Sequence[str], options: Mapping[str, Any], settings: Sequence[str] | None
) -> dict[str, Any]:
    """The recipe of a data file or a TOML file, with options and ``--set`` applied in this order."""
    from luthier.recipe import assign, fields_of, parse_columns, parse_mix, set_field

    fields = fields_of(data)
    for key, value in options.items():
        if key == "data.mix":
            value = [parse_mix(text) for text in value]
        elif key == "data.columns":
            value = parse_columns(value)
        assign(fields, key.split("."), value)
    for setting in settings or ():
        set_field(fields, setting)
    return fields


def read_recipe(data: str, options: Mapping[str, Any], settings: Sequence[str] | None) -> Recipe:
    """The same as the recipe of a tuning.

    Raises:
        RecipeError: naming each field that cannot be used.
    """
    from luthier.recipe import Recipe

    return Recipe.parse(recipe_fields(data, options, settings))


Command = TypeVar("Command", bound=Callable[..., None])


def with_sampling(command: Command) -> Command:
    """Give ``command`` an option for each field of :class:`Sampling` that has limits.

    The command receives the fields as its keywords ``**sampling_fields``.
    """
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(Sampling, name),
            annotation=Annotated[
                kind, typer.Option(help=text, min=low, max=high if high < MOST_TOKENS else None)
            ],
        )
        for name, (kind, (low, high, text)) in limited_fields(Sampling).items()
    ]
    kept = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    command.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return command


def parse_columns(texts: list[str]) -> dict[str, str]:
    """Parse each ``KEY=COLUMN`` of ``--map``."""
    from luthier.recipe import parse_columns

    return parse_columns(texts)


def parse_mix(texts: list[str]) -> list[dict[str, Any]]:
    """Parse each ``FILE=RATIO`` of ``--mix``."""
    from luthier.recipe import parse_mix

    return [parse_mix(text) for text in texts]


def parse_duration(text: str) -> float:
    """Parse a duration such as ``90m``, in seconds."""
    from luthier.workflows.estimate.budget import duration

    return duration(text)


def parse_numbers(text: str) -> list[float]:
    """Parse numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of numbers such as 0.125,0.25,0.5,1") from error


def parse_whole_numbers(text: str) -> list[int]:
    """Parse whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of whole numbers such as 0,2,4") from error


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse each ``KEY=VALUE`` of ``--set``."""
    from luthier.recipe import parse_setting

    return dict(parse_setting(text) for text in texts)


AtLeastOne = Annotated[int, typer.Option(min=1)]
OptionalAtLeastOne = Annotated[int | None, typer.Option(min=1)]
ModelSource = Annotated["str | Model | StoredModel", FromText(str)]
DataSource = Annotated["str | Path | Recipe", FromText(str)]
Mapped = Annotated[
    Mapping[str, str] | None,
    FromText(list[str], parse_columns),
    typer.Option("--map", metavar="KEY=COLUMN"),
]


@dataclass(frozen=True)
class RecipeField:
    """A field of a recipe that a command accepts by a short name."""

    path: str
    help: str
    type: Any = str
    convert: Callable[[Any], Any] = lambda value: value
    flag: str | None = None
    metavar: str | None = None

    @property
    def option(self) -> Any:
        """The annotated type of the command's option."""
        flags = [self.flag] if self.flag else []
        info = typer.Option(*flags, metavar=self.metavar, help=self.help)
        return Annotated[self.type, FromText(self.type, self.convert), info]


TUNING: Mapping[str, RecipeField] = {
    "validation": RecipeField("data.validation", "Rows for validation."),
    "columns": RecipeField(
        "data.columns", "Column of a key, e.g. prompt=question; repeatable.", list[str],
        parse_columns, "--map", "KEY=COLUMN",
    ),
    "mix": RecipeField(
        "data.mix", "Mix in another file; repeatable.", list[str], parse_mix, None, "FILE=RATIO"
    ),
    "long_rows": RecipeField(
        "data.long_rows", "How to handle rows longer than the context.",
        Literal["error", "drop", "truncate"],
    ),
    "base": RecipeField("base", "Base model; chosen from the rows by default."),
    "name": RecipeField("name", "Name of the custom model."),
    "objective": RecipeField(
        "objective.method", "Objective, e.g. dpo; chosen from the rows by default."
    ),
    "adaptation": RecipeField("adaptation.method", "Adaptation: lora, qlora, full or another."),
    "epochs": RecipeField("training.epochs", "Passes over the rows.", float),
    "batch_size": RecipeField("training.batch_size", "Rows per step.", int),
    "learning_rate": RecipeField("training.learning_rate", "Peak learning rate.", float),
    "seed": RecipeField("training.seed", "Random seed.", int),
    "track": RecipeField(
        "training.track", "Tracker: mlflow, tensorboard or wandb; repeatable.", list[str],
        metavar="NAME",
    ),
}  # fmt: skip
"""Fields of a tuning's recipe that have a short name."""


def recipe_keywords(fields: Mapping[str, RecipeField]) -> KeywordOptions:
    """Return the options of ``fields`` and ``--set`` for all other fields."""
    options = {name: field.option for name, field in fields.items()}
    return KeywordOptions(options, settings="Any field of the recipe, e.g. adaptation.rank=8.")


TuningFields = Annotated[Any, recipe_keywords(TUNING)]


def tuning_recipe(data: str | Path | Recipe, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a data file, a TOML file or a recipe, with ``fields`` set.

    Raises:
        RecipeError: for an unknown or invalid field, or for fields in addition to a ``Recipe``.
    """
    from luthier.recipe import Recipe, fields_of

    if not isinstance(data, Recipe):
        return Recipe.parse(assign_fields(fields_of(data), fields, TUNING))
    if fields:
        raise RecipeError("a Recipe object is complete: set the fields in the object")
    return data


def assign_fields(
    plain: dict[str, Any], fields: Mapping[str, Any], short_names: Mapping[str, RecipeField]
) -> dict[str, Any]:
    """Set ``fields``, by short name or by path, in the values of a recipe, and return the values.

    Raises:
        RecipeError: for a field that is given twice.
    """
    from luthier.recipe import assign

    names: dict[str, str] = {}
    for name, value in fields.items():
        path = field_path(name, value, short_names)
        if path in names:
            raise RecipeError(f"{names[path]} and {name} are the same field: give one of them")
        names[path] = name
        assign(plain, path.split("."), value)
    return plain


def field_path(name: str, value: Any, short_names: Mapping[str, RecipeField]) -> str:
    """Return the dotted path of a field from its keyword, such as ``training__epochs``."""
    path = short_names[name].path if name in short_names else name.replace("__", ".")
    # A table replaces the whole group, a name its method.
    return path.removesuffix(".method") if isinstance(value, Mapping) else path
