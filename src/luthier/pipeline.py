"""Several runs as one: each stage starts from a model of an earlier one.

A TOML file names the stages in the order they run::

    name = "support"                      # the models become base:support-STAGE
    base = "smollm2-135m-instruct"        # what the first stage starts from

    [[stage]]
    name = "sft"
    data.train = "answers.jsonl"

    [[stage]]
    name = "reward"
    data.train = "preferences.jsonl"
    objective.method = "reward_model"

    [[stage]]
    name = "dpo"
    base = "stage:sft"                    # without this, the stage before: here, reward
    data.train = "preferences.jsonl"
    objective.method = "dpo"

A stage has the fields of a recipe, or those of another command where ``command`` says so. Wherever a
model id stands, ``stage:NAME`` is the model of an earlier stage. All stages are parsed, and their rows
checked, before the first one trains; those that are done are not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from luthier.errors import RecipeError
from luthier.pretraining import PretrainRecipe
from luthier.recipe import NAME_PATTERN, Part, Recipe, parse, read_toml, with_paths

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result

REFERENCE = "stage:"


class StageSpec(Part):
    """One stage as it is written: its name, its command, and the fields of that command's recipe."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """Its model is ``base:PIPELINE-NAME``."""
    command: Literal["tune", "pretrain"] = "tune"
    """What it runs."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return _checked(name)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its recipe, as they are written."""
        return dict(self.model_extra or {})


class PipelineSpec(Part):
    """The whole file."""

    name: str
    """First part of the names of all its models."""
    base: str = "smollm2-135m-instruct"
    """Model that the first stage starts from."""
    stage: tuple[StageSpec, ...] = Field(min_length=1)
    """The stages, in the order they run."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return _checked(name)

    @model_validator(mode="after")
    def _distinct(self) -> PipelineSpec:
        names = [stage.name for stage in self.stage]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called {name!r}; give each its own name")
        return self


@dataclass(frozen=True)
class Stage:
    """A stage with nothing left to fill in."""

    name: str
    model_id: str
    """Id of the model it makes."""
    recipe: Recipe | PretrainRecipe
    after: tuple[str, ...]
    """Ids of the models of earlier stages that it needs."""


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order they run."""

    name: str
    stages: tuple[Stage, ...]

    @staticmethod
    def read(path: Path) -> Pipeline:
        """Read a TOML pipeline; paths in it are relative to its folder.

        Raises:
            RecipeError: naming the stage and the field that cannot be used.
        """
        spec = parse(PipelineSpec, _with_paths(read_toml(path), path.parent))
        stages: list[Stage] = []
        for each in spec.stage:
            stages.append(_stage(spec, each, stages))
        return Pipeline(spec.name, tuple(stages))

    def run(
        self, reporter: Reporter, done: Callable[[Stage, Result], None] = lambda stage, result: None
    ) -> list[Result]:
        """Run every stage that is not done; the results of all, in order.

        Raises:
            RefusedInput: before anything trains, where a stage cannot be used; what a stage raises.
        """
        self.check(reporter)
        results = []
        for number, stage in enumerate(self.stages, 1):
            reporter.note(f"stage {number} of {len(self.stages)}: {stage.name} -> {stage.model_id}")
            results.append(_run(stage, reporter))
            done(stage, results[-1])
        return results

    def check(self, reporter: Reporter) -> None:
        """Refuse stages whose rows cannot be learned, or whose model is older than what it needs."""
        made: dict[str, str] = {}
        for stage in self.stages:
            created = _created(stage.model_id)
            for needed in stage.after if created else ():
                if made[needed] == "" or made[needed] > created:
                    raise RecipeError(
                        f"stage {stage.name}: {stage.model_id} was made from a model {needed} that is "
                        "no longer there. Remove it, so that it is made again: luthier models remove "
                        f"{stage.model_id}"
                    )
            made[stage.model_id] = created
            if not created:
                reporter.stage(f"Checking the data of stage {stage.name}")
                _check_rows(stage, self.stages)


