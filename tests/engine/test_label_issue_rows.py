"""Training rows with a label issue: left out, relabelled or kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import Notes, manifest_of, write_rows

from luthier.data.conversations.chat import ChatFormat
from luthier.engine import comparison
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.dataset import prepare
from luthier.engine.job import prepare_job, prepare_refit
from luthier.engine.loop import Loop
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.runs import LABEL_ISSUES, Result, Run
from luthier.engine.train import train
from luthier.evaluation.label_issues import LabelIssues
from luthier.library import models as store
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.recipe import DataSpec, Recipe
from luthier.types import Example

WRONG = (17, 60, 181)
WORDS = {"animal": "fox fox fox fox fox", "thing": "card card card card card"}


def rows_with(wrong: tuple[int, ...]) -> list[dict[str, str]]:
    """Return 240 rows of two topics that an untrained network separates, with wrong labels."""
    rows = [
        {"text": f"{WORDS[label]} {number % 40}", "label": label}
        for number, label in enumerate(("animal", "thing") * 120)
    ]
    for line in wrong:
        rows[line - 1]["label"] = "thing" if rows[line - 1]["label"] == "animal" else "animal"
    return rows


@pytest.fixture
def tuned(tmp_path: Path, family_folder: Callable[[str], Path]) -> Callable[..., Result]:
    def run(
        name: str,
        chosen: str | None = None,
        resume: bool = False,
    ) -> Result:
        recipe = {
            "base": str(family_folder("bert")),
            "name": name,
            "training": {"max_steps": 3, "precision": "float32", "threads": 1, "refit": False},
            "data": {
                "train": str(write_rows(tmp_path / "rows.jsonl", rows_with(WRONG))),
                "validation_share": 0.25,
                **({"label_issues": chosen} if chosen else {}),
            },
        }
        return train(Recipe.parse(recipe), resume, Notes())

    return run


def sha256(result: Result) -> str:
    return str(manifest_of(result)["trained_weights_sha256"])


@pytest.mark.slow
def test_rows_are_left_out(tuned: Callable[..., Result]) -> None:
    kept, left_out = tuned("kept"), tuned("left-out", "leave_out")
    assert (kept.rows, manifest_of(kept)["data"]["rows"]) == (180, 180)
    assert 177 <= left_out.rows < 180 and manifest_of(left_out)["data"]["rows"] == left_out.rows
    assert left_out.label_issues is not None and left_out.label_issues.issues == 3
    assert sha256(left_out) != sha256(kept)


def test_setting_without_a_check_is_reported(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    notes = Notes()
    recipe = {
        "base": str(family_folder("bert")),
        "training": {"max_steps": 1, "precision": "float32", "threads": 1, "baseline_seconds": 0},
        "data": {
            "train": str(write_rows(tmp_path / "rows.jsonl", rows_with(WRONG)[:40])),
            "label_issues": "leave_out",
        },
    }
    assert train(Recipe.parse(recipe), reporter=notes).label_issues is None
    assert [each for each in notes.notes if "data.label_issues=leave_out" in each]


ISSUES = [3, 4, 5, 8, 10, 12]


@pytest.fixture
def changed(
    tmp_path: Path, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Result, list[Example]]]:
    """Train on 20 rows with six known issues; return the result and the learned examples."""
    data = write_rows(tmp_path / "rows.jsonl", rows_with(())[:20])
    held = write_rows(tmp_path / "held.jsonl", [{"text": "a lazy fox", "label": "animal"}] * 4)
    issues = [{"file": str(data), "line": line, "likely_label": "thing"} for line in ISSUES]
    monkeypatch.setattr(Run, "read_label_issues", lambda self: issues)
    learned: list[Example] = []

    def run(chosen: str, epochs: float) -> tuple[Result, list[Example]]:
        settings = {"epochs": epochs, "batch_size": 2, "patience": 0, "baseline_seconds": 0}
        recipe = {
            "base": str(family_folder("bert")),
            "objective": {"method": "classification", "probe": False},
            "data": {"train": str(data), "validation": str(held), "label_issues": chosen},
            "training": {**settings, "precision": "float32", "threads": 1},
        }
        step = Loop._step

        def recorded(loop: Loop) -> None:
            learned.extend(loop.examples[index] for index in loop.order.batch(loop.progress.step))
            step(loop)

        monkeypatch.setattr(Loop, "_step", recorded)
        return train(Recipe.parse(recipe)), learned

    return run


def test_batches_have_the_likely_label(
    changed: Callable[..., tuple[Result, list[Example]]],
) -> None:
    result, learned = changed("relabel", epochs=1)
    assert (result.rows, result.steps) == (20, 10)
    # Labels in alphabetical order: animal, thing. Lines with odd numbers had the label "animal".
    targets = {each.row + 1: int(each.target.item()) for each in learned}
    assert targets == {n: int(n % 2 == 0 or n in ISSUES) for n in range(1, 21)}


def test_epochs_and_counts_of_remaining_rows(
    changed: Callable[..., tuple[Result, list[Example]]],
) -> None:
    result, learned = changed("leave_out", epochs=3)
    assert (result.rows, result.steps, result.rows_seen) == (14, 21, 42)
    lines = Counter(each.row + 1 for each in learned)
    assert lines == {line: 3 for line in range(1, 21) if line not in ISSUES}
    first = learned[:14]
    record = manifest_of(result)["data"]
    assert record["tokens"] == sum(map(len, first))
    assert record["learned_tokens"] == sum(np.count_nonzero(each.weight_T) for each in first)


def test_refit_ends_at_share_of_steps(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_with(())[:40])
    recipe = Recipe.parse(
        {
            "base": str(family_folder("bert")),
            "objective": "classification",
            "data": {"train": str(data), "validation_share": 0.25, "label_issues": "leave_out"},
            "training": {"epochs": 4.0, "batch_size": 2, "precision": "float32", "refit": True},
        }
    )
    base, machine = store.find(recipe.base), choose_machine("float32", 1)
    job = prepare_job(recipe, base, machine, Reporter())
    assert (len(job.data.train), job.steps, job.refit_steps) == (30, 60, 80)
    learned = [(row.file, row.line) for row in job.data.learned]
    left = job.with_label_issues(dict.fromkeys(learned[:10], "thing"))
    assert (len(left.data.train), left.steps, left.refit_steps) == (20, 40, 60)
    refit = prepare_refit(left, kept_step=30, steps_before=40)
    assert (refit.data.counts["rows"], refit.steps, refit.until) == (30, 60, 45)


@pytest.mark.slow
def test_resumed_run_leaves_out_the_same_rows(
    tuned: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned("whole", "leave_out")
    step = Loop._step

    def stop(loop: Loop) -> None:
        if loop.progress.step == 2:
            raise KeyboardInterrupt
        step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", lambda *_: True)
        patch.setattr(Loop, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned("resumed", "leave_out")
    # Another machine may find other rows: the rows of the first start count.
    monkeypatch.setattr(comparison, "find_label_issues", lambda *_: LabelIssues([], 240))
    resumed = tuned("resumed", "leave_out", resume=True)
    assert sha256(resumed) == sha256(whole) and resumed.rows == whole.rows
    assert len((Path(resumed.run_dir) / LABEL_ISSUES).read_text().splitlines()) == 3


def encoded(tmp_path: Path, folder: Path, **spec: Any) -> tuple[Any, ChatFormat, Path]:
    data = write_rows(tmp_path / "rows.jsonl", rows_with(()))
    chat = load_chat_format(folder)
    fields = {"train": str(data), "validation_share": 0.25, **spec}
    objective = OBJECTIVES["classification"]()
    return prepare(DataSpec.model_validate(fields), objective, chat, 64, 0), chat, data


def test_mixed_sets_keep_sizes(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    other = write_rows(tmp_path / "other.jsonl", rows_with(())[:9])
    mix = [{"train": str(other), "weight": 0.05}]
    data, chat, _ = encoded(tmp_path, family_folder("bert"), mix=mix)
    learned = [(row.file, row.line) for row in data.learned]
    assert len(learned) == len(data.train) == 189
    likely = {(str(other), 3): "thing", (str(other), 9): "animal", learned[4]: "thing"}
    left = data.with_label_issues(likely, chat, relabel=False)
    assert (left.main, left.mixed[0].rows, left.mixed[0].drawn) == (179, 7, data.mixed[0].drawn)
    rest = [e for place, e in enumerate(data.train) if learned[place] not in likely]
    assert all(one is two for one, two in zip(left.train, rest, strict=True))
    # The weight of the mix counts rows per row of the main file.
    half = data.with_label_issues(dict.fromkeys(learned[:100], "thing"), chat, relabel=False)
    assert (half.main, half.mixed[0].rows, half.mixed[0].drawn) == (80, 9, 4)


def test_held_out_rows_do_not_change(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    data, chat, main = encoded(tmp_path, family_folder("bert"))
    held = data.held_out["validation"][str(main)]
    learned = [row.line for row in data.learned]
    likely = {(str(main), held[0]): "thing", (str(main), learned[0]): "thing"}
    changed = data.with_label_issues(likely, chat, relabel=True)
    assert changed.validation is data.validation and len(changed.train) == len(data.train)
    assert changed.train[0].target.tolist() == [data.objective.labels.index("thing")]
    assert changed.train[0].ids_T.tolist() == data.train[0].ids_T.tolist()
    assert [e.target.tolist() for e in changed.train[1:]] == [
        e.target.tolist() for e in data.train[1:]
    ]
