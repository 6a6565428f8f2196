"""``luthier examples``, and the output of ``luthier demo``; tests/test_readme.py runs it (slow)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.demo import _measure, print_replies
from luthier.cli.examples import INDEX, examples, show_examples
from luthier.data.shapes.conversations import PromptCompletion
from luthier.errors import RecipeError
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.significance import RowScores


def test_demo_prints_scores_of_base_and_tuned_model(capsys: pytest.CaptureFixture[str]) -> None:
    def evaluation(reply: str, score: float) -> Evaluation:
        rows = [PromptCompletion("t", n, f"question {n}", "[route: a]") for n in range(60)]
        records = [{"prompt": row.prompt, "reply": reply} for row in rows]
        return Evaluation({"label": RowScores.of([score] * 60)}, [*rows], records=records)

    print_replies("base:tuned", evaluation("no idea", 0.0), evaluation("[route: a] Hello", 1.0))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["on", "60", "unseen", "rows", "base", "tuned"] in lines
    assert ["label", "0%", "100%"] in lines
    assert len(lines) < 40
    assert "[route: a] Hello" in " ".join(" ".join(line) for line in lines)


def test_replies_are_graded_by_label_and_style(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    rows = [{"prompt": f"question {n}", "completion": "[route: a]\n\nBye"} for n in range(2)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _measure(str(tiny_model_folder), tmp_path / "test.jsonl")
    assert found.scores == {"routing label": 0.0, "house style": 0.0}
    assert [record["prompt"] for record in found.records] == ["question 0", "question 1"]


@pytest.mark.parametrize("use", examples().uses, ids=lambda use: use["name"])
def test_examples_write_rows_that_their_commands_read(
    use: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rows"
    show_examples(examples(use["name"], folder))
    shown = capsys.readouterr().out
    assert all(command in shown for command in use["commands"])
    written = {path.name for path in folder.iterdir()}
    assert {"NOTICE.md", "README.md"} & written
    words = " ".join(use["commands"]).split()
    assert {word.removeprefix("rows/") for word in words if word.startswith("rows/")} <= written
    page = Path(__file__).parents[2] / "docs" / use["page"]
    assert all(line in page.read_text() for line in use["commands"])
    with pytest.raises(RecipeError, match="exists"):
        examples(use["name"], folder)


def test_examples_lists_uses_within_the_size_of_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_examples(examples())
    shown = capsys.readouterr().out
    assert all(use["name"] in shown for use in examples().uses)
    assert sum(path.stat().st_size for path in INDEX.parent.rglob("*")) < 2_500_000
    with pytest.raises(RecipeError, match="route-messages"):
        examples("route-mesages")
