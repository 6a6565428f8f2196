"""InfoNCE against the formula, and gradient caching against a whole batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luthier
from luthier.data.augmentation import Augmentation
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, LabelledImage
from luthier.data.shapes.texts import QueryDocument, RawText, TextPair
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.retrieval import partner_ranks
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Contrastive
from luthier.objectives.base import RunStart
from luthier.types import Example, Row

CPU = torch.device("cpu")
PAIRS = (
    ("the quick brown fox", "a fox jumps"),
    ("my card has not arrived", "when will my card arrive"),
    ("what is the capital of france", "paris is the capital"),
    ("the lazy dog", "a dog that is lazy"),
    ("yes", "no"),
)


def rows() -> list[Row]:
    return [TextPair("f", n, text=a, positive=b) for n, (a, b) in enumerate(PAIRS)]


def ready(folder: Path, objective: Contrastive) -> tuple[Network, list[Example]]:
    chat = load_chat_format(folder)
    torch.manual_seed(2)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    return network, [objective.encode(row, n, chat) for n, row in enumerate(rows())]


def total_and_gradients(
    network: Network, objective: Contrastive, examples: list[Example], budget: int
) -> tuple[float, dict[str, torch.Tensor], int]:
    network.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        batches = objective.annotate(network, examples, budget)
    assert sum(batch.weight for batch in batches) == len(examples)
    total = 0.0
    for batch in batches:
        loss = objective.loss(network, batch).total
        loss.backward()
        total += float(loss.detach())
    gradients = {n: w.grad for n, w in network.model.named_parameters() if w.grad is not None}
    return total, gradients, len(batches)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("family", "pooling"),
    [("bert", "mean"), ("bert", "first"), ("roberta", "auto"), ("llama", "auto")],
)
def test_the_loss_is_info_nce(
    family: str, pooling: Any, symmetric: bool, family_folder: Callable[[str], Path]
) -> None:
    objective = Contrastive(symmetric=symmetric, pooling=pooling, temperature=0.1)
    network, examples = ready(family_folder(family), objective)
    network.model.eval()
    plain: Any = load_model(family_folder(family), torch.float32, CPU, objective.head())
    plain.eval()

    def embedded(ids: Any) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            states = plain(input_ids=torch.from_numpy(np.asarray(ids))[None]).last_hidden_state[0]
        kind = {"auto": "last" if family == "llama" else "mean"}.get(pooling, pooling)
        picked = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[kind]
        return np.asarray(picked / picked.norm(), dtype=np.float64)

    a = np.stack([embedded(example.ids_T) for example in examples])
    b = np.stack([embedded(example.target) for example in examples])
    scores = a @ b.T / 0.1
    forward = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    backward = np.log(np.exp(scores).sum(0)) - np.diag(scores)
    expected = ((forward + backward) / 2 if symmetric else forward).sum()
    total, _, count = total_and_gradients(network, objective, examples, 1000)
    assert count == 1
    assert total == pytest.approx(expected, rel=1e-4)


def image_rows(labels: str = "") -> list[Row]:
    found: list[Row] = []
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        media = Media("image", f"i[{n}]", array=pixels)
        label = labels[n : n + 1]
        found.append(LabelledImage("f", n, media, label) if label else BareImage("f", n, media))
    return found


def nt_xent(side_VH: np.ndarray[Any, Any], classes: list[Any], temperature: float) -> float:
    """Equation 1 of Chen et al. 2020 and L_out of Khosla et al. 2020, term by term."""
    total = 0.0
    for one, anchor in enumerate(side_VH):
        others = [k for k in range(len(side_VH)) if k != one]
        below = sum(np.exp(anchor @ side_VH[k] / temperature) for k in others)
        positives = [k for k in others if classes[k] == classes[one]]
        terms = [np.log(np.exp(anchor @ side_VH[k] / temperature) / below) for k in positives]
        total -= sum(terms) / len(positives)
    return total / 2  # a row is two views


@pytest.mark.parametrize("labels", ["", "aabbbc"])
def test_image_views_are_contrasted_within_batch(
    labels: str, family_folder: Callable[[str], Path]
) -> None:
    folder, rows = family_folder("small_cnn"), image_rows(labels)
    chat = load_chat_format(folder)
    objective = Contrastive().fit(rows, chat)
    assert objective.temperature == 0.1
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    network.model.eval()
    examples = [objective.encode(row, n, chat) for n, row in enumerate(rows)]
    views = objective.views(examples, "fixed")
    pixels = np.stack([view.media.array() for view in views if view.media])
    with torch.no_grad():
        states = model(pixel_values=torch.from_numpy(pixels)).pooler_output.double().numpy()
    sides = states / np.linalg.norm(states, axis=1, keepdims=True)
    classes = [labels[view.row // 2] if labels else view.row // 2 for view in views]
    expected = nt_xent(sides, classes, 0.1)
    total, wanted, count = total_and_gradients(network, objective, examples, 1000)
    assert count == 1 and total == pytest.approx(expected, rel=1e-4)
    wanted = copy.deepcopy(wanted)
    parts, found, count = total_and_gradients(network, objective, examples, 4)
    assert count == 3 and parts == pytest.approx(total, rel=1e-5)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_invalid_labels_are_refused(family_folder: Callable[[str], Path]) -> None:
    chat, rows = load_chat_format(family_folder("small_cnn")), image_rows("aabbbc")
    with pytest.raises(RowRefused) as refused:
        Contrastive().fit(rows[:2], chat)
    assert refused.value.rule == "label.one_class"
    several = replace(rows[0], label=("a", "b"))  # type: ignore[call-arg]
    with pytest.raises(RowRefused) as refused:
        Contrastive().encode(several, 0, chat)
    assert refused.value.rule == "label.mixed"


def test_views_vary_in_training_and_repeat_in_validation(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("small_cnn"))
    objective = Contrastive()
    examples = [objective.encode(row, n, chat) for n, row in enumerate(image_rows())]

    def seen(rows: list[Example], training: bool = False) -> np.ndarray[Any, Any]:
        return np.stack(
            [
                v.media.array()
                for v in objective.views(rows, "random" if training else "fixed")
                if v.media
            ]
        )

    fixed = seen(examples)
    assert len(fixed) == 12
    assert not np.array_equal(fixed[0], fixed[1])
    assert np.array_equal(fixed, seen(examples))
    assert np.array_equal(fixed[4:6], seen(examples[2:3]))  # independent of the batch
    torch.manual_seed(0)
    drawn = seen(examples, True)
    assert not np.array_equal(drawn, fixed) and not np.array_equal(drawn, seen(examples, True))
    torch.manual_seed(0)
    assert np.array_equal(drawn, seen(examples, True))
    # Both views use the step's draw of `data.augmentation`.
    mirrored = Augmentation(flip=1.0).change(examples[0], np.random.default_rng(0))
    both, plain = seen([mirrored], True), examples[0].media
    assert plain is not None
    assert all(np.allclose(view, plain.array()[:, :, ::-1]) for view in both)


def test_contrastive_pretraining_helps_few_label_training(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (24, 9, 7), dtype=np.uint8)
    pixels[::2, :4] += 190
    np.savez(tmp_path / "bare.npz", images=pixels)
    np.savez(tmp_path / "few.npz", images=pixels, labels=np.arange(24) % 2)
    base = str(family_folder("small_cnn"))
    fields: dict[str, Any] = {"training__precision": "float32", "data__validation_share": 0}
    learned = luthier.tune(
        tmp_path / "bare.npz", base=base, name="simclr", objective="contrastive", adaptation="full",
        training__max_steps=4, training__batch_size=12, **fields,
    )  # fmt: skip
    found = luthier.evaluate(learned.model_id, tmp_path / "few.npz")
    assert {"recall_at_1", "recall_at_5", "ndcg_at_10"} <= found.scores.keys()
    assert found.scores["recall_at_1"] > 0.9  # halves differ at any weights
    few = luthier.tune(
        tmp_path / "few.npz", base=learned.model_id, name="few", training__max_steps=60,
        adaptation="full", training__learning_rate=5e-3, **fields,
    )  # fmt: skip
    assert few.model_id == "small_cnn:few"
    answers = luthier.evaluate(few.model_id, tmp_path / "few.npz")
    assert answers.scores["accuracy"] > 0.9


def test_pairs_with_shared_side_are_not_contrasted(
    family_folder: Callable[[str], Path],
) -> None:
    objective = Contrastive(temperature=0.1)
    network, examples = ready(family_folder("bert"), objective)
    network.model.eval()
    examples[1] = replace(examples[1], target=examples[0].target)
    examples[3] = replace(examples[3], ids_T=examples[2].ids_T, weight_T=examples[2].weight_T)
    with torch.no_grad():
        (batch,) = objective.annotate(network, examples, 1000)
        embedded = objective.embed(network, batch).double().numpy()
        total = float(objective.loss(network, batch).total)
    # Equal partners are computed once.
    assert len(embedded) == 2 * len(examples) - 1
    ids = [side.ids_T.tolist() for side in batch.tree.examples]
    anchors = [embedded[ids.index(example.ids_T.tolist())] for example in examples]
    partners = [embedded[ids.index(np.asarray(e.target).tolist())] for e in examples]
    scores = np.stack(anchors) @ np.stack(partners).T / 0.1
    for one, other in ((0, 1), (2, 3)):
        scores[one, other] = scores[other, one] = -np.inf
    forward = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    backward = np.log(np.exp(scores).sum(0)) - np.diag(scores)
    assert total == pytest.approx((forward + backward).sum() / 2, rel=1e-5)
    parts, _, count = total_and_gradients(network, objective, examples, 16)
    assert count > 2 and parts == pytest.approx(total, rel=1e-5)


def vectors(network: Network, objective: Contrastive, texts: list[str]) -> torch.Tensor:
    """Embeddings of single texts, each in a batch of its own."""
    assert network.chat is not None
    found = []
    for text in texts:
        example = network.chat.encode_embedded(RawText("f", 0, text), 0)
        with torch.no_grad():
            found.append(objective.embed(network, next(iter(network.batches([example], 99))))[0])
    return torch.stack(found).double()


@pytest.mark.parametrize(("symmetric", "sizes"), [(False, ()), (True, (16, 8))])
def test_hard_negatives_and_dimensions(
    symmetric: bool, sizes: tuple[int, ...], family_folder: Callable[[str], Path]
) -> None:
    objective = Contrastive(symmetric=symmetric, dimensions=sizes)
    network, _ = ready(family_folder("bert"), objective)
    network.model.eval()
    network.chat = chat = load_chat_format(family_folder("bert"))
    negatives = [("a card", "the fox"), ("a dog",), (), ("the fox", "paris"), ("no way",)]
    given = [
        TextPair("f", n, text=a, positive=b, negatives=c)
        for n, ((a, b), c) in enumerate(zip(PAIRS, negatives, strict=True))
    ]
    examples = [objective.encode(row, n, chat) for n, row in enumerate(given)]
    assert len(objective.views(examples)) == 16
    query = vectors(network, objective, [row.text for row in given])
    documents = [row.positive for row in given] + [t for row in given for t in row.negatives]
    key = vectors(network, objective, documents)
    expected = 0.0
    for size in (query.shape[1], *sizes):
        # MultipleNegativesRankingLoss of sentence-transformers: scale 20, all documents.
        one, other = (torch.nn.functional.normalize(each[:, :size]) for each in (query, key))
        forward = torch.nn.functional.cross_entropy(20 * one @ other.T, torch.arange(5))
        backward = torch.nn.functional.cross_entropy(20 * other[:5] @ one.T, torch.arange(5))
        expected += float((forward + backward) / 2 if symmetric else forward)
    total, wanted, count = total_and_gradients(network, objective, examples, 1000)
    assert count == 1 and total / 5 == pytest.approx(expected, rel=1e-4)
    wanted = copy.deepcopy(wanted)
    parts, found, count = total_and_gradients(network, objective, examples, 16)
    assert count > 2 and parts == pytest.approx(total, rel=1e-5)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    with torch.no_grad():
        (batch,) = objective.annotate(network, examples, 1000)
    assert len(batch.tree.examples) == 15  # "the fox" once
    short = objective.truncate(examples[0], 4)
    assert [len(view) for view in objective.views([short])] == [4, 4, 4, 4]


def test_a_partner_of_an_equal_anchor_is_no_negative(
    family_folder: Callable[[str], Path],
) -> None:
    objective = Contrastive(symmetric=False)
    network, _ = ready(family_folder("bert"), objective)
    network.model.eval()
    chat = load_chat_format(family_folder("bert"))

    def loss(negatives: tuple[str, ...]) -> float:
        given = [
            TextPair("f", 0, "a fox", "a fox jumps", negatives),
            TextPair("f", 1, "a fox", "it is quick"),
        ]
        examples = [objective.encode(row, n, chat) for n, row in enumerate(given)]
        return total_and_gradients(network, objective, examples, 1000)[0]

    # Both partners match the anchor: no negative is left.
    assert loss(("it is quick",)) == pytest.approx(0, abs=1e-6) == loss(())
    assert loss(("a card",)) > 0.1


def test_hard_negatives_are_mined_at_the_start(family_folder: Callable[[str], Path]) -> None:
    objective = Contrastive(hard_negatives=2)
    network, examples = ready(family_folder("bert"), objective)
    network.model.eval()
    notes: list[str] = []
    start = RunStart(network, examples, 1000, False, 5, 0, 0, notes.append)
    with torch.no_grad():
        prepared = objective.prepare(start).examples
    assert len(notes) == 1 and len(prepared) == len(examples)
    partners = {np.asarray(example.target).tobytes() for example in examples}
    for example, before in zip(prepared, examples, strict=True):
        mined = [] if example.partner is None else example.partner.sides
        assert len(mined) <= 2 and {each.ids_T.tobytes() for each in mined} <= partners
        assert np.asarray(before.target).tobytes() not in {m.ids_T.tobytes() for m in mined}
    assert any(example.partner for example in prepared)


def test_dimensions_beyond_the_vectors_are_refused(family_folder: Callable[[str], Path]) -> None:
    network, _ = ready(family_folder("bert"), Contrastive())
    with pytest.raises(RecipeError) as caught:
        Contrastive(dimensions=(16, network.width + 1)).attach(network.model)
    assert caught.value.setting == "objective.dimensions"


def test_full_size_among_dimensions_counts_once(family_folder: Callable[[str], Path]) -> None:
    losses = []
    for with_full in (False, True):
        network, examples = ready(family_folder("bert"), Contrastive())
        sizes = (network.width, 16) if with_full else (16,)
        objective = Contrastive(dimensions=sizes)
        objective.attach(network.model)
        losses.append(objective.parity_loss(network, examples, 1024))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_batch_in_parts_is_the_whole_batch(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    objective = Contrastive()
    network, examples = ready(family_folder(family), objective)
    network.model.eval()
    whole, wanted, _ = total_and_gradients(network, objective, examples, 1000)
    wanted = copy.deepcopy(wanted)
    parts, found, count = total_and_gradients(network, objective, examples, 16)
    assert count > 2
    assert parts == pytest.approx(whole, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_the_second_pass_sees_the_dropout_of_the_first(
    family_folder: Callable[[str], Path],
) -> None:
    objective = Contrastive()
    network, examples = ready(family_folder("bert"), objective)
    network.model.train()
    seen: list[torch.Tensor] = []
    embed = network.row_states

    def watched(batch: Any, pooling: str) -> torch.Tensor:
        seen.append(embed(batch, pooling).detach())
        return seen[-1].clone().requires_grad_()

    network.row_states = watched  # type: ignore[method-assign]
    with torch.no_grad():
        batches = objective.annotate(network, examples, 16)
    for batch in batches:
        objective.loss(network, batch)
    first, second = seen[: len(batches)], seen[len(batches) :]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(embed(batches[0], "mean"), first[0])


def test_single_texts_are_learned_under_dropout(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": a}) + "\n" for a, _ in PAIRS * 4))
    fields = {"objective": "contrastive", "training__epochs": 2, "training__batch_size": 5}
    result = luthier.tune(data, base=str(family_folder("bert")), name="simcse", **fields)
    vectors = luthier.load(result.model_id).embed([a for a, _ in PAIRS])
    assert vectors.shape == (len(PAIRS), 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(PAIRS)), abs=1e-3)
    with pytest.raises(RecipeError) as refused:
        luthier.tune(data, base=str(family_folder("llama")), name="no", **fields)
    assert refused.value.rule == "objective.dropout"


def test_trained_partners_rank_first(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    data = tmp_path / "pairs.jsonl"
    lines = [{"anchor": a, "positive": b} for a, b in PAIRS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = luthier.tune(
        data,
        base=str(family_folder("bert")),
        name="pairs",
        adaptation="full",
        training__epochs=40,
        training__learning_rate=3e-3,
        training__precision="float32",
        data__validation_share=0,
    )
    model = luthier.load(result.model_id)
    a, b = (model.embed([pair[side] for pair in PAIRS]) for side in (0, 1))
    assert partner_ranks(a, b, [pair[1] for pair in PAIRS]).tolist() == [1] * len(PAIRS)


def test_a_partner_longer_than_the_context_is_seen(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    from luthier.errors import DataError

    data = tmp_path / "pairs.jsonl"
    long = {"anchor": "yes", "positive": "many " * 300}
    data.write_text("".join(json.dumps(line) + "\n" for line in [long, long | {"anchor": "no"}]))
    with pytest.raises(DataError) as caught:
        luthier.tune(data, base=str(family_folder("bert")), name="x")
    assert caught.value.rule == "row.too_long"
    assert [problem.line for problem in caught.value.problems] == [1, 2]


def test_threshold_matches_false_alarm_rate(
    family_folder: Callable[[str], Path],
) -> None:
    objective = Contrastive(false_alarms=0.25)
    network, examples = ready(family_folder("bert"), objective)
    network.model.eval()
    with torch.no_grad():
        (batch,) = objective.annotate(network, examples, 1000)
        embedded = objective.embed(network, batch).double().numpy()
        finished = objective.finish(network, examples, [], 16)
        assert (finished.rows, finished.wanted) == (len(examples), 3)
        few = objective.finish(network, examples[:2], examples[2:], 16)
        assert few.rows == len(examples)  # the training rows, too
        assert objective.finish(network, examples[:1], [], 1000).objective is objective
        done = finished.objective
        assert isinstance(done, Contrastive)
        assert done.finish(network, examples[:2], [], 1000).objective is done
    order = np.argsort([side.row for side in batch.tree.examples])
    scores = embedded[order[::2]] @ embedded[order[1::2]].T
    others = scores[~np.eye(len(examples), dtype=bool)]  # at most 5 of 20 can be above
    assert done.threshold == pytest.approx(np.sort(others)[-5], abs=1e-6)
    chat = load_chat_format(family_folder("small_cnn"))
    views = [objective.encode(row, n, chat) for n, row in enumerate(image_rows())]
    assert objective.finish(network, views, [], 16).objective is objective


@pytest.mark.slow
def test_similarity_of_two_texts_uses_threshold(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"anchor": a, "positive": b}) + "\n" for a, b in PAIRS))
    learned = luthier.tune(
        data, base=str(family_folder("bert")), name="same", adaptation="full",
        training__epochs=40, training__learning_rate=3e-3, training__precision="float32",
        data__validation_share=0,
    )  # fmt: skip
    model = luthier.load(learned.model_id)
    (a, b), (c, _) = PAIRS[:2]
    rows = [{"text": a, "other": b}, {"anchor": a, "positive": c}, {"text": a}]
    same, other, alone = (answer["predicted"] for answer in model.predict(rows))
    vectors = model.embed([a, b])
    assert same["score"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
    assert same["similar"] and not other["similar"]
    assert alone["embedding"] == pytest.approx(vectors[0].tolist(), abs=1e-6)
    scores = luthier.evaluate(model, data).scores
    assert scores["similar"] == 1.0 and scores["false_alarms"] <= 0.06  # 1 of 20
    assert model.nearest(a, [a, c], count=1)[0].place == 0  # type: ignore[union-attr]


def test_labelled_pairs_are_pairs_with_negatives() -> None:
    judged = [("q", "a", 1.0), ("q", "b", 0.0), ("r", "c", 0.0), ("s", "d", 0.9), ("q", "e", 1.0)]
    rows: list[Row] = [QueryDocument("f", n, *each) for n, each in enumerate(judged)]
    objective = Contrastive()
    assert objective.regroup(rows) == [
        TextPair("f", 0, "q", "a", ("b",)),
        TextPair("f", 3, "s", "d"),
        TextPair("f", 4, "q", "e", ("b",)),
    ]
    assert objective.regroup_scored(rows) is rows
    pairs: list[Row] = [TextPair("f", 0, "q", "a")]
    assert objective.regroup(pairs) is pairs
