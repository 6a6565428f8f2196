"""Class weights: torch's weighted cross-entropy, scikit-learn's formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import luthier
from luthier.data.shapes.texts import LabelledText
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.errors import RecipeError
from luthier.evaluation.linear import fit_logistic
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification
from luthier.recipe import Recipe, Training
from luthier.types import Example, Row
from test_pairs import ROWS

CPU = torch.device("cpu")
ROWS_OF = {"bert": "label", "vit": "labelled_image", "ast": "labelled_audio"}
NAMES = ("fox", "dog", "dog", "card")

FamilyFolder = Callable[[str], Path]


def rows_of(family: str) -> list[Row]:
    """Return four rows of three classes; one class has two rows."""
    return [
        replace(row, label=name) for row, name in zip(ROWS[ROWS_OF[family]], NAMES, strict=True)
    ]


def encode(
    objective: Classification, folder: Path, rows: Sequence[Row]
) -> tuple[Classification, Any, list[Example]]:
    chat = load_chat_format(folder)
    fitted = objective.fit(rows, chat)
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU, fitted.head())
    network = as_network(model, CPU, torch.float32)
    network.chat = chat
    return fitted, network, [fitted.encode(row, n, chat) for n, row in enumerate(rows)]


def test_balanced_is_the_formula_of_scikit_learn(family_folder: FamilyFolder) -> None:
    """n_samples / (n_classes * np.bincount(y)), and weights of a table as they are."""
    rows = rows_of("bert")
    chat = load_chat_format(family_folder("bert"))
    balanced = Classification(class_weights="balanced").fit(rows, chat)
    y = np.array([["card", "dog", "fox"].index(name) for name in NAMES])
    expected = len(y) / (3 * np.bincount(y))
    assert balanced.labels == ("card", "dog", "fox")
    assert balanced.class_weights == pytest.approx(
        dict(zip(balanced.labels, expected, strict=True))
    )
    # Initial shares add 1 to each count: 2, 3 and 2 of 7 rows.
    assert balanced.head().bias == pytest.approx((0, np.log(3 / 4), 0))
    given = Classification(class_weights={"dog": 0.5}).fit(rows, chat)
    assert given.class_weights == {"dog": 0.5}
    more = Classification(labels=("card", "cow", "dog", "fox"), class_weights="balanced")
    assert more.fit(rows, chat).class_weights == {**balanced.class_weights, "cow": 1.0}  # type: ignore[dict-item]
    assert Classification().fit(rows, chat).class_weights is None
    even = [LabelledText("f", n, text="a", label="ab"[n % 2]) for n in range(20)]
    assert Classification(class_weights="balanced").fit(even, chat).head().bias == (0, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("family", ROWS_OF)
def test_weighted_loss_matches_torch_in_any_batches(
    family: str, smoothing: float, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    weights = {"fox": 5.0, "dog": 0.25}
    objective, network, examples = encode(
        Classification(class_weights=weights, label_smoothing=smoothing),
        family_folder(family),
        rows_of(family),
    )
    assert [each.weight for each in examples] == [5.0, 0.25, 0.25, 1.0]
    with torch.no_grad():
        scores_RC = torch.tensor(
            network.read_rows(examples, 1000, lambda batch: network.row_scores(batch).tolist())
        )
    target_R = torch.tensor([2, 1, 1, 0])
    weight_C = torch.tensor([1.0, 0.25, 5.0])
    expected = F.cross_entropy(
        scores_RC, target_R, weight=weight_C, label_smoothing=smoothing
    )  # a weighted mean
    for budget in (1, 1000):
        assert objective.parity_loss(network, examples, budget) == pytest.approx(
            float(expected), rel=1e-5
        )
    plain = F.cross_entropy(scores_RC, target_R, label_smoothing=smoothing)
    assert abs(float(expected - plain)) > 1e-3
    for module in network.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lines = [first_step(network, objective, examples, budget, tmp_path) for budget in (1, 1000)]
    for line in lines:
        assert line["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert lines[0]["gradient_norm"] == pytest.approx(lines[1]["gradient_norm"], rel=1e-4)


def first_step(
    network: Any, objective: Classification, examples: list[Example], budget: int, folder: Path
) -> dict[str, Any]:
    """Measure a step on all rows in micro-batches of ``budget`` tokens; the weights stay."""
    training = Training(
        batch_size=len(examples), learning_rate=1e-30, warmup_ratio=0.0, micro_batch_tokens=budget
    )
    loop = Loop(
        network=network,
        objective=objective,
        training=training,
        examples=examples,
        validation=[],
        steps=1,
        checkpoints=Checkpoints(folder / "checkpoints"),
        metrics=MetricsFile(folder / f"{budget}.jsonl"),
        reporter=Reporter(),
    )
    loop.run()
    (line,) = [line for line in loop.metrics.read() if line["event"] == "train"]
    return line


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "heavy"])
def test_invalid_class_weights_are_refused(weight: Any) -> None:
    for given in ({"fox": weight}, weight):
        with pytest.raises(RecipeError) as refused:
            Recipe.parse(
                {
                    "data": {"train": "-"},
                    "objective": {"method": "classification", "class_weights": given},
                }
            )
        assert refused.value.setting == "objective.class_weights"


def test_class_weights_of_unknown_labels_are_refused(family_folder: FamilyFolder) -> None:
    chat = load_chat_format(family_folder("bert"))
    rows = rows_of("bert")
    with pytest.raises(RecipeError) as refused:
        Classification(class_weights={"foxx": 2.0}).fit(rows, chat)
    assert refused.value.setting == "objective.class_weights"
    with pytest.raises(RecipeError) as refused:
        Classification(class_weights={"xyz": 2.0}).fit(rows, chat)
    assert refused.value.setting == "objective.class_weights"
    several = [LabelledText("f", n, text="a", label=("a", "b")[: n % 3]) for n in range(4)]
    with pytest.raises(RecipeError) as refused:
        Classification(class_weights="balanced").fit(several, chat)
    assert refused.value.setting == "objective.class_weights"
    for method in ("semi_supervised", "encoder_distillation"):
        with pytest.raises(RecipeError) as refused:
            Recipe.parse(
                {
                    "data": {"train": "-"},
                    "objective": {"method": method, "class_weights": "balanced"},
                }
            )
        assert refused.value.setting == "objective.class_weights"


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
def test_balanced_weights_raise_rare_class_score(
    tmp_path: Path, family_folder: FamilyFolder
) -> None:
    """The text is unrelated to the class, so only weights make the rare class a good answer."""
    lines = [
        f'{{"text": "the lazy dog", "label": "{"often" if n % 5 else "rare"}"}}' for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    share = {}
    for weights in (None, "balanced"):
        objective: dict[str, Any] = {"method": "classification"}
        if weights is not None:
            objective["class_weights"] = weights
        tuned = luthier.tune(
            tmp_path / "rows.jsonl", base=str(family_folder("bert")), name=f"by-{weights}".lower(),
            objective=objective, training__max_steps=20, training__precision="float32",
            training__batch_size=40, data__validation_share=0, training__refit=False,
        )  # fmt: skip
        share[weights] = luthier.load(tuned.model_id).predict("the lazy dog")["scores"]["rare"]
    assert share[None] == pytest.approx(0.2, abs=0.07)
    assert share["balanced"] == pytest.approx(0.5, abs=0.07)


def test_weighted_regression_equals_repeated_rows() -> None:
    random = torch.Generator().manual_seed(0)
    features_NH = torch.randn(12, 4, generator=random)
    features_NH -= features_NH.mean(0)
    target_N = torch.arange(12) % 3
    weights = [1.0, 3.0, 2.0]
    found = fit_logistic(features_NH, target_N, 3, weights=weights)
    often = torch.tensor(weights)[target_N].long()
    score_NC = found.scores(features_NH).requires_grad_(True)
    F.cross_entropy(
        score_NC.repeat_interleave(often, dim=0), target_N.repeat_interleave(often)
    ).backward()
    assert score_NC.grad is not None
    # At the minimum the gradient of the bias, which has no penalty, is 0.
    assert score_NC.grad.sum(0).abs().max() < 1e-3
    assert fit_logistic(features_NH, target_N, 3).bias_C.sub(found.bias_C).abs().max() > 0.1
