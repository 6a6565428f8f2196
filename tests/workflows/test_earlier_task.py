"""The score of an earlier task before and after a training: with the task's own head, or a probe."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import RecipeError
from luthier.workflows.earlier_task import MetricChange

ANIMALS = ("fox", "dog", "cat", "cow", "hen", "pig")
FIELDS: dict[str, Any] = {
    "training__max_steps": 20,
    "training__batch_size": 8,
    "training__learning_rate": 3e-3,
    "training__precision": "float32",
    "training__refit": False,
    "data__validation_share": 0,
    "adaptation": "full",
}
FamilyFolder = Callable[[str], Path]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(data: Path, base: str | Path, name: str, **fields: Any) -> str:
    return luthier.tune(data, base=str(base), name=name, **{**FIELDS, **fields}).model_id


def only_change(found: Any) -> MetricChange:
    (change,) = found.changes
    return change  # type: ignore[no-any-return]


def label_rows(names: str, count: int = 48) -> list[dict[str, Any]]:
    return [
        {"text": f"the {ANIMALS[n % 6]} number {n}", "label": names[n % 2]} for n in range(count)
    ]


@pytest.mark.slow
def test_shared_head_is_scored_directly(family_folder: FamilyFolder, tmp_path: Path) -> None:
    rows = label_rows("ab")
    swapped = [{**row, "label": "ba"["ab".index(row["label"])]} for row in rows]
    earlier = write(tmp_path / "earlier.jsonl", rows)
    before = tune(earlier, family_folder("bert"), "before", training__max_steps=60)
    after = tune(write(tmp_path / "later.jsonl", swapped), before, "after", training__max_steps=60)
    found = luthier.forgetting(after, rows=earlier)
    change = only_change(found)
    assert (change.name, change.measure, change.rows) == ("earlier.jsonl, own head", "accuracy", 48)
    for model, score in ((before, change.base), (after, change.tuned)):
        assert score.value == luthier.evaluate(model, earlier).scores["accuracy"]
    assert change.tuned.value < change.base.value and found.regressions == [change]
    assert found.plain()["changes"][0]["significant"] is True


@pytest.mark.slow
def test_replaced_head_is_measured_by_a_probe(family_folder: FamilyFolder, tmp_path: Path) -> None:
    earlier = write(tmp_path / "earlier.jsonl", label_rows("ab"))
    later = write(tmp_path / "later.jsonl", label_rows("xy"))
    before = tune(earlier, family_folder("bert"), "before")
    frozen = tune(later, before, "frozen", adaptation="feature_extraction")
    change = only_change(luthier.forgetting(frozen, rows=earlier))
    assert (change.name, change.rows) == ("earlier.jsonl, probe", 24)
    # Frozen states are the parent's states.
    assert change.base.parts_R.tolist() == change.tuned.parts_R.tolist()
    moved = luthier.forgetting(tune(later, before, "moved"), rows=earlier)
    assert "logistic regression" in moved.remarks[0] and "24" in moved.remarks[0]


@pytest.mark.slow
def test_adapter_of_a_pretrained_encoder_has_a_probe(
    family_folder: FamilyFolder, tmp_path: Path
) -> None:
    """The base has no head, and the earlier task is a different one."""
    base = family_folder("bert")
    tagged = [{"tokens": ["a", a, "runs"], "tags": ["O", "B-X", "O"]} for a in ANIMALS * 4]
    model = tune(write(tmp_path / "tags.jsonl", tagged), base, "tags", adaptation="lora")
    rated = [{"text": f"{a} {n}", "rating": n % 5} for n, a in enumerate(ANIMALS * 4)]
    # Partners of other words: a search that compares an anchor with itself would be right.
    pairs = [
        {"anchor": f"a {a} {n}", "positive": "it runs"[: 1 + n % 7]}
        for n, a in enumerate(ANIMALS * 4)
    ]
    for name, rows, measure in (
        ("labels", label_rows("ab"), "accuracy"),
        ("ratings", rated, "mean_absolute_error"),
        ("pairs", pairs, "recall_at_1"),
        ("words", tagged, "entity_f1"),
    ):
        found = luthier.forgetting(model, rows=write(tmp_path / f"{name}.jsonl", rows))
        change = only_change(found)
        assert (change.name, change.measure) == (f"{name}.jsonl, probe", measure)
        assert change.rows == (24 if name in ("pairs", "labels") else 12)
        assert name != "pairs" or change.base.value < 1


@pytest.mark.slow
def test_ratings_and_embeddings_are_scored_with_the_parent(
    family_folder: FamilyFolder, tmp_path: Path
) -> None:
    base = family_folder("bert")
    pairs = [{"anchor": f"a {a} {n}", "positive": f"{a} {n}"} for n, a in enumerate(ANIMALS * 4)]
    data = write(tmp_path / "pairs.jsonl", pairs)
    change = only_change(luthier.forgetting(tune(data, base, "pairs"), rows=data))
    assert change.name == "pairs.jsonl, own head" and change.rows == 24
    rated = [{"text": f"{a} {n}", "rating": n % 5} for n, a in enumerate(ANIMALS * 4)]
    data = write(tmp_path / "rated.jsonl", rated)
    first = tune(data, base, "rated")
    change = only_change(luthier.forgetting(tune(data, first, "again"), rows=data))
    assert (change.name, change.measure) == ("rated.jsonl, own head", "mean_absolute_error")


@pytest.mark.slow
def test_readers_need_their_head_and_rerankers_do_not(
    family_folder: FamilyFolder, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(family_folder("bert"))
    start, end = tokenizer.convert_ids_to_tokens([5, 6])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, 5), (end, 6)],
    )
    base.mkdir()
    for file in family_folder("bert").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(base)
    questions = [
        {"question": "who runs", "context": f"{a} runs", "answers": {"text": [a], "answer_start": [0]}}
        for a in ANIMALS * 2
    ]  # fmt: skip
    ranked = [
        {"query": a, "positive": f"the {a}", "negatives": [f"the {ANIMALS[n - 1]}"]}
        for n, a in enumerate(ANIMALS)
    ]
    for name, rows, measure, fields in (
        ("reads", questions, "answer_f1", {"objective": "question_answering"}),
        ("ranks", ranked, "recall_at_1", {"objective": "reranker"}),
    ):
        data = write(tmp_path / f"{name}.jsonl", rows)
        first = tune(data, base, name, **fields)
        change = only_change(luthier.forgetting(tune(data, first, f"{name}2", **fields), rows=data))
        assert change.name == f"{name}.jsonl, own head"
        assert change.measure == measure
    labels = write(tmp_path / "labels.jsonl", label_rows("ab"))
    classifier = tune(labels, base, "labels")
    with pytest.raises(RecipeError):
        luthier.forgetting(classifier, rows=tmp_path / "reads.jsonl")
    change = only_change(luthier.forgetting(classifier, rows=tmp_path / "ranks.jsonl"))
    assert (change.name, change.measure) == ("ranks.jsonl, probe", "recall_at_1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "sounds"])
def test_images_and_sounds(kind: str, family_folder: FamilyFolder, tmp_path: Path) -> None:
    for n in range(8):
        for place, label in enumerate(["one", "two"]):
            file = tmp_path / kind / label / str(n)
            file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "images":
                pixels = np.full((24, 24, 3), 40 + 150 * place + n, np.uint8)
                Image.fromarray(pixels).save(file.with_suffix(".png"))
                continue
            wave_T = np.sin(np.arange(6_000) * (0.2 + place) + n)
            with wave.open(str(file.with_suffix(".wav")), "wb") as sound:
                sound.setparams((1, 2, 8_000, 0, "NONE", ""))
                sound.writeframes((wave_T * 9_000).astype("<i2").tobytes())
    data = tmp_path / kind
    base = family_folder({"images": "small_cnn", "sounds": "ast"}[kind])
    first = tune(data, base, "first", training__max_steps=5)
    probe = only_change(luthier.forgetting(first, rows=data))
    assert probe.name == f"{kind}, probe" and probe.rows == 8
    again = only_change(luthier.forgetting(tune(data, first, "again"), rows=data))
    assert again.name == f"{kind}, own head" and again.rows == 16


@pytest.mark.slow
def test_generated_replies_stand_beside_the_drift(
    family_folder: FamilyFolder, tmp_path: Path
) -> None:
    rows = [{"prompt": f"the {a}", "completion": "yes"} for a in ANIMALS]
    data = write(tmp_path / "rows.jsonl", rows)
    model = tune(data, family_folder("llama"), "says")
    found = luthier.forgetting(model, rows=data)
    names = [each.name for each in found.changes]
    assert names[1:] == ["rows.jsonl, own head"] and "drift" in found.plain()


def test_command_prints_the_measure(family_folder: FamilyFolder, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", label_rows("ab"))
    model = tune(data, family_folder("bert"), "labels", training__max_steps=2)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["forgetting", model, "--rows", str(data), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "probe" in done.stdout and "rows.jsonl, probe" in page.read_text()
    refused = CliRunner().invoke(app, ["forgetting", model])
    assert refused.exit_code == 2 and "--rows" in refused.output
