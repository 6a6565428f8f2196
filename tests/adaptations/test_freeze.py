"""Trained layers for each kind of freezing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from luthier.adaptations import Freeze
from luthier.errors import RecipeError
from luthier.models.load import load_model
from luthier.models.networks.heads import Head
from luthier.models.networks.layers import layer_names


def moving(model: nn.Module) -> set[str]:
    """Return the numbers of fully trained layers, and the names of other trained weights."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    layers: dict[str, list[bool]] = {}
    rest = set()
    for name, weight in model.named_parameters():
        inside = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if inside:
            layers.setdefault(inside[1], []).append(weight.requires_grad)
        elif name in trained:
            rest.add(name)
    assert all(len(set(marks)) == 1 for marks in layers.values())
    return rest | {number for number, marks in layers.items() if marks[0]}


@pytest.mark.parametrize(
    ("frozen", "share", "layers"),
    [
        ("bottom", 0.5, {"text": "2", "vision": "12"}),
        ("bottom", 0.66, {"text": "2", "vision": "2"}),
        ("top", 0.66, {"text": "0", "vision": "0"}),
        ("alternate", 0.5, {"text": "02", "vision": "1"}),
        ("interval", 0.5, {"text": "02", "vision": "1"}),
    ],
)
def test_encoders_side_by_side_are_frozen_at_equal_height(
    frozen: Any, share: float, layers: dict[str, str], family_folder: Callable[[str], Path]
) -> None:
    model = load_model(family_folder("clip"), torch.float32, torch.device("cpu"), Head("embedding"))
    Freeze(frozen=frozen, share=share).attach(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    inside = {kind: f"{kind}_model.encoder.layers." for kind in layers}
    for kind, start in inside.items():
        numbers = {name[len(start)] for name in trained if name.startswith(start)}
        assert numbers == {*layers[kind]}, kind
    rest = {name for name in trained if not name.startswith((*inside.values(),))}
    below = {name for name in rest if "embeddings" in name or "pre_layrnorm" in name}
    above = {"visual_projection.weight", "text_projection.weight"}
    assert bool(below) == (frozen == "top") and (above <= rest) == (frozen != "top")
    assert ("logit_scale" in rest) == (frozen == "top")


EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("frozen", "share", "expected"),
    [
        ("bottom", 0.5, {"2", "3", NORM, HEAD}),
        ("bottom", 0.75, {"3", NORM, HEAD}),
        ("bottom", 0.01, {"1", "2", "3", NORM, HEAD}),
        ("bottom", 0.99, {"3", NORM, HEAD}),
        ("top", 0.5, {"0", "1", EMBEDDING}),
        ("top", 0.25, {"0", "1", "2", EMBEDDING}),
        ("alternate", 0.5, {"1", "3", NORM, HEAD}),
        ("alternate", 0.25, {"1", "2", "3", NORM, HEAD}),
        ("alternate", 0.75, {"3", NORM, HEAD}),
        ("interval", 0.5, {"1", "3", NORM, HEAD}),
        ("interval", 0.75, {"3", NORM, HEAD}),
    ],
)
def test_the_chosen_layers_stay(
    frozen: Any, share: float, expected: set[str], tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama()
    Freeze(frozen=frozen, share=share).attach(model)
    assert moving(model) == expected


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (12, 0.5, [1, 3, 5, 7, 9, 11]),
        (12, 2 / 3, [2, 5, 8, 11]),
        (12, 0.75, [3, 7, 11]),
        (12, 0.9, [11]),
        (30, 0.75, [1, 5, 9, 13, 17, 21, 25, 29]),  # a half more than 7.5
        (7, 0.6, [0, 3, 6]),
    ],
)
def test_every_nth_layer_trains(count: int, share: float, expected: list[int]) -> None:
    frozen = Freeze(frozen="interval", share=share)._frozen(count)
    assert sorted({*range(count)} - set(frozen)) == expected


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_share_without_matching_interval_is_refused(share: float) -> None:
    with pytest.raises(RecipeError) as refused:
        Freeze(frozen="interval", share=share)._frozen(12)
    assert refused.value.rule == "freeze.share"


def test_bottom_half_is_the_default(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    Freeze().attach(model)
    assert moving(model) == {"2", "3", NORM, HEAD}


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [("bottom", {"2", "3", NORM}), ("top", {"0", "1", EMBEDDING})],
)
def test_a_tied_head_follows_the_embedding(
    frozen: Any, expected: set[str], tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(tied=True)
    Freeze(frozen=frozen).attach(model)
    assert moving(model) == expected
    assert model.lm_head.weight.requires_grad == (frozen == "top")


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("bottom", {"2", "3", "transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("top", {"0", "1", "transformer.wte.weight", "transformer.wpe.weight"}),
    ],
)
def test_learned_positions_are_embeddings_too(
    frozen: Any, expected: set[str], tiny_gpt2: Callable[..., Any]
) -> None:
    model = tiny_gpt2(n_layer=4)
    Freeze(frozen=frozen).attach(model)
    assert moving(model) == expected


def test_a_mark_left_from_before_is_overwritten(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    Freeze(frozen="bottom").attach(model)
    assert moving(model) == {"2", "3", NORM, HEAD}


def test_the_stack_of_layers_is_found(
    tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    assert layer_names(tiny_llama()) == [f"model.layers.{index}" for index in range(4)]
    assert layer_names(tiny_gpt2()) == [f"transformer.h.{index}" for index in range(3)]


def test_layer_names_uses_largest_outer_stack() -> None:
    inner = nn.ModuleList(nn.Linear(50, 50) for _ in range(3))
    layers = nn.ModuleList(nn.ModuleDict({"experts": inner}) for _ in range(2))
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2)] * 9), "blocks": layers})
    assert layer_names(model) == ["blocks.0", "blocks.1"]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        layer_names(nn.Sequential(nn.Linear(2, 2)))
    assert refused.value.rule == "network.layers"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_0_or_1_is_refused(share: float) -> None:
    with pytest.raises(ValidationError):
        Freeze(share=share)


def test_frozen_bottom_layers_get_no_gradient(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    Freeze(frozen="bottom").attach(model)
    model(input_ids=torch.arange(6)[None]).logits.square().sum().backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, w in model.named_parameters() if w.requires_grad}
