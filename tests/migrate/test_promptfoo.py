"""Imports of promptfoo configurations: equal replies pass in promptfoo and in luthier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Answer

import luthier
from luthier.data.rows import load_prompts
from luthier.errors import RecipeError
from luthier.evaluation.evaluate import grade
from luthier.graders import parse_graders, read_graders
from luthier.types import Row

QUESTION = {"vars": {"question": "Which colour has snow?"}}


def configured(folder: Path, **fields: Any) -> Path:
    path = folder / "promptfooconfig.yaml"
    path.write_text(json.dumps({"prompts": ["Answer: {{question}}"], **fields}))  # JSON is YAML
    return path


def imported(folder: Path, **fields: Any) -> Any:
    return luthier.import_promptfoo(configured(folder, **fields), folder / "out", judge="judge")


def rows_of(found: Any, name: str) -> list[Row]:
    return load_prompts(found.folder / name)


def scores(found: Any, reply: str, number: str = "") -> dict[str, float]:
    """Return the scores of ``reply`` to the first row."""
    (row, *_) = rows_of(found, f"prompt-1{number}.jsonl")
    graders = parse_graders(read_graders(found.folder / f"graders{number}.toml"))
    return dict(grade([row], [reply], graders).records[0]["scores"])


@pytest.mark.parametrize(
    ("assertion", "passing", "failing"),
    [
        ({"type": "equals", "value": "white"}, "white", "White"),
        ({"type": "equals", "value": 4}, "4", "5"),
        ({"type": "equals", "value": {"a": 1}}, '{"a": 1}', '{"a": 2}'),
        ({"type": "contains", "value": "white"}, "is white.", "is White."),
        ({"type": "icontains", "value": "white"}, "is WHITE.", "is red."),
        ({"type": "contains", "value": "{{question}}"}, "Which colour has snow? Guess.", "Guess."),
        ({"type": "not-contains", "value": "white"}, "red", "white"),
        ({"type": "contains-any", "value": ["red", "white"]}, "white", "blue"),
        ({"type": "contains-all", "value": "red, white"}, "white and red", "white"),
        ({"type": "not-icontains-any", "value": ["red", "white"]}, "blue", "WHITE"),
        ({"type": "starts-with", "value": "It (is)"}, "It (is) white", "Well. It (is) white"),
        ({"type": "regex", "value": r"\d{3}"}, "a 123", "a 12"),
        ({"type": "regex", "value": r"^\d+$"}, "4", "4\n"),
        ({"type": "regex", "value": r"^\d+$"}, "4", "\u0664"),
        ({"type": "bleu", "value": "the snow is white", "threshold": "0.9"}, "the snow is white", "no"),
        ({"type": "is-json"}, "[1]", "one"),
        ({"type": "is-json", "value": {"required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
        ({"type": "is-json", "value": "required: [a]"}, '{"a": 1}', '{"b": 1}'),
        ({"type": "contains-json"}, 'so: {"a": 1} it is', "so { it is"),
        ({"type": "levenshtein", "value": "kitten", "threshold": 3}, "sitting", "something"),
        ({"type": "rouge-n", "value": "the snow is white", "threshold": 0.5}, "snow is white", "no"),
        ({"type": "python", "value": "len(output) < 5"}, "abc", "abcdef"),
        (
            {"type": "python", "value": "asked = context['vars']['question']\nreturn output in asked"},
            "snow", "ice",
        ),
        ({"type": "python", "value": "len(output) / 10", "threshold": 0.5}, "abcde", "abcd"),
        ({"type": "not-python", "value": "len(output) < 5"}, "abcdef", "abc"),
        (
            {"type": "assert-set", "threshold": 0.5, "assert": [
                {"type": "contains", "value": "red"}, {"type": "contains", "value": "blue"}]},
            "red", "green",
        ),
        (
            {"type": "assert-set", "assert": [
                {"type": "contains", "value": "red"}, {"type": "not-contains", "value": "blue"}]},
            "red", "red and blue",
        ),
    ],
)  # fmt: skip
def test_assertions_pass_and_fail_as_there(
    tmp_path: Path, assertion: dict[str, Any], passing: str, failing: str
) -> None:
    found = imported(tmp_path, tests=[{**QUESTION, "assert": [assertion]}])
    assert found.not_imported == []
    assert list(scores(found, passing).values()) == [1.0]
    assert list(scores(found, failing).values()) == [0.0]


def test_a_test_passes_where_all_its_assertions_do_or_by_its_threshold(tmp_path: Path) -> None:
    asserts = [
        {"type": "contains", "value": "white", "weight": 3},
        {"type": "contains", "value": "snow", "metric": "Subject named"},
        {"type": "contains", "value": "never", "weight": 0},
    ]
    tests = [{**QUESTION, "assert": asserts}, {**QUESTION, "assert": asserts, "threshold": 0.75}]
    found = imported(tmp_path, tests=tests)
    white = {"contains": 1.0, "subject_named": 0.0, "contains_2": 0.0}
    assert scores(found, "white", "-1") == {**white, "pass": 0.0}
    assert scores(found, "white", "-2") == {**white, "pass": 1.0}
    assert scores(found, "white snow", "-1")["pass"] == 1.0
    assert scores(found, "snow", "-2")["pass"] == 0.0


def test_similar_asks_the_encoder(tmp_path: Path) -> None:
    tests = [{**QUESTION, "assert": [{"type": "similar", "value": "white", "threshold": 0.8}]}]
    found = imported(tmp_path, tests=tests)
    similar: Any = read_graders(found.folder / "graders.toml")["similar"]
    assert similar["calculate_output"] == "similar >= 0.8"
    assert similar["graders"]["similar"]["method"] == "embedding_similarity"
    assert "all-minilm-l6-v2" in found.remarks[0]


def test_rows_have_variables_defaults_tables_and_turns(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(
        '[{"role": "system", "content": "Be {{tone}}."}, {"role": "user", "content": "{{question}}"}]'
    )
    (tmp_path / "two.txt").write_text("{{question | upper}}\n---\nNow {{question}}")
    (tmp_path / "tests.csv").write_text(
        "question,__expected,__description,__metadata:kind\n"
        'Snow?,white,cold,a\nSky?,"not-contains: red",,b\n'
    )
    found = imported(
        tmp_path,
        prompts=["file://chat.json", {"id": "file://two.txt", "label": "two"}],
        defaultTest={"vars": {"tone": "kind"}},
        tests=["file://tests.csv", {"vars": {"question": ["A?", "B?"]}}],
    )
    records = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(found.folder.glob("*.jsonl"))
    }
    assert records["chat-1.jsonl"] == [
        {
            "messages": [
                {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Snow?"},
                {"role": "assistant", "content": "white"},
            ],
            "vars": {"tone": "kind", "question": "Snow?"}, "assert": ["white"],
            "description": "cold", "metadata": {"kind": "a"},
        }
    ]  # fmt: skip
    assert [row["prompt"] for row in records["two-1-2.jsonl"]] == ["SKY?"]
    assert [row["prompt"] for row in records["two-2-3.jsonl"]] == ["Now A?", "Now B?"]
    assert (found.folder / "graders-2.toml").exists()
    assert not (found.folder / "graders-3.toml").exists()  # nothing is asserted of those
    assert {"graders-1.toml", "graders-2.toml"} == {p.name for p in found.folder.glob("*.toml")}


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.csv").write_text("question\nWhich?\n")
    found = imported(
        tmp_path / "inside",
        prompts=[
            "Answer: {{question}}", "file://made.py", "exec:./prompt.sh", "{{ question | nothing }}",
        ],
        providers=["openai:gpt-4o-mini"],
        tests=[
            {**QUESTION, "assert": [
                {"type": "javascript", "value": "output.length"}, {"type": "latency", "threshold": 1},
                {"type": "regex", "value": "("},
                {"type": "contains", "value": "a", "transform": "output"},
                {"type": "never heard of"}, "text", {"type": "contains", "value": "white"},
            ]},
            "file://../secret.csv", "file://gone.csv", "file://tests.py", "https://example.org/t.csv",
            {"vars": {"other": "x"}},
        ],
    )  # fmt: skip
    left = {(each.where, each.reason.partition(":")[0]) for each in found.not_imported}
    assert {where for where, _ in left} >= {
        "prompt 2", "prompt 3", "test 1, assertion `javascript`", "test 1, assertion `latency`",
        "test 1, assertion `regex`", "test 1, assertion `never heard of`", "test 1, assertion `None`",
        "test 2", "test 3", "test 4", "test 5", "providers (openai:gpt-4o-mini)",
        "test 1 with 'prompt 4'",
    }  # fmt: skip
    reasons = {each.where: each.reason for each in found.not_imported}
    assert "outside the folder" in reasons["test 2"] and reasons["test 3"] == "gone.csv is missing"
    assert list(scores(found, "white", "-1")) == ["contains"]  # the one that is left
    assert "`question`" in found.remarks[0]
    assert "Which?" not in "".join(p.read_text() for p in found.folder.iterdir())
    report = (found.folder / "IMPORT.md").read_text()
    assert all(each.reason in report for each in found.not_imported)


def test_rubrics_ask_the_judge_that_is_named_and_none_else(tmp_path: Path) -> None:
    asserts = [
        {"type": "llm-rubric", "value": "Speaks of {{question}}"},
        {"type": "g-eval", "value": "Is kind", "threshold": 0.8},
    ]
    tests = [{**QUESTION, "assert": asserts}]
    found = imported(tmp_path, tests=tests)
    graders = read_graders(found.folder / "graders.toml")
    rubric: Any = graders["llm_rubric"]
    assert (rubric["method"], rubric["model"]) == ("label_model", "judge")
    assert "{{item.assert[0]}}" in rubric["input"][0]["content"]
    geval: Any = graders["g_eval"]
    assert geval["calculate_output"] == "g_eval >= 0.8"
    (row,) = rows_of(found, "prompt-1.jsonl")
    assert (
        row.members is not None and row.members["assert"][0] == "Speaks of Which colour has snow?"
    )
    config = configured(tmp_path, tests=tests)
    alone = luthier.import_promptfoo(config, tmp_path / "alone")
    assert [each.where for each in alone.not_imported] == [
        "test 1, assertion `llm-rubric`", "test 1, assertion `g-eval`"
    ]  # fmt: skip
    options = {"options": {"provider": "openai:chat:gpt-5-mini"}}
    config = configured(tmp_path, tests=tests, defaultTest=options)
    theirs = luthier.import_promptfoo(config, tmp_path / "theirs")
    (parsed, *_) = parse_graders(read_graders(theirs.folder / "graders.toml")).values()
    assert (parsed.model, parsed.url) == ("gpt-5-mini", "https://api.openai.com/v1")  # type: ignore[attr-defined]


def test_a_test_of_which_a_part_is_left_out_has_no_result(tmp_path: Path) -> None:
    asserts = [
        {"type": "contains", "value": "a"},
        {"type": "javascript", "value": "x", "weight": 9},
    ]
    found = imported(tmp_path, tests=[{**QUESTION, "assert": asserts, "threshold": 0.9}])
    assert list(scores(found, "a")) == ["contains"]
    assert "test 1, result of the test" in [each.where for each in found.not_imported]


@pytest.mark.parametrize(
    ("threshold", "passes"), [(0, False), ("0.5", True), ("0.6", False), (None, False)]
)
def test_thresholds_may_be_texts_and_none_is_all(
    tmp_path: Path, threshold: Any, passes: bool
) -> None:
    asserts = [{"type": "contains", "value": "a"}, {"type": "contains", "value": "b"}]
    found = imported(tmp_path, tests=[{**QUESTION, "assert": asserts, "threshold": threshold}])
    assert scores(found, "a")["pass"] == passes


def test_plain_values_are_those_of_yaml_1_2_and_of_javascript(tmp_path: Path) -> None:
    path = tmp_path / "promptfooconfig.yaml"
    path.write_text(
        "prompts: ['{{day}} {{time}} {{yes}} {{is}} {{list}} {{none}} {{greeting}} {{face}}']\n"
        "tests:\n- vars:\n    day: 2024-01-01\n    time: 12:30\n    yes: no\n    is: true\n"
        "    list: {a: [1]}\n    none: null\n    greeting: Hi {{time}}\n    face: file://face.json\n"
    )
    (tmp_path / "face.json").write_text('"\\ud83d\\ude00"')
    found = luthier.import_promptfoo(path, tmp_path / "out")
    (row,) = rows_of(found, "prompt-1.jsonl")
    asked = row.turns()[-1].content
    assert asked == '2024-01-01 12:30 no true {"a": [1]}  Hi 12:30 "\U0001f600"'


def test_one_bad_row_of_a_table_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        'question,__expected\na,is-json\nfile://x.pdf,b\nc,"similar(0.9): d"\n'
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text(f"{name} {{{{question}}}}\n")
    prompts = ["file://one/p.txt", "file://two/p.txt"]
    found = imported(tmp_path, prompts=prompts, tests="file://t.csv")
    assert [each.where for each in found.not_imported] == ["t.csv row 2"]
    asked = {
        p.name: rows_of(found, p.name)[0].turns()[-1].content for p in found.folder.glob("*.jsonl")
    }
    assert set(asked.values()) == {"one a", "one c", "two a", "two c"}
    assert "is_json" in read_graders(found.folder / "graders-1.toml")


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__ }}", "{{ question | nothing }}", "{% if %}"],
)
def test_templates_that_cannot_be_filled_are_left_out(tmp_path: Path, template: str) -> None:
    found = imported(tmp_path, prompts=["{{question}}", template], tests=[QUESTION])
    texts = {
        row.turns()[-1].content
        for p in found.folder.glob("*.jsonl")
        for row in rows_of(found, p.name)
    }
    assert texts == {"Which colour has snow?"}
    assert "'prompt 2'" in found.not_imported[0].where


@pytest.mark.parametrize(
    "fields",
    [{"tests": [{"assert": 5}]}, {"tests": [{"options": [1]}]}, {"scenarios": 5}, {"tests": 5},
     {"tests": ["file:///etc/*.csv"]}, {"tests": ["file://**x/*.csv"]}, {"prompts": ["file://a\0b.txt"]},
     {"defaultTest": "file://gone.yaml", "tests": [QUESTION]}, {"tests": [{"vars": {"q": []}}]},
     {"tests": [{"threshold": "80%"}]}, {"tests": "file://../*.csv"}],
)  # fmt: skip
def test_odd_configurations_are_refused_in_words(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        imported(tmp_path, **fields)
    assert not (tmp_path / "out").exists()


def test_the_value_of_an_assertion_may_be_a_text_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("Answer: yes\n")  # as YAML it would be an object
    (tmp_path / "s.yaml").write_text("required: [a]\n")
    asserts = [
        {"type": "equals", "value": "file://v.txt"}, {"type": "is-json", "value": "file://s.yaml"},
    ]  # fmt: skip
    found = imported(tmp_path, tests=[{**QUESTION, "assert": asserts}])
    assert scores(found, "Answer: yes")["equals"] == 1 and scores(found, '{"a": 1}')["is_json"] == 1
    assert scores(found, '{"Answer": true}')["equals"] == 0


def test_no_file_outside_the_folder_becomes_a_schema(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"type": "object"}')
    (tmp_path / "in").mkdir()
    asserts = [
        {"type": "is-json", "value": str(secret)}, {"type": "equals", "value": {"a": None}},
        {"type": "contains", "value": "white"},
    ]  # fmt: skip
    found = imported(tmp_path / "in", tests=[{**QUESTION, "assert": asserts}])
    assert list(scores(found, "white")) == ["contains"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "prompts: [",
        "prompts: !!python/object/apply:os.system ['true']",
        "prompts: [x]\ntests: []",
        "prompts: ['file://gone.txt']\ntests: [{}]",
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_and_leaves_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "promptfooconfig.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        luthier.import_promptfoo(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_command_says_where_to_go_on_and_keeps_what_is_there(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    config = configured(
        tmp_path, tests=[{**QUESTION, "assert": [{"type": "icontains", "value": "a"}]}]
    )
    out = tmp_path / "out"
    said = Answer("import", "promptfoo", str(config), str(out)).good().out
    command = said.splitlines()[-1].strip()
    assert command == f"luthier evaluate MODEL {out}/prompt-1.jsonl --grader {out}/graders.toml"
    words = command.replace("MODEL", str(tiny_model_folder)).split()[1:]
    report = Answer(*words, "--max-tokens", "4", "--json").good().json()
    assert report["rows"] == 1 and set(report["scores"]) == {"icontains"}
    assert str(out) in Answer("import", "promptfoo", str(config), str(out)).refused()
