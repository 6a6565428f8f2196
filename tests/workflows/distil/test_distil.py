"""Distillation by an objective: on replies, or on the teacher's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import RecipeError
from luthier.files import luthier_home
from luthier.library.models import find
from luthier.workflows.distil import distil
from luthier.workflows.distil.recipe import DistilRecipe

QUICK = {
    "training__max_steps": 2, "training__batch_size": 4, "training__threads": 1,
    "data__validation_share": 0.0, "adaptation__rank": 2,
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def teacher(tiny_model_folder: Path, tmp_path: Path) -> str:
    rows = [{"prompt": f"question {n}", "completion": "yes, it is"} for n in range(8)]
    file = write(tmp_path / "teach.jsonl", rows)
    settings = {**QUICK, "training__max_steps": 60, "training__learning_rate": 0.02}
    made = luthier.tune(file, base=str(tiny_model_folder), name="teacher", **settings)
    return made.model_id


@pytest.mark.parametrize("method", [pytest.param("logits", marks=pytest.mark.slow), "on_policy"])
def test_distil_trains_on_replies_of_rows(
    method: str, teacher: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {n}", "completion": "no, never"} for n in range(8)]
    settings: dict[str, Any] = {**QUICK, "objective__temperature": 2.0}
    if method == "on_policy":
        settings["objective__max_tokens"] = 4
    found = luthier.distil(
        write(tmp_path / "rows.jsonl", rows), teacher=teacher, student=str(tiny_model_folder),
        method=method, name="pupil", **settings,
    )  # fmt: skip
    manifest = find(found.result.model_id).manifest.plain()
    assert manifest["distillation"] == found.details
    assert found.details["teacher"] == {"model": teacher}
    assert manifest["others"] == {"teacher": teacher}
    objective = manifest["recipe"]["objective"]
    assert (objective["temperature"], objective["teacher"]) == (2.0, teacher)
    assert not (luthier_home() / "distillations").exists()


@pytest.mark.slow
def test_bare_prompts_are_answered_by_the_teacher_first(
    teacher: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}"} for n in range(6)])
    found = luthier.distil(
        file, teacher=teacher, student=str(tiny_model_folder), method="logits", name="pupil",
        insights__minimum=2, sampling__max_tokens=200, **QUICK,
    )  # fmt: skip
    answers = luthier_home() / "distillations" / "tiny-llama" / "pupil" / "train.jsonl"
    assert found.result.rows == len(answers.read_text().splitlines()) >= 2
    assert find(found.result.model_id).manifest.others == {"teacher": teacher}


@pytest.mark.slow
def test_parallel_training_makes_equal_student(
    teacher: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}"} for n in range(6)])
    training = {"max_steps": 3, "batch_size": 4, "threads": 2, "precision": "float32"}
    fields = {
        "data": {"train": str(file), "validation_share": 0.0}, "base": str(tiny_model_folder),
        "teacher": teacher, "method": "logits", "training": training,
        "insights": {"minimum": 2}, "sampling": {"max_tokens": 200},
    }  # fmt: skip
    one, two = (
        distil(DistilRecipe.parse({**fields, "name": f"by-{count}"}), processes=count)
        for count in (1, 2)
    )
    assert two.result.train_loss == pytest.approx(one.result.train_loss, rel=1e-5)
    records = [find(each.result.model_id).manifest for each in (one, two)]
    assert records[0].others == records[1].others == {"teacher": teacher}
    assert records[1].plain()["distillation"] == two.details


def test_invalid_distillation_options_are_refused(
    tiny_model_folder: Path, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": str(n), "completion": "x"} for n in range(4)])

    def refused(rule: str, **fields: Any) -> None:
        given = {"teacher": str(tiny_model_folder), "method": "logits", **QUICK, **fields}
        with pytest.raises(RecipeError) as caught:
            luthier.distil(file, student=str(tiny_model_folder), name="pupil", **given)
        assert caught.value.rule == rule

    refused("teacher.network", teacher="https://host/v1#big")
    refused("objective.conflict", objective__method="sft")
    refused("teacher.tokenizer", teacher=str(family_folder("t5")))
    refused("recipe.invalid", method="magic")
    assert not list((luthier_home() / "models").glob("custom/*/*"))
