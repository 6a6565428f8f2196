"""Pipelines: several runs, in which each stage starts from a model of an earlier stage.

A TOML file names the stages in order::

    name = "support"                      # the models become base:support-STAGE
    base = "smollm2-135m-instruct"        # start of the first stage

    [[stage]]
    name = "sft"
    data.train = "answers.jsonl"

    [[stage]]
    name = "reward"
    data.train = "preferences.jsonl"
    objective.method = "reward_model"

    [[stage]]
    name = "dpo"
    base = "stage:sft"                    # default: the stage before, here reward
    data.train = "preferences.jsonl"
    objective.method = "dpo"

A stage has the fields of a recipe, or of a different command with ``command``: ``pretrain``,
``student`` (``teacher``, ``layers``, ...) or ``distil`` (``teacher``, ``method``, and ``base`` for
the student). For a model id, ``stage:NAME`` means the model of an earlier stage. All stages are
parsed, and the rows are checked, before the first stage trains. Finished stages are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from luthier.errors import RecipeError
from luthier.files import read_toml
from luthier.models import DEFAULT_BASE
from luthier.models.manifest import MANIFEST, Manifest
from luthier.recipe import ModelName, Recipe, parse, with_paths
from luthier.validation import StrictModel
from luthier.workflows.distil.recipe import DistilRecipe
from luthier.workflows.pretrain_recipe import PretrainRecipe

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter

REFERENCE = "stage:"


class StageSpec(StrictModel):
    """A stage of the file: name, command, and the fields of the command's recipe."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: ModelName
    """Name of the stage; the model is ``base:PIPELINE-NAME``."""
    command: Literal["tune", "pretrain", "student", "distil"] = "tune"
    """Command of the stage."""

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the stage's recipe, as written."""
        return dict(self.model_extra or {})


class PipelineSpec(StrictModel):
    """Content of a pipeline file."""

    name: ModelName
    """First part of all model names."""
    base: str = DEFAULT_BASE
    """Start model of the first stage."""
    stage: tuple[StageSpec, ...] = Field(min_length=1)
    """Stages in order."""

    @model_validator(mode="after")
    def _distinct(self) -> PipelineSpec:
        names = [stage.name for stage in self.stage]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages have the name {name!r}; use distinct names")
        return self


class StudentRecipe(StrictModel):
    """Fields of a ``student`` stage, as for ``luthier models student``."""

    teacher: str
    """Teacher model."""
    name: str
    """Name of the student."""
    layers: int | None = None
    """Layers, spread evenly over the teacher's."""
    keep: tuple[int, ...] | None = None
    """Or the layers themselves, counted from 0."""
    heads: int | None = None
    """Attention heads of each layer."""
    intermediate: int | None = None
    """Neurons of each MLP."""
    hidden: int | None = None
    """Channels of the residual stream."""


Fields = Recipe | PretrainRecipe | DistilRecipe | StudentRecipe


@dataclass(frozen=True)
class _Kind:
    """A command of stages."""

    recipe: type[Fields]
    start: str | None
    """Field with the start model."""
    run: Callable[[Any, Reporter, int], dict[str, Any]]
    """Run a recipe with a number of processes and return JSON values; finished work is not
    repeated."""


@dataclass(frozen=True)
class Stage:
    """A stage with nothing left to fill in."""

    name: str
    command: str
    model_id: str
    """Id of the resulting model."""
    recipe: Fields
    after: tuple[str, ...]
    """Ids of the required models of earlier stages."""

    @property
    def start(self) -> str | None:
        """Id of the start model; ``None`` for random weights."""
        field = KINDS[self.command].start
        return str(getattr(self.recipe, field)) if field else None


