"""Heads on the flat layout against each family's own padded forward, gradients included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from luthier.data.shapes.texts import LabelledText, RatedText, RawText, TaggedWords
from luthier.errors import RecipeError
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head, head_modules, head_weights
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES, Objective
from luthier.types import Example, Row

CPU = torch.device("cpu")
ENCODERS = ("bert", "roberta", "albert", "modernbert")
OTHER_ENCODERS = ("eurobert", "distilbert", "mpnet", "electra", "deberta")
"""Encoders with a head of another form, in the slow tests."""
FAMILIES = ("llama", "gpt2", "transfo_xl", *ENCODERS, "t5", "xlnet", "elmo")
TEXTS = ("The quick brown fox", "My card has not arrived yet.", "yes", "The quick brown dog jumps")
TAGS = ("O", "B-animal", "I-animal", "O", "O", "B-thing")


def slow(families: tuple[str, ...]) -> list[Any]:
    return [pytest.param(family, marks=pytest.mark.slow) for family in families]


def fresh(folder: Path, objective: Objective) -> Any:
    """The network with the head of ``objective``, without dropout."""
    torch.manual_seed(1)
    model: Any = load_model(folder, torch.float32, CPU, objective.head())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def labelled(name: str) -> list[Row]:
    if name == "classification":
        return [
            LabelledText("f", n, text=t, label="even" if n % 2 else "odd")
            for n, t in enumerate(TEXTS)
        ]
    if name == "several":
        labels: list[tuple[str, ...]] = [("a", "b"), (), ("b",), ("a", "c")]
        return [LabelledText("f", n, text=t, label=labels[n]) for n, t in enumerate(TEXTS)]
    if name == "regression":
        return [RatedText("f", n, text=t, rating=n * n / 3) for n, t in enumerate(TEXTS)]
    words = [tuple(text.split()) for text in TEXTS]
    return [TaggedWords("f", n, tokens=w, tags=TAGS[: len(w)]) for n, w in enumerate(words)]


def ready(name: str, folder: Path) -> tuple[Objective, list[Example]]:
    kind = "classification" if name == "several" else name
    chat = load_chat_format(folder)
    rows = labelled(name)
    objective = OBJECTIVES[kind]().fit(rows, chat)
    return objective, [objective.encode(row, n, chat) for n, row in enumerate(rows)]


def padded_loss(model: Any, name: str, examples: list[Example]) -> torch.Tensor:
    """Return the loss by its formula, from transformers' own forward pass per row."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(example.ids_T)[None]
        logits = model(input_ids=ids).logits
        target = torch.from_numpy(np.array(example.target))
        if name == "classification":
            total = total - logits[0].log_softmax(-1)[target[0]]
        elif name == "several":
            p = logits[0].sigmoid()
            total = total - (target * p.log() + (1 - target) * (1 - p).log()).mean()
        elif name == "regression":
            total = total + (logits[0, 0] - target[0]) ** 2
        else:
            kept = torch.from_numpy(example.weight_T) > 0
            total = total + F.nll_loss(
                logits[0][kept].log_softmax(-1), target[kept], reduction="sum"
            )
    return total


@pytest.mark.parametrize("family", [*FAMILIES, *slow(OTHER_ENCODERS)])
@pytest.mark.parametrize(
    "name", ["classification", "several", "regression", "token_classification"]
)
def test_loss_and_gradients_match_transformers(
    name: str, family: str, family_folder: Callable[[str], Path]
) -> None:
    objective, examples = ready(name, family_folder(family))
    model = fresh(family_folder(family), objective)
    model.config.pad_token_id = model.config.pad_token_id or 0
    ours = copy.deepcopy(model)
    expected = padded_loss(model, name, examples)
    expected.backward()
    network = as_network(ours, CPU, torch.float32)
    # Of T5 only the encoder reads words; texts as a whole are read by the decoder.
    reads = family in (*ENCODERS, *OTHER_ENCODERS, "xlnet", "elmo") or (family, name) == (
        "t5",
        "token_classification",
    )
    assert network.is_bidirectional == reads
    total = torch.zeros(())
    for batch in network.batches(examples, 20):
        total = total + objective.loss(network, batch).total
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = {n: w.grad for n, w in model.named_parameters()}
    compared = 0
    for n, weight in ours.named_parameters():
        if theirs[n] is None:
            assert weight.grad is None or not weight.grad.any(), n
            continue
        error = (weight.grad - theirs[n]).norm()
        assert error <= 1e-4 * theirs[n].norm() + 1e-6, n
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("family", [*ENCODERS, *slow(OTHER_ENCODERS)])
def test_masked_language_model_matches_transformers(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    chat = load_chat_format(folder)
    rows = [RawText("f", n, text=text) for n, text in enumerate(TEXTS)]
    objective = OBJECTIVES["masked_lm"].model_validate({"mask_share": 0.4}).fit(rows, chat)
    encoded = [objective.encode(row, n, chat) for n, row in enumerate(rows)]
    examples = objective.pack(encoded, 64)
    model = fresh(folder, objective)
    ours = copy.deepcopy(model)
    network = as_network(ours, CPU, torch.float32)
    network.model.eval()
    (batch,) = objective.annotate(network, examples, 1000)
    total = objective.loss(network, batch).total
    total.backward()
    expected = torch.zeros(())
    nodes = np.split(batch.tree.node_M, np.cumsum([len(e) for e in batch.tree.examples])[:-1])
    for example, row_nodes in zip(batch.tree.examples, nodes, strict=True):
        ids = batch.ids_N[torch.from_numpy(row_nodes)]
        logits = model(input_ids=ids[None]).logits[0]
        chosen = torch.from_numpy(np.isin(row_nodes, batch.source_S.numpy()))
        assert chosen.any()
        original = torch.from_numpy(example.ids_T)
        expected = expected + F.cross_entropy(logits[chosen], original[chosen], reduction="sum")
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (n, weight), (_, other) in zip(
        ours.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (weight.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-6, n


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_ENCODERS])
def test_a_new_head_is_not_part_of_the_network(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    model = ModelFolder(family_folder(family)).sketch(
        Head("sequence_classification", ("a", "b", "c"))
    )
    names = head_weights(model)
    assert names
    prefix = model.base_model_prefix
    assert all(
        not name.startswith(f"{prefix}.") or ".pooler" in name or ".mix." in name for name in names
    )
    assert not any("layers.0" in name or ".h.0" in name for name in names)
    assert head_modules(ModelFolder(family_folder("llama")).sketch(Head("causal_lm"))) == []


def test_unsupported_head_of_family_is_refused(
    family_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(RecipeError) as refused:
        ModelFolder(family_folder("llama")).sketch(Head("masked_lm"))
    assert refused.value.rule == "network.head"
    with pytest.raises(RecipeError) as refused:
        ModelFolder(family_folder("bert")).sketch(Head("causal_lm"))
    assert refused.value.rule == "network.head"
