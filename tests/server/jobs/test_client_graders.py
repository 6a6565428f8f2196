"""Graders and settings of clients: no models, addresses or files."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import RecipeError
from luthier.server.jobs.submit import CLIENT_GRADERS, Submission, check_client_grader, recipe_of
from luthier.server.tables.foundation import foundation_model

JUDGE = {"method": "judge", "url": "http://127.0.0.1:1/v1", "model": "x", "key_env": "HOME"}
CODE = {"method": "code", "allow_code": True, "unisolated": True}
REFUSED: list[Any] = [
    JUDGE,
    CODE,
    {"method": "reward", "model": "base:job-abcdefabcdef"},
    {"method": "score_model", "model": "x", "input": [{"role": "user", "content": "?"}]},
    {"method": "json_schema", "against": "/etc/hostname"},
    {"method": "mix", "parts": {"a": {"method": "exact"}, "b": JUDGE}},
    {"method": "multi", "graders": {"a": CODE}, "calculate_output": "a"},
    {"method": "mix", "parts": {"a": {"method": "mix", "parts": {"b": CODE}}}},
    {"method": "mix", "parts": [JUDGE]},
    "judge",
    {},
    7,
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_unsafe_client_graders_are_rejected(fields: Any) -> None:
    with pytest.raises(RecipeError):
        check_client_grader(fields)


def test_text_graders_are_accepted_unchanged() -> None:
    mixed = {"method": "mix", "parts": {"a": {"method": "exact"}, "b": {"method": "number"}}}
    assert check_client_grader(mixed) == mixed
    assert check_client_grader("exact") == {"method": "exact"}
    assert not {"judge", "reward", "code", "score_model"} & set(CLIENT_GRADERS)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": {"method": "grpo", "grader": JUDGE}},
        {"objective": {"method": "ppo", "grader": {"method": "mix", "parts": {"a": CODE}}}},
        {"objective": {"method": "logit_distillation", "teacher": "some-org/huge-model"}},
        {"objective": {"anything": {"grader": CODE}}},
        {"insights": {"grader": JUDGE}},
        {"teacher": {"url": "http://127.0.0.1:1/v1"}},
        {"data": {"policy": "/etc/passwd"}},
        {"data": {"mix": [{"train": "/etc/passwd", "weight": 1}]}},
        {"training": {"threads": 10**9}},
    ],
    ids=str,
)
def test_settings_name_no_model_no_file_and_no_grader(settings: dict[str, Any]) -> None:
    base = foundation_model("smollm2-135m-instruct")
    assert base is not None
    asked = Submission("0" * 12, "native", "a", "b", "FINE_TUNING", base, ["s3://a/b"])
    assert recipe_of(asked, "abcdefabcdef").base == base.base
    with pytest.raises(RecipeError):
        recipe_of(
            Submission(
                "0" * 12, "native", "a", "b", "FINE_TUNING", base, ["s3://a/b"], settings=settings
            ),
            "abcdefabcdef",
        )