def _stage(spec: PipelineSpec, each: StageSpec, before: list[Stage]) -> Stage:
    fields, known = each.fields, {stage.name: stage.model_id for stage in before}
    if each.command == "tune" and "base" not in fields:
        fields["base"] = before[-1].model_id if before else spec.base
    needed: list[str] = []
    fields = _resolved(fields, each.name, known, needed)
    ids = [stage.model_id for stage in before]
    if fields.get("base") in ids:
        needed.append(str(fields["base"]))
    fields["name"] = f"{spec.name}-{each.name}"
    kinds: dict[str, type[Recipe | PretrainRecipe]] = {"tune": Recipe, "pretrain": PretrainRecipe}
    try:
        recipe = parse(kinds[each.command], fields)
    except RecipeError as error:
        raise RecipeError(f"stage {each.name}: {error}") from error
    return Stage(each.name, _model_id(recipe, before), recipe, tuple(dict.fromkeys(needed)))


def _model_id(recipe: Recipe | PretrainRecipe, before: list[Stage]) -> str:
    """The id a run gives its model: the root of the lineage, and the name."""
    from luthier.store.models import find, short_name

    if isinstance(recipe, PretrainRecipe):
        return str(recipe.name)
    earlier = {stage.model_id: stage for stage in before}
    if recipe.base not in earlier:
        return f"{short_name(find(recipe.base).root)}:{recipe.name}"
    # Everything that was made from one base model has its name in front.
    return f"{recipe.base.partition(':')[0]}:{recipe.name}"


def _resolved(value: Any, stage: str, known: Mapping[str, str], needed: list[str]) -> Any:
    """``value`` with the ids of models for ``stage:NAME``; those ids join ``needed``."""
    if isinstance(value, Mapping):
        return {key: _resolved(item, stage, known, needed) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, stage, known, needed) for item in value]
    if not (isinstance(value, str) and value.startswith(REFERENCE)):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in known:
        listed = ", ".join(known) or "none"
        raise RecipeError(f"stage {stage}: {value!r} names no stage before it; there are {listed}")
    needed.append(known[name])
    return known[name]


def _with_paths(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with the data files of each stage below ``folder``."""
    stages = fields.get("stage")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict):
            with_paths(stage, folder)
    return fields


def _run(stage: Stage, reporter: Reporter) -> Result:
    from luthier.engine.pretrain import pretrain
    from luthier.engine.train import train

    if isinstance(stage.recipe, PretrainRecipe):
        return pretrain(stage.recipe, True, reporter)
    return train(stage.recipe, True, reporter)


def _check_rows(stage: Stage, stages: tuple[Stage, ...]) -> None:
    """Encode the rows of ``stage`` as its run will, with the base model at the bottom of its lineage.

    The base model of a stage that is made by another one is not there yet.
    """
    from luthier.engine.dataset import prepare
    from luthier.models.load import check_folder, context_length
    from luthier.store.models import chat_format, find

    recipe = stage.recipe
    if not isinstance(recipe, Recipe):
        return
    root = next(_roots(stage, stages), None)
    if root is None:
        return
    model = find(root)
    context = context_length(check_folder(model.network_folder))
    prepare(recipe.data, recipe.objective, chat_format(model), context, recipe.training.seed)


def _roots(stage: Stage, stages: tuple[Stage, ...]) -> Iterator[str]:
    """The model on this machine that ``stage`` goes back to, where there is one."""
    made = {each.model_id: each for each in stages}
    while isinstance(stage.recipe, Recipe):
        if stage.recipe.base not in made:
            yield stage.recipe.base
            return
        stage = made[stage.recipe.base]


def _created(model_id: str) -> str:
    """When a model was made; empty where there is none, also where its parent is gone."""
    from luthier.files import read_json
    from luthier.models.catalog import MANIFEST
    from luthier.store.models import base_folder, custom_folder

    base, _, name = model_id.partition(":")
    file = (custom_folder(base, name) if name else base_folder(base)) / MANIFEST
    return str(read_json(file).get("created", "")) if file.is_file() else ""


def _checked(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError("use 1-63 lower-case letters, digits, '.', '_' and '-'")
    return name
