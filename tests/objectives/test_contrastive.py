"""InfoNCE by its formula, and a cached batch against a whole one."""

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
from luthier.data.shapes import TextPair
from luthier.errors import RecipeError
from luthier.evaluation.retrieval import partner_ranks
from luthier.models.load import as_network, load_model
from luthier.models.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Contrastive
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


def test_pairs_that_share_a_side_are_not_told_apart(
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
    order = np.argsort([side.row for side in batch.tree.examples])
    scores = (embedded[order[::2]] @ embedded[order[1::2]].T) / 0.1
    for one, other in ((0, 1), (2, 3)):
        scores[one, other] = scores[other, one] = -np.inf
    forward = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    backward = np.log(np.exp(scores).sum(0)) - np.diag(scores)
    assert total == pytest.approx((forward + backward).sum() / 2, rel=1e-5)
    parts, _, count = total_and_gradients(network, objective, examples, 16)
    assert count > 2 and parts == pytest.approx(total, rel=1e-5)


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
    with pytest.raises(RecipeError, match="Give pairs"):
        luthier.tune(data, base=str(family_folder("llama")), name="no", **fields)


def test_partners_find_each_other_after_training(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
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
    with pytest.raises(DataError, match="more than the model's context") as caught:
        luthier.tune(data, base=str(family_folder("bert")), name="x")
    assert [problem.line for problem in caught.value.problems] == [1, 2]
