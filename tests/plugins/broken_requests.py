"""Invalid requests for every route of the JSON APIs.

Each request is a valid request with one replaced, removed or added value in body, path or query.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from botocore.model import OperationModel
from hypothesis import strategies as st

from luthier.server.bedrock.shapes import operation_models

MODEL = "luthier.tiny"
ACCOUNT = "000000000000"
ROWS = b'{"prompt": "Hello?", "completion": "Hello."}\n' * 10
MESSAGES = [{"role": "user", "content": "Hello?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CHAT = {
    "model": MODEL, "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES],
    "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 3, "stop": ["x"],
    "logprobs": True, "top_logprobs": 2, "tools": [FUNCTION], "tool_choice": "auto",
    "response_format": {"type": "text"}, "metadata": {"a": "b"}, "logit_bias": {"5": 1},
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "user": "u", "stream": False,
}  # fmt: skip
STRUCTURED = {
    **{k: v for k, v in CHAT.items() if k not in ("tools", "tool_choice")},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
}  # fmt: skip
GRADER = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}",
          "reference": "{{item.answer}}", "operation": "eq"}  # fmt: skip
TUNING = {
    "model": MODEL, "training_file": "file-none", "validation_file": "file-none", "seed": 1,
    "suffix": "mine", "metadata": {"a": "b"},
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": 0.1}}},
}  # fmt: skip
OPENAI: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", STRUCTURED),
    ("POST", "/v1/completions", {"model": MODEL, "prompt": ["Hello"], "max_tokens": 2, "echo": True,
                                 "logprobs": 1, "stop": "x", "suffix": None, "best_of": 1}),
    ("POST", "/v1/embeddings",
     {"model": "luthier.encoder", "input": ["a", "b"], "encoding_format": "float"}),
    ("POST", "/v1/fine_tuning/jobs", TUNING),
    ("POST", "/v1/fine_tuning/jobs", {**TUNING, "method": {
        "type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": {}}}}),
    ("POST", "/v1/fine_tuning/alpha/graders/validate", {"grader": GRADER}),
    ("POST", "/v1/fine_tuning/alpha/graders/run",
     {"grader": GRADER, "model_sample": "a", "item": {"answer": "a"}}),
    ("POST", "/v1/batches", {"input_file_id": "file-none", "endpoint": "/v1/embeddings",
                             "completion_window": "24h", "metadata": {}}),
    ("POST", "/v1/fine_tuning/jobs/none/pause", {}),
    ("POST", "/v1/files", {"purpose": "batch"}),
    ("GET", "/v1/models?limit=1&after=x", None),
    ("GET", "/v1/files?limit=1&after=x&order=asc&purpose=batch", None),
    ("GET", "/v1/fine_tuning/jobs?limit=1&after=x", None),
    ("GET", "/v1/batches?limit=1&after=x", None),
]  # fmt: skip
JOB = {
    "name": "n", "model_name": "m", "base": MODEL, "training": ["s3://rows/train.jsonl"],
    "validation": ["s3://rows/train.jsonl"], "customization_type": "FINE_TUNING", "priority": 0,
    "settings": {"training": {"epochs": 1}, "adaptation": {"method": "lora", "rank": 4}},
    "output": "s3://rows/out/",
    "time_limit_seconds": 10,
}  # fmt: skip
TAUGHT = {**JOB, "customization_type": "DISTILLATION", "teacher": MODEL, "settings": {}}
REWARDED = {**JOB, "customization_type": "REINFORCEMENT_FINE_TUNING",
            "grader": {"method": "mix", "graders": {"a": {"method": "exact"}}}}  # fmt: skip
NATIVE: list[tuple[str, str, Any]] = [
    ("POST", "/api/v1/jobs", JOB),
    ("POST", "/api/v1/jobs", TAUGHT),
    ("POST", "/api/v1/jobs", REWARDED),
    ("POST", "/api/v1/inspections", {"training": "s3://rows/none.jsonl", "base": MODEL}),
    (
        "POST",
        "/api/v1/estimates",
        {"training": "s3://rows/none.jsonl", "base": MODEL, "settings": {}},
    ),
    ("GET", "/api/v1/jobs?limit=1&position=2&state=Queued", None),
    ("GET", "/api/v1/jobs/none/events?after=1&follow=false", None),
    ("GET", "/api/v1/models/none/certificate", None),
]
CONVERSE = {
    "messages": [{"role": "user", "content": [{"text": "Hello?"}]}],
    "system": [{"text": "Be brief."}],
    "inferenceConfig": {"maxTokens": 2, "temperature": 0.5, "topP": 0.9, "stopSequences": ["x"]},
    "toolConfig": {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": SCHEMA}}}],
                   "toolChoice": {"auto": {}}},
    "additionalModelRequestFields": {"top_k": 5}, "requestMetadata": {"a": "b"},
    "outputConfig": {"textFormat": {"type": "json_schema"}},
    "performanceConfig": {"latency": "standard"},
}  # fmt: skip
RUNTIME: list[tuple[str, str, Any]] = [
    ("POST", f"/model/{MODEL}/converse", CONVERSE),
    ("POST", f"/model/{MODEL}/converse-stream", CONVERSE),
    ("POST", f"/model/{MODEL}/invoke", {k: v for k, v in CHAT.items() if k != "model"}),
    ("POST", f"/model/{MODEL}/invoke", {"inputText": "Hello", "textGenerationConfig": {}}),
    ("POST", f"/model/{MODEL}/invoke", {"prompt": "Hello", "max_gen_len": 2, "temperature": 0.1}),
    ("POST", f"/model/{MODEL}/invoke-with-response-stream", {"messages": MESSAGES, "max_tokens": 2}),
    ("POST", f"/model/{MODEL}/count-tokens",
     {"input": {"converse": {k: CONVERSE[k] for k in ("messages", "system")}}}),
    ("POST", f"/model/{MODEL}/count-tokens", {"input": {"invokeModel": {"body": "eyJhIjoxfQ=="}}}),
]  # fmt: skip

HARD = (
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308, -0.0, "", "a", "\0",
    "\ud800", "é" * 3000, "x" * 70_000, "../../etc/passwd", "2026-01-01T00:00:00Z", "s3://b/\0", "{{",
    "arn:aws:bedrock:us-east-1:000000000000:custom-model/a.b/abcdefabcdef", [], [[]], [None], {},
    {"": None}, {"a": {"b": {}}}, [{}] * 300, MODEL, "tiny",
)  # fmt: skip
"""Values that often cause errors."""
hard = st.sampled_from(HARD).map(copy.deepcopy) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, cases: list[tuple[str, str, Any]]) -> tuple[str, str, Any]:
    """Draw a request with an invalid path, query or body."""
    method, path, body = draw(st.sampled_from(cases))
    if body is None or draw(st.integers(0, 9)) == 0:
        path = draw(mistaken(path))
    if body is not None:
        body = copy.deepcopy(body)
        for _ in range(draw(st.integers(1, 2))):
            body = draw(mutated(body))
    return method, path, body


@st.composite
def mistaken(draw: st.DrawFn, path: str) -> str:
    plain, _, query = path.partition("?")
    segments = plain.split("/")
    pairs = [each.partition("=")[::2] for each in query.split("&")] if query else []
    texts = st.sampled_from([str(each) for each in HARD if "\ud800" not in str(each)])
    word = draw(texts | st.text(st.characters(exclude_categories=("Cs",)), max_size=30))[:2000]
    if pairs and draw(st.booleans()):
        number = draw(st.integers(0, len(pairs) - 1))
        pairs[number] = (pairs[number][0], word)
    else:
        segments[draw(st.integers(min(2, len(segments) - 1), len(segments) - 1))] = quote(
            word, safe=""
        )
    return "/".join(segments) + (f"?{urlencode(pairs)}" if pairs else "")


@st.composite
def mutated(draw: st.DrawFn, body: Any) -> Any:
    """Draw ``body`` with one replaced, removed or added value."""
    places = list(walked(body)) if isinstance(body, (dict, list)) else []
    if not places or draw(st.integers(0, 19)) == 0:
        return draw(hard)
    holder, key = draw(st.sampled_from(places))
    what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "double")))
    if what == "replace":
        holder[key] = draw(hard)
    elif what == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.append(draw(hard) if what == "add" else holder[key])
    else:
        holder[draw(st.text(max_size=8))] = draw(hard)
    return body


def walked(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a value with the key of each child."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in pairs:
        yield value, key
        if isinstance(each, (dict, list)):
            yield from walked(each)


def shaped(shape: Any, depth: int = 0) -> Any:
    """Return a value of a botocore shape with every member up to depth six."""
    kind = shape.type_name
    if kind == "structure":
        members = shape.members.items() if depth < 6 else ()
        wanted = list(members)[:1] if getattr(shape, "is_tagged_union", False) else members
        return {name: shaped(member, depth + 1) for name, member in wanted}
    if kind in ("list", "map"):
        inner = shape.member if kind == "list" else shape.value
        value = shaped(inner, depth + 1) if depth < 6 else None
        return [value] if kind == "list" else {"key": value}
    if kind == "string":
        return shape.enum[0] if getattr(shape, "enum", None) else WORDS.get(shape.name, "name-1")
    known = {
        "boolean": True,
        "integer": 1,
        "long": 1,
        "float": 0.5,
        "double": 0.5,
        "timestamp": 1e9,
    }
    return known.get(kind, "eA==")


ROLE = "arn:aws:iam::000000000000:role/x"
WORDS = {
    "RoleArn": ROLE, "S3Uri": "s3://rows/train.jsonl", "BaseModelIdentifier": MODEL,
    "ModelCustomizationHyperParameters": "1",
}  # fmt: skip


CUSTOMIZATION = {
    "jobName": "j", "customModelName": "m", "roleArn": ROLE, "baseModelIdentifier": MODEL,
    "clientRequestToken": "t", "customizationType": "FINE_TUNING",
    "trainingDataConfig": {"s3Uri": "s3://rows/train.jsonl"},
    "validationDataConfig": {"validators": [{"s3Uri": "s3://rows/train.jsonl"}]},
    "outputDataConfig": {"s3Uri": "s3://rows/out/"}, "hyperParameters": {"epochCount": "1"},
    "jobTags": [{"key": "a", "value": "b"}], "customModelTags": [{"key": "a", "value": "b"}],
}  # fmt: skip


def control() -> list[tuple[str, str, Any]]:
    whole = [
        asked(each)
        for each in operation_models().values()
        if each.service_model.service_name == "bedrock"
    ]
    return [*whole, *[("POST", "/model-customization-jobs", CUSTOMIZATION)] * 10]


def asked(operation: OperationModel) -> tuple[str, str, Any]:
    """Return a request with every member."""
    shape: Any = operation.input_shape
    members = shape.members if shape is not None else {}
    path, query, body = operation.http["requestUri"], {}, {}
    for name, member in members.items():
        place, value = member.serialization.get("location"), shaped(member)
        if place == "uri":
            sent = member.serialization.get("name", name)
            path = path.replace(f"{{{sent}}}", "name-1").replace(f"{{{sent}+}}", "name-1")
        elif place == "querystring":
            query[member.serialization.get("name", name)] = str(value)
        elif place is None:
            body[member.serialization.get("name", name)] = value
    path += f"?{urlencode(query)}" if query else ""
    method = operation.http["method"]
    return method, path, body if method in ("POST", "PUT", "PATCH") else None
