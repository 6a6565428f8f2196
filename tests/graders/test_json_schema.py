"""Replies that must be JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validators

from luthier.errors import GradingFailed, RecipeError
from luthier.graders import Answer, JsonSchema, grade_answers, parse_graders
from luthier.types import Message, Row

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
        "count": {"$ref": "#/$defs/count"},
    },
    "required": ["id", "count"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 1}},
}
GOOD = '{"id": "AB12", "count": 3}'


def answer(reply: str) -> Answer:
    return Answer((Message("user", "?"),), reply, None, Row("data.jsonl", 4))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (GOOD, 1.0),
        (f"\n {GOOD}\n", 1.0),
        (f"Here you are:\n```json\n{GOOD}\n```\nAnything else?", 1.0),
        (f"```\n{GOOD}\n```", 1.0),
        (f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```", 0.0),
        (f"Sure! {GOOD}", 0.0),
        ('{"id": "ab12", "count": 3}', 0.0),
        ('{"id": "AB12", "count": 0}', 0.0),
        ('{"id": "AB12", "count": 3, "more": 1}', 0.0),
        ('{"id": "AB12"}', 0.0),
        ('{"id": "AB12", "count": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 10_000, 0.0),
        ("null", 0.0),
        ("", 0.0),
    ],
)
def test_an_inline_schema(reply: str, score: float) -> None:
    assert JsonSchema(against=ORDER).grade([answer(reply)]) == [score]


def test_a_schema_from_a_file_of_an_older_draft(tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    draft = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]}
    file.write_text(json.dumps(draft))
    grader = JsonSchema(against=file)
    grader.check()
    assert [grader.score(answer(text)) for text in ("[null]", "[1]", "[null, 1]")] == [
        1.0,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"properties": {"a": {"minimum": "1"}}},
        {"$schema": 1},
        {"$schema": ["x"]},
        {"items": {"$ref": "#/$defs/none"}},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"patternProperties": {"^(a+)+$": {}}},
        {"enum": ["a" * 100] * 1000},
        {"pattern": "(" * 1000},
        {"items": {"pattern": "a" * 5000}},
        Path("/nowhere/schema.json"),
    ],
)
def test_a_bad_schema_is_rejected(schema: Any) -> None:
    with pytest.raises(RecipeError) as error:
        parse_graders([{"method": "json_schema", "against": schema}])
    assert error.value.setting == "against"


def test_references_within_a_schema_are_followed() -> None:
    schema = {
        "$id": "http://here/all",
        "$defs": {"count": {"$id": "count", "type": "integer"}, "$ref": {"$anchor": "name"}},
        "properties": {"n": {"$ref": "count"}, "name": {"$ref": "#name"}},
        "const": {"n": 1, "$ref": "a value, no reference"},
    }
    parse_graders([{"method": "json_schema", "against": schema}])


def test_remote_reference_is_not_fetched() -> None:
    grader = JsonSchema(against={"$ref": "http://127.0.0.1:1/schema.json"})
    with pytest.raises(GradingFailed) as refused:
        grade_answers(grader, [answer("1")])
    assert refused.value.rule == "grader.raised"


def test_patterns_are_bounded_in_time() -> None:
    grader = JsonSchema(against={"type": "string", "pattern": r"^(a|aa)+$"})
    started = time.monotonic()
    with pytest.raises(GradingFailed):
        grade_answers(grader, [answer(json.dumps("a" * 60 + "!"))])
    assert time.monotonic() - started < 20


def alternatives(levels: int) -> dict[str, Any]:
    """Return a schema of references that takes 2 ** ``levels`` steps."""
    either = [{"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)]
    defined = {f"a{n}": each for n, each in enumerate(either)}
    return {"$defs": {**defined, f"a{levels}": {"type": "string"}}, "$ref": "#/$defs/a0"}


class TestHostileSchemas:
    def test_exponential_schema_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("luthier.graders.json_schema.TIME_LIMIT_S", 0.5)
        grader = JsonSchema(against=alternatives(40))
        grader.check()
        started = time.monotonic()
        with pytest.raises(GradingFailed):
            grade_answers(grader, [answer("1")])
        assert time.monotonic() - started < 10
        assert grader.score(answer('"a"')) == 1.0
        assert JsonSchema(against=alternatives(5)).score(answer("1")) == 0.0

    def test_circular_reference_fails(self) -> None:
        with pytest.raises(GradingFailed):
            grade_answers(JsonSchema(against={"$ref": "#"}), [answer("1")])

    @pytest.mark.parametrize("levels", [150, 100_000])
    def test_deeply_nested_schema_is_refused(self, levels: int) -> None:
        schema: dict[str, Any] = {}
        for _ in range(levels):
            schema = {"items": schema}
        with pytest.raises(RecipeError):
            JsonSchema.model_construct(against=schema).check()

    def test_pattern_key_inside_enum_value(self) -> None:
        grader = JsonSchema(against={"enum": [{"pattern": "("}]})
        grader.check()
        assert grader.score(answer('{"pattern": "("}')) == 1.0

    @pytest.mark.parametrize(
        ("reply", "score"),
        [
            ('[1, true, null, false, 0, [1], [true], {}, {"a": 1}, {"a": true}]', 1.0),
            ("[1, 1.0]", 0.0),
            ('[{"a": [0], "b": 1}, {"b": 1, "a": [0.0]}]', 0.0),
            ('[[], [[]], "[]"]', 1.0),
            (json.dumps([[], {}] * 30_000), 0.0),
            (json.dumps([{"a": n} for n in range(15_000)]), 1.0),
        ],
    )
    def test_equal_items(self, reply: str, score: float) -> None:
        assert JsonSchema(against={"uniqueItems": True}).score(answer(reply)) == score


def test_time_limit_excludes_schema_preparation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, extend = [0.0], validators.extend

    def extend_slowly(*given: Any) -> Any:
        now[0] += 60  # as on a busy machine that has yet to import the library
        return extend(*given)

    monkeypatch.setattr(validators, "extend", extend_slowly)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert JsonSchema(against={"type": "object"}).first_error({}) is None
