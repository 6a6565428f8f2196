"""Thresholds of labels, chosen from a precision on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from luthier.cli.terminal.options import TUNING, tuning_recipe
from luthier.data.shapes.texts import LabelledText
from luthier.errors import RecipeError
from luthier.objectives import Classification
from luthier.types import Example

SPAM = np.array([0.95, 0.9, 0.8, 0.7, 0.2, 0.1])
IS_SPAM = [True, True, False, True, False, False]


class Scores:
    """A network whose scores are given: the row is the index."""

    def read_rows(self, examples: Sequence[Example], budget: int, read: Any) -> list[Any]:
        return read(SimpleNamespace(rows=range(len(examples))))

    def row_scores(self, batch: Any) -> torch.Tensor:
        p_N2 = np.stack([1 - SPAM, SPAM], 1)
        return torch.from_numpy(np.log(p_N2))[[*batch.rows]]


def finished(**fields: Any) -> Classification:
    objective = Classification(labels=("ham", "spam"), multi_label=False, **fields)
    held: Any = [SimpleNamespace(target=np.array([int(own)])) for own in IS_SPAM]
    network: Any = Scores()
    done = objective.finish(network, held, [], 512).objective
    assert isinstance(done, Classification)
    return done


@pytest.mark.parametrize(("precision", "threshold"), [(1.0, 0.85), (0.7, 0.7)])
def test_threshold_reaches_precision(precision: float, threshold: float) -> None:
    done = finished(min_precision={"spam": precision})
    assert done.thresholds == {"spam": pytest.approx(threshold)}
    network: Any = Scores()
    batch: Any = SimpleNamespace(rows=range(6))
    labels = [answer["label"] for answer in done.predict(network, batch)]
    assert labels == ["spam" if score >= threshold else "ham" for score in SPAM]


def test_label_that_no_threshold_predicts_is_a_warning() -> None:
    objective = Classification(
        labels=("ham", "spam"), multi_label=False, min_precision={"spam": 0.9}
    )
    held: Any = [SimpleNamespace(target=np.array([0])) for _ in IS_SPAM]
    network: Any = Scores()
    assert objective.finish(network, held, [], 512).note.startswith("warning")


def test_given_threshold_is_kept() -> None:
    given = {"spam": 0.75}
    assert finished(min_precision={"spam": 1.0}, thresholds=given).thresholds == given


@pytest.mark.parametrize("named", [{"eggs": 0.9}, {"ham": 0.9, "spam": 0.9}])
def test_threshold_of_unknown_label_or_of_all_labels_rejected(named: dict[str, float]) -> None:
    rows = [LabelledText("f", n, text="x", label=label) for n, label in enumerate(("ham", "spam"))]
    with pytest.raises(RecipeError):
        Classification(min_precision=named).fit(rows, SimpleNamespace())  # type: ignore[arg-type]


def test_option_sets_precision_and_objective() -> None:
    option = TUNING["threshold"].convert(["a=b=0.9"])
    objective = tuning_recipe("rows.jsonl", {"threshold": option}).objective
    assert isinstance(objective, Classification)
    assert objective.min_precision == {"a=b": 0.9}
    for wrong in ("spam", "=0.9", "spam=high"):
        with pytest.raises(RecipeError):
            TUNING["threshold"].convert([wrong])
