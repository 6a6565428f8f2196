"""Constrained decoding: schemas, tool calls, whole characters."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from typing import Any

import pytest
from decoding import answer, asked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import validate

from luthier.data.conversations.chat import ChatFormat
from luthier.inference.constraints import Constraints
from luthier.inference.decoder import Decoder
from luthier.inference.inference import (
    Chat,
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    TokenChunk,
)
from luthier.models.decoding.sampling import Constraint
from luthier.types import Message, Tool


def test_characters_of_several_tokens_come_whole(opened: Decoder) -> None:
    text = "日本👋 ü𝄞"
    found = opened.submit(asked("Hi", schema={"const": text}, max_tokens=200))
    pieces = [event.text for event in found if isinstance(event, TokenChunk)]
    assert json.loads("".join(pieces)) == text
    assert not any("\ufffd" in piece for piece in pieces)


SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"enum": ["red", "grün"]},
        {"type": "null"},
        {"type": "string", "maxLength": 4},
    ]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(
            lambda members: {
                "type": "object",
                "properties": members,
                "required": sorted(members),
                "additionalProperties": False,
            }
        ),
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda either: {"anyOf": either}),
    ),
    max_leaves=4,
)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SCHEMAS, st.integers(0, 9))
def test_constrained_answer_matches_schema(
    opened: Decoder, schema: dict[str, Any], seed: int
) -> None:
    request = asked("Hi", temperature=1.5, seed=seed, schema=schema, max_tokens=600)
    found = answer(opened, request)
    assert found.reason == "stop"
    validate(json.loads(found.text), schema)


def test_schema_true_gives_object_and_invalid_schemas_are_refused(opened: Decoder) -> None:
    found = answer(opened, asked("Hi", schema=True, max_tokens=400, logit_bias={}))
    if found.reason == "stop":
        assert isinstance(json.loads(found.text), dict)
    assert found.text.startswith("{")
    for wrong in ({"type": "objekt"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        with pytest.raises(InferenceRefused):
            opened.submit(asked("Hi", schema=wrong))


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        nested(101),
        nested(5000),
        {"pattern": "(" * 1000, "type": "string"},
        {"enum": ["a" * 200_000]},
    ],
)
def test_unenforceable_schemas_are_refused(opened: Decoder, schema: dict[str, Any]) -> None:
    with pytest.raises(InferenceRefused) as refused:
        opened.submit(asked("Hi", schema=schema))
    assert "<state>" not in str(refused.value) and "\n" not in str(refused.value)
    for tool in (Tool("f", "", schema), Tool("g", "", {"properties": {"a": schema}})):
        chat = Chat((Message("user", "Hi"),), (tool,), "required")
        with suppress(InferenceRefused):
            assert len(opened.submit(GenerationRequest(chat, max_tokens=3)).results()) == 1


PATTERNS = [{"type": "string", "pattern": f".*{n}.*"} for n in range(60)]
JOINED = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}", **PATTERNS[n]} for n in range(16)}


def chained(rule: str, count: int) -> str:
    """Return a chain of rules."""
    return "".join(f"{rule}{n}: {rule}{n + 1}\n" for n in range(count)) + f'{rule}{count}: "x"\n'


@pytest.mark.parametrize(
    "definition",
    [
        {"type": "integer", "multipleOf": 999_983},
        {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"},
        {"type": "number", "multipleOf": 0.12347},
        {"allOf": PATTERNS},
        {"type": "string", "pattern": "a{1000}{1000}"},
        {"$defs": {**JOINED, "a16": {}}, "$ref": "#/$defs/a0"},
        {"type": "object", "properties": {f"f{n}": {"type": "string"} for n in range(6000)}},
    ],
)
def test_oversized_schemas_are_refused_within_time_limit(
    tokenizer: Any, definition: dict[str, Any]
) -> None:
    constraints = Constraints(ChatFormat.of(tokenizer), len(tokenizer))
    lark = f"start: %json {json.dumps(definition)}"
    started = time.process_time()
    for constraint in (Constraint("schema", definition), Constraint("grammar", lark)):
        with pytest.raises(InferenceRefused) as refused:
            constraints.matcher(constraint)
        assert refused.value.parameter == constraint.kind
    assert time.process_time() - started < 10
    assert not constraints.matcher(Constraint("schema", {"type": "string"})).is_finished


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("schema", {"enum": [f"choice {n}" for n in range(2000)]}),
        Constraint("schema", {"type": "number", "multipleOf": 0.01}),
        Constraint("schema", {"allOf": [{"required": [f"f{n}"]} for n in range(20)]}),
        Constraint("schema", {"properties": {f"f{n}": PATTERNS[n] for n in range(20)}}),
        # Each rule is read by a function that calls itself: these take 20 MB of stack.
        Constraint("grammar", f"start: a0\n{chained('a', 12_000)}"),
        Constraint("grammar", f"start: A0\n{chained('A', 12_000)}"),
        Constraint("schema", {
            "$defs": {**{f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(4000)}, "a4000": {}},
            "$ref": "#/$defs/a0",
        }),
    ],
)  # fmt: skip
def test_large_grammars_are_enforced(tokenizer: Any, constraint: Constraint) -> None:
    constraints = Constraints(ChatFormat.of(tokenizer), len(tokenizer))
    matcher = constraints.matcher(constraint)
    assert matcher.allowed_mask(len(tokenizer)).any()


TOOLS = (
    Tool("weather", "Tells it.", {
        "$defs": {"place": {"enum": ["Rome", "Oslo"]}},
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }),
    Tool("stop", "", {"type": "object", "properties": {}, "additionalProperties": False}),
)  # fmt: skip


@pytest.mark.parametrize("choice", ["required", "name:weather", "name:stop"])
def test_a_call_is_enforced(opened: Decoder, choice: str) -> None:
    for seed in range(2):
        chat = Chat((Message("user", "Hi"),), TOOLS, choice)
        request = GenerationRequest(chat, max_tokens=200, temperature=1, seed=seed)
        found = answer(opened, request)
        assert (found.text, found.reason) == ("", "tool_calls")
        (call,) = found.calls
        tool = next(tool for tool in TOOLS if tool.name == call.name)
        assert choice in ("required", f"name:{call.name}")
        validate(dict(call.arguments), dict(tool.parameters))


def test_schema_with_keyword_names_and_reference_values(opened: Decoder) -> None:
    reference = {"$ref": "#/$defs/place"}
    schema = {
        "$defs": {"place": {"enum": ["Rome", "Oslo"]}},
        "type": "object",
        "properties": {"enum": reference, "same": {"const": "#/a"}, "kept": {"enum": [reference]}},
        "required": ["enum", "same", "kept"],
        "additionalProperties": False,
    }
    chat = Chat((Message("user", "Hi"),), (Tool("pick", "", schema),), "name:pick")
    (call,) = answer(opened, GenerationRequest(chat, max_tokens=200, seed=1)).calls
    assert call.arguments["kept"] == reference
    validate(dict(call.arguments), schema)


def test_text_is_streamed_when_tools_are_declared(opened: Decoder) -> None:
    chat = Chat((Message("user", "Hi"),), TOOLS)
    counts = []
    for seed in range(4):
        request = GenerationRequest(chat, max_tokens=20, seed=seed, logit_bias={1: -100.0})
        counts.append(sum(isinstance(event, TokenChunk) for event in opened.submit(request)))
    assert max(counts) > 5
    none = GenerationRequest(
        Chat((Message("user", "Hi"),), TOOLS, "none"), max_tokens=20, temperature=0
    )
    assert answer(opened, none).text == answer(opened, asked("Hi", max_tokens=20)).text


TEXTS = {
    "numbers": Constraint("regex", r"\d{3}-\d{4}"),
    "letters of several bytes": Constraint("regex", "[äöü日本👋]{6}"),
    "anchors": Constraint("regex", "^(yes|no|maybe so)$"),
    "slashes and quotes": Constraint("regex", r'a/b"\\[/"]{3}'),
    "nested": Constraint("grammar", 'start: "(" (start | WORD) ")"\nWORD: /[a-zé]{1,3}/'),
    "list": Constraint(
        "grammar", 'start: "ü" item ("," item){2} "!"\nitem: "👋" | "日本" | /[0-9]+/'
    ),
}
PYTHON = {
    "nested": r"\(+[a-zé]{1,3}\)+",
    "list": r"ü(👋|日本|[0-9]+)(,(👋|日本|[0-9]+)){2}!",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_match_regular_expressions_and_grammars(opened: Decoder, name: str) -> None:
    constraint = TEXTS[name]
    pattern = PYTHON.get(name) or str(constraint.definition)
    for seed in range(4):
        request = asked("Hi", temperature=2.0, seed=seed, n=2, max_tokens=300, **constraint.fields)
        events = [*opened.submit(request)]
        assert not any("\ufffd" in each.text for each in events if isinstance(each, TokenChunk))
        for whole in opened.submit(request).results():
            if name in ("nested", "list") and whole.reason == "length":
                continue  # of these some texts have no end
            assert whole.reason == "stop"
            assert re.fullmatch(pattern, whole.text), whole.text


def test_stop_sequence_ends_text_before_pattern(opened: Decoder) -> None:
    found = answer(opened, asked("Hi", regex="abcd", stop=("c",), max_tokens=20))
    assert (found.text, found.reason, found.stop) == ("ab", "stop_sequence", "c")


def test_pattern_is_enforced_after_cached_prompt(opened: Decoder) -> None:
    prompt = "one two three four five six seven eight nine ten " * 10
    texts = [
        answer(opened, asked(prompt, regex="(one |two ){12}", temperature=0, max_tokens=200)).text
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and re.fullmatch("(one |two ){12}", texts[0])


REFUSED = [
    ("regex", "ab(c"),
    ("regex", ""),
    ("regex", "a\ud800"),
    ("regex", r"[^\s\S]"),
    ("regex", r"(x)\1"),
    ("regex", "a{1000}{1000}"),
    ("regex", "(" * 100_000),
    ("regex", "a" * 200_001),
    ("grammar", 'start: a\nb: "x"'),
    ("grammar", 'root ::= "a"'),
    ("grammar", 'start: start "a"'),
    ("grammar", 'foo: "a"'),
    ("grammar", '{"grammars": [{"json_schema": {}}]}'),
    ("grammar", "start: " + "(" * 20_000 + '"b"' + ")" * 20_000),
    ("grammar", "start: /a{1000}{1000}/"),
    ("grammar", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_invalid_patterns_and_grammars_are_refused(tokenizer: Any, kind: Any, text: str) -> None:
    constraints = Constraints(ChatFormat.of(tokenizer), len(tokenizer))
    with pytest.raises(InferenceRefused) as refused:
        constraints.matcher(Constraint(kind, text))
    assert refused.value.parameter == kind and len(str(refused.value)) < 500
    assert not constraints.matcher(Constraint("regex", "a+")).is_finished


def test_ambiguous_grammar_fails_a_single_answer(opened: Decoder) -> None:
    grammar = 'start: s\ns: s s s | "a" |'
    began = time.process_time()
    with pytest.raises(InferenceFailed):
        answer(opened, asked("Hi", grammar=grammar, temperature=0, max_tokens=400,
                             logit_bias=dict.fromkeys(opened.chat.stop_ids, -100.0)))  # fmt: skip
    assert time.process_time() - began < 10
    assert answer(opened, asked("Hi", regex="ok")).text == "ok"


def test_regex_with_schema_is_refused() -> None:
    with pytest.raises(InferenceRefused):
        asked("Hi", regex="a", schema=True)
