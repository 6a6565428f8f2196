"""Graders run and validated by the unmodified client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

CHECK: Any = {
    "type": "string_check",
    "name": "check",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
NEAR: Any = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}
PYTHON: Any = {
    "type": "python",
    "name": "py",
    "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['size']",
}


def run(client: openai.OpenAI, grader: Any, sample: str = "Paris", **item: Any) -> Any:
    given = {"answer": "Paris", "size": 2, **item}
    return client.fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=given)


def test_graders_return_expected_rewards(client: openai.OpenAI) -> None:
    for grader, sample, reward in (
        (CHECK, "Paris", 1.0),
        (CHECK, "Rome", 0.0),
        (NEAR, "Pa", 4 / 7),
        (PYTHON, "Paris", 2.5),
    ):
        made = run(client, grader, sample)
        assert made.reward == pytest.approx(reward)
        assert (made.metadata.name, made.metadata.type) == (grader["name"], grader["type"])
        assert not any(value for value in made.metadata.errors.model_dump().values())
        assert made.metadata.execution_time > 0


def test_multi_grader_combines_rewards(client: openai.OpenAI) -> None:
    grader = {
        "type": "multi",
        "name": "both",
        "graders": {"check": CHECK, "near": NEAR},
        "calculate_output": "0.5 * check + near",
    }
    made = run(client, grader)
    assert made.reward == 1.5
    assert made.sub_rewards == {"check": 1.0, "near": 1.0}


def test_grader_errors_are_reported_in_metadata(client: openai.OpenAI) -> None:
    missing = run(client, {**CHECK, "reference": "{{item.no}}"})
    assert missing.reward == 0
    assert missing.metadata.errors.invalid_variable_error
    raised = run(client, PYTHON, size=0)
    assert raised.reward == 0
    assert raised.metadata.errors.python_grader_runtime_error
    assert "ZeroDivisionError" in raised.metadata.errors.python_grader_runtime_error_details


def test_score_model_grader_returns_reward(client: openai.OpenAI, tiny_base: str) -> None:
    grader = {
        "type": "score_model",
        "name": "judge",
        "model": "tiny",
        "input": [{"role": "user", "content": "{{sample.output_text}}"}],
        "sampling_params": {"max_completions_tokens": 4, "temperature": 0, "seed": 1},
    }
    made = run(client, grader)
    # A model with random weights returns a valid score or no score.
    assert 0 <= made.reward <= 1
    assert made.metadata.sampled_model_name == "tiny"
    assert made.metadata.errors.model_grader_parse_error or made.reward > 0
    with pytest.raises(openai.BadRequestError) as refused:
        run(client, {**grader, "model": "gpt-4o"})
    assert refused.value.param == "grader.model"
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        run(client, {**grader, "input": "a"})


def test_grader_validation_names_invalid_parameter(client: openai.OpenAI) -> None:
    for grader in (CHECK, NEAR, PYTHON):
        made = client.fine_tuning.alpha.graders.validate(grader=grader)
        assert made.grader is not None and made.grader.name == grader["name"]
    for wrong, param in (
        ({"type": "oracle"}, "grader.type"),
        ({**CHECK, "operation": "near"}, "grader"),
        ({**CHECK, "reference": "{{nothing}}"}, "grader"),
        ({"type": "string_check", "name": "a"}, "grader"),
        ({**NEAR, "evaluation_metric": "cosine"}, "grader"),
        ({**PYTHON, "source": "def other(): pass"}, "grader"),
        ({"type": "multi", "graders": {}, "calculate_output": "a"}, "grader.graders"),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "b"}, "grader"),
        (
            {"type": "multi", "graders": {"a": {"type": "multi"}}, "calculate_output": "a"},
            "grader.graders",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.alpha.graders.validate(grader=wrong)  # type: ignore[arg-type]
        assert refused.value.param == param, wrong
