"""Validation of values against shapes; patterns keep their meaning and have a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from botocore.model import Shape, StringShape, StructureShape

from luthier.server.bedrock.routes import CONTROL
from luthier.server.bedrock.shapes import ShapeChecker, matches, operation_models
from luthier.server.http.messages import Fault


def texts(shape: Shape | None, visited: set[str]) -> Iterator[StringShape]:
    """Yield all string shapes below a shape once; filters may be nested."""
    if shape is None or shape.name in visited:
        return
    visited.add(shape.name)
    if isinstance(shape, StructureShape):
        for member in shape.members.values():
            yield from texts(member, visited)
    elif shape.type_name in ("list", "map"):
        yield from texts(shape.member if shape.type_name == "list" else shape.value, visited)
        yield from texts(None if shape.type_name == "list" else shape.key, visited)
    elif isinstance(shape, StringShape):
        yield shape


PATTERNS = {
    shape.name: shape
    for name in (*CONTROL, "Converse", "InvokeModel", "CountTokens")
    for shape in texts(operation_models()[name].input_shape, set())
    if "pattern" in shape.metadata
}


def test_pattern_match_time_is_bounded() -> None:
    began = time.monotonic()
    assert not matches(PATTERNS["JobName"], "a" + "-" * 61 + "!")
    assert time.monotonic() - began < 10
    assert matches(PATTERNS["JobName"], "a" + "-" * 61 + "b")


def test_pattern_rejects_non_ascii_digits_and_spaces() -> None:
    assert matches(PATTERNS["TagKey"], "a b\tc")
    assert not matches(PATTERNS["TagKey"], "a\u2003b")
    assert not matches(PATTERNS["TagKey"], "a\n\u0663")
    assert not matches(PATTERNS["CustomModelName"], "name\n")


def problems(operation: str, **given: object) -> str:
    checker = ShapeChecker()
    shape = operation_models()[operation].input_shape
    assert isinstance(shape, StructureShape)
    checker.members(shape, given)
    with pytest.raises(Fault) as caught:
        checker.finish()
    assert caught.value.code == "Validation"
    return caught.value.message


def test_validation_error_names_members() -> None:
    tags = [{"key": "a", "value": "b"}, {"key": "a!", "value": None}]
    text = problems("TagResource", resourceARN="short", tags=tags)
    assert text.startswith("3 validation errors detected: Value 'short' at 'resourceARN'")
    assert "Value 'a!' at 'tags.2.member.key' failed to satisfy constraint" in text
    assert "Value 'null' at 'tags.2.member.value'" in text
    assert "Member must have length greater than or equal to 20" in text


def test_long_values_are_cut_in_the_message() -> None:
    text = problems("GetCustomModel", modelIdentifier="x" * 100_000)
    assert len(text) < 600 and "Member must have length less than or equal to 2048" in text


def test_missing_required_value_is_reported_as_null() -> None:
    text = problems("CreateProvisionedModelThroughput", provisionedModelName="a", modelUnits=0)
    assert "Value '0' at 'modelUnits'" in text and "Value 'null' at 'modelId'" in text
    assert "Member must have value greater than or equal to 1" in text


@pytest.mark.parametrize("units", ["1", 1.0, True, [1], 2**40])
def test_integer_member_of_wrong_type_is_rejected(units: object) -> None:
    shape = operation_models()["CreateProvisionedModelThroughput"].input_shape
    asked = {"provisionedModelName": "a", "modelUnits": units, "modelId": "a"}
    with pytest.raises(Fault) as caught:
        ShapeChecker().members(shape, asked)
    assert caught.value.code == "Serialization"
