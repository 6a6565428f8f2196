"""Simple baselines of a run: stored results, and no effect on training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from short_runs import CPU, manifest_of, write_rows

from luthier.cli.tune import print_label_issues
from luthier.data.shapes.texts import RatedText
from luthier.engine import comparison
from luthier.engine.runs import LABEL_ISSUES, Result
from luthier.engine.train import train
from luthier.evaluation.baselines import ComparedRows
from luthier.files import read_json
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Contrastive
from luthier.recipe import Recipe
from luthier.tasks import RATING

ANIMALS = ("fox", "dog", "cat", "bird")
THINGS = ("card", "bank", "house", "stone")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Write rows with the label as a word of the text."""
    rows = [
        {
            "text": f"the {word} and my {other} {n}",
            "label": "animal" if word in ANIMALS else "thing",
        }
        for n, (word, other) in enumerate(
            (word, other)
            for word in (*ANIMALS, *THINGS)
            for other in ("river", "tree", "cloud") * 3
        )
    ]
    return write_rows(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def tuned(labelled: Path, family_folder: Callable[[str], Path]) -> Callable[..., Result]:
    def run(name: str, **training: Any) -> Result:
        settings = {"max_steps": 2, "precision": "float32", "threads": 1, **training}
        recipe = {
            "base": str(family_folder("bert")), "name": name, "training": settings,
            "data": {"train": str(labelled), "validation_share": 0.25},
        }  # fmt: skip
        return train(Recipe.parse(recipe))

    return run


@pytest.mark.slow
def test_pairs_are_compared_with_words_and_base_model(
    tuned: Callable[..., Result], labelled: Path, tmp_path: Path
) -> None:
    rows = [
        {"anchor": f"where is number {n}", "positive": f"number {n} is in row {n % 7}"}
        for n in range(10, 50)  # one-letter words do not count
    ]
    write_rows(labelled, rows)
    found = tuned("pairs").comparison
    assert found is not None
    assert (found.measure, found.rows) == ("recall_at_1", 10)
    scores = {each.name: each.score for each in found.baselines}
    assert list(scores) == ["BM25 on words", "the base model as it is"]
    assert scores["BM25 on words"] == 1.0
    # A step at this rate leaves the base model unchanged, so both measurements agree.
    same = tuned("same", max_steps=1, learning_rate=1e-12).comparison
    assert same is not None
    assert (
        same.tuned == {each.name: each.score for each in same.baselines}["the base model as it is"]
    )
    assert same.verdict


def test_classifier_is_compared_with_baselines(tuned: Callable[..., Result]) -> None:
    result = tuned("beside")
    found = result.comparison
    assert found is not None
    assert found.measure == "accuracy"
    assert found.rows + found.train_rows == 72
    scores = {each.name: each.score for each in found.baselines}
    assert scores["naive Bayes on words"] == 1.0
    assert len(scores) == 7
    assert found.tuned is not None
    assert found.tuned in [pytest.approx(n / found.rows) for n in range(found.rows + 1)]
    # The stored comparison is equal in the run and in the model.
    stored = read_json(Path(result.run_dir) / "result.json")
    assert TypeAdapter(Result).validate_python(stored) == result
    kept = manifest_of(result)["metrics"]["comparison"]
    assert kept["tuned"] == found.tuned
    assert len(kept["baselines"]) == len(scores)


@pytest.mark.slow
def test_baselines_do_not_change_run(
    tuned: Callable[..., Result],
) -> None:
    beside, alone = tuned("beside"), tuned("alone", baseline_seconds=0)
    assert alone.comparison is None
    weights = [manifest_of(result)["trained_weights_sha256"] for result in (beside, alone)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_generating_models_have_no_baselines(recipe: Callable[..., Recipe]) -> None:
    assert train(recipe()).comparison is None


def test_result_without_comparison_is_read(tuned: Callable[..., Result]) -> None:
    result = tuned("alone", baseline_seconds=0)
    stored = read_json(Path(result.run_dir) / "result.json")
    del stored["comparison"]
    assert TypeAdapter(Result).validate_python(stored) == result


MISLABELLED = (17, 60, 181)


@pytest.fixture
def mislabelled(labelled: Path) -> list[dict[str, str]]:
    """Return 240 rows of two topics that an untrained network separates, with three wrong labels."""
    words = {"animal": "fox fox fox fox fox", "thing": "card card card card card"}
    rows = [
        {"text": f"{words[label]} {number % 40}", "label": label}
        for number, label in enumerate(("animal", "thing") * 120)
    ]
    for line in MISLABELLED:
        rows[line - 1]["label"] = "thing" if rows[line - 1]["label"] == "animal" else "animal"
    write_rows(labelled, rows)
    return rows


def issues_of(result: Result) -> list[dict[str, Any]]:
    text = (Path(result.run_dir) / LABEL_ISSUES).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_rows_with_wrong_labels_are_listed(
    tuned: Callable[..., Result],
    labelled: Path,
    mislabelled: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tuned("wrong", refit=False)
    issues = issues_of(result)
    assert sorted(each["line"] for each in issues) == [*MISLABELLED]
    for each in issues:
        row = mislabelled[each["line"] - 1]
        assert (each["file"], each["label"], each["text"]) == (
            str(labelled), row["label"], row["text"],
        )  # fmt: skip
        assert {each["label"], each["likely_label"]} == {"animal", "thing"}
    assert result.label_issues is not None
    assert (result.label_issues.issues, result.label_issues.rows) == (3, 240)
    # The model says how many there are, and nothing of the rows.
    assert manifest_of(result)["metrics"]["label_issues"] == {"issues": 3, "rows": 240}
    assert (
        TypeAdapter(Result).validate_python(read_json(Path(result.run_dir) / "result.json"))
        == result
    )
    capsys.readouterr()
    print_label_issues(result)
    out = capsys.readouterr().out
    assert "3 " in out and "240 rows" in out
    for line in MISLABELLED:
        row = mislabelled[line - 1]
        other = "thing" if row["label"] == "animal" else "animal"
        assert f'labelled.jsonl:{line}  "{row["label"]}" looks like "{other}": {row["text"]}' in out
    assert str(Path(result.run_dir) / LABEL_ISSUES) in out


@pytest.mark.slow
def test_search_for_label_issues_does_not_change_run(
    tuned: Callable[..., Result], mislabelled: list[dict[str, str]]
) -> None:
    looked, alone = tuned("looked", refit=False), tuned("alone", refit=False, baseline_seconds=0)
    assert alone.label_issues is None
    assert not (Path(alone.run_dir) / LABEL_ISSUES).exists()
    weights = [manifest_of(result)["trained_weights_sha256"] for result in (looked, alone)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_no_label_issues_with_right_labels_or_few_rows(
    tuned: Callable[..., Result],
    labelled: Path,
    mislabelled: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for line in MISLABELLED:
        mislabelled[line - 1]["label"] = mislabelled[line]["label"]
        mislabelled[line - 1]["text"] = mislabelled[line]["text"]
    write_rows(labelled, mislabelled)
    right = tuned("right", refit=False, max_steps=1)
    assert right.label_issues is not None
    assert (right.label_issues.issues, right.label_issues.rows) == (0, 240)
    assert not (Path(right.run_dir) / LABEL_ISSUES).exists()
    write_rows(labelled, mislabelled[:180])
    few = tuned("fewer", refit=False, max_steps=1)
    assert few.comparison is not None and few.label_issues is None
    capsys.readouterr()
    for result in (right, few):
        print_label_issues(result)
    assert not capsys.readouterr().out


def test_time_limit_is_checked_within_long_rows(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder("bert")
    objective = Contrastive()
    network = as_network(
        load_model(folder, torch.float32, CPU, objective.head()), CPU, torch.float32
    )
    chat = load_chat_format(folder)
    rows = [RatedText("f", n, "the quick brown fox and my card", n / 40) for n in range(40)]
    both = ComparedRows(rows, [objective.encode(row, n, chat) for n, row in enumerate(rows)])
    tokens, seconds, progress = both.examples[0].tokens, iter(range(1_000)), list[int]()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(comparison, "time", clock)
    states = comparison.base_states(
        network,
        objective,
        RATING,
        both,
        both,
        tokens,
        8.0,
        lambda done, total: progress.append(done),
    )
    # Each check takes a second: five before the held-out rows, three before training rows.
    assert states is not None
    assert states.rows == progress[-1] - len(rows) == 3 * comparison.PASSES
