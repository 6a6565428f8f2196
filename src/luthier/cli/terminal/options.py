"""Arguments and options of several commands, and the recipe from the options.

This module imports no heavy library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.terminal.bridge import FromText, KeywordOptions
from luthier.errors import DataError, Problem, RecipeError

if TYPE_CHECKING:
    from luthier.cli.model import Model
    from luthier.library.models import StoredModel
    from luthier.recipe import Recipe

RayAddress = Annotated[str | None, typer.Option(metavar="HOST:PORT")]


def parse_columns(texts: list[str]) -> dict[str, str]:
    """Parse each ``KEY=COLUMN`` of ``--map``."""
    from luthier.recipe import parse_columns

    return parse_columns(texts)


def parse_mix(texts: list[str]) -> list[dict[str, Any]]:
    """Parse each ``FILE=RATIO`` of ``--mix``."""
    from luthier.recipe import parse_mix

    return [parse_mix(text) for text in texts]


def parse_duration(text: str) -> float:
    """Parse a duration such as ``90m`` into seconds."""
    from luthier.workflows.estimate.budget import duration

    return duration(text)


def parse_whole_numbers(text: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of whole numbers like 0,2,4") from error


def parse_shares(texts: list[str]) -> dict[str, float]:
    """Parse each ``LABEL=PRECISION`` of ``--threshold``."""
    shares = {}
    for text in texts:
        label, _, share = text.rpartition("=")
        try:
            shares[label] = float(share)
        except ValueError:
            label = ""
        if not label:
            raise RecipeError(f"--threshold takes LABEL=PRECISION such as spam=0.98, not {text!r}")
    return shares


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Parse each ``KEY=VALUE`` of ``--set``."""
    from luthier.recipe import parse_setting

    return dict(parse_setting(text) for text in texts)


def existing_source(source: str) -> str:
    """Return a data source, and report a missing file before heavy imports."""
    path = Path(source)
    if has_magic(source) or path.exists():
        return source
    from luthier.data.files.read import find_container
    from luthier.data.files.sources import is_address

    if is_address(source):
        return source
    problems: list[Problem] = []
    find_container(path, problems)
    raise DataError(problems)


COLUMNS = FromText(list[str], parse_columns, "ignore", "Column to leave out; repeatable.")
AtLeastOne = Annotated[int, typer.Option(min=1)]
OptionalAtLeastOne = Annotated[int | None, typer.Option(min=1)]
ModelSource = Annotated["str | Model | StoredModel", FromText(str)]
DataSource = Annotated["str | Path | Recipe", FromText(str, existing_source)]
RowSource = Annotated["str | Path", FromText(str, existing_source)]
Mapped = Annotated[
    Mapping[str, str] | None,
    COLUMNS,
    typer.Option("--map", metavar="KEY=COLUMN"),
]


@dataclass(frozen=True)
class RecipeField:
    """Field of a recipe with a short name in a command."""

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
        text = COLUMNS if self.convert is parse_columns else FromText(self.type, self.convert)
        return Annotated[self.type, text, info]


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
    "chat_template": RecipeField(
        "data.chat_template", "Chat template: chatml or a Jinja file.", metavar="chatml|FILE"
    ),
    "base": RecipeField("base", "Base model; chosen from the rows by default."),
    "name": RecipeField("name", "Name of the custom model."),
    "objective": RecipeField(
        "objective.method", "Objective, e.g. dpo; chosen from the rows by default."
    ),
    "threshold": RecipeField(
        "objective.min_precision", "Precision that a label must reach; repeatable.", list[str],
        parse_shares, None, "LABEL=PRECISION",
    ),
    "adaptation": RecipeField("adaptation.method", "Adaptation, e.g. lora, qlora or full."),
    "epochs": RecipeField("training.epochs", "Passes over the rows.", float),
    "batch_size": RecipeField("training.batch_size", "Rows per step.", int),
    "learning_rate": RecipeField("training.learning_rate", "Peak learning rate.", float),
    "seed": RecipeField("training.seed", "Random seed.", int),
    "track": RecipeField(
        "training.track", "Tracker: mlflow, tensorboard or wandb; repeatable.", list[str],
        metavar="NAME",
    ),
}  # fmt: skip
"""Recipe fields of tuning by short name."""


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
        plain = fields_of(data)
        if "threshold" in fields and "objective" not in plain.keys() | fields.keys():
            fields = {"objective": "classification", **fields}
        return Recipe.parse(assign_fields(plain, fields, TUNING))
    if fields:
        raise RecipeError("a Recipe object is complete. Set fields in the object")
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
            raise RecipeError(f"`{names[path]}` and `{name}` set the same field. Set only one")
        names[path] = name
        assign(plain, path.split("."), value)
    return plain


def field_path(name: str, value: Any, short_names: Mapping[str, RecipeField]) -> str:
    """Return the dotted path of a field from the keyword, for example ``training__epochs``."""
    path = short_names[name].path if name in short_names else name.replace("__", ".")
    # A table replaces the whole group; a text sets only the method.
    return path.removesuffix(".method") if isinstance(value, Mapping) else path