@dataclass(frozen=True)
class StageOutcome:
    """Result of a stage."""

    stage: str
    model_id: str
    details: dict[str, Any]
    """JSON output of the stage's command."""


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order they run."""

    name: str
    stages: tuple[Stage, ...]

    @staticmethod
    def read(path: Path) -> Pipeline:
        """Read a TOML pipeline; relative paths start at the folder of the file.

        Raises:
            RecipeError: for an invalid field, with the name of the stage.
        """
        spec = parse(PipelineSpec, _with_paths(read_toml(path, "a pipeline"), path.parent))
        stages: list[Stage] = []
        for each in spec.stage:
            stages.append(_stage(spec, each, stages))
        return Pipeline(spec.name, tuple(stages))

    def run(self, reporter: Reporter) -> list[StageOutcome]:
        """Run every unfinished stage and return the results in order.

        Raises:
            RefusedInput: before any training, for an invalid stage; and the errors of the stages.
        """
        # All stages before the first: an error in the last stage must not wait for days of
        # training.
        self.check(reporter)
        outcomes = []
        for number, stage in enumerate(self.stages, 1):
            reporter.note(f"stage {number} of {len(self.stages)}: {stage.name} -> {stage.model_id}")
            details = KINDS[stage.command].run(stage.recipe, reporter, 1)
            outcomes.append(StageOutcome(stage.name, stage.model_id, details))
        return outcomes

    def check(self, reporter: Reporter) -> None:
        """Raise :class:`RecipeError` for unlearnable rows, or a model older than its inputs."""
        created_at: dict[str, str] = {}
        for stage in self.stages:
            manifest = _manifest(stage.model_id)
            created = manifest.created if manifest else ""
            for needed in stage.after if created else ():
                # A model that is older than its input was trained on an earlier version of the
                # input.
                if created_at[needed] == "" or created_at[needed] > created:
                    raise RecipeError(
                        f"Stage {stage.name}: {stage.model_id} is older than its input {needed}. "
                        f"Train again after `luthier models remove {stage.model_id}`."
                    )
            created_at[stage.model_id] = created
            if not created:
                reporter.stage(f"Checking the data of stage {stage.name}")
                _check_rows(stage, self.stages)


def _stage(spec: PipelineSpec, each: StageSpec, earlier: list[Stage]) -> Stage:
    kind, fields = KINDS[each.command], each.fields
    if kind.start and kind.start not in fields:
        fields[kind.start] = earlier[-1].model_id if earlier else spec.base
    inputs: list[str] = []
    model_ids = {stage.name: stage.model_id for stage in earlier}
    fields = _resolve_stages(fields, each.name, model_ids, inputs)
    if kind.start and fields[kind.start] in model_ids.values():
        inputs.append(str(fields[kind.start]))
    fields["name"] = name = f"{spec.name}-{each.name}"
    try:
        recipe = parse(kind.recipe, fields)
    except RecipeError as error:
        raise RecipeError(f"Stage {each.name}: {error}") from error
    root = fields[kind.start] if kind.start else None
    if isinstance(recipe, PretrainRecipe) and recipe.makes_adapter:
        root = recipe.network.base
    model_id = f"{_root(root, earlier)}:{name}" if root is not None else name
    return Stage(each.name, each.command, model_id, recipe, tuple(dict.fromkeys(inputs)))


def _root(start: str, earlier: list[Stage]) -> str:
    """Return the first part of the ids of all models with the base model of ``start``."""
    from luthier.library.folders import short_name, split_id
    from luthier.library.models import find
    from luthier.models.catalog import CATALOG

    if start in {stage.model_id for stage in earlier}:
        return split_id(start)[0]
    # A base of the catalogue need not be downloaded to know its id.
    return start if start in CATALOG else short_name(find(start).root)


def _resolve_stages(value: Any, stage: str, model_ids: Mapping[str, str], inputs: list[str]) -> Any:
    """Return ``value`` with model ids for ``stage:NAME``; append the ids to ``needed``."""
    if isinstance(value, Mapping):
        return {key: _resolve_stages(item, stage, model_ids, inputs) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_stages(item, stage, model_ids, inputs) for item in value]
    if not (isinstance(value, str) and value.startswith(REFERENCE)):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in model_ids:
        names = ", ".join(model_ids) or "none"
        raise RecipeError(
            f"Stage {stage}: {value!r} is not an earlier stage. Earlier stages: {names}."
        )
    inputs.append(model_ids[name])
    return model_ids[name]


def _with_paths(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return ``fields`` with the data files of each stage relative to ``folder``."""
    stages = fields.get("stage")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict):
            with_paths(stage, folder)
    return fields


