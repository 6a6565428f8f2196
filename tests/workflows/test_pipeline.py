"""Pipelines: parsing, rejected stages, and finished stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.metrics import Reporter
from luthier.errors import DataError, RecipeError
from luthier.library.models import find
from luthier.workflows.pipeline import Pipeline

TINY = "training.max_steps = 2\ntraining.batch_size = 2\nadaptation.rank = 2\n"


@pytest.fixture
def folder(tmp_path: Path, luthier_home: Path) -> Path:
    pairs = [{"prompt": f"Say {n}", "completion": f"{n} it is"} for n in range(8)]
    texts = [{"text": f"The number {n} comes after {n - 1}. " * 4} for n in range(8)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def written(folder: Path, stages: str, base: str | None = None) -> Path:
    file = folder / "road.toml"
    head = f'name = "road"\nbase = "{base or folder / "model"}"\n'
    file.write_text(head + stages, encoding="utf-8")
    return file


def stage(name: str, data: str, *further: str) -> str:
    lines = ["[[stage]]", f'name = "{name}"', f'data.train = "{data}.jsonl"', TINY, *further]
    return "\n".join(lines) + "\n"


class Counting(Reporter):
    def __init__(self) -> None:
        self.steps = 0
        self.notes: list[str] = []

    def metrics(self, line: Any, steps: int) -> None:
        self.steps += line["event"] == "train"

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_stages_start_from_named_stage_and_run_once(folder: Path, tiny_model_folder: Path) -> None:
    stages = (
        stage("read", "texts", 'objective.method = "causal_lm"')
        + stage("answer", "pairs")
        + stage("other", "pairs", 'base = "stage:read"', "training.seed = 1")
    )
    file = written(folder, stages, str(tiny_model_folder))
    pipeline = Pipeline.read(file)
    read, answer, other = (each.model_id for each in pipeline.stages)
    assert [each.after for each in pipeline.stages] == [(), (read,), (read,)]
    first = Counting()
    outcomes = pipeline.run(first)
    assert [each.model_id for each in outcomes] == [read, answer, other]
    assert first.steps == 6
    parents = [find(model).manifest.parent for model in (answer, other)]
    assert parents == [read, read]

    again = Counting()
    assert Pipeline.read(file).run(again) == outcomes
    assert again.steps == 0

    grown = written(
        folder, stages + stage("last", "pairs", "training.seed = 2"), str(tiny_model_folder)
    )
    more = Counting()
    assert len(Pipeline.read(grown).run(more)) == 4
    assert more.steps == 2


@pytest.mark.slow
def test_pipeline_with_teacher_and_student_stages(folder: Path, tiny_model_folder: Path) -> None:
    stages = (
        stage("large", "pairs")
        + '[[stage]]\nname = "small"\ncommand = "student"\nlayers = 1\n'
        + stage("taught", "pairs", 'command = "distil"', 'method = "logits"',
                'base = "stage:small"', 'teacher = "stage:large"')
        + stage("more", "pairs", 'base = "stage:small"', 'objective.method = "logit_distillation"',
                'objective.teacher = "stage:taught"')
    )  # fmt: skip
    pipeline = Pipeline.read(written(folder, stages, str(tiny_model_folder)))
    large, small, taught, more = (each.model_id for each in pipeline.stages)
    assert [set(each.after) for each in pipeline.stages] == [
        set(), {large}, {small, large}, {small, taught}
    ]  # fmt: skip
    outcomes = pipeline.run(Counting())
    assert [each.model_id for each in outcomes] == [large, small, taught, more]
    manifest = find(taught).manifest.plain()
    assert (manifest["parent"], manifest["others"]) == (small, {"teacher": large})
    again = Counting()
    assert [each.model_id for each in pipeline.run(again)] == [large, small, taught, more]
    assert again.steps == 0


@pytest.mark.slow
def test_stage_with_removed_base_model_is_refused(folder: Path, tiny_model_folder: Path) -> None:
    import shutil

    stages = stage("one", "pairs") + stage("two", "pairs")
    pipeline = Pipeline.read(written(folder, stages, str(tiny_model_folder)))
    pipeline.run(Reporter())
    shutil.rmtree(find(pipeline.stages[0].model_id).folder)
    with pytest.raises(RecipeError):
        pipeline.check(Reporter())


def test_rows_of_all_stages_are_checked_before_the_first_trains(
    folder: Path, tiny_model_folder: Path
) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 3)
    file = written(folder, stage("one", "pairs") + stage("two", "bad"), str(tiny_model_folder))
    counting = Counting()
    with pytest.raises(DataError) as refused:
        Pipeline.read(file).run(counting)
    assert refused.value.rule == "field.empty"
    assert counting.steps == 0


@pytest.mark.parametrize(
    "stages",
    [
        stage("one", "pairs", 'base = "stage:two"'),
        stage("one", "pairs") * 2,
        stage("One", "pairs"),
        stage("one", "pairs", "adaptation.ranks = 2"),
        stage("one", "pairs", 'command = "bake"'),
        "",
    ],
)
def test_invalid_pipeline_is_refused(stages: str, folder: Path, tiny_model_folder: Path) -> None:
    file = written(folder, stages, str(tiny_model_folder))
    with pytest.raises(RecipeError):
        Pipeline.read(file)
