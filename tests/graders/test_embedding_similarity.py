"""Cosines of the embeddings of two texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

import luthier
from luthier.data.shapes.conversations import PromptOnly
from luthier.errors import RecipeError
from luthier.graders import Answer, EmbeddingSimilarity, Mix, Multi, grade_answers
from luthier.inference.prediction import Predictor
from luthier.library.models import find
from luthier.workflows.evaluate import open_graders


def answers(*replies: str) -> list[Answer]:
    return [
        Answer((), reply, "up", PromptOnly("f", 1, "?", members={"to": "up"})) for reply in replies
    ]


def test_each_text_is_read_once_and_compared() -> None:
    asked = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        asked.append(list(texts))
        places = {"up": (0, 1), "right": (1, 0), "both": (0.6, 0.8)}
        return np.array([places[text] for text in texts], np.float32)

    for reference in ("{{item.expected}}", "{{item.to}}"):
        grader = EmbeddingSimilarity(reference=reference, embedder=embed)
        found = grade_answers(grader, answers("up", "right", "both", "right")).scores
        assert found == pytest.approx([1, 0, 0.8, 0])
    assert asked == [["up", "right", "both"]] * 2
    assert EmbeddingSimilarity.model_validate(grader.model_dump()).embedder is None
    with pytest.raises(RecipeError):
        grade_answers(EmbeddingSimilarity(), answers("up"))


def test_stored_encoder_scores_match_predict(
    family_folder: Callable[[str], Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    names = ("snow", "sky", "sea", "sun", "moon", "leaf", "rock", "dust")
    rows = [{"anchor": f"the {name}", "positive": f"a {name}"} for name in names]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = luthier.tune(
        pairs,
        base=str(family_folder("bert")),
        name="x",
        objective="contrastive",
        training__max_steps=2,
        data__validation_share=0,
    ).model_id
    data = tmp_path / "rows.jsonl"
    texts = [("the snow", "white"), ("sky", "the sky is blue" * 20)]
    data.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in texts))
    mine = EmbeddingSimilarity(model=encoder)
    graders = {"mine": mine, "both": Multi(graders={"a": mine}, calculate_output="a >= -1")}
    found = luthier.evaluate(str(tiny_model_folder), data, graders=graders, max_tokens=4)
    predictor = Predictor.open(find(encoder))
    for each in found.records:
        assert each["expected"] is not None
        one, other = torch.from_numpy(predictor.embed([each["reply"], each["expected"]]))
        assert each["scores"]["mine"] == pytest.approx(
            float(cosine_similarity(one, other, 0)), abs=1e-4
        )
    assert found.scores["both"] == 1


def test_model_without_encoder_is_refused(tiny_model_folder: Path) -> None:
    grader = EmbeddingSimilarity(model=str(tiny_model_folder))
    with pytest.raises(RecipeError):
        open_graders({"a": Mix(parts={"b": grader})}, 1, print)
