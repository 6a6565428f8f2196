"""Rejections before any work, without leftover files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import Notes, manifest_of, pairs, write_rows
from stored_files import files_in

from luthier.engine import job, train
from luthier.engine.machine import choose_machine
from luthier.engine.runs import CHECKPOINTS, REFIT, Run
from luthier.errors import (
    DataError,
    DiskFull,
    DoesNotFit,
    LuthierError,
    RecipeError,
    RunConflict,
    UnknownModel,
)
from luthier.files import read_json, write_json
from luthier.library.models import find
from luthier.recipe import Recipe


def refused(recipe: Recipe, kind: type[LuthierError], match: str, home: Path) -> None:
    with pytest.raises(kind, match=match) as caught:
        train.train(recipe)
    assert caught.value.exit_code == (1 if isinstance(caught.value, DiskFull) else 2)
    assert files_in(home) == []
    train_again = [path.name for path in home.rglob("x")]
    assert train_again == []


def test_too_little_memory_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available_memory", lambda device: 100_000)
    refused(recipe(), DoesNotFit, r"needs about 0\.\d GB of memory and 0\.0 GB are", luthier_home)


def test_too_little_disk_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 20_000_000, "total": 21_000_000})
    monkeypatch.setattr("luthier.files.shutil.disk_usage", lambda path: usage)
    refused(recipe(), DoesNotFit, "this run needs 2[0-9] MB on the disk", luthier_home)


def test_refit_needs_disk_space_without_stored_checkpoints(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(job, "need_disk", lambda folder, size, what: needed.append(size))
    base = find(recipe().base)

    def bytes_needed(stored: int = 0, **training: Any) -> int:
        asked = recipe(training)
        data = asked.data.model_copy(update={"validation_share": 0.5})
        asked = asked.model_copy(update={"data": data})
        machine = choose_machine("float32", 1)
        job.prepare_job(asked, base, machine, Notes(), stored_bytes=stored)
        return needed[-1]

    once, twice = bytes_needed(refit=False), bytes_needed(refit=True)
    # Five checkpoints instead of three, and not the other way round: the rest is small here.
    assert twice - once == pytest.approx((once - 20_000_000) * 2 / 3, rel=0.2)
    assert bytes_needed(stored=once - 1_000, refit=False) == 1_000
    assert bytes_needed(stored=2 * once, refit=False) == 0


def test_checkpoints_of_run_and_refit_are_counted(luthier_home: Path) -> None:
    run = Run("base", "x")
    assert run.checkpoint_bytes() == 0
    for folder in (run.folder, run.folder / REFIT):
        (folder / CHECKPOINTS / "step-1").mkdir(parents=True)
        (folder / CHECKPOINTS / "step-1" / "tensors.safetensors").write_bytes(b"x" * 10)
        (folder / "other.safetensors").write_bytes(b"x")
    assert run.checkpoint_bytes() == 20


@pytest.mark.slow
def test_full_tuning_needs_more_disk_than_lora(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(job, "need_disk", lambda folder, size, what: needed.append(size))
    for adaptation in ("lora", "full"):
        train.train(recipe({"max_steps": 1}, adaptation=adaptation, name=adaptation))
    stored = sum(p.stat().st_size for p in Path(find("tiny-llama:full").folder).rglob("*.safet*"))
    assert needed[1] > needed[0] > 20_000_000
    assert needed[1] - 20_000_000 > 10 * stored


@pytest.mark.parametrize(
    ("fields", "kind", "match"),
    [
        ({"adaptation": {"targets": "no_proj"}}, RecipeError, "no linear layer is called no_proj"),
        ({"base": "nothing-here"}, UnknownModel, "Unknown model"),
        ({"data": {"train": "/no/such.jsonl"}}, DataError, "file.missing"),
        ({"objective": "causal_lm"}, DataError, "row.objective"),
    ],
)
def test_invalid_job_is_refused_without_files(
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    fields: dict[str, Any],
    kind: type[LuthierError],
    match: str,
) -> None:
    refused(recipe(**fields), kind, match, luthier_home)


def test_network_without_token_tree_is_refused(
    recipe: Callable[..., Recipe], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found only when the weights are loaded; the name is free again all the same."""

    def refuse(*arguments: Any) -> Any:
        raise RecipeError("networks of this type cannot be trained here yet")

    monkeypatch.setattr("luthier.engine.trained_network.as_network", refuse)
    refused(recipe(), RecipeError, "cannot be trained here yet", luthier_home)
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["unknown", "encoder"])
def test_base_without_causal_lm_is_refused(
    recipe: Callable[..., Recipe],
    tiny_model_folder: Path,
    tmp_path: Path,
    luthier_home: Path,
    kind: str,
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    config = read_json(folder / "config.json")
    other = "evil" if kind == "unknown" else "bert"
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    write_json(folder / "config.json", {**config, "model_type": other, "auto_map": auto_map})
    (folder / "evil.py").write_text("import os; os.mkdir('exploded')")
    kinds = (UnknownModel, "Cannot load") if other == "evil" else (RecipeError, "cannot be")
    refused(recipe(base=str(folder)), *kinds, luthier_home)


def test_existing_name_is_refused(recipe: Callable[..., Recipe], luthier_home: Path) -> None:
    result = train.train(recipe())
    before = files_in(luthier_home)
    with pytest.raises(RunConflict) as refused:
        train.train(recipe({"max_steps": 5}))
    assert refused.value.rule == "run.name_taken"
    shutil.rmtree(result.run_dir)
    with pytest.raises(RunConflict) as refused:
        train.train(recipe())
    assert refused.value.rule == "run.name_taken"
    assert files_in(luthier_home) == [name for name in before if not name.startswith("runs")]


def small_context(folder: Path, target: Path, context: int) -> Path:
    shutil.copytree(folder, target)
    config = read_json(target / "config.json")
    write_json(target / "config.json", {**config, "max_position_embeddings": context})
    return target


@pytest.mark.slow
def test_long_rows_are_refused_dropped_or_cut_and_counted(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path, luthier_home: Path
) -> None:
    base = str(small_context(tiny_model_folder, tmp_path / "small", 100))
    long = [{"prompt": "say it", "completion": "Z" * 200}] * 3
    data = str(write_rows(tmp_path / "long.jsonl", [*pairs(9), *long]))
    with pytest.raises(DataError) as caught:
        train.train(recipe(base=base, data={"train": data}))
    assert files_in(luthier_home) == []
    assert [problem.line for problem in caught.value.problems] == [10, 11, 12]
    for problem in caught.value.problems:
        assert problem.rule == "row.too_long"
        assert "221 tokens" in problem.message
        assert "data.long_rows=drop" in problem.advice
    for choice, left, tokens in (("drop", 9, None), ("truncate", 12, 100)):
        reporter = Notes()
        data_fields = {"train": data, "long_rows": choice, "validation_share": 0}
        spec = recipe({"max_steps": 1, "batch_size": 50}, base=base, name=choice, data=data_fields)
        result = train.train(spec, reporter=reporter)
        counted = manifest_of(result)["data"]
        assert counted["dropped"] == (3 if choice == "drop" else 0)
        assert counted["truncated"] == (3 if choice == "truncate" else 0)
        assert counted["rows"] == result.rows == left
        if tokens:
            assert result.tokens == counted["tokens"] > 3 * tokens
        (note,) = [each for each in reporter.notes if "3 rows longer than 100 tokens were" in each]
        assert not note.startswith("warning")


def test_row_with_reply_beyond_context_is_refused(
    recipe: Callable[..., Recipe], tiny_model_folder: Path, tmp_path: Path
) -> None:
    base = str(small_context(tiny_model_folder, tmp_path / "small", 64))
    rows = [*pairs(3), {"prompt": "Z" * 200, "completion": "yes"}]
    data = {"train": str(write_rows(tmp_path / "long.jsonl", rows)), "long_rows": "truncate"}
    with pytest.raises(DataError) as refused:
        train.train(recipe(base=base, data=data))
    assert refused.value.rule == "row.nothing_learned"


def planned(
    rows: list[dict[str, Any]], base: Path, folder: Path, **training: Any
) -> tuple[job.TrainingJob, Notes]:
    """Prepare a job of ``rows`` and return the job with the notes."""
    notes = Notes()
    data = {"train": str(write_rows(folder / "rows.jsonl", rows)), "validation_share": 0}
    spec = Recipe.parse(
        {
            "base": str(base),
            "name": "planned",
            "data": data,
            "training": {"precision": "float32", **training},
        }
    )
    machine = choose_machine("float32", 1)
    return job.prepare_job(spec, find(spec.base), machine, notes), notes


def test_mostly_truncated_rows_are_a_warning_with_the_count(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    def note(long: int) -> str:
        rows = [
            {"text": "fox " * (900 if n < long else 1) + str(n), "label": "ab"[n % 2]}
            for n in range(6)
        ]
        notes = planned(rows, family_folder("bert"), tmp_path)[1].notes
        (found,) = [each for each in notes if "were truncated" in each]
        return found

    assert note(2).startswith("2 rows")
    assert note(3).startswith("warning: 3 rows") and "of 6" in note(3)


def test_contrastive_batch_of_single_row_needs_negatives(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pairs_of_text = [{"anchor": f"fox {n}", "positive": f"card {n}"} for n in range(6)]
    base = family_folder("bert")
    with pytest.raises(RecipeError) as caught:
        planned(pairs_of_text, base, tmp_path, batch_size=1)
    assert caught.value.setting == "training.batch_size"
    planned(pairs_of_text, base, tmp_path, batch_size=2)
    planned(
        [{**row, "negative": "the river"} for row in pairs_of_text], base, tmp_path, batch_size=1
    )


def test_imported_reader_head_is_not_new(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(family_folder("bert"), folder)
    rows = [
        {
            "question": "who?",
            "context": f"the fox {n}",
            "answers": {"text": ["fox"], "answer_start": [4]},
        }
        for n in range(6)
    ]
    assert planned(rows, folder, tmp_path)[0].new_head
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "architectures": ["BertForQuestionAnswering"]})
    assert not planned(rows, folder, tmp_path)[0].new_head
