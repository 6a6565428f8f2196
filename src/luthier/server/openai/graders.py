"""Conversion of OpenAI's graders, and ``/fine_tuning/alpha/graders`` to test a grader."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from luthier.chat_models.base import CachedWriter, Failure, ModelSpec, SamplingSpec, Writer
from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import LuthierError, RecipeError, RowRefused
from luthier.graders import (
    Answer,
    Grader,
    Multi,
    Scorer,
    Ungraded,
    grader_from,
    parse_graders,
)
from luthier.graders.base import TOO_LONG, Embedder, LabelReader
from luthier.graders.grade import attempt
from luthier.inference.inference import Chat, GenerationRequest, InferenceRefused
from luthier.inference.pool import ModelPool
from luthier.server.http.routes import GRADING_SLOT
from luthier.server.openai.generation import Judge
from luthier.server.openai.operations import GraderRoute, OpenAICall, openai_router
from luthier.server.openai.protocol import Body, JsonObject, invalid
from luthier.types import Message

_MEMBERS = {
    "string_check": ("input", "reference", "operation"),
    "text_similarity": ("input", "reference", "evaluation_metric"),
    "python": ("source",),
    "score_model": ("model", "input", "range"),
    "label_model": ("model", "input", "labels", "passing_labels"),
    "multi": ("graders", "calculate_output"),
}
"""Supported members by grader type. The member ``name`` is only a label."""
_ASKING = ("score_model", "label_model")
"""Grader types that query a model."""
_SAMPLING = {"max_completions_tokens": "max_tokens", "temperature": "temperature"} | {
    "top_p": "top_p",
    "seed": "seed",
}
_ERRORS = (
    "formula_parse_error", "sample_parse_error", "truncated_observation_error",
    "unresponsive_reward_error", "invalid_variable_error", "other_error",
    "python_grader_server_error", "python_grader_runtime_error", "model_grader_server_error",
    "model_grader_refusal_error", "model_grader_parse_error",
)  # fmt: skip


router = openai_router(GraderRoute)


class RunGrader(Body):
    """Body of a grader test."""

    grader: dict[str, Any]
    model_sample: str
    item: dict[str, Any] | None = None


class ValidateGrader(Body):
    """Body of a grader check."""

    grader: dict[str, Any]


@router.post(
    "/fine_tuning/alpha/graders/validate",
    name="fine_tuning.alpha.graders.validate",
    dependencies=[GRADING_SLOT],
)
def validate(call: OpenAICall, body: ValidateGrader) -> JsonObject:
    """Check a grader and return the grader unchanged."""
    grader_fields(body.grader, "grader", call.context.inference.judge(call.account))
    return {"grader": body.grader}


@router.post(
    "/fine_tuning/alpha/graders/run",
    name="fine_tuning.alpha.graders.run",
    dependencies=[GRADING_SLOT],
)
def run(call: OpenAICall, body: RunGrader) -> JsonObject:
    """Grade a reply. If the grader fails, the response contains the error and the reward 0.

    Raises:
        Fault: 400 if a text is too long.
    """
    context, definition = call.context, body.grader
    grader = grader_from(grader_fields(definition, "grader", context.inference.judge(call.account)))
    if grader.models:
        grader = grader.with_models(context.eval_parts.models)
    began = time.perf_counter()
    row = PromptOnly("item", 1, "", members=body.item or {})
    longest = context.limits.grading_text_characters
    sample = Answer((), body.model_sample, None, row, longest)
    score, parts, error = grade_reply(grader, sample)
    if error is not None and error.rule == TOO_LONG:
        raise invalid(
            f"The grader rejects the input: {error.problem.message}", "grader", "invalid_grader"
        )
    return {
        "reward": score,
        "sub_rewards": parts,
        "model_grader_token_usage_per_model": {},
        "metadata": {
            "name": str(definition.get("name", definition["type"])),
            "type": definition["type"],
            "errors": _errors(definition["type"], error),
            "execution_time": time.perf_counter() - began,
            "scores": parts,
            "token_usage": None,
            "sampled_model_name": definition.get("model"),
        },
    }


def grade_reply(
    grader: Grader, sample: Answer
) -> tuple[float, dict[str, float], RowRefused | None]:
    """Grade a reply.

    Returns:
        The reward (0 after an error), the rewards by name of a multi grader, and the error.
    """
    faults: dict[int, RowRefused] = {}
    parts: dict[str, float] = {}
    score = math.nan
    try:
        if isinstance(grader, Multi):
            each = grader.grade_parts([sample], faults)
            parts = {name: _finite(scores[0]) for name, scores in each.items()}
            (score,) = grader.combine(each, 1, faults)
        else:
            (score,), faults = attempt(grader, [sample])
    except Ungraded as ungraded:
        faults = ungraded.faults
    except LuthierError as error:
        faults = {0: RowRefused("grader.raised", str(error), "Fix the grader.")}
    if not faults and not math.isfinite(score):
        text = f"the formula gave {score!r}, which is not finite."
        faults = {0: RowRefused("grader.not_finite", text, "Fix the formula.")}
    return (0.0 if faults else score), parts, faults.get(0)


def grader_fields(definition: Mapping[str, Any], where: str, judge: Judge) -> dict[str, Any]:
    """Return an OpenAI grader as ``method`` and fields of a luthier grader.

    Args:
        definition: OpenAI's grader.
        where: Location of the grader in the request.
        judge: Finds the model of a ``score_model`` or ``label_model`` grader.

    Raises:
        Fault: 400 for an unknown type, a missing member or an invalid value.
    """
    fields = _fields(definition, where, judge)
    try:
        parse_graders({fields["method"]: fields})
    except RecipeError as error:
        raise invalid(" ".join(str(error).split()), where, "invalid_grader") from error
    return fields


def _fields(definition: Mapping[str, Any], where: str, judge: Judge) -> dict[str, Any]:
    kind = definition.get("type")
    if not isinstance(kind, str) or kind not in _MEMBERS:
        known = ", ".join(_MEMBERS)
        raise invalid(f"Unknown grader type {kind!r}. Use one of {known}.", f"{where}.type")
    fields = {name: definition[name] for name in _MEMBERS[kind] if name in definition}
    if kind == "multi":
        fields["graders"] = {
            name: _fields(part, f"{where}.graders.{name}", judge)
            for name, part in _parts(definition.get("graders"), f"{where}.graders").items()
        }
    if kind in _ASKING:
        fields |= _turns_and_sampling(definition, where)
        fields["model"] = judge(str(definition.get("model", "")), f"{where}.model")
    return {"method": kind, **fields}


def _parts(graders: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """Return the graders of a multi grader by name.

    OpenAI's guide documents a mapping by name, the client's types a single grader.
    """
    if isinstance(graders, Mapping) and isinstance(graders.get("type"), str):
        graders = {graders.get("name"): graders}
    if not isinstance(graders, Mapping) or not graders:
        raise invalid("A multi grader needs graders by name.", where)
    for name, part in graders.items():
        if not isinstance(part, Mapping) or part.get("type") == "multi":
            raise invalid("A part of a multi grader is not an object, or is a multi grader.", where)
        if not str(name).isidentifier():
            raise invalid(
                f"The grader name {name!r} is not allowed in a formula. Use letters, digits and _.",
                where,
            )
    return dict(graders)


def _turns_and_sampling(definition: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return messages and sampling settings of a grader that queries a model."""
    turns = definition.get("input")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise invalid("The input of a model grader is not a list of messages.", f"{where}.input")
    messages = [
        {"role": turn.get("role"), "content": text_content(turn.get("content"))} for turn in turns
    ]
    params = definition.get("sampling_params") or {}
    if not isinstance(params, Mapping):
        raise invalid("sampling_params is not an object.", f"{where}.sampling_params")
    sampling = {
        name: params[openai_name]
        for openai_name, name in _SAMPLING.items()
        if params.get(openai_name) is not None
    }
    with suppress(ValidationError):  # parse_graders reports invalid sampling
        _generation_request((), SamplingSpec.model_validate(sampling), None, where)
    return {"input": messages, "sampling": sampling}


