"""Grading by the label of a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.data.shapes.conversations import PromptOnly
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.graders import Answer, Classifier, grade_answers
from luthier.inference.prediction import Predictor
from luthier.library.models import find
from luthier.workflows.evaluate import open_graders


def tuned(
    family_folder: Callable[[str], Path], path: Path, rows: list[dict[str, Any]], **more: Any
) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return luthier.tune(
        path,
        base=str(family_folder("bert")),
        name="x",
        training__max_steps=2,
        data__validation_share=0,
        **more,
    ).model_id


def test_probabilities_of_several_labels_match_predict(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    labels = [["snow"], ["sand"], ["snow", "sand"], []]
    rows = [{"text": f"a {n}", "label": labels[n % 4]} for n in range(16)]
    model = tuned(family_folder, tmp_path / "texts.jsonl", rows)
    grader = open_graders({"mine": Classifier(model=model, label="snow")}, 2, print)["mine"]
    (wanted,) = Predictor.open(find(model)).answers([RawText("f", 1, "snow")])
    (found,) = grade_answers(grader, [Answer((), "snow", None, PromptOnly("f", 1, "?"))]).scores
    assert found == pytest.approx(wanted["scores"]["snow"], abs=1e-4)


@pytest.mark.parametrize("method", ["regression", "reward_model"])
def test_model_of_ratings_or_rewards_is_refused(
    method: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "regression": [{"text": f"a {n}", "rating": n} for n in range(16)],
        "reward_model": [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(16)],
    }
    model = tuned(family_folder, tmp_path / "texts.jsonl", rows[method], objective=method)
    with pytest.raises(RecipeError) as refused:
        open_graders({"mine": Classifier(model=model, label="snow")}, 2, print)
    assert refused.value.rule == "scorer.task"


def test_probability_of_the_label_matches_predict(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for word in ("snow", "sand") for n in range(8)]
    model = tuned(family_folder, tmp_path / "texts.jsonl", rows)
    grader = open_graders({"mine": Classifier(model=model, label="snow")}, 2, print)["mine"]
    texts = ["snow again", "sand " * 400]
    answers = [Answer((), text, None, PromptOnly("f", 1, "?")) for text in texts]
    (wanted,) = Predictor.open(find(model)).answers([RawText("f", 1, texts[0])])
    found = grade_answers(grader, answers).scores
    assert found[0] == pytest.approx(wanted["scores"]["snow"], abs=1e-4)
    assert 0 < found[1] < 1
    with pytest.raises(RecipeError, match="snow"):
        open_graders({"mine": Classifier(model=model, label="rain")}, 2, print)
