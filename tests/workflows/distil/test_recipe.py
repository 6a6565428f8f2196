"""Teachers of a distillation, and the fields shared with tuning recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.chat_models.base import address_fields
from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.workflows.distil import distil
from luthier.workflows.distil.recipe import DistilRecipe, TeacherSpec


def recipe(**fields: Any) -> DistilRecipe:
    return DistilRecipe.parse({"data": {"train": "p.jsonl"}, "teacher": "big", **fields})


@pytest.mark.parametrize(
    "url",
    ["https://host/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1"],
)
def test_encrypted_or_on_this_machine(url: str) -> None:
    assert TeacherSpec(model="m", url=url).url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://host/v1",
        "http://10.0.0.5/v1",
        "http://localhost.evil.example/v1",
        "https://user:pw@host/v1",
        "https://host/v1?key=abc",
        "ftp://host/v1",
        "https:///v1",
    ],
)
def test_unsafe_teacher_urls_are_refused(url: str) -> None:
    with pytest.raises(RecipeError):
        recipe(teacher={"model": "m", "url": url})


def test_plain_http_when_asked_for() -> None:
    assert TeacherSpec(model="m", url="http://host/v1/", plain_http=True).url == "http://host/v1"


def test_teacher_as_text_has_model_and_url() -> None:
    assert address_fields("base:mine") == {"model": "base:mine"}
    assert address_fields("https://h/v1#org/m") == {"url": "https://h/v1", "model": "org/m"}
    assert recipe(teacher="https://h/v1#m").teacher.url == "https://h/v1"
    with pytest.raises(RecipeError):
        recipe(teacher="https://h/v1")


def test_the_student_s_part_is_a_recipe_of_tuning() -> None:
    whole = recipe(adaptation={"method": "full"}, training={"epochs": 2}, name="x")
    tuned = whole.tuning_recipe()
    assert type(tuned) is Recipe
    plain = whole.plain()
    assert tuned.plain() == {k: v for k, v in plain.items() if k in Recipe.model_fields}
    assert Recipe.parse(tuned.plain()) == tuned


def test_unknown_methods_and_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        distil(recipe(method="magic"))
    with pytest.raises(RecipeError):
        recipe(teacher={"model": "m", "concurency": 2})
