"""FixMatch by its formula, whole and in parts, and from files to a model that is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import luthier
from luthier.data.augmentation import Augmentation
from luthier.errors import DataError, RecipeError
from luthier.models.load import as_network, load_chat_format, load_model
from luthier.models.network import Network
from luthier.objectives import SemiSupervised
from luthier.types import Example, Row

CPU = torch.device("cpu")
LABELLED = (("the quick brown fox", "animal"), ("my card has not arrived", "bank"))
TEXTS = (
    "the lazy dog jumps over my fox",
    "when will my new card be delivered to me",
    "the capital of France is Paris",
    "yes, please answer the question",
    "a brown dog and a quick fox",
)


def rows() -> list[Row]:
    labelled = [Row("f", n, text=text, label=label) for n, (text, label) in enumerate(LABELLED)]
    return [*labelled, *(Row("g", n, text=text) for n, text in enumerate(TEXTS))]


def ready(folder: Path, objective: SemiSupervised) -> tuple[Network, SemiSupervised, list[Example]]:
    chat = load_chat_format(folder)
    objective = objective.fit(rows(), chat)
    torch.manual_seed(2)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    network.model.train()
    return network, objective, [objective.encode(row, n, chat) for n, row in enumerate(rows())]


def total_and_gradients(
    network: Network, objective: SemiSupervised, views: list[Example], budget: int
) -> tuple[float, float, dict[str, torch.Tensor], int]:
    network.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        batches = objective.annotate(network, network.batches(views, budget))
    total = 0.0
    for batch in batches:
        loss = objective.loss(network, batch).total
        loss.backward()
        total += float(loss.detach())
    gradients = {
        n: w.grad.clone() for n, w in network.model.named_parameters() if w.grad is not None
    }
    return total, sum(batch.weight for batch in batches), gradients, len(batches)


def log_probabilities(network: Network, example: Example) -> np.ndarray:
    """Of one row by itself, through transformers' own forward."""
    with torch.no_grad():
        scores_C = network.row_scores(network.batches([example], 1000)[0])[0]
    return scores_C.double().log_softmax(-1).numpy()


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
def test_the_loss_is_that_of_fixmatch(
    threshold: float, family_folder: Callable[[str], Path]
) -> None:
    objective = SemiSupervised(threshold=threshold, unlabelled_weight=0.4)
    network, objective, examples = ready(family_folder("gpt2"), objective)  # it has no dropout
    torch.manual_seed(9)
    views = objective.seen(examples, training=True)
    assert len(views) == len(LABELLED) + 2 * len(TEXTS)
    plain = {view.row: view for view in views}
    expected, sure = 0.0, 0
    for place, example in enumerate(examples):
        log_p = log_probabilities(network, plain[2 * place + 1])
        if place < len(LABELLED):
            assert example.target is not None
            expected -= log_p[int(example.target[0])]
            continue
        q = np.exp(log_probabilities(network, plain[2 * place]))
        if q.max() >= threshold:
            sure += 1
            expected -= 0.4 * log_p[q.argmax()]
    assert {0.0: sure == 5, 0.6: 0 < sure < 5, 1.0: sure == 0}[threshold]
    total, weight, _, _ = total_and_gradients(network, objective, views, 1000)
    assert total == pytest.approx(expected, rel=1e-5)
    assert weight == pytest.approx(2 + 0.4 * 5)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_in_parts_is_the_whole_batch(
    family: str, threshold: float, family_folder: Callable[[str], Path]
) -> None:
    network, objective, examples = ready(
        family_folder(family), SemiSupervised(threshold=threshold, unlabelled_weight=0.3)
    )
    views = objective.seen(examples, training=True)
    total, weight, wanted, count = total_and_gradients(network, objective, views, 10_000)
    assert count == 1
    parts, part_weight, found, count = total_and_gradients(network, objective, views, 30)
    assert count > 1
    assert (parts, part_weight) == pytest.approx((total, weight), rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_a_step_that_is_sure_of_nothing_moves_nothing(
    family_folder: Callable[[str], Path],
) -> None:
    network, objective, examples = ready(
        family_folder("bert"), SemiSupervised(threshold=1.0, unlabelled_weight=1.0)
    )
    views = objective.seen(examples[len(LABELLED) :], training=True)
    total, weight, gradients, _ = total_and_gradients(network, objective, views, 40)
    assert (total, weight) == (0.0, 5.0)
    assert all(not gradient.any() for gradient in gradients.values())


def test_own_labels_are_given_without_dropout_and_views_drawn_anew(
    family_folder: Callable[[str], Path],
) -> None:
    network, objective, examples = ready(family_folder("bert"), SemiSupervised(threshold=0.0))
    torch.manual_seed(1)
    first, second = (objective.seen(examples, training=True) for _ in range(2))
    torch.manual_seed(1)
    again = objective.seen(examples, training=True)

    def ids(views: list[Example]) -> list[list[int]]:
        return [view.ids_T.tolist() for view in views]

    assert ids(first) == ids(again) != ids(second)
    own = [objective._own_labels(network, network.batches(first, 60)) for _ in range(5)]
    assert all(labels == own[0] for labels in own)
    assert network.model.training


def test_only_labelled_rows_are_measured(family_folder: Callable[[str], Path]) -> None:
    network, objective, examples = ready(family_folder("bert"), SemiSupervised())
    network.model.eval()
    measured = objective.seen(examples)
    assert [example.row for example in measured] == [0, 1]
    batches = objective.annotate(network, network.batches(measured, 1000))
    loss = objective.loss(network, batches[0])
    plain = [
        -log_probabilities(network, e)[int(e.target[0])] for e in measured if e.target is not None
    ]
    assert float(loss.total.detach()) == pytest.approx(sum(plain), rel=1e-5)
    assert objective.described(examples[0]) == "animal"
    assert objective.described(examples[3]) == "without a label"


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    labelled = [
        {"text": f"{text} {n}", "label": label} for n in range(4) for text, label in LABELLED
    ]
    return (
        write(tmp_path / "labelled.jsonl", labelled),
        write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS]),
    )


