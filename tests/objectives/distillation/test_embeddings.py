"""Embedding distillation: the loss row by row, the projection of a wider teacher, and results."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.data.shapes.texts import RawText
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification, Contrastive, EmbeddingDistillation
from luthier.objectives.base import OtherModel, RunModels
from luthier.objectives.distillation.embeddings import project, rotate
from luthier.objectives.means import mean_loss
from luthier.recipe import Recipe

CPU = torch.device("cpu")
TEXTS = (
    "the quick brown fox",
    "my card has not arrived",
    "the lazy dog jumps",
    "when will my new card be delivered",
    "the capital of France is Paris",
)


def encoder(folder: Path, seed: int) -> tuple[Network, Any]:
    """Return the network, and the same network in transformers."""
    torch.manual_seed(seed)
    head = EmbeddingDistillation().head()
    model = load_model(folder, torch.float32, CPU, head)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    plain = copy.deepcopy(model).eval()
    return as_network(model, CPU, torch.float32), plain


def test_the_loss_is_the_angle_to_the_teachers_embedding(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder("bert")
    chat = load_chat_format(folder)
    objective = EmbeddingDistillation(teacher="t")
    examples = [
        objective.encode(RawText("f", n, text=text), n, chat) for n, text in enumerate(TEXTS)
    ]
    (network, student_model), (teacher, teacher_model) = encoder(folder, 1), encoder(folder, 2)
    places = []
    for one in (student_model, teacher_model):
        with torch.no_grad():
            states = [
                one(input_ids=torch.from_numpy(e.ids_T)[None]).last_hidden_state[0].mean(0)
                for e in examples
            ]
        places.append(torch.stack(states))
    expected = float((1 - torch.cosine_similarity(*places)).mean())
    network.others["teacher"] = teacher
    notes: list[str] = []
    with torch.no_grad():
        objective.precompute(network, [*examples, examples[0]], 20, tmp_path, notes.append)
    assert not network.others and notes == []
    assert mean_loss(objective, network, examples, 15) == pytest.approx(expected, rel=1e-4)


def test_projection_preserves_largest_singular_values() -> None:
    torch.manual_seed(0)
    plane = torch.nn.functional.normalize(torch.randn(40, 3) @ torch.randn(3, 12), dim=-1)
    placed, share = project(plane, 3)
    torch.testing.assert_close(placed @ placed.t(), plane @ plane.t(), rtol=1e-4, atol=1e-5)
    assert share == pytest.approx(1.0)
    whole = torch.nn.functional.normalize(torch.randn(40, 12), dim=-1)
    _, share = project(whole, 5)
    values = np.linalg.svd(whole.numpy(), compute_uv=False) ** 2
    assert share == pytest.approx(float(values[:5].sum() / values.sum()), rel=1e-5)


def test_turning_finds_the_way_back() -> None:
    torch.manual_seed(1)
    points = torch.randn(30, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    torch.testing.assert_close(rotate(points @ rotation, points), points, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_narrow_student_learns_teacher_cosines(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

    wide, small = family_folder("bert"), tmp_path / "narrow"
    config = AutoConfig.from_pretrained(wide)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 16, 1, 2
    torch.manual_seed(5)
    BertForMaskedLM(config).save_pretrained(small)
    AutoTokenizer.from_pretrained(wide).save_pretrained(small)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def tuned(base: Path, name: str, steps: int, **objective: str) -> str:
        result = train(
            Recipe.parse(
                {
                    "base": str(base),
                    "name": name,
                    "data": {"train": data, "validation_share": 0},
                    "objective": objective,
                    "adaptation": {"method": "full"},
                    "training": {"max_steps": steps, "batch_size": 5, "learning_rate": 1e-2},
                }
            )
        )
        return result.model_id

    teacher = tuned(wide, "teacher", 3, method="contrastive", pooling="first")
    fields = {"method": "embedding_distillation", "teacher": teacher}
    cosines = []
    for model in (
        teacher,
        tuned(small, "before", 1, **fields),
        tuned(small, "after", 60, **fields),
    ):
        places = np.array(luthier.load(model).embed(list(TEXTS)))
        cosines.append(places @ places.T)
    before, after = (float(np.abs(cosines[0] - each).mean()) for each in cosines[1:])
    assert after < 0.25 * before


def test_the_teacher_must_embed(family_folder: Callable[[str], Path]) -> None:
    objective = EmbeddingDistillation(teacher="base:router")
    chat = load_chat_format(family_folder("bert"))
    classifier = OtherModel(Classification(labels=("a", "b")), 32, chat)
    with pytest.raises(RecipeError) as refused:
        objective.bind(RunModels(chat, others={"teacher": classifier}))
    assert refused.value.rule == "teacher.task"
    encoder = OtherModel(Contrastive(pooling="first"), 32, chat)
    bound = objective.bind(RunModels(chat, others={"teacher": encoder}))
    assert bound.teacher_pooling == "first"
