"""Grading by the label of a classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import luthier
from luthier.data.shapes.conversations import PromptOnly
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError
from luthier.graders import Answer, Classifier, grade_answers
from luthier.inference.prediction import Predictor
from luthier.library.models import find
from luthier.workflows.evaluate import open_graders


def test_probability_of_the_label_matches_predict(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    rows = [{"text": f"{word} {n}", "label": word} for word in ("snow", "sand") for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = luthier.tune(
        data,
        base=str(family_folder("bert")),
        name="x",
        training__max_steps=2,
        data__validation_share=0,
    ).model_id
    grader = open_graders({"mine": Classifier(model=model, label="snow")}, 2, print)["mine"]
    texts = ["snow again", "sand " * 400]
    answers = [Answer((), text, None, PromptOnly("f", 1, "?")) for text in texts]
    (wanted,) = Predictor.open(find(model)).answers([RawText("f", 1, texts[0])])
    found = grade_answers(grader, answers).scores
    assert found[0] == pytest.approx(wanted["scores"]["snow"], abs=1e-4)
    assert 0 < found[1] < 1
    with pytest.raises(RecipeError, match="snow"):
        open_graders({"mine": Classifier(model=model, label="rain")}, 2, print)