def test_from_two_files_to_a_model_that_answers(
    files: tuple[Path, Path], family_folder: Callable[[str], Path]
) -> None:
    labelled, texts = files
    result = luthier.tune(
        labelled,
        base=str(family_folder("bert")),
        name="semi",
        objective={"method": "semi_supervised", "threshold": 0.6, "strong": {"delete": 0.3}},
        adaptation="full",
        data__mix=[{"train": texts, "weight": 2}],
        data__validation=labelled,
        training__epochs=12,
        training__batch_size=6,
        training__learning_rate=3e-3,
    )
    assert result.rows == 13
    manifest = json.loads((Path(result.model_dir) / "luthier.json").read_text())
    assert manifest["data"]["mix"] == [{"train": str(texts), "weight": 2.0, "rows": 5, "drawn": 16}]
    assert set(manifest["data"]["sha256"]) == {str(labelled), str(texts)}
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("pseudo_labelled") for line in lines]
    assert any(share for share in shares) and all(0 <= share <= 1 for share in shares if share)
    model = luthier.load(result.model_id)
    answers = model.predict([text for text, _ in LABELLED])
    assert [answer["label"] for answer in answers] == ["animal", "bank"]


def test_what_it_cannot_learn_from_is_refused(
    files: tuple[Path, Path], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    labelled, texts = files
    base = str(family_folder("bert"))
    fields = {"base": base, "name": "no", "objective": "semi_supervised"}
    with pytest.raises(RecipeError, match=r"all 8 rows have labels.*--mix FILE=7"):
        luthier.tune(labelled, data__validation_share=0, **fields)
    with pytest.raises(DataError) as caught:
        luthier.tune(texts, data__mix=[{"train": labelled, "weight": 1}], **fields)
    assert "Such rows are for a file of --mix" in caught.value.problems[0].fix
    several = write(tmp_path / "several.jsonl", [{"text": x, "label": [x]} for x in "ab"])  # type: ignore[dict-item]
    with pytest.raises(DataError) as caught:
        luthier.tune(several, data__mix=[{"train": texts, "weight": 1}], **fields)
    assert caught.value.problems[0].rule == "label.mixed"


def test_the_strong_view_is_a_setting() -> None:
    objective = SemiSupervised.model_validate({"strong": {"delete": 0.4}})
    assert objective.strong == Augmentation(delete=0.4)
