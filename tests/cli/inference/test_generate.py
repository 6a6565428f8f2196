"""``luthier generate``, ``chat`` and ``evaluate`` with a model that memorized its answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import COLOURS, MODEL, ROWS, Answer, jsonl, start
from thinking_models import THOUGHT

from luthier.cli.terminal.console import stream_reasoning
from luthier.files import read_json
from luthier.formatting import printable
from luthier.inference.generation import Generator
from luthier.models.manifest import MANIFEST


def test_generate_prints_reply_to_prompt(home: Path) -> None:
    answer = Answer("generate", MODEL, "colour of sky?").good()
    assert answer.out == "blue\n"
    assert answer.err == ""
    answer = Answer("generate", MODEL, "colour of sky?", "--json").good()
    assert answer.json() == {"model": MODEL, "prompt": "colour of sky?", "completion": "blue"}
    cut = Answer("generate", MODEL, "colour of sky?", "--max-tokens", "1").good()
    assert cut.out != "blue\n" and "--max-tokens" in cut.err


def test_system_message_changes_the_prompt(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stream = Generator.stream

    def record(self: Generator, prompt: Any, *rest: Any) -> Any:
        seen.append([turn.role for turn in prompt])
        return stream(self, prompt, *rest)

    monkeypatch.setattr(Generator, "stream", record)
    Answer("generate", MODEL, "colour of sky?", "--system", "Be brief.").good()
    Answer("chat", MODEL, "--system", "Be brief.", text="snow?\n\nsnow?\n").good()
    assert seen[0] == seen[1] == seen[2] == ["system", "user"]
    assert "--system" in Answer("generate", MODEL, "--input", "x", "--system", "a").refused()


def test_generate_rejects_missing_image(home: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.png")
    assert missing in Answer("generate", MODEL, "hello", "--image", missing).refused()


def test_generate_respects_min_tokens(home: Path) -> None:
    ask = ("generate", MODEL, "colour of sky?", "--max-tokens", "9")
    longer = Answer(*ask, "--min-tokens", "9").good().out
    assert longer.startswith("blue") and len(longer) > len("blue\n")
    assert "min_tokens" in Answer(*ask, "--min-tokens", "10").refused()


@pytest.mark.slow
def test_generate_constrains_replies(home: Path, tmp_path: Path) -> None:
    ask = ["generate", MODEL, "colour of sky?"]
    grammar, schema = tmp_path / "list.lark", tmp_path / "schema.json"
    grammar.write_text('start: "[" /[a-c]/ ("," /[a-c]/){1} "]"')
    schema.write_text('{"enum": ["green"]}')
    assert Answer(*ask, "--regex", "red|green").good().out in ("red\n", "green\n")
    assert re.fullmatch(r"\[[a-c],[a-c]\]\n", Answer(*ask, "--grammar", str(grammar)).good().out)
    assert Answer(*ask, "--schema", str(schema)).good().out == '"green"\n'
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "colour of sky?"}, {"prompt": "snow?"}])
    lines = Answer("generate", MODEL, "--input", str(source), "--regex", "no|not").good().out
    assert [json.loads(line)["completion"] in ("no", "not") for line in lines.splitlines()] == [
        True,
        True,
    ]
    assert "unclosed group" in Answer(*ask, "--regex", "a(").refused()
    both = Answer(*ask, "--regex", "a", "--schema", str(schema)).refused()
    assert "schema" in both and "regex" in both
    assert "none.lark" in Answer(*ask, "--grammar", "none.lark").refused()
    grammar.write_bytes(b"\xff\xfe")
    assert str(grammar) in Answer(*ask, "--grammar", str(grammar)).refused()


def test_generate_preserves_order_of_input_file(home: Path, tmp_path: Path) -> None:
    things = ["snow", "sky", "coal", "grass", "sky"]
    source = jsonl(
        tmp_path / "in.jsonl",
        *(
            {"id": n, "prompt": f"colour of {thing}?", "set": ["a"]}
            for n, thing in enumerate(things)
        ),
    )
    target = tmp_path / "sub" / "out.jsonl"
    command = ["generate", MODEL, "--input", str(source)]
    expected = [
        {"prompt": f"colour of {thing}?", "completion": COLOURS[thing], "id": n, "set": ["a"]}
        for n, thing in enumerate(things)
    ]
    answer = Answer(*command, "--output", str(target)).good()
    assert [json.loads(line) for line in target.read_text().splitlines()] == expected
    assert str(target) in answer.out
    for dash in ((), ("--output", "-")):
        printed = Answer(*command, *dash).good().out
        assert [json.loads(line) for line in printed.splitlines()] == expected
    assert not Path("-").exists()
    report = Answer(*command, "--json").good().json()
    assert report["answers"] == expected
    Answer(*command, "--output", str(target)).refused()
    again = ("--output", str(target), "--overwrite", "--json")
    report = Answer(*command, *again).good().json()
    assert (report["rows"], report["output"]) == (5, str(target))


def test_generate_accepts_messages_without_expected_reply(home: Path, tmp_path: Path) -> None:
    """The expected reply in the file is not part of the prompt."""
    source = jsonl(
        tmp_path / "in.jsonl",
        {"messages": [{"role": "user", "content": "colour of coal?"}]},
        {"messages": [
            {"role": "user", "content": "colour of grass?"}, {"role": "assistant", "content": "red"}
        ], "id": 2},
        {"prompt": "colour of coal?", "completion": "red", "expected": "black"},
    )  # fmt: skip
    lines = Answer("generate", MODEL, "--input", str(source)).good().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["completion"] for row in rows] == ["black", "green", "black"]
    assert rows[0].keys() == {"prompt", "completion"}
    assert rows[1].keys() == {"prompt", "completion", "expected", "id"}
    assert [row.get("expected") for row in rows] == [None, "red", "black"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "colour of coal?"}]
    assert rows[1]["prompt"] == [{"role": "user", "content": "colour of grass?"}]


@pytest.mark.parametrize("expected", [None, "", {}, []])
def test_row_without_expected_reply_preserves_expected_field(
    home: Path, tmp_path: Path, expected: Any
) -> None:
    row = {"prompt": "colour of coal?", "expected": expected}
    source = jsonl(tmp_path / "in.jsonl", row | {"completion": "red"}, row)
    lines = Answer("generate", MODEL, "--input", str(source)).good().out.splitlines()
    replied, plain = map(json.loads, lines)
    assert replied == {"prompt": "colour of coal?", "completion": "black", "expected": "red"}
    assert plain == row | {"completion": "black"}


def test_generate_accepts_data_forms_of_tune(home: Path, tmp_path: Path) -> None:
    def answers(source: str | Path, *options: str) -> list[dict[str, Any]]:
        lines = Answer("generate", MODEL, "--input", str(source), *options).good().out.splitlines()
        return [json.loads(line) for line in lines]

    table = tmp_path / "a.csv"
    table.write_text("q,reply,id\ncolour of sky?,red,7\ncolour of coal?,,7\n")
    mapped = answers(table, "--map", "prompt=q", "--map", "completion=reply")
    assert mapped == [
        {
            "prompt": "colour of sky?", "completion": "blue", "expected": "red",
            "q": "colour of sky?", "reply": "red", "id": "7",
        },
        {
            "prompt": "colour of coal?", "completion": "black",
            "q": "colour of coal?", "reply": "", "id": "7",
        },
    ]  # fmt: skip
    refusal = Answer("generate", MODEL, "--input", str(table)).refused()
    assert "a.csv:2: [prompt.shape]" in refusal and "--map prompt=COLUMN" in refusal
    texts = tmp_path / "a.txt"
    texts.write_text("colour of sky?\n\ncolour of grass?\n")
    assert [row["completion"] for row in answers(texts)] == ["blue", "green"]
    alpaca = {"instruction": "colour of sky?", "input": "", "output": "red", "n": 1}
    share = {"conversations": [{"from": "human", "value": "colour of coal?"}]}
    jsonl(tmp_path / "forms.jsonl", alpaca, share, {"prompt": "colour of sky?", "expected": 3})
    first, second, third = answers(tmp_path / "form*.jsonl")
    assert first == {"prompt": "colour of sky?", "completion": "blue", "expected": "red", **alpaca}
    assert (second["completion"], "expected" in second) == ("black", False)
    assert (third["completion"], third["expected"]) == ("blue", 3)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"question": "x"}, "prompt.shape"),
        ({"prompt": "  "}, "field.empty"),
        ({"messages": []}, "messages.empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "prompt.unasked"),
        ({"messages": [{"role": "user"}]}, "field.missing"),
        ("{", "json.invalid"),
    ],
)
def test_generate_rejects_rows_without_prompt(
    home: Path, tmp_path: Path, row: Any, rule: str
) -> None:
    source = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, row)
    target = tmp_path / "out.jsonl"
    answer = Answer("generate", MODEL, "--input", str(source), "--output", str(target))
    assert f"{source}:2: [{rule}]" in answer.refused()
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none", "hi"], "none"),
        (["tiny-llama:none", "hi"], MODEL),
        ([MODEL], "--input"),
        ([MODEL, " "], "prompt"),
        ([MODEL, "hi", "--input", "x.jsonl"], "--input"),
        ([MODEL, "hi", "--output", "x.jsonl"], "--output"),
        ([MODEL, "hi", "--map", "prompt=q"], "--map"),
        ([MODEL, "hi", "--temperature", "-1"], "temperature"),
        ([MODEL, "hi", "--top-p", "1.1"], "top-p"),
        ([MODEL, "hi", "--max-tokens", "0"], "max-tokens"),
        ([MODEL, "hi", "--max-tokens", "1024"], "1024"),
        ([MODEL, "--input", "none.jsonl"], "file.missing"),
        ([MODEL, "hi", "--schema", "none.json"], "none.json"),
        ([MODEL, "hi", "--schema", __file__], __file__),
    ],
)
def test_generate_rejects_invalid_arguments(home: Path, arguments: list[str], text: str) -> None:
    assert text in Answer("generate", *arguments).refused()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_unwritable_output_is_rejected_before_work(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from luthier.inference.generation import Generator

    def work(*arguments: Any) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(Generator, "answers", work)
    given = ["--input", str(data)] if command == "generate" else [str(data)]
    for target, text in ((tmp_path, "is a folder"), (data / "below", "below")):
        answer = Answer(command, MODEL, *given, "--output", str(target))
        assert text in answer.refused()


@pytest.mark.slow
def test_draws_repeat_with_their_seed(home: Path, tiny_model_folder: Path) -> None:
    def draw(seed: int) -> str:
        options = ["--temperature", "1.5", "--seed", str(seed), "--max-tokens", "20"]
        return Answer("generate", str(tiny_model_folder), "hi", *options).good().out

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_chat_continues_and_restarts_conversation(home: Path) -> None:
    text = "colour of sky?\n\ncolour of coal?\nand of grass?\n\ncolour of coal?\n"
    answer = Answer("chat", MODEL, text=text).good()
    turns = [part.strip() for part in answer.out.split("you > ")]
    assert MODEL in turns[0]
    assert "Backend: " in answer.err
    assert turns[1:4] == ["blue", "", "black"]
    assert turns[5:] == ["", "black", ""]
    again = Answer("chat", MODEL, "--max-tokens", "1", text="colour of sky?\n").good()
    assert "blue" not in again.out
    unknown = Answer("chat", MODEL, text="/help\ncolour of sky?\n").good().out
    assert "/help" in unknown and "blue" in unknown
    ended = Answer("chat", MODEL, text="/exit\ncolour of sky?\n").good()
    assert "blue" not in ended.out


@pytest.mark.slow
def test_chat_process_ends_with_stdin(home: Path) -> None:
    process = start(home, "chat", MODEL, stdin=subprocess.PIPE)
    out, err = process.communicate("colour of grass?\n", timeout=120)
    assert process.returncode == 0, err
    assert "green" in out
    assert err.startswith("Backend: ") and err.count("\n") == 1


@pytest.fixture
def thinker(thinking_folder: Callable[[str], Path]) -> str:
    """Return the id of a reasoning model."""
    return str(thinking_folder("is opened"))


@pytest.mark.slow
def test_reasoning_is_excluded_from_completion_and_grading(thinker: str, tmp_path: Path) -> None:
    answer = Answer("generate", thinker, "sky?", "--max-tokens", "120").good()
    assert (answer.out, answer.err) == ("blue\n", THOUGHT + "\n\n")
    cut = Answer("generate", thinker, "sky?", "--max-tokens", "9").good()
    thought, _, note = cut.err.partition("(")
    assert THOUGHT.startswith(thought.strip()) and "--max-tokens" in note and cut.out == "\n"
    answer = Answer("generate", thinker, "sky?", "--max-tokens", "120", "--json").good()
    assert answer.json() == {
        "model": thinker, "prompt": "sky?", "completion": "blue", "reasoning": THOUGHT
    }  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    jsonl(source, {"prompt": "sky?", "completion": "blue", "reasoning": "its own"})
    options = ["--input", str(source), "--max-tokens", "120"]
    Answer("generate", thinker, *options, "--output", str(target)).good()
    assert json.loads(target.read_text()) == {
        "prompt": "sky?", "completion": "blue", "expected": "blue", "reasoning": THOUGHT
    }  # fmt: skip
    report = Answer("generate", thinker, *options, "--json").good().json()
    (row,) = report["answers"]
    assert (row["completion"], row["reasoning"]) == ("blue", THOUGHT)
    graded = Answer("evaluate", thinker, str(source), "--max-tokens", "120", "--json").good().json()
    assert graded["scores"] == {"exact": 1.0}


@pytest.mark.slow
def test_chat_prints_dimmed_reasoning_on_stderr(
    thinker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "sky?\n\nhow many?\n"
    answer = Answer("chat", thinker, "--max-tokens", "120", text=text).good()
    assert answer.err.count(THOUGHT) == 2 and THOUGHT not in answer.out
    assert "blue\n" in answer.out and '{"mood": "good", "age": 7}\n' in answer.out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream_reasoning("hm\x1b[2J")
    assert capsys.readouterr().err == "\x1b[2mhm" + printable("\x1b[2J") + "\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    stream_reasoning("hm")
    assert capsys.readouterr().err == "hm"


@pytest.mark.slow
def test_evaluate_grades_and_writes_all_replies(home: Path, data: Path, tmp_path: Path) -> None:
    held = jsonl(
        tmp_path / "held.jsonl",
        *ROWS[:2],
        {"prompt": "colour of coal?", "completion": "yellow"},
        {"prompt": "colour of snow?", "completion": "white\nlike milk"},
    )
    target = tmp_path / "answers.jsonl"
    answer = Answer("evaluate", MODEL, str(held), "--output", str(target)).good()
    assert answer.out.startswith("exact: 50.00% ± 17.68% of 4 rows")
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[2] == {
        "prompt": "colour of coal?", "reply": "black", "expected": "yellow", "scores": {"exact": 0.0}
    }  # fmt: skip
    graders = ["--grader", "exact", "--grader", "first_line"]
    report = Answer("evaluate", MODEL, str(held), *graders, "--json").good().json()
    assert report["model"] == MODEL
    assert report["rows"] == 4
    assert report["scores"] == {"exact": 0.5, "first_line": 0.75}
    base = read_json(home / "models" / "custom" / "tiny-llama" / "colours" / MANIFEST)["parent"]
    assert Answer("evaluate", base, str(held), "--json").good().json()["scores"]["exact"] == 0


def test_grader_fields_from_options_and_files(home: Path, tmp_path: Path) -> None:
    held = jsonl(tmp_path / "held.jsonl", {"prompt": "colour of coal?", "completion": "BLACK"})
    fields = ["--grader", "exact", "--set", "exact.ignore_case=true"]
    report = Answer("evaluate", MODEL, str(held), *fields, "--json").good().json()
    assert report["scores"] == {"exact": 1.0}
    file = tmp_path / "graders.toml"
    file.write_text(
        '[form]\nmethod = "regex"\npattern = "^[a-z]+$"\n'
        '[both]\nmethod = "mix"\nparts = { a = "exact", b = { method = "regex", pattern = "k" } }\n'
    )
    graders = ["--grader", str(file), "--set", "both.weights.b=3", "--set", "form.match=whole"]
    report = Answer("evaluate", MODEL, str(held), *graders, "--json").good().json()
    assert report["scores"] == {"form": 1.0, "both": 0.75}
    refused = Answer("evaluate", MODEL, str(held), "--set", "number.tolerance=1", "--json")
    assert (
        refused.refused()
        and refused.json()["error"]["problems"][0]["setting"] == "number.tolerance"
    )
    refused = Answer("evaluate", MODEL, str(held), "--grader", "number").refused()
    assert "held.jsonl:1: [grader.no_number]" in refused
    refused = Answer("evaluate", MODEL, str(held), "--grader", "code").refused()
    assert "allow_code=true" in refused


def test_overlong_prompts_are_reported_or_dropped(home: Path, tmp_path: Path) -> None:
    long = {"prompt": "colour of " * 600, "completion": "blue"}
    held = jsonl(tmp_path / "held.jsonl", ROWS[0], long, ROWS[1], long)
    for arguments in (["generate", MODEL, "--input", str(held)], ["evaluate", MODEL, str(held)]):
        message = Answer(*arguments).refused()
        assert f"{held}:2: [row.too_long]" in message and "(also line 4)" in message
    report = Answer("evaluate", MODEL, str(held), "--long-rows", "drop", "--json").good().json()
    assert (report["rows"], report["dropped"], report["scores"]) == (2, 2, {"exact": 1.0})
    Answer("evaluate", MODEL, str(held), "--long-rows", "truncate").refused()


def test_evaluate_rejects_unknown_grader_and_model(home: Path, data: Path, tmp_path: Path) -> None:
    answer = Answer("evaluate", MODEL, str(data), "--grader", "rouge", "--json")
    assert "'rouge'" in answer.refused() and "first_line" in answer.err
    assert answer.json()["error"]["type"] == "RecipeError"
    answer = Answer("evaluate", "none", str(data), "--json")
    answer.refused()
    assert answer.json()["error"]["type"] == "UnknownModel"
