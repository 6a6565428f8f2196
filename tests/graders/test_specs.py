"""Graders from names, tables and files, and the contract of all graders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import RecipeError
from luthier.graders import (
    GRADERS,
    Exact,
    Grader,
    Judge,
    Number,
    Regex,
    parse_graders,
    read_graders,
)
from luthier.validation import field_docstrings

NEEDED: dict[str, dict[str, Any]] = {
    "regex": {"pattern": "a"},
    "json_schema": {"against": {}},
    "code": {"allow_code": True},
    "mix": {"parts": {"a": "exact"}},
    "reward": {"model": "base:judge"},
    "classifier": {"model": "base:voice", "label": "ours"},
    "string_check": {"reference": "{{item.answer}}"},
    "text_similarity": {"reference": "{{item.answer}}"},
    "python": {"source": "def grade(sample, item):\n    return 1.0"},
    "lambda": {"source": "def lambda_handler(event, context):\n    return []"},
    "score_model": {"model": "base:judge", "input": [{"role": "user", "content": "?"}]},
    "label_model": {
        "model": "base:judge",
        "input": [{"role": "user", "content": "?"}],
        "labels": ["good", "bad"],
        "passing_labels": ["good"],
    },
    "multi": {"graders": {"a": "exact"}, "calculate_output": "a"},
}


@pytest.mark.parametrize("name", GRADERS)
def test_every_grader_is_a_frozen_configuration(name: str) -> None:
    grader = GRADERS[name].model_validate(NEEDED.get(name, {}))
    assert grader.method == name
    assert GRADERS[name].model_validate(grader.model_dump(mode="json")) == grader
    with pytest.raises(ValidationError):
        grader.method = "other"
    with pytest.raises(ValidationError):
        GRADERS[name].model_validate({**NEEDED.get(name, {}), "nothing": 1})
    for field in GRADERS[name].model_fields.keys() - {"method"}:
        assert field_docstrings(GRADERS[name]).get(field), f"{name}.{field} has no documentation"
    assert GRADERS[name].model_json_schema()["properties"]


def test_names_tables_and_objects() -> None:
    found = parse_graders(["exact", {"method": "number", "tolerance": 0.1}, Regex(pattern="a")])
    assert found == {"exact": Exact(), "number": Number(tolerance=0.1), "regex": Regex(pattern="a")}
    assert parse_graders(["exact", "exact"]) == {"exact": Exact()}
    named = parse_graders({"a": Regex(pattern="a"), "b": {"method": "regex", "pattern": "b"}})
    assert named == {"a": Regex(pattern="a"), "b": Regex(pattern="b")}


@pytest.mark.parametrize(
    "specs",
    [
        ["rouge"],
        [{"pattern": "a"}],
        ["regex"],
        [{"method": "exact", "case": 1}],
        [{"method": "number", "tolerance": -1}],
        [{"method": "regex", "pattern": "("}],
        [{"method": "code"}],
        [3],
        [Regex(pattern="a"), Regex(pattern="b")],
    ],
)
def test_invalid_grader_is_refused(specs: Any) -> None:
    with pytest.raises(RecipeError):
        parse_graders(specs)


def test_a_file_of_graders(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    file = tmp_path / "graders.toml"
    file.write_text(
        '[result]\nmethod = "number"\n'
        '[form]\nmethod = "json_schema"\nagainst = "schema.json"\n'
        '[both.parts]\na = "exact"\nb = { method = "json_schema", against = "schema.json" }\n'
        '[both]\nmethod = "mix"\nweights = { a = 2.0 }\n'
        '[formula.graders]\nb = { method = "json_schema", against = "schema.json" }\n'
        '[formula]\nmethod = "multi"\ncalculate_output = "b"\n'
    )
    found = parse_graders(read_graders(file))
    assert list(found) == ["result", "form", "both", "formula"]
    assert found["form"].against == tmp_path / "schema.json"  # type: ignore[attr-defined]
    assert found["both"].parts["b"] == found["form"]  # type: ignore[attr-defined]
    assert found["formula"].graders["b"] == found["form"]  # type: ignore[attr-defined]
    file.write_text("")
    with pytest.raises(RecipeError):
        read_graders(file)
    with pytest.raises(RecipeError):
        read_graders(tmp_path / "none.toml")
    file.write_text("[a")
    with pytest.raises(RecipeError):
        read_graders(file)
    file.write_text('exact = "exact"\nform = 3')
    with pytest.raises(RecipeError):
        parse_graders(read_graders(file))


def test_import_of_graders_is_light() -> None:
    heavy = {"torch", "transformers", "jsonschema", "regex", "rich", "tokenizers"}
    code = f"import luthier.graders, sys; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_base_is_no_grader() -> None:
    assert Judge().prefers_batches and not Exact().prefers_batches
    assert all(issubclass(cls, Grader) for cls in GRADERS.values())
