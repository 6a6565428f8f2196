"""Tests of conversions: round trips preserve text, and unsupported rows are rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.conversations.tool_forms import REASONING_KEYS
from luthier.data.convert import FORMATS, Conversion, convert, format_of
from luthier.data.formats import TARGETS
from luthier.data.rows import load_rows
from luthier.data.rules import CONVERT_RULES as RULES
from luthier.data.shapes.conversations import Conversation, PromptCompletion
from luthier.errors import MOST_PROBLEMS, DataError, Problem, RecipeError
from luthier.types import Row

pytest.importorskip("pyarrow")
pytest.importorskip("zstandard")

REPLY = {"role": "assistant", "content": "b"}
AWKWARD = ' a,"b"\u2028;\t\r\n\rx\x85 \\ud800 [1] '


def write(folder: Path, *records: dict[str, Any], name: str = "in.jsonl") -> Path:
    path = folder / name
    lines = "".join(json.dumps(each) + "\n" for each in records)
    path.write_bytes(lines.encode())
    return path


def same(rows: list[Row]) -> list[Row]:
    """Return rows without locations, and a prompt with a completion as a conversation."""
    made = [replace(row, file="", line=0) for row in rows]
    return [
        Conversation("", 0, row.turns()) if isinstance(row, PromptCompletion) else row
        for row in made
    ]


def problems_of(*args: Any, **options: Any) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        convert(*args, **options)
    assert not list(Path(args[1]).parent.glob(".tmp-*")) and not Path(args[1]).exists()
    return list(caught.value.problems)


def turns(*texts: str, system: str | None = None) -> dict[str, Any]:
    said = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {
        "messages": [*said, *({"role": roles[n % 2], "content": t} for n, t in enumerate(texts))]
    }


SAMPLES: dict[str, list[dict[str, Any]]] = {
    "pair": [{"prompt": AWKWARD, "completion": "b"}, {"prompt": "c", "completion": AWKWARD}],
    "chat": [turns("a", AWKWARD)],
    "system": [turns("a", AWKWARD, system="be kind"), turns("a", "b")],
    "long": [turns("a", "b", "c", AWKWARD), turns("a", "b", "c", "d", system="s")],
    "text": [{"text": AWKWARD}],
    "label": [{"text": AWKWARD, "label": "true"}, {"text": "x", "label": "3"}],
    "labels": [{"text": AWKWARD, "label": ["a", "b"]}, {"text": "x", "label": ["c"]}],
    "rating": [{"text": AWKWARD, "rating": 0.1}, {"text": "x", "rating": -3}],
    "tags": [{"tokens": ["a\u2028", 'b",'], "tags": ["O", "B-x"]}],
    "partners": [{"anchor": AWKWARD, "positive": "b"}],
    "prompts": [{"prompt": AWKWARD}, {"prompt": "x", "expected": AWKWARD}],
    "preference": [{"prompt": AWKWARD, "chosen": "b", "rejected": ""}],
    "preferences": [{"prompt": turns("a", "b", "c")["messages"], "chosen": AWKWARD, "rejected": "x"}],
    "rated": [{"prompt": "p", "completion": AWKWARD, "rating": 4.5}],
    "thumb": [{"prompt": "p", "completion": AWKWARD, "label": False}],
}  # fmt: skip
# Content supported by each form; "rows" supports all.
SAID = {
    "prompt-completion": {"pair", "chat"},
    "chat": {"pair", "chat", "system", "long"},
    "openai": {"pair", "chat", "system", "long", "preference", "preferences"},
    "bedrock": {"pair", "chat", "text"},
    "bedrock-conversation": {"pair", "chat", "system", "long"},
    "sharegpt": {"pair", "chat", "system", "long"},
    "alpaca": {"pair", "chat", "system", "long"},
    "text": {"text"},
    "rows": set(SAMPLES),
}
NOT_IN_A_CELL = {
    ("rows", "preferences"), ("openai", "preference"), ("openai", "preferences"),
    ("alpaca", "long"), ("bedrock-conversation", "system"), ("bedrock-conversation", "long"),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize(
    "name", ["out.jsonl", "out.json", "out.csv", "out.tsv.gz", "out.parquet", "out.jsonl.zst"]
)
def test_there_and_back(tmp_path: Path, sample: str, form: str, name: str) -> None:
    source = write(tmp_path, *SAMPLES[sample])
    target = tmp_path / name
    table = "sv" in name
    if sample not in SAID[form]:
        assert {p.rule for p in problems_of(source, target, form)} == {"convert.form"}
        return
    if table and (form, sample) in NOT_IN_A_CELL:
        assert {p.rule for p in problems_of(source, target, form)} == {"convert.container"}
        return
    found = convert(source, target, form)
    assert (found.rows, found.kept) == (len(SAMPLES[sample]), ())
    assert same(load_rows(target)) == same(load_rows(source))
    again = tmp_path / f"again-{name}"
    # Alpaca's rows are conversations only where there is a system prompt.
    convert(target, again, "chat" if form == "alpaca" else "rows")
    assert same(load_rows(again)) == same(load_rows(source))


said = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("\r\n\t"), min_size=1
).filter(lambda text: bool(text.strip()) and "\0" not in text)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, database=None)
@given(st.lists(st.tuples(said, said), min_size=1, max_size=4), st.sampled_from(FORMATS))
@example([("a\rb", "\u2028c")], "csv")
def test_any_texts_survive_every_container(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], format_: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source = write(folder, *({"prompt": p, "completion": c} for p, c in rows), name="any.jsonl")
    target = folder / "any-out"
    convert(source, target, "prompt-completion", format_, overwrite=True)
    assert [(row.prompt, row.completion) for row in load_rows(target)] == rows


def test_extra_keys_are_converted_or_dropped(tmp_path: Path) -> None:
    more = {"id": 7, "category": "x", "score": None}
    source = write(tmp_path, {"question": "a", "answer": "b", **more})
    target = tmp_path / "out.jsonl"
    found = convert(source, target, "sharegpt")
    assert found.kept == ("id", "category", "score")
    assert json.loads(target.read_text())["category"] == "x"
    found = convert(source, target, "alpaca", drop_extra_keys=True, overwrite=True)
    assert found.left_out == ("id", "category", "score")
    assert json.loads(target.read_text()) == {"instruction": "a", "input": "", "output": "b"}


@pytest.mark.parametrize(
    ("records", "name", "rule", "line"),
    [
        ([{"text": "a"}, {"text": "b", "x": {"y": 1}}], "o.csv", "convert.container", 2),
        ([{"text": "a", "n": 1}], "o.csv", "convert.container", 1),
        ([{"text": "a", "n": "x"}, {"text": "b"}], "o.csv", "convert.container", 2),
        ([{"text": "a", "n": "x"}, {"text": "b"}], "o.parquet", "convert.container", 2),
        ([{"text": "a", "n": "x"}, {"text": "b", "n": 1}], "o.parquet", "convert.container", 0),
        ([{"text": "a", "score": "4"}], "o.csv", "convert.container", 1),
        ([{"text": "a\0"}], "o.tsv", "convert.container", 1),
        ([{**turns("a", "b"), "prompt": "c", "x": 1}], "o.jsonl", "row.ambiguous", 1),
        (
            [{"messages": [{"role": "user", "content": "a", "name": "Bo"}, REPLY]}],
            "o.jsonl", "convert.message", 1,
        ),
        ([{"text": "a"}, {"text": ""}], "o.jsonl", "field.empty", 2),
    ],
)  # fmt: skip
def test_unwritable_row_is_refused_with_line(
    tmp_path: Path, records: list[dict[str, Any]], name: str, rule: str, line: int
) -> None:
    (problem,) = problems_of(write(tmp_path, *records), tmp_path / name)
    assert (problem.rule, problem.line) == (rule, line)
    assert problem.advice


def test_extra_key_named_like_written_key_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"prompt": "a", "completion": "b", "output": "c"})
    (problem,) = problems_of(source, tmp_path / "o.jsonl", "alpaca")
    assert problem.rule == "convert.key"
    convert(source, tmp_path / "o.jsonl", "alpaca", drop_extra_keys=True)
    assert {problem.rule, "convert.form", "convert.container", "convert.message"} == set(RULES)


def test_system_prompt_in_unsupported_form_is_refused(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    source = write(tmp_path, {"messages": turns})
    (problem,) = problems_of(source, tmp_path / "o.jsonl", "bedrock")
    assert (problem.rule, problem.line) == ("convert.form", 1)


def test_converted_rows_of_mixed_shapes_are_refused(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "system": "s"}]
    source = write(tmp_path, *rows)
    (problem,) = problems_of(source, tmp_path / "o.jsonl")
    assert (problem.rule, problem.line) == ("convert.form", 2) and "--to chat" in problem.advice
    with pytest.raises(DataError):
        convert(source, tmp_path / "o.jsonl")
    convert(source, tmp_path / "o.jsonl", "chat")
    assert len(load_rows(tmp_path / "o.jsonl")) == 2


def test_columns_are_mapped_and_folders_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in (1, 2):
        write(folder, {"q": f"a{n}", "a": "b"}, name=f"{n}.jsonl")
    target = tmp_path / "o.parquet"
    found = convert(folder, target, columns={"prompt": "q", "completion": "a"})
    assert isinstance(found, Conversion) and found.rows == 2 and found.recognized.files == 2
    assert [row.prompt for row in load_rows(target)] == ["a1", "a2"]


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_is_converted_to_reasoning_content(tmp_path: Path, key: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: "c"}]
    source, target = write(tmp_path, {"messages": turns}), tmp_path / "o.jsonl"
    convert(source, target, "openai")
    assert json.loads(target.read_text())["messages"][1]["reasoning_content"] == "c"
    with pytest.raises(DataError) as refused:
        convert(source, tmp_path / "x.jsonl", "sharegpt")
    assert refused.value.rule == "convert.form"


def test_tools_and_calls_stay_or_the_row_is_refused(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    row = {
        "messages": [
            {"role": "user", "content": "do it"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "ok", "tool_call_id": "c1"},
            {"role": "assistant", "content": "done", "reasoning_content": "it said ok"},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    source, target = write(tmp_path, row), tmp_path / "o.jsonl"
    for form in ("rows", "chat", "openai"):
        convert(source, target, form, overwrite=True)
        assert json.loads(target.read_text()) == row
    for form in ("sharegpt", "alpaca", "bedrock-conversation", "prompt-completion"):
        for drop in (False, True):
            with pytest.raises(DataError) as refused:
                convert(source, tmp_path / "x.jsonl", form, drop_extra_keys=drop)
            assert refused.value.rule == "convert.form"


def test_invalid_targets_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"text": "a"})
    for options, rule, setting in (
        ({"form": "xml"}, "recipe.invalid", "form"),
        ({"target": tmp_path / "o.bin"}, "recipe.invalid", "format"),
        ({"target": source}, "target.is_source", None),
        ({"target": tmp_path, "format_": "jsonl"}, "target.folder", None),
    ):
        given_: dict[str, Any] = {"target": tmp_path / "o.jsonl", **options}
        with pytest.raises(RecipeError) as refused:
            convert(source, **given_)
        assert (refused.value.rule, refused.value.setting) == (rule, setting)
    assert source.read_text() == '{"text": "a"}\n'
    assert format_of(Path("a.b.NDJSON.gz")) == "jsonl"


def test_convert_target_inside_source_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, {"text": "a"})
    with pytest.raises(RecipeError) as refused:
        convert(folder, folder / "o.jsonl")
    assert refused.value.rule == "target.inside_source"


def test_reading_stops_at_a_hundred_problems(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("nonsense\n" * 1000)
    problems = problems_of(source, tmp_path / "o.jsonl")
    assert len(problems) == MOST_PROBLEMS


def test_json_target_is_an_array(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    target = tmp_path / "rows.json"
    assert convert(write(tmp_path, *rows), target).format == "json"
    assert json.loads(target.read_text()) == rows


def test_packed_output_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    source = write(tmp_path, *({"text": f"words {n}"} for n in range(3000)))
    for name in ("o.jsonl.gz", "o.csv.zst"):
        one, other = tmp_path / name, tmp_path / f"x-{name}"
        convert(source, one)
        convert(source, other)
        assert one.read_bytes() == other.read_bytes()
        assert len(load_rows(one)) == 3000
