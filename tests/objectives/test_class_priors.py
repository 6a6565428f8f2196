"""Initial bias of a new head: the class frequencies; a trained head is unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.shapes.texts import LabelledText, RawText, TaggedWords
from luthier.models.load import load_model
from luthier.models.networks.heads import Head, head_weights
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES, Classification, SemiSupervised, TokenClassification
from luthier.objectives.class_priors import shares_of, sigmoid_bias, softmax_bias
from luthier.types import Row

CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "bert", "roberta", "albert", "t5", "xlnet")
WORDS = ("a", "b", "c", "d", "e", "f", "g", "h")
TAGS = ("O", "O", "B-x", "O", "O", "O", "O", "O")
SENTENCE = TaggedWords("f", 1, tokens=WORDS, tags=TAGS)


def one_label(label: str | tuple[str, ...] | None) -> Row:
    if label is None:
        return RawText("f", 1, text="the fox")
    return LabelledText("f", 1, text="the fox", label=label)


def test_shares_count_each_class_once_more() -> None:
    assert shares_of(("a", "b"), {"a": 5, "b": 1}) == (6 / 8, 2 / 8)
    assert shares_of(("a", "b"), {"a": 5}) == (6 / 7, 1 / 7)  # never seen, but not impossible
    assert shares_of(("a", "b"), {"a": 6, "b": 3}, rows=6) == (7 / 8, 4 / 8)


def test_softmax_bias_gives_class_shares() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    bias = torch.tensor(softmax_bias(shares.tolist()), dtype=torch.float64)
    torch.testing.assert_close(bias.softmax(0), shares)
    assert bias[0] == 0
    assert softmax_bias([1 / 77] * 77) == (0.0,) * 77


def test_the_sigmoids_of_the_bias_are_the_shares() -> None:
    shares = torch.tensor([0.5, 0.01, 0.99], dtype=torch.float64)
    bias = torch.tensor(sigmoid_bias(shares.tolist()), dtype=torch.float64)
    torch.testing.assert_close(bias.sigmoid(), shares)


def scores_at_the_start(folder: Path, head: Head) -> torch.Tensor:
    """Return class probabilities of a token on which the new head's random matrix has no effect."""
    torch.manual_seed(0)
    model: Any = load_model(folder, torch.float32, CPU, head).eval()
    for name, weight in model.named_parameters():
        if name in head_weights(model) and weight.dim() == 2 and len(weight) == len(head.labels):
            torch.nn.init.zeros_(weight)
    with torch.no_grad():
        scores: torch.Tensor = model(input_ids=torch.tensor([[7, 8, 9, 1]])).logits[0]
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_new_tagger_starts_with_tag_shares(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    objective = TokenClassification().fit([SENTENCE], load_chat_format(folder))
    assert objective.labels == ("O", "B-x", "I-x")
    scores_TC = scores_at_the_start(folder, objective.head())
    wanted_C = torch.tensor([8 / 11, 2 / 11, 1 / 11])
    torch.testing.assert_close(scores_TC.softmax(-1), wanted_C.expand_as(scores_TC))


@pytest.mark.parametrize("labels", [("a", "a", "a", "b"), (("a",), ("a", "b"), (), ("a",))])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_classifier_starts_with_class_shares(
    family: str, labels: tuple[Any, ...], family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    rows = [one_label(label) for label in labels]
    head = Classification().fit(rows, load_chat_format(folder)).head()
    scores_C = scores_at_the_start(folder, head).flatten()
    multi = head.problem == "multi_label_classification"
    wanted_C = torch.tensor([4 / 6, 2 / 6])
    if family in ("llama", "gpt2"):  # transformers' head of decoders has no bias
        wanted_C = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(scores_C.sigmoid() if multi else scores_C.softmax(-1), wanted_C)


@pytest.mark.parametrize(
    ("labels", "several"),
    [
        (("a", "b"), False),
        (("a", "b", ("a",)), False),  # one label, in an array
        (("a", "b", ("a", "b")), True),
        (("a", "b", ()), True),
        ((("a",), ("b",)), True),
    ],
)
def test_rows_determine_multi_label(
    labels: tuple[Any, ...], several: bool, family_folder: Callable[[str], Path]
) -> None:
    chat, rows = load_chat_format(family_folder("bert")), [one_label(label) for label in labels]
    objective = Classification().fit(rows, chat)
    assert objective.multi_label is several
    assert [np.size(objective.encode(row, 0, chat).target) for row in rows] == [
        2 if several else 1
    ] * len(rows)


def test_semi_supervised_shares_come_from_labelled_rows(
    family_folder: Callable[[str], Path],
) -> None:
    rows = [one_label(label) for label in ("a", "a", "a", "b", None, None)]
    objective = SemiSupervised().fit(rows, load_chat_format(family_folder("bert")))
    assert objective.shares == (4 / 6, 2 / 6)
    assert objective.head().bias == softmax_bias((4, 2))


def test_stored_head_keeps_bias(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    labels = ("O", "B-x", "I-x")
    head = Head("token_classification", labels)
    model: Any = load_model(family_folder("bert"), torch.float32, CPU, head)
    torch.nn.init.constant_(model.classifier.bias, 0.25)
    model.save_pretrained(tmp_path)
    again: Any = load_model(
        tmp_path, torch.float32, CPU, Head("token_classification", labels, bias=(0.0, -3.0, -5.0))
    )
    assert again.classifier.bias.tolist() == [0.25] * 3


def test_shares_change_only_the_head_bias(
    family_folder: Callable[[str], Path],
) -> None:
    states = []
    for bias in ((), (0.0, -3.0, -5.0)):
        torch.manual_seed(0)
        head = Head("token_classification", ("O", "B-x", "I-x"), bias=bias)
        model = load_model(family_folder("bert"), torch.float32, CPU, head)
        states.append({n: w for n, w in model.state_dict().items() if n != "classifier.bias"})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


@pytest.mark.parametrize("method", ["classification", "semi_supervised", "token_classification"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"shares": [0.5, 0.5]}, "shares go with labels"),
        ({"labels": ["O", "B-x", "I-x"], "shares": [0.5, 0.5]}, "one share for each label"),
        ({"labels": ["O", "B-x"], "shares": [1.0, 0.0]}, "between 0 and 1"),
    ],
)
def test_shares_without_labels_are_refused(
    method: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError):
        OBJECTIVES[method].model_validate(fields)
