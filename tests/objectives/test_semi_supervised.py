"""Label propagation, the loss of a step whole and in parts, and an end-to-end run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import luthier
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.errors import DataError, RecipeError
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import SemiSupervised, semi_supervised
from luthier.objectives.base import RunStart
from luthier.objectives.semi_supervised import neighbour_graph, propagate
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
    labelled = [
        LabelledText("f", n, text=text, label=label) for n, (text, label) in enumerate(LABELLED)
    ]
    return [*labelled, *(RawText("g", n, text=text) for n, text in enumerate(TEXTS))]


def ready(folder: Path, objective: SemiSupervised) -> tuple[Network, SemiSupervised, list[Example]]:
    chat = load_chat_format(folder)
    objective = objective.fit(rows(), chat)
    torch.manual_seed(2)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    network.model.eval()
    examples = [objective.encode(row, n, chat) for n, row in enumerate(rows())]
    return network, objective, examples


def begun(
    network: Network, objective: SemiSupervised, examples: list[Example], budget: int = 1000
) -> tuple[list[int], list[str]]:
    """Return the label of each row after propagation, and the notes."""
    notes: list[str] = []
    with torch.no_grad():
        after = objective.prepare(
            RunStart(network, examples, budget, False, 0, 0, 0, notes.append)
        ).examples
    assert [(e.row, e.weight) for e in after] == [(e.row, e.weight) for e in examples]
    return [int(example.target[0]) for example in after if example.target is not None], notes


def shares(network: Network, examples: list[Example], neighbours: int, alpha: float) -> np.ndarray:
    """Compute propagation row by row with an explicit inverse: mean states, nearest neighbours,
    labels."""
    with torch.no_grad():
        states = [network.hidden(next(network.batches([e], 1000)))[: len(e)] for e in examples]
    points = np.array([state.double().mean(0).numpy() for state in states])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosine = points @ points.T
    np.fill_diagonal(cosine, -np.inf)
    ties = np.zeros_like(cosine)
    for one, row in enumerate(cosine):
        for other in np.argsort(-row)[:neighbours]:
            ties[one, other] = max(0.0, row[other]) ** 3
    ties += ties.T
    scale = np.diag(ties.sum(1) ** -0.5)
    known = np.zeros((len(examples), 2))
    known[[0, 1], [int(e.target[0]) for e in examples[:2] if e.target is not None]] = 1
    spread = np.linalg.inv(np.eye(len(examples)) - alpha * scale @ ties @ scale) @ known
    return np.asarray(spread / np.maximum(spread.sum(1, keepdims=True), 1e-12))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("neighbours", "alpha"), [(1, 0.5), (2, 0.9), (50, 0.9)])
def test_labels_spread_as_by_the_inverse(
    family: str, neighbours: int, alpha: float, family_folder: Callable[[str], Path]
) -> None:
    objective = SemiSupervised(neighbours=neighbours, alpha=alpha, threshold=0.0)
    network, objective, examples = ready(family_folder(family), objective)
    expected = shares(network, examples, neighbours, alpha)
    reached = expected.sum(1) > 0.5
    found, notes = begun(network, objective, examples)
    assert found[:2] == [0, 1]
    gap = np.abs(expected[:, 0] - expected[:, 1])
    for label, share, seen, clear in zip(found, expected, reached, gap > 1e-2, strict=True):
        if not seen:
            assert label == -100
        elif clear:
            assert label == share.argmax()
    assert f"{int(reached[2:].sum())} of 5 texts have a label of 0 or more" in notes[0]
    if not reached[2:].any():  # few neighbours can leave rows unreached
        assert neighbours < len(examples) - 1
        return
    highest = expected[2:].max()
    sure = objective.model_copy(update={"threshold": float(highest) - 5e-3})
    limit = expected.max(1) >= highest - 1e-2
    assert [place for place, label in enumerate(begun(network, sure, examples)[0]) if label >= 0]
    for place, label in enumerate(begun(network, sure, examples)[0]):
        assert place < 2 or label == -100 or limit[place]


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "t5", "xlnet"])
def test_propagated_labels_are_independent_of_batch_and_order(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    network, objective, examples = ready(family_folder(family), SemiSupervised(threshold=0.0))
    state = torch.get_rng_state()
    whole = begun(network, objective, examples)
    assert whole == begun(network, objective, examples) == begun(network, objective, examples, 12)
    assert torch.equal(state, torch.get_rng_state())
    order = [4, 0, 6, 2, 1, 5, 3]
    turned, _ = begun(network, objective, [examples[place] for place in order])
    assert turned == [whole[0][place] for place in order]


def total_and_gradients(
    network: Network, objective: SemiSupervised, examples: list[Example], budget: int
) -> tuple[float, float, dict[str, torch.Tensor], int]:
    network.model.zero_grad(set_to_none=True)
    batches = [*network.batches(objective.views(examples, "random"), budget)]
    total = 0.0
    for batch in batches:
        loss = objective.loss(network, batch).total
        loss.backward()
        total += float(loss.detach())
    gradients = {
        n: w.grad.clone() for n, w in network.model.named_parameters() if w.grad is not None
    }
    return total, sum(batch.weight for batch in batches), gradients, len(batches)


def labelled(examples: list[Example], labels: list[int]) -> list[Example]:
    return [replace(e, target=np.array([label])) for e, label in zip(examples, labels, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_loss_of_a_step_whole_and_in_parts(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    network, objective, examples = ready(
        family_folder(family), SemiSupervised(unlabelled_weight=0.3)
    )
    examples = labelled(examples, [0, 1, -100, 1, 0, -100, 1])
    expected = 0.0
    for example, weight in zip(examples, [1, 1, 0, 0.3, 0.3, 0, 0.3], strict=True):
        with torch.no_grad():
            scores_C = network.row_scores(next(network.batches([example], 1000)))[0]
        assert example.target is not None
        if weight:
            expected -= weight * float(scores_C.double().log_softmax(-1)[int(example.target[0])])
    total, weight, wanted, count = total_and_gradients(network, objective, examples, 10_000)
    assert count == 1
    assert total == pytest.approx(expected, rel=1e-5)
    assert weight == pytest.approx(2 + 3 * 0.3)
    parts, part_weight, found, count = total_and_gradients(network, objective, examples, 20)
    assert count > 1
    assert (parts, part_weight) == pytest.approx((total, weight), rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_step_without_labels_has_zero_gradient(family_folder: Callable[[str], Path]) -> None:
    network, objective, examples = ready(family_folder("bert"), SemiSupervised())
    bare = examples[len(LABELLED) :]
    total, weight, gradients, _ = total_and_gradients(network, objective, bare, 40)
    assert (total, weight) == (0.0, 1.0)
    assert all(not gradient.any() for gradient in gradients.values())
    assert objective.views(bare, "fixed") == []


def test_only_labelled_rows_are_measured(family_folder: Callable[[str], Path]) -> None:
    _, objective, examples = ready(family_folder("bert"), SemiSupervised())
    assert [example.row for example in objective.views(examples, "fixed")] == [0, 1]
    assert objective.describe(examples[0]) == "animal"
    assert objective.describe(examples[3]) == "without a label"


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


@pytest.mark.slow
def test_model_from_labelled_and_unlabelled_files_predicts(
    files: tuple[Path, Path], family_folder: Callable[[str], Path]
) -> None:
    labelled, texts = files
    result = luthier.tune(
        labelled,
        base=str(family_folder("bert")),
        name="semi",
        objective={"method": "semi_supervised", "neighbours": 2},
        adaptation="full",
        data__mix=[{"train": texts, "weight": 2}],
        data__validation=labelled,
        data__severity={"leakage.many": "note"},
        training__epochs=12,
        training__batch_size=6,
        training__learning_rate=3e-3,
    )
    assert result.rows == 13
    manifest = json.loads((Path(result.model_dir) / "luthier.json").read_text())
    assert manifest["data"]["mix"] == [{"train": str(texts), "weight": 2.0, "rows": 5, "drawn": 16}]
    assert set(manifest["data"]["sha256"]) == {str(labelled), str(texts)}
    model = luthier.load(result.model_id)
    answers = model.predict([text for text, _ in LABELLED])
    assert [answer["label"] for answer in answers] == ["animal", "bank"]


def test_unsuitable_data_is_refused(
    files: tuple[Path, Path], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    labelled, texts = files
    base = str(family_folder("bert"))
    fields = {"base": base, "name": "no", "objective": "semi_supervised"}
    with pytest.raises(RecipeError) as refused:
        luthier.tune(labelled, data__validation_share=0, **fields)
    assert refused.value.rule == "data.all_labelled"
    with pytest.raises(DataError) as caught:
        luthier.tune(texts, data__mix=[{"train": labelled, "weight": 1}], **fields)
    assert "`data.mix`" in caught.value.problems[0].advice
    several = write(tmp_path / "several.jsonl", [{"text": x, "label": [x, "c"]} for x in "ab"])  # type: ignore[dict-item]
    with pytest.raises(DataError) as caught:
        luthier.tune(several, data__mix=[{"train": texts, "weight": 1}], **fields)
    assert caught.value.problems[0].rule == "label.mixed"


def points(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dense(points_NH: torch.Tensor, neighbours: int) -> torch.Tensor:
    cosine = (points_NH @ points_NH.t()).double().fill_diagonal_(-2)
    kept = cosine >= cosine.sort(dim=-1, descending=True).values[:, neighbours - 1 : neighbours]
    ties = torch.where(kept, cosine.clamp(min=0) ** 3, 0.0)
    ties = ties + ties.t()
    scale = ties.sum(-1).clamp(min=1e-12).rsqrt()
    return scale[:, None] * ties * scale


@pytest.mark.parametrize("neighbours", [1, 3, 11])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_neighbour_graph_matches_dense_algebra(
    neighbours: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_supervised, "CHUNK", chunk)
    found = neighbour_graph(points(12), neighbours).to_dense().double()
    assert torch.allclose(found, dense(points(12), neighbours), atol=1e-6)
    assert torch.equal(found, found.t())


@pytest.mark.parametrize("alpha", [0.1, 0.9, 0.99])
def test_propagated_labels_match_matrix_inverse(alpha: float) -> None:
    known = torch.full((30,), -1)
    known[:4] = torch.tensor([2, 0, 1, 2])
    one = torch.zeros(30, 3, dtype=torch.float64)
    one[torch.arange(4), known[:4]] = 1
    wanted = torch.linalg.solve(torch.eye(30) - alpha * dense(points(30), 4), one)
    wanted /= wanted.sum(-1, keepdim=True).clamp(min=1e-12)
    found = propagate(neighbour_graph(points(30), 4), known, 3, alpha)
    assert torch.allclose(found.double(), wanted, atol=5e-3)


def test_unreached_rows_stay_empty() -> None:
    apart = torch.eye(6)[[0, 0, 1, 1]]
    found = propagate(neighbour_graph(apart, 1), torch.tensor([0, -1, -1, -1]), 2, 0.9)
    assert found.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
