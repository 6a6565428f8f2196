"""Tests of settings in messages: recipe names in backticks, replaced by each API."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import luthier
from luthier.formatting import command_option, map_code, python_keyword
from luthier.gate.checks import all_rules
from luthier.recipe import Recipe, Training
from luthier.server.bedrock.hyperparameters import HYPERPARAMETERS
from luthier.server.bedrock.hyperparameters import setting_name as bedrock
from luthier.server.native.operations import setting_name as native
from luthier.server.openai.fine_tuning import Hyperparameters
from luthier.server.openai.fine_tuning import setting_name as openai

APIS: dict[str, Callable[[str], str]] = {"bedrock": bedrock, "openai": openai, "native": native}
SOURCE = Path(luthier.__file__).parent
OPTION = re.compile(r"(?:^|\s|\()--[a-z]")
COMMANDS = ("cli", "cluster", "sdk/hub", "migrate", "workflows/advise", "workflows/estimate",
            "workflows/study", "limits.py", "workflows/pretrain_recipe.py",
            "server/http/server.py", "formatting.py")  # fmt: skip
"""Code of commands and of the server's start, and the home of the names."""
FURTHER = (
    "data/convert.py", "data/files/writers.py", "exports/writer.py",
    "workflows/pretrain.py",
    "models/build.py", "models/shrinking/student.py", "models/shrinking/width.py",
    "models/shrinking/width_bert.py",
    "gate/clean.py", "gate/clean_plan.py", "gate/edits.py", "gate/policy.py", "gate/report.py",
    "gate/row_selection.py", "gate/splits.py", "server/stores/backup.py",
)  # fmt: skip
"""Additional files of commands."""
OF_COMMANDS = {
    "recipe.py": r"--(set|mix|map) takes",
    # Names of runs and what goes on: a job is its own name, goes on by itself, and has local teachers.
    "engine/runs.py": "--(resume|name)", "engine/loop.py": "--resume",
    "library/suggestions.py": "luthier tune … --resume",
    "library/packing.py": "--merged",
    "workflows/distil/responses.py": "--(resume|name)", "data/formats.py": "--to",
    "workflows/distil/recipe.py": "--(resume|set teacher)",
    # A server is started by a command, and a driver by arguments.
    "server/service.py": "--(job-processes|runner)", "inference/opened_model.py": "student --from",
    "server/jobs/runners.py": "--(runner|ray-address)",
    "workflows/evaluate.py": "has no effect with --corpus",
    # The next command and the printed prediction of a task.
    "tasks/base.py": "--input series", "tasks/embedding.py": "--json prints all",
    "tasks/generation.py": "--image photo|DATA --base", "tasks/reading.py": "--input questions",
    "tasks/reranking.py": "--input pairs", "media/tasks.py": "--(output samples|reconstruct images)",
    "media/image_generation.py": "--output codes",
    "server/retraining.py": "--base", "evaluation/baselines.py": "--(base|objective|set) ",
    "engine/train.py": "trials are compared", "models/catalog.py": "--only-binary",
}  # fmt: skip
"""Messages in other files that API clients never see, as patterns."""


def texts() -> Iterator[tuple[str, str]]:
    """Yield every message of code behind the API with its file; without docstrings."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(COMMANDS) or name in FURTHER:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                allowed = OF_COMMANDS.get(name)
                if id(node) in documentation or (allowed and re.search(allowed, node.value)):
                    continue
                # An argument of a process is one word.
                if not re.fullmatch(r"--[\w-]+", node.value):
                    yield name, node.value


def test_client_messages_name_no_cli_option() -> None:
    found = {name for name, text in texts() if OPTION.search(map_code(text, lambda code: ""))}
    assert not found


def test_rules_of_the_gate_name_no_option() -> None:
    for rule in all_rules().values():
        text = map_code(f"{rule.about} {rule.why} {rule.fix}", lambda code: "")
        assert not OPTION.search(text), rule.id


@pytest.mark.parametrize(
    ("api", "code", "name"),
    [
        ("bedrock", "training.epochs", "epochCount"),
        ("bedrock", "data.long_rows=drop", "luthier.longRows=drop"),
        ("bedrock", "objective.template=plain", "objective.template=plain"),
        ("openai", "training.epochs=3", "n_epochs=3"),
        ("openai", "base=tiny", "model=tiny"),
        ("openai", "training.learning_rate=1e-3", "training.learning_rate=1e-3"),
        ("native", "training.epochs=3", "settings.training.epochs=3"),
        ("native", "data.validation=rows", "validation=rows"),
        ("native", "data.long_rows=drop", "settings.data.long_rows=drop"),
        ("native", "my.model", "my.model"),
    ],
)
def test_setting_names_per_api(api: str, code: str, name: str) -> None:
    assert APIS[api](code) == name


@pytest.mark.parametrize(
    ("code", "option"),
    [
        ("training.epochs=3", "--set training.epochs=3"),
        ("training.epochs", "training.epochs"),
        ("data.columns.prompt=Q=A", "--map prompt=Q=A"),
        ("data.validation=FILE", "--validation FILE"),
        ("luthier inspect --map text=a", "luthier inspect --map text=a"),
    ],
)
def test_advice_names_options_of_commands(code: str, option: str) -> None:
    assert command_option(code) == option


@pytest.mark.parametrize(
    ("code", "keyword"),
    [
        ("data.columns.prompt=Q=A", 'columns={"prompt": "Q=A"}'),
        ("data.columns.intent=", 'columns={"intent": ""}'),
        ("data.columns.intent", "data.columns.intent"),
        ("training.epochs=3", "training.epochs=3"),
    ],
)
def test_advice_names_keywords_of_functions(code: str, keyword: str) -> None:
    assert python_keyword(code) == keyword


def test_only_code_is_changed() -> None:
    text = "base: use `base`, or none.\n  `a b`: base` "
    assert map_code(text, str.upper) == "base: use `BASE`, or none.\n  `A B`: base` "


def test_setting_names_refer_to_existing_fields() -> None:
    fields = {f"training.{name}" for name in Training.model_fields} | set(Recipe.model_fields)
    for name, field in HYPERPARAMETERS.items():
        assert not field.startswith("training.") or field in fields
        assert bedrock(field) == name
    assert set(Hyperparameters.model_fields) <= {openai(field) for field in fields}
