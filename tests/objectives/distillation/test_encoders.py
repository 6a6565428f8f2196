"""Classifier distillation: the triple loss row by row, the map between widths, and rejections."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import luthier
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.engine.train import Result, train
from luthier.errors import DataError, RecipeError
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification, EncoderDistillation
from luthier.objectives.base import OtherModel, RunModels, add_modules
from luthier.objectives.means import mean_loss
from luthier.recipe import Recipe
from luthier.types import Example, Row

CPU = torch.device("cpu")
LABELLED = (
    ("the quick brown fox", "animal"),
    ("my card has not arrived", "bank"),
    ("the lazy dog jumps", "animal"),
    ("when will my new card be delivered", "bank"),
)
BARE = ("a brown dog and a quick fox", "the capital of France is Paris")
ROWS = [
    *(LabelledText("f", n, text=text, label=label) for n, (text, label) in enumerate(LABELLED)),
    *(RawText("g", n, text=text) for n, text in enumerate(BARE)),
]


def narrow(family_folder: Callable[[str], Path], folder: Path) -> Path:
    """A BERT of half the width and a third of the layers, on the same tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

    config = AutoConfig.from_pretrained(family_folder("bert"))
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 16, 1, 2
    torch.manual_seed(5)
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(family_folder("bert")).save_pretrained(folder)
    return folder


def classifier(folder: Path, seed: int) -> tuple[Network, Any]:
    """Return the network, and the same network in transformers."""
    torch.manual_seed(seed)
    head = Classification(labels=("animal", "bank")).head()
    model = load_model(folder, torch.float32, CPU, head)
    plain = copy.deepcopy(model).eval()
    return as_network(model, CPU, torch.float32), plain


@pytest.mark.parametrize("student", ["same", "narrow"])
@pytest.mark.parametrize("budget", [1000, 12])
def test_the_triple_loss_row_by_row(
    budget: int, student: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    wide = family_folder("bert")
    folder = wide if student == "same" else narrow(family_folder, tmp_path / "narrow")
    network, student_model = classifier(folder, 1)
    network.others["teacher"], teacher_model = classifier(wide, 2)
    chat = load_chat_format(folder)
    objective = EncoderDistillation(teacher="t", temperature=3.0, soft=0.7, hard=0.2, hidden=0.4)
    teacher = OtherModel(Classification(labels=("animal", "bank")), 32, chat)
    objective = objective.bind(RunModels(chat, others={"teacher": teacher}))
    objective = objective.fit(ROWS, chat)
    extra = add_modules(network.model, objective.attach(network.model))
    assert hasattr(network.model, "teacher_map") == (student == "narrow")
    examples = [objective.encode(row, n, chat) for n, row in enumerate(ROWS)]
    expected = 0.0
    for row, example in zip(ROWS, examples, strict=True):
        ids = torch.from_numpy(example.ids_T)[None]
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids, output_hidden_states=True)
                for model in (student_model, teacher_model)
            )
        p, q = (theirs.logits[0] / 3).softmax(-1), (ours.logits[0] / 3).softmax(-1)
        expected += 0.7 * 9 * float((p * (p / q).log()).sum())
        if isinstance(row, LabelledText):
            expected -= 0.2 * float(ours.logits[0].log_softmax(-1)[int(row.label == "bank")])
        states = ours.hidden_states[-1][0]
        if student == "narrow":
            states = states @ network.model.teacher_map.weight.detach().t()
        cosines = F.cosine_similarity(states, theirs.hidden_states[-1][0], dim=-1)
        expected += 0.4 * float((1 - cosines).mean())
    found = mean_loss(objective, network, examples, budget)
    assert found == pytest.approx(expected / len(ROWS), rel=1e-5)
    for name in extra:
        delattr(network.model, name)
    network.others = {}
    assert objective.parity_loss(network, examples, budget) > 0


def test_unlabelled_text_is_encoded_and_unknown_label_refused(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("bert"))
    objective = EncoderDistillation(teacher="t", labels=("animal", "bank")).fit([], chat)
    bare: Example = objective.encode(ROWS[-1], 0, chat)
    assert objective.describe(bare) == "without a label"
    assert objective.describe(objective.encode(ROWS[1], 0, chat)) == "bank"
    with pytest.raises(Exception) as refused:
        objective.encode(LabelledText("f", 1, text="a fish", label="fish"), 0, chat)
    assert refused.value.rule == "label.unseen"


def tuned(base: Path | str, name: str, rows: list[Row], tmp_path: Path, **objective: Any) -> Result:
    data = tmp_path / f"{name}.jsonl"
    lines = [
        {"text": row.text, **({"label": row.label} if isinstance(row, LabelledText) else {})}
        for row in rows
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return train(
        Recipe.parse(
            {
                "base": str(base),
                "name": name,
                "data": {"train": data, "validation_share": 0},
                "objective": objective,
                "adaptation": {"method": "full"},
                "training": {"max_steps": 120, "batch_size": 4, "learning_rate": 5e-3},
            }
        )
    )


@pytest.mark.slow
def test_narrow_student_learns_from_unlabelled_texts(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    wide, small = family_folder("bert"), narrow(family_folder, tmp_path / "narrow")
    teacher = tuned(wide, "teacher", ROWS[:4], tmp_path, method="classification")
    bare = [RawText("f", n, text=row.text) for n, row in enumerate(ROWS)]
    student = tuned(
        small, "pupil", bare, tmp_path, method="encoder_distillation", teacher=teacher.model_id
    )
    lines = Path(student.run_dir, "metrics.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "train"]
    assert np.mean([s["loss"] for s in steps[-3:]]) < 0.5 * np.mean([s["loss"] for s in steps[:3]])
    assert steps[-1]["agreement"] == 1.0
    model = luthier.load(student.model_id)
    texts = [text for text, _ in LABELLED]
    assert [answer["label"] for answer in model.predict(texts)] == [label for _, label in LABELLED]
    stored = list(Path(student.model_dir).glob("*.safetensors"))
    assert stored and all(b"teacher_map" not in path.read_bytes() for path in stored)
    # An unknown label, a generator as teacher, a teacher with different classes.
    with pytest.raises(DataError, match="none of the teacher's"):
        tuned(
            small,
            "odd",
            [*ROWS[:4], LabelledText("f", 9, text="a fish", label="fish")],
            tmp_path,
            method="encoder_distillation",
            teacher=teacher.model_id,
        )
    asked = {"method": "encoder_distillation", "teacher": str(family_folder("llama"))}
    with pytest.raises(RecipeError, match=r"is for causal_lm.*logit_distillation"):
        tuned(small, "odd", bare, tmp_path, **asked)
    asked = {**asked, "teacher": teacher.model_id, "labels": ["bank", "animal"]}
    with pytest.raises(RecipeError, match=r"has the classes animal, bank"):
        tuned(small, "odd", bare, tmp_path, **asked)
