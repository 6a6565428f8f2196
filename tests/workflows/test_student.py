"""Students: cutting, records, loading, tuning, and rejections without files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stored_files import files_in

import luthier
from luthier.engine.metrics import Reporter
from luthier.errors import LuthierError, RecipeError, RunConflict
from luthier.files import read_json, sha256_of, verify
from luthier.library import models as store
from luthier.models.manifest import MANIFEST
from luthier.models.networks.heads import head_kind
from luthier.models.shrinking.student import StudentShape
from luthier.workflows.student import make_student

CPU = torch.device("cpu")
LABELLED = [
    {"text": f"My card number {n} has not arrived", "label": "late" if n % 2 else "lost"}
    for n in range(8)
]
PAIRS = [{"prompt": f"colour {n}?", "completion": "blue"} for n in range(8)]
SHORT: dict[str, Any] = {
    "training__max_steps": 2,
    "training__batch_size": 4,
    "training__precision": "float32",
    "training__threads": 1,
}


def rows(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Notes(Reporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_student_is_stored_with_origin(tiny_model_folder: Path) -> None:
    notes = Notes()
    made = make_student(str(tiny_model_folder), "small", StudentShape(layers=2), notes)
    assert made.model_id == "tiny-llama:small" and (made.layers, made.kept) == (2, (0, 3))
    assert notes.told[0] == "layers: 2 of 4 (0, 3)"
    weights = load_file(Path(made.model_dir) / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == made.weights
    stored = store.find(made.model_id)
    manifest = stored.manifest.plain()
    assert stored.parent is None and stored.root == str(tiny_model_folder)
    assert manifest["parent"] == str(tiny_model_folder) and manifest["kind"] == "causal_lm"
    assert manifest["student"]["asked"] == {"layers": 2}
    assert manifest["student"]["kept"] == {"model.layers": [0, 3]}
    teachers = manifest["student"]["teacher_sha256"]
    assert teachers == {"model.safetensors": sha256_of(tiny_model_folder / "model.safetensors")}
    verify(stored.folder, manifest["files"])
    teacher = load_file(tiny_model_folder / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight, teacher[name.replace("layers.1.", "layers.3.")]), name


def test_full_size_student_generates_like_teacher(tiny_model_folder: Path) -> None:
    made = luthier.student(str(tiny_model_folder), name="all", layers=4)
    shape = {"template", "stop_ids", "start_id", "opening_ids", "closing_ids", "sentence"}
    assert read_json(Path(made.model_dir) / MANIFEST)["format"].keys() == shape
    ours, theirs = luthier.load(made.model_id), luthier.load(str(tiny_model_folder))
    assert ours.generate(["What is the"], max_tokens=8) == theirs.generate(
        ["What is the"], max_tokens=8
    )
    formats = [store.find(m).chat for m in (made.model_id, str(tiny_model_folder))]
    assert formats[0].stop_ids == formats[1].stop_ids
    assert formats[0].template.kind == formats[1].template.kind


@pytest.mark.parametrize(
    ("family", "adaptation"),
    [("llama", "lora"), ("gpt2", "full"), pytest.param("t5", "lora", marks=pytest.mark.slow)],
)
def test_a_student_is_tuned_as_any_model(
    family: str, adaptation: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shape = StudentShape(layers=2, intermediate=40)
    made = make_student(str(family_folder(family)), "small", shape)
    data = rows(tmp_path / "rows.jsonl", PAIRS)
    result = luthier.tune(
        data, base=made.model_id, name="tuned", adaptation__method=adaptation, **SHORT
    )
    assert result.steps == 2 and result.weights >= made.weights
    found = store.find(result.model_id)
    assert found.manifest.parent == made.model_id
    assert found.root == str(family_folder(family))
    assert luthier.load(result.model_id).generate(["colour 1?"], max_tokens=3)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_a_student_learns_labels(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    made = make_student(str(family_folder(family)), "small", StudentShape(layers=2))
    data = rows(tmp_path / "rows.jsonl", LABELLED)
    result = luthier.tune(data, base=made.model_id, name="tuned", **SHORT)
    assert result.steps == 2
    assert luthier.load(result.model_id).predict(["My card"])[0]["label"] in ("late", "lost")


@pytest.mark.parametrize("adaptation", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_tuned_teacher_is_merged_with_head(
    adaptation: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = rows(tmp_path / "rows.jsonl", LABELLED)
    teacher = luthier.tune(
        data, base=str(family_folder("bert")), name="t", adaptation__method=adaptation,
        training__learning_rate=0.03, **SHORT,
    )  # fmt: skip
    made = luthier.student(teacher.model_id, name="s", keep=[0, 2])
    found = store.find(made.model_id)
    assert found.root == str(family_folder("bert")) and found.parent is None
    assert "adaptation" not in found.manifest.recipe
    merged = store.load(store.find(teacher.model_id), torch.float32, CPU)
    student = store.load(found, torch.float32, CPU)
    assert head_kind(student) == "sequence_classification"
    theirs = merged.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, theirs[name.replace("layer.1.", "layer.2.")]), name
    base = load_file(family_folder("bert") / "model.safetensors")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(student.state_dict()[query], base[query])
    answer = luthier.load(made.model_id).predict(["My card"])[0]
    assert answer["scores"].keys() == {"late", "lost"}
    whole = luthier.student(teacher.model_id, name="same", layers=3)
    ours, teachers = (luthier.load(m).predict(["My card"])[0]["scores"] for m in (
        whole.model_id, teacher.model_id
    ))  # fmt: skip
    assert ours == pytest.approx(teachers, abs=2e-2)


def test_student_of_student_has_masked_lm_head(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first = make_student(str(family_folder("bert")), "one", StudentShape(layers=2))
    second = make_student(first.model_id, "two", StudentShape(layers=1))
    assert second.kept == (0,) and second.parent == first.model_id
    teacher = load_file(family_folder("bert") / "model.safetensors")
    held = load_file(Path(second.model_dir) / "model.safetensors")
    name = "cls.predictions.transform.dense.weight"
    assert torch.equal(held[name], teacher[name])
    assert luthier.load(second.model_id).embed(["My card"]).shape == (1, 32)
    data = rows(tmp_path / "rows.jsonl", [{"text": "My card has not arrived yet"}] * 8)
    luthier.tune(data, base=second.model_id, name="m", objective__method="masked_lm", **SHORT)


def test_the_precision_of_the_teacher_stays(
    tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama(tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    made = make_student(str(tmp_path / "half"), "small", StudentShape(layers=2))
    held = load_file(Path(made.model_dir) / "model.safetensors")
    assert {weight.dtype for weight in held.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in held.values()) == made.weights
    assert made.saved_bytes < 2 * made.weights + 10_000


def test_a_taken_name_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    shape = StudentShape(layers=2)
    make_student(str(tiny_model_folder), "small", shape)
    with pytest.raises(RunConflict):
        make_student(str(tiny_model_folder), "small", shape)
    data = rows(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(RunConflict):
        luthier.tune(data, base=str(tiny_model_folder), name="small", **SHORT)
    luthier.tune(data, base=str(tiny_model_folder), name="run", **SHORT)
    with pytest.raises(RunConflict):
        make_student(str(tiny_model_folder), "run", shape)


def test_a_refusal_leaves_nothing(tiny_model_folder: Path, luthier_home: Path) -> None:
    with pytest.raises(RecipeError):
        make_student(str(tiny_model_folder), "small", StudentShape(layers=9))
    assert files_in(luthier_home) == []


def test_unmergeable_teacher_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", PAIRS)
    prompt = luthier.tune(
        data, base=str(tiny_model_folder), name="p", adaptation__method="prompt", **SHORT
    )
    with pytest.raises(RecipeError):
        make_student(prompt.model_id, "small", StudentShape(layers=2))


def test_student_with_damaged_weights_is_not_stored(
    tiny_model_folder: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.workflows import student

    def damaged(model: Any, chat: Any, folder: Path) -> None:
        with torch.no_grad():
            spoiled = model.model.norm.weight.clone()
            model.model.norm.weight.add_(1.0)
            saved(model, chat, folder)
            model.model.norm.weight.copy_(spoiled)

    saved = student.save_network
    monkeypatch.setattr(student, "save_network", damaged)
    with pytest.raises(LuthierError):
        make_student(str(tiny_model_folder), "small", StudentShape(layers=2))
    assert files_in(luthier_home) == []