def _tune(recipe: Recipe, reporter: Reporter, processes: int) -> dict[str, Any]:
    from luthier.workflows.tuning import tune

    return asdict(tune(recipe, True, reporter, processes))


def _pretrain(recipe: PretrainRecipe, reporter: Reporter, processes: int) -> dict[str, Any]:
    from luthier.workflows.pretrain import pretrain

    return asdict(pretrain(recipe, True, reporter, processes))


def _distil(recipe: DistilRecipe, reporter: Reporter, processes: int) -> dict[str, Any]:
    from luthier.workflows.distil import distil

    distilled = distil(recipe, True, reporter, processes)
    return {**asdict(distilled.result), "distillation": distilled.details}


def _student(recipe: StudentRecipe, reporter: Reporter, processes: int) -> dict[str, Any]:
    from luthier.library.folders import short_name
    from luthier.library.models import find
    from luthier.models.shrinking.student import StudentShape
    from luthier.workflows.student import make_student

    model_id = f"{short_name(find(recipe.teacher).root)}:{recipe.name}"
    if _manifest(model_id):
        reporter.note(f"{model_id} exists already")
        return {"model_id": model_id}
    shape = StudentShape(**recipe.model_dump(exclude={"teacher", "name"}))
    return asdict(make_student(recipe.teacher, recipe.name, shape, reporter))


KINDS: dict[str, _Kind] = {
    "tune": _Kind(Recipe, "base", _tune),
    "pretrain": _Kind(PretrainRecipe, None, _pretrain),
    "student": _Kind(StudentRecipe, "teacher", _student),
    "distil": _Kind(DistilRecipe, "base", _distil),
}


def _check_rows(stage: Stage, stages: tuple[Stage, ...]) -> None:
    """Encode the rows of ``stage`` as in the run, with the first base model of the lineage.

    The start model of a later stage does not exist yet. Answers of a teacher are checked when the
    stage begins; here only the prompts are read.
    """
    from luthier.data.prompts import load_prompts
    from luthier.data.rows import load_rows
    from luthier.engine.dataset import prepare
    from luthier.library.models import find

    recipe = stage.recipe
    if isinstance(recipe, DistilRecipe):
        load = load_prompts if recipe.method == "responses" else load_rows
        load(recipe.data.train, recipe.data.columns)
        return
    if not isinstance(recipe, Recipe):
        return
    root = next(_roots(stage, stages), None)
    if root is None or (recipe.objective is not None and recipe.objective.other_models):
        load_rows(recipe.data.train, recipe.data.columns)
        return
    model = find(root)
    room = model.room - recipe.adaptation.added_tokens
    chat = recipe.data.format(model.chat)
    prepare(recipe.data, recipe.objective, chat, room, recipe.training.seed)


def _roots(stage: Stage, stages: tuple[Stage, ...]) -> Iterator[str]:
    """Yield the stored model at the start of the lineage of ``stage``, if any."""
    stages_by_model = {each.model_id: each for each in stages}
    while stage.start is not None:
        if stage.start not in stages_by_model:
            yield stage.start
            return
        stage = stages_by_model[stage.start]


def _manifest(model_id: str) -> Manifest | None:
    """Return the record of a model, also if the parent is gone; ``None`` without a record."""
    from luthier.library.folders import base_folder, folder_of

    folder = folder_of(model_id) or base_folder(model_id)
    return Manifest.read(folder) if (folder / MANIFEST).is_file() else None
