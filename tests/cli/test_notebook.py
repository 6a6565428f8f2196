"""Notebooks of use cases: calls equal to the commands of the page, and executed cells."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from luthier.cli.examples import examples
from luthier.cli.notebook import as_python
from luthier.files import luthier_home

BASES = luthier_home() / "models" / "base"
FEW_ROWS = """\
for file in Path("rows").glob("t*.jsonl"):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: 80 if file.stem == "train" else 20]))
"""


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (
            "luthier tune rows/train.zip --epochs 2 --set data.image_size=64 --name cells",
            "luthier.tune('rows/train.zip', epochs=2.0, name='cells', data__image_size=64)",
        ),
        (
            "luthier compare a.jsonl --prompt b.txt --tuned base:x --grader first_line",
            "luthier.compare('a.jsonl', ['base:x'], prompt=[Path('b.txt')], graders=['first_line'])",
        ),
        (
            'luthier predict base:x "My chain slips" --top 2',
            "luthier.predict('base:x', 'My chain slips', top=2)",
        ),
        ("luthier examples x rows", "!{sys.executable} -m luthier examples x rows"),
    ],
)
def test_command_becomes_a_call(command: str, call: str) -> None:
    assert as_python(command) == call


@pytest.mark.parametrize("use", examples().uses, ids=lambda use: str(use["name"]))
def test_notebook_is_valid_and_has_all_commands(
    use: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = examples(use["name"], notebook=True).notebook
    assert file is not None
    written = nbformat.read(file, as_version=4)
    nbformat.validate(written)
    cells = [cell["source"] for cell in written.cells if cell["cell_type"] == "code"]
    assert cells[1:] == [as_python(command) for command in use["commands"]]
    for cell in cells:
        compile(TransformerManager().transform_cell(cell), "cell", "exec")
    # IPython replaces $NAME and {NAME} in a command by variables.
    assert not any(character in " ".join(use["commands"]) for character in "${}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["route-messages", "diseases", "copied-questions"])
def test_executed_notebook_renders_each_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not BASES.is_dir():
        pytest.skip("no base models here: `luthier models pull` fetches them")
    shutil.copytree(BASES, tmp_path / "home" / "models" / "base", copy_function=os.symlink)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    file = examples(name, notebook=True).notebook
    assert file is not None
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if "luthier examples" in cell["source"]:
            cell["source"] += f"\n{FEW_ROWS}"
        if cell["source"].startswith("luthier.tune"):
            cell["source"] = cell["source"][:-1] + ", training__max_steps=2)"
    NotebookClient(notebook, timeout=1200).execute()
    calls = [cell for cell in notebook.cells if cell["source"].startswith("luthier.")]
    assert len(calls) >= 3
    for cell in calls:
        *progress, result = cell["outputs"]
        assert "<table" in result["data"]["text/html"]
        assert [each["text"] for each in progress if each["name"] == "stderr"] == []
        assert not any("\x1b" in each["text"] for each in progress)