def text_content(content: Any) -> Any:
    """Return the joined text of a message. Content with other blocks is returned unchanged, for a
    later error."""
    blocks = content if isinstance(content, list) else [content]
    texts = [block.get("text") if isinstance(block, Mapping) else block for block in blocks]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(texts) else content


def _errors(kind: str, error: RowRefused | None) -> dict[str, Any]:
    flags: dict[str, Any] = dict.fromkeys(_ERRORS, False)
    details: dict[str, Any] = {
        "python_grader_server_error_type": None,
        "python_grader_runtime_error_details": None,
        "model_grader_server_error_details": None,
    }
    if error is not None:
        name = {
            "grader.no_member": "invalid_variable_error",
            "grader.formula": "formula_parse_error",
        }
        kinds = {
            "python": "python_grader_runtime_error",
            **dict.fromkeys(_ASKING, "model_grader_parse_error"),
        }
        flags[name.get(error.rule) or kinds.get(kind, "other_error")] = True
        if kind == "python":
            details["python_grader_runtime_error_details"] = error.problem.message
        elif kind in _ASKING:
            details["model_grader_server_error_details"] = error.problem.message
    return {**flags, **details}


def _finite(score: float) -> float:
    return score if math.isfinite(score) else 0.0


def _generation_request(
    turns: Sequence[Message],
    sampling: SamplingSpec,
    schema: Mapping[str, Any] | None,
    where: str,
) -> GenerationRequest:
    """Return the generation request of a grading model; 400 for unsupported sampling settings."""
    try:
        return GenerationRequest(
            Chat(tuple(turns)),
            schema=schema,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
    except InferenceRefused as refused:
        raise invalid(f"{refused}.", f"{where}.sampling_params", "invalid_value") from refused


class PooledModels:
    """Source of grading models from the server's model pool."""

    def __init__(self, pool: ModelPool) -> None:
        self.pool = pool

    def scorer(self, model: str) -> Scorer:
        """Raise an error: OpenAI's graders use no reward models."""
        raise RecipeError("OpenAI graders support no reward models")

    def embedder(self, model: str) -> Embedder:
        """Raise an error: OpenAI's graders use no encoders."""
        raise RecipeError("OpenAI graders support no encoders")

    def classifier(self, model: str) -> LabelReader:
        """Raise an error: OpenAI's graders use no classifiers."""
        raise RecipeError("OpenAI graders support no classifiers")

    def writer(
        self, judge: ModelSpec, sampling: SamplingSpec, schema: Mapping[str, Any] | None = None
    ) -> Writer:
        """Return a writer that queries the model ``judge`` for replies that match ``schema``."""

        def write(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
            return [self._reply(judge.model, turns, sampling, schema) for turns in conversations]

        return CachedWriter(write)

    def _reply(
        self,
        model: str,
        turns: Sequence[Message],
        sampling: SamplingSpec,
        schema: Mapping[str, Any] | None,
    ) -> str | Failure:
        request = _generation_request(turns, sampling, schema, "")
        try:
            return self.pool.submit(model, request).results()[0].text
        except LuthierError as error:
            return Failure("judge.failed", str(error))
