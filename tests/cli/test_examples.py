"""``luthier examples``."""

from __future__ import annotations

from pathlib import Path

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
    assert all(
        load_rows(str(each))
        for each in written
        if each.suffix == ".jsonl" and each.stem != "credits"
    )
    words = " ".join(use["commands"]).split()
    used = {word.removeprefix("rows/") for word in words if word.startswith("rows/")}
    assert all((found.folder / each).exists() for each in used)
    page = (Path(__file__).parents[2] / "docs" / use["page"]).read_text()
    assert all(command in page for command in use["commands"])
    assert len(page.splitlines()) <= 90
    with pytest.raises(RecipeError):
        examples(use["name"], tmp_path / "rows")


def test_notebook_is_written_once_and_without_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert examples("diseases", notebook=True).notebook == Path("diseases.ipynb")
    with pytest.raises(RecipeError, match="exists"):
        examples("diseases", notebook=True)
    with pytest.raises(RecipeError, match="no folder"):
        examples("diseases", Path("rows"), notebook=True)


def test_rows_are_small_and_unknown_use_case_is_refused(tmp_path: Path) -> None:
    assert (
        sum(each.stat().st_size for each in INDEX.parent.rglob("*") if each.is_file()) < 2_500_000
    )
    with pytest.raises(RecipeError, match=str(USES[0]["name"])):
        examples("nothing", tmp_path / "rows")
