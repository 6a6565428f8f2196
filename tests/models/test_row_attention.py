"""Rows side by side: the numbers of the tree's attention, and the bits that each has alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.tree import build_tree
from luthier.models.attention import plan_attention
from luthier.models.heads import Head
from luthier.models.load import as_network, load_model
from luthier.models.network import Network
from luthier.models.packing import packed_linears
from luthier.models.row_attention import plan_rows
from luthier.types import Example

CPU = torch.device("cpu")
LENGTHS = (1, 3, 16, 17, 33, 70, 5)


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(5, 60, length), np.zeros(length, np.float32), index)
        for index, length in enumerate(lengths)
    ]


class Prefixed:
    """A layer with two keys of its own."""

    def __init__(self, heads: int, size: int) -> None:
        self.pair = torch.randn(2, 1, heads, 2, size, generator=torch.manual_seed(1))

    def key_value_prefix(self, key: Any, value: Any) -> tuple[Any, Any]:
        return torch.cat([self.pair[0], key], 2), torch.cat([self.pair[1], value], 2)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, (16,)])
def test_it_is_the_attention_of_the_tree(
    lengths: tuple[int, ...], key_heads: int, both_ways: bool, before: int
) -> None:
    tree, generator = build_tree(rows(lengths), False, ()), torch.manual_seed(0)
    query = torch.randn(1, 4, len(tree), 8, generator=generator)
    key, value = torch.randn(2, 1, key_heads, len(tree), 8, generator=generator)
    module = Prefixed(key_heads, 8)
    plans = (
        plan_rows(tree, both_ways, before),
        plan_attention(tree, CPU, torch.float32, both_ways, before),
    )
    assert plans[0].longest == plans[1].longest
    found, expected = (plan.attend(module, query, key, value, 0.3) for plan in plans)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "llama"])
@torch.inference_mode()
def test_each_row_has_the_bits_that_it_has_alone(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    head = Head("causal_lm" if family == "llama" else "embedding")
    model = load_model(family_folder(family), torch.float32, CPU, head).eval()
    network = as_network(model, CPU, torch.float32)
    examples = rows((9, 3, 16, 17, 33, 40, 5, 1))
    with packed_linears(network.model, 0):
        together = states(network, examples)
        for example in examples:
            (alone,) = states(network, [replace(example, row=0)])
            assert torch.equal(alone, together[example.row])
    for mine, usual in zip(together, states(network, examples, False), strict=True):
        torch.testing.assert_close(mine, usual, rtol=1e-4, atol=1e-5)


def states(network: Network, examples: list[Example], side_by_side: bool = True) -> list[Any]:
    found: list[Any] = [None] * len(examples)
    for batch in network.batches(examples, 2048, side_by_side):
        state_RH = network.row_states(batch, "mean")
        for example, state_H in zip(batch.tree.examples, state_RH, strict=True):
            found[example.row] = state_H
    return found
