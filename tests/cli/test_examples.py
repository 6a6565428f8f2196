"""``luthier examples``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.examples import examples
from luthier.data.rows import load_rows
from luthier.errors import RecipeError
from luthier.examples import INDEX

USES = examples().uses


@pytest.mark.parametrize("use", USES, ids=lambda use: str(use["name"]))
def test_rows_of_use_case_are_readable_and_have_a_notice(
    use: dict[str, str], tmp_path: Path
) -> None:
    found = examples(use["name"], tmp_path / "rows")
    assert found.folder is not None
    written = sorted(each for each in found.folder.rglob("*") if each.is_file())
    assert any(each.suffix == ".md" for each in written)
    assert all(load_rows(str(each)) for each in written if each.suffix == ".jsonl")
    words = " ".join(use["commands"]).split()
    used = {word.removeprefix("rows/") for word in words if word.startswith("rows/")}
    assert used <= {str(each.relative_to(found.folder)) for each in written}
    page = (Path(__file__).parents[2] / "docs" / use["page"]).read_text()
    assert all(command in page for command in use["commands"])
    with pytest.raises(RecipeError):
        examples(use["name"], tmp_path / "rows")


@pytest.mark.parametrize("use", USES, ids=lambda use: str(use["name"]))
def test_cells_of_notebook_are_the_commands_of_the_page(
    use: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = examples(use["name"], notebook=True).notebook
    assert file is not None
    written = json.loads(file.read_text())
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    cells = written["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    commands = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert commands == [f"!{command}" for command in use["commands"]]
    # IPython replaces $NAME and {NAME} in a command by variables.
    assert not any(character in command for command in commands for character in "${}")
    with pytest.raises(RecipeError, match="exists"):
        examples(use["name"], notebook=True)
    with pytest.raises(RecipeError, match="no folder"):
        examples(use["name"], Path("rows"), notebook=True)


def test_rows_are_small_and_unknown_use_case_is_refused(tmp_path: Path) -> None:
    assert (
        sum(each.stat().st_size for each in INDEX.parent.rglob("*") if each.is_file()) < 2_500_000
    )
    with pytest.raises(RecipeError, match=str(USES[0]["name"])):
        examples("nothing", tmp_path / "rows")
