"""``luthier examples``, and the output of ``luthier demo``; tests/test_readme.py runs it (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.demo import _measure, print_replies
from luthier.data.shapes.conversations import PromptCompletion
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
