"""``luthier models student``, and other commands with the resulting student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stored_files import files_in
from typer.testing import CliRunner

from luthier.cli.app import app


def run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_student_model_lifecycle(tiny_model_folder: Path, tmp_path: Path) -> None:
    made = json.loads(
        run(
            "models", "student", "--from", tiny_model_folder, "--layers", 2, "--heads", 2,
            "--intermediate", 32, "--hidden", 16, "--name", "small", "--json",
        ).stdout
    )  # fmt: skip
    assert made["model_id"] == "tiny-llama:small"
    assert (made["layers"], made["kept"]) == (2, [0, 3])
    assert made["weights"] < made["teacher_weights"] / 2
    listed = json.loads(run("models", "list", "--json").stdout)["custom"]
    assert [(m["id"], m["adaptation"]) for m in listed] == [
        ("tiny-llama:small", "student, 2 of 4 layers")
    ]
    assert "tiny-llama:small" in run("models", "list").stdout
    shown = json.loads(run("models", "show", "tiny-llama:small", "--json").stdout)
    assert shown["lineage"] == ["tiny-llama:small", str(tiny_model_folder)]
    assert shown["student"]["asked"] == {
        "layers": 2, "heads": 2, "intermediate": 32, "hidden": 16
    }  # fmt: skip
    assert all(file["intact"] for file in shown["files"].values())
    run("models", "export", "tiny-llama:small", tmp_path / "out")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.hidden_size == 16
    run("models", "student", "--from", "tiny-llama:small", "--layers", 1, "--name", "smaller")
    said = run("models", "remove", "tiny-llama:small", code=2).output
    assert "tiny-llama:smaller" in said and "--force" in said
    run("models", "remove", "tiny-llama:smaller")
    run("models", "remove", "tiny-llama:small")
    assert json.loads(run("models", "list", "--json").stdout)["custom"] == []


def test_student_command_prints_remaining_layers(tiny_model_folder: Path) -> None:
    done = run(
        "models", "student", "--from", tiny_model_folder, "--keep", "0,1,3", "--name", "small"
    )
    said = " ".join(done.output.split())
    for words in (
        "layers: 3 of 4 (0, 1, 3)",
        "MB in float32",
        "tiny-llama:small is stored and verified",
        "luthier tune DATA --base tiny-llama:small",
    ):
        assert words in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--layers", "9"],
        ["--keep", "0;1"],
        ["--keep", "0,1", "--layers", "2"],
        ["--hidden", "21"],
    ],
)
def test_invalid_student_options_leave_no_files(
    arguments: list[str], tiny_model_folder: Path, luthier_home: Path
) -> None:
    run("models", "student", "--from", tiny_model_folder, "--name", "x", *arguments, code=2)
    assert files_in(luthier_home) == []
