"""Messages name settings once, and every face in its own words; none over the API names an option."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier
from luthier.api.bedrock.hyperparameters import HYPERPARAMETERS
from luthier.api.bedrock.hyperparameters import setting_name as bedrock
from luthier.api.native.operations import setting_name as native
from luthier.api.openai.fine_tuning import Hyperparameters
from luthier.api.openai.fine_tuning import setting_name as openai
from luthier.gate.checks import all_rules
from luthier.recipe import Recipe, Training
from luthier.setting_names import SettingName, option, with_setting_names, without_commands
from luthier.types import map_texts

FACES: dict[str, SettingName] = {"bedrock": bedrock, "openai": openai, "native": native}
SOURCE = Path(luthier.__file__).parent
OPTION = re.compile(r"(?:^|\s|\()--[a-z]")
COMMANDS = ("cli", "sdk/hub", "sdk/imports", "workflows/advise", "workflows/estimate", "limits.py",
            "pretrain_recipe.py", "api/http/server.py", "setting_names.py")  # fmt: skip
"""What only commands run, the start of a server, and the home of these names."""
FURTHER = (
    "data/convert.py", "data/writers.py", "serving/export.py", "workflows/learning_curve.py",
    "workflows/pretrain.py", "workflows/search.py", "workflows/space.py",
    "workflows/trial_processes.py", "workflows/launch.py",
    "models/build.py", "models/student.py", "models/width.py", "models/width_bert.py",
    "gate/clean.py", "gate/clean_plan.py", "gate/edits.py", "gate/policy.py", "gate/report.py",
    "gate/selection.py", "gate/splits.py", "api/http/cors.py", "store/audit.py", "store/backup.py",
)  # fmt: skip
"""The same, file by file."""
OF_COMMANDS = {
    "recipe.py": r"--(set|mix|map) takes",
    # Names of runs and what goes on: a job is its own name, goes on by itself, and has local teachers.
    "engine/runs.py": "--(resume|name)", "engine/loop.py": "--resume",
    "store/models.py": "that began it, with --resume",
    "workflows/distil/responses.py": "--(resume|name)", "data/forms.py": "--to",
    "workflows/distil/recipe.py": "--(resume|set teacher)",
    # A server is started by a command, and a driver by arguments.
    "api/service.py": "--(job-processes|runner)", "serving/opened_model.py": "student --from",
    "jobs/ray_runner.py": "--[a-z]",
    "engine/train.py": "trials are compared", "models/catalog.py": "--only-binary",
}  # fmt: skip
"""Texts of other files that clients of the API never come to."""


def texts() -> Iterator[tuple[str, str]]:
    """Every text of the rooms that serve the API, and the file that has it; docstrings left out."""
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


def test_no_text_that_can_reach_a_client_names_an_option() -> None:
    found = {name for name, text in texts() if OPTION.search(without_commands(text))}
    assert not found


@pytest.mark.parametrize("face", FACES)
def test_rules_of_the_gate_name_no_option(face: str) -> None:
    for rule in all_rules().values():
        text = with_setting_names(f"{rule.about} {rule.why} {rule.fix}", FACES[face])
        assert not OPTION.search(text) and "`luthier " not in text, rule.id
        typed = with_setting_names(rule.fix, option)
        assert "`data." not in typed, rule.id


LONG = "a:3: [row.too_long] Too long. Fix: Shorten the row, or choose `data.long_rows=drop`."


def test_each_face_has_its_own_words() -> None:
    said = {name: with_setting_names(LONG, face) for name, face in FACES.items()}
    start = "a:3: [row.too_long] Too long. Fix: Shorten the row"
    assert with_setting_names(LONG, option) == f"{start}, or choose --set data.long_rows=drop."
    assert said["bedrock"] == f"{start}, or choose hyperParameters luthier.longRows=drop."
    assert said["native"] == f"{start}, or choose settings.data.long_rows=drop."
    # OpenAI's jobs have no such setting.
    assert said["openai"] == f"{start}."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Use `objective.method=kto`, or mend the rows.", "Mend the rows."),
        ("Use `objective.method=dpo`, or mend.", "Use method.type=dpo, or mend."),
        ("Low: try `training.learning_rate=1e-3`.", "Low: try another learning_rate_multiplier."),
        ("Rename the keys. Or say `data.columns.prompt=Q`.", "Rename the keys."),
        ("Run `luthier models pull X`, or `luthier inspect --no-base`.", ""),
        ("fits:\n  `data.long_rows=drop` (1 GB)\n  `base=tiny` (2 GB)", "fits:\n  model=tiny (2 GB)"),
        ("refused:\n  `training.epochs`: too many\n  `training.threads`: 0",
         "refused:\n  n_epochs: too many\n  training.threads: 0"),
        ("The model `my.model` does not exist.", "The model `my.model` does not exist."),
        ("no setting. Two  spaces, or none.\n", "no setting. Two  spaces, or none.\n"),
    ],
)  # fmt: skip
def test_advice_that_a_face_has_not_is_left_out(text: str, told: str) -> None:
    assert with_setting_names(text, openai) == told
    named = map_texts({"a": [text, 3]}, lambda each: with_setting_names(each, openai))
    assert named == {"a": [told, 3]}


def test_commands_are_for_those_who_have_a_terminal() -> None:
    text = "Look at it, or run `luthier inspect a.jsonl --html b`. Try `data.long_rows=drop`."
    assert without_commands(text) == "Look at it. Try `data.long_rows=drop`."


def test_faces_name_fields_that_there_are() -> None:
    fields = {f"training.{name}" for name in Training.model_fields} | set(Recipe.model_fields)
    for each in HYPERPARAMETERS.values():
        field = ".".join(each.field)
        assert each.field[0] != "training" or field in fields
        assert bedrock(field, None) == f"hyperParameters {each.name}"
    named = {openai(field, None) for field in fields} - {None}
    assert set(Hyperparameters.model_fields) <= named
