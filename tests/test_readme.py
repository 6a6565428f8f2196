"""Tests of documented commands, and of the README's main promises (slow)."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import luthier
from luthier.cli.app import app
from luthier.cli.service.serve import ROOT_KEYS
from luthier.data.rows import load_rows
from luthier.graders import parse_graders
from luthier.recipe import Recipe, assign, parse_setting
from luthier.workflows.distil.recipe import DistilRecipe

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "README.vi.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "src" / "luthier" / "demo" / "README.md",
    ROOT / "skills" / "luthier" / "SKILL.md",
]
HOLES = re.compile(r"[A-Z_]{3,}|…|\.\.\.|[\[\]<>|]")
"""Placeholders of a synopsis (``luthier tune DATA``)."""


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(text: str, program: str) -> Iterator[str]:
    """Commands of ``program`` in shell blocks and in `inline code`."""
    shell = (body.replace("\\\n", " ") for body in blocks(text, "sh", "console", "bash"))
    lines = [line for body in shell for line in body.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    for line in lines:
        for part in line.removeprefix("$ ").split("&&"):
            command = part.partition("  #")[0].strip()
            if command.split(" ")[0] == program:
                yield command


def all_commands(program: str) -> list[Any]:
    return [
        pytest.param(command, id=f"{document.stem}: {command[:60]}")
        for document in DOCUMENTS
        if document.exists()
        for command in dict.fromkeys(commands(document.read_text(), program))
    ]


def check_graders(fields: dict[str, Any]) -> None:
    for method, own in fields.items():
        parse_graders([{"method": method, **own}])


KINDS = {"evaluate": check_graders, "distil": DistilRecipe.parse}
"""Parser of ``--set`` fields by command; a recipe for other commands."""


@cache
def command_tree() -> Any:
    """The command tree, built once because this takes 0.2 s."""
    return typer.main.get_command(app)


def check(command: str) -> None:
    """Check that a command and its options exist and accept the values."""
    words = shlex.split(command)[1:]
    node: Any = command_tree()
    while words and hasattr(node, "commands"):
        if words[0].startswith("-"):
            break
        assert words[0] in node.commands, f"there is no command {words[0]!r}"
        node = node.commands[words.pop(0)]
    options = {
        name: param for param in node.params for name in (*param.opts, *param.secondary_opts)
    }
    places = [param for param in node.params if param.param_type_name == "argument"]
    given, methods, settings = [], dict[str, Any](), list[str]()
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            given.append(word)
        elif name != "--help":
            assert name in options, f"`luthier {node.name}` has no option {name}"
            if not getattr(options[name], "is_flag", False) and not equals:
                assert words, f"{name} needs a value"
                value = words.pop(0)
                if name in ("--objective", "--adaptation"):
                    methods[name.strip("-")] = value
                if name == "--set" and not HOLES.search(value):
                    settings.append(value)
    if settings:
        fields: dict[str, Any] = {"data": {"train": "x"}, **methods}
        if node.name == "evaluate":  # fields of a grader
            fields = {}
        if node.name == "distil":
            fields["teacher"] = {"model": "x"}
        for key, parsed in map(parse_setting, settings):
            assign(fields, key.split("."), parsed)
        KINDS.get(node.name, Recipe.parse)(fields)
    many = any(param.nargs == -1 for param in places)
    assert many or len(given) <= len(places), f"{given} are too many arguments"
    if given or not HOLES.search(command):
        required = [param for param in places if param.required]
        assert len(given) >= len(required) or "--help" in command or not given, command


def test_check_rejects_wrong_commands() -> None:
    check("luthier tune my.jsonl --set adaptation.rank=8 --name x")
    for wrong in (
        "luthier tume my.jsonl",
        "luthier tune my.jsonl --nam x",
        "luthier models delete x",
        "luthier models list x",
        "luthier tune my.jsonl --name",
    ):
        with pytest.raises(AssertionError):
            check(wrong)
    from luthier.errors import RecipeError

    with pytest.raises(RecipeError):
        check("luthier tune my.jsonl --set adaptation.rnk=8")


@pytest.mark.parametrize("command", all_commands("luthier"))
def test_commands_in_the_documents_exist(command: str) -> None:
    check(command)


def test_readme_shows_main_commands() -> None:
    """Without this test, the test above could pass without any command."""
    text = (ROOT / "README.md").read_text()
    shown = {" ".join(command.split()[:2]) for command in commands(text, "luthier")}
    for name in ("tune", "chat", "predict", "evaluate", "inspect", "serve"):
        assert f"luthier {name}" in shown


@pytest.mark.parametrize("command", all_commands("make"))
def test_make_targets_in_the_documents_exist(command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for word in shlex.split(command)[1:]:
        assert "=" in word or word in targets, f"make has no target {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_links_point_to_existing_files(document: Path) -> None:
    if not document.exists():
        pytest.skip("not written yet")
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_recipes_named_in_documents_exist() -> None:
    for document in DOCUMENTS:
        if document.exists():
            for path in re.findall(r"\brecipes/[a-z0-9.-]+\.toml", document.read_text()):
                assert (ROOT / path).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_uses_public_names(document: Path) -> None:
    for body in blocks(document.read_text(), "python"):
        for node in ast.walk(ast.parse(body)):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "luthier"
            ):
                assert node.attr in luthier.__all__


@pytest.mark.parametrize(
    "document", ["README.md", "README.vi.md", "docs/vi/index.md", "docs/guide/data.md"]
)
def test_rows_in_the_documents_are_rows(document: str, tmp_path: Path) -> None:
    bodies = blocks((ROOT / document).read_text(), "json")
    lines = [line for body in bodies for line in body.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        path = tmp_path / "row.jsonl"
        path.write_text(line)
        assert len(load_rows(path)) == 1


@pytest.mark.parametrize(
    ("translated", "page"),
    [
        ("README.vi.md", "README.md"),
        ("docs/vi/route-messages.md", "docs/use-cases/route-messages.md"),
        ("docs/vi/copied-questions.md", "docs/use-cases/copied-questions.md"),
        ("docs/vi/domain-text.md", "docs/use-cases/domain-text.md"),
    ],
)
def test_translated_page_has_the_commands_and_figures_of_the_page(
    translated: str, page: str
) -> None:
    text, original = (ROOT / translated).read_text(), (ROOT / page).read_text()
    lines, expected = (
        [
            line.partition("  #")[0].strip()
            for body in blocks(one, "sh")
            for line in body.splitlines()
        ]
        for one in (text, original)
    )
    assert [line for line in lines if line in expected] == expected
    if page != "README.md":  # which has Vietnamese examples and figures of its own
        assert lines == expected
        figures = re.findall(r"\d+,\d+ %", text)
        assert figures and all(each.replace(",", ".") in original for each in figures)


def test_demo_data_matches_page() -> None:
    folder = ROOT / "src" / "luthier" / "demo"
    judged = load_rows(folder / "preferences.jsonl")
    assert len(judged) == 160 and all(row.chosen != row.rejected for row in judged)
    prompts: dict[str, set[str | None]] = {}
    for name in ("train", "validation", "test"):
        rows = load_rows(folder / f"{name}.jsonl")
        prompts[name] = {row.prompt for row in rows}
        assert len(prompts[name]) == len(rows)
        assert all(row.completion and row.completion.startswith("[route: ") for row in rows)
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


@pytest.mark.slow
def test_demo_improves_the_model(tmp_path: Path) -> None:
    """``make demo``: download the base model, tune, measure before and after."""
    done = subprocess.run(
        [sys.executable, "-m", "luthier", "demo", "--json"],
        env={
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            "LUTHIER_HOME": str(tmp_path),
        },
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model_id"] == "smollm2-135m-instruct:support-v1"
    base, tuned = report["scores"]["base"], report["scores"]["tuned"]
    assert tuned["routing label"] >= 0.6
    assert tuned["house style"] >= 0.9
    assert base["routing label"] <= 0.1
    assert base["house style"] <= 0.1
    listed = subprocess.run(
        [sys.executable, "-m", "luthier", "models", "list", "--json"],
        env={**os.environ, "LUTHIER_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [model["id"] for model in json.loads(listed.stdout)["custom"]] == [report["model_id"]]


@pytest.mark.slow
def test_service_page_examples_run(tmp_path: Path) -> None:
    """Run ``luthier serve`` with the printed variables and the page's Python code."""
    aws, compatible, *_ = blocks((ROOT / "docs/guide/service.md").read_text(), "python")
    (tmp_path / "my.jsonl").write_text(
        "".join((ROOT / "src/luthier/demo/train.jsonl").read_text().splitlines(keepends=True)[:40])
    )
    plain = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    plain |= {"LUTHIER_HOME": str(tmp_path / "home")}
    plain.pop("HF_HUB_OFFLINE", None)
    server = subprocess.Popen(
        [sys.executable, "-m", "luthier", "serve", "--port", "0"],
        env=plain, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        keys = tmp_path / "home" / ROOT_KEYS
        while str(keys) not in (line := server.stdout.readline()):
            assert line, "the server ended"
        exported = [line.removeprefix("export ") for line in keys.read_text().splitlines()]
        printed = {name: value for name, _, value in (line.partition("=") for line in exported)}

        def paste(body: str) -> str:
            done = subprocess.run(
                [sys.executable, "-c", body], env=plain | printed, cwd=tmp_path,
                capture_output=True, text=True, check=False, timeout=1200,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "[route: " in paste(aws), "it learned nothing"
        end = (
            "import time\n"
            "while client.fine_tuning.jobs.retrieve(job.id).status not in ('succeeded', 'failed'):\n"
            "    time.sleep(2)\n"
            "done = client.fine_tuning.jobs.retrieve(job.id)\n"
            "said = client.chat.completions.create(model=done.fine_tuned_model, max_tokens=12,\n"
            "    messages=[{'role': 'user', 'content': 'My chain keeps slipping'}])\n"
            "print(done.status, said.choices[0].message.content)\n"
        )
        assert paste(compatible + end).startswith("succeeded ")
    finally:
        server.terminate()
        server.communicate(timeout=60)
