"""Embedding rows compared with AdamW over the whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from luthier.engine import embedding_rows
from luthier.engine.embedding_rows import embedding_tables, sparse_gradients
from luthier.engine.optimizers import MasterAdamW
from luthier.models.rounding import Rounding
from luthier.recipe import Training

RATE, WORDS, WIDTH = 0.01, 200, 16


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_rows, "MIN_NUMBERS", WORDS * 10)


def network(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, width, padding_idx=0), nn.Linear(width, 5))
    return model.to(dtype)


def optimizer_of(model: nn.Module, tables: Any = (), **settings: Any) -> MasterAdamW:
    training = Training(learning_rate=RATE, **{"max_gradient_norm": 0.0, **settings})
    return MasterAdamW(model.named_parameters(), training, tables=tables)


def learn(model: nn.Sequential, optimizer: MasterAdamW, steps: range, parts: int = 2) -> None:
    """Run steps with gradients for a few rows: new rows in each step, some rows repeated."""
    for step in steps:
        for part in range(parts):
            generator = torch.Generator().manual_seed(parts * step + part)
            ids_RT = torch.randint(0, 40 + 3 * step, (6, 4), generator=generator)
            logits_RC = model[1](model[0](ids_RT).mean(1))
            cross_entropy(logits_RC.float(), ids_RT[:, 0] % 5).backward()
            optimizer.collect()
        optimizer.step(RATE)


def state_of(optimizer: MasterAdamW) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state().items()}


def weights_of(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize(("sparse", "width"), [(True, WIDTH), (False, WIDTH), (True, 11)])
def test_float32_rows_equal_adamw_over_whole_table(sparse: bool, width: int) -> None:
    whole, mine = network(width=width), network(width=width)
    learn(whole, optimizer_of(whole), range(12))
    tables = embedding_tables(mine)
    assert [*tables] == ["0.weight"]
    optimizer = optimizer_of(mine, tables)
    if sparse:
        with sparse_gradients(tables):
            learn(mine, optimizer, range(12))
    else:  # as of a network that takes rows by itself
        learn(mine, optimizer, range(12))
    assert not mine[0].sparse
    for one, other in zip(weights_of(whole), weights_of(mine), strict=True):
        assert torch.equal(one, other)
    kept = optimizer.masters["0.weight"]
    assert 40 < len(kept) < 80  # of 200: the state is as small


def test_clipping_uses_norm_of_all_rows() -> None:
    whole, mine = network(), network()
    learn(whole, optimizer_of(whole, max_gradient_norm=0.01), range(6))
    tables = embedding_tables(mine)
    with sparse_gradients(tables):
        learn(mine, optimizer_of(mine, tables, max_gradient_norm=0.01), range(6))
    for one, other in zip(weights_of(whole), weights_of(mine), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_bfloat16_masters_equal_float32_and_copy_follows() -> None:
    whole, mine = network(torch.bfloat16), network(torch.bfloat16)
    tables = embedding_tables(mine)
    optimizer, reference = optimizer_of(mine, tables), optimizer_of(whole)
    with sparse_gradients(tables):
        learn(mine, optimizer, range(1), parts=1)
    learn(whole, reference, range(1), parts=1)
    rows = optimizer._tables["0.weight"].ids
    torch.testing.assert_close(
        optimizer.masters["0.weight"], reference.masters["0.weight"][rows], rtol=0, atol=RATE / 10
    )
    with sparse_gradients(tables):
        learn(mine, optimizer, range(1, 4), parts=1)
    rows = optimizer._tables["0.weight"].ids
    copy = mine[0].weight.detach().float()
    error = copy[rows] - optimizer.masters["0.weight"]
    spacing = torch.tensor(2.0) ** (copy[rows].abs().log2().floor() - 7)
    assert (error.abs() < spacing).all()
    assert error.mean().abs() < spacing.mean() / 10  # up as often as down
    others = torch.ones(WORDS, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(copy[others], network(torch.bfloat16)[0].weight.detach().float()[others])


def test_rounding_depends_on_row_position() -> None:
    torch.manual_seed(0)
    values, ids = torch.randn(6, WIDTH), torch.tensor([3, 90, 7, 150, 11, 42])
    once, again = torch.zeros(2, WORDS, WIDTH, dtype=torch.bfloat16)
    Rounding().into_rows(once, ids, values)
    turned = torch.arange(5, -1, -1)
    Rounding().into_rows(again, ids[turned], values[turned])
    assert torch.equal(once, again) and not torch.equal(once[ids], values.bfloat16())
    exact = values.bfloat16().float()
    Rounding().into_rows(once, ids, exact)
    assert torch.equal(once[ids].float(), exact)
    of_float = torch.zeros(WORDS, WIDTH)
    Rounding().into_rows(of_float, ids, values)
    assert torch.equal(of_float[ids], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_optimizer_continues_bit_equal(dtype: torch.dtype) -> None:
    straight, resumed = network(dtype), network(dtype)
    tables = embedding_tables(straight)
    optimizer = optimizer_of(straight, tables, max_gradient_norm=0.01)
    with sparse_gradients(tables):
        learn(straight, optimizer, range(5))
        state = state_of(optimizer)
        learn(straight, optimizer, range(5, 9))
    again = optimizer_of(resumed, embedding_tables(resumed), max_gradient_norm=0.01)
    again.restore(state)
    with sparse_gradients(embedding_tables(resumed)):
        learn(resumed, again, range(5, 9))
    for one, other in zip(weights_of(straight), weights_of(resumed), strict=True):
        assert torch.equal(one, other)


def test_optimizer_state_moves_between_dense_and_sparse() -> None:
    whole, mine = network(), network()
    reference = optimizer_of(whole)
    learn(whole, reference, range(4))
    optimizer = optimizer_of(mine, embedding_tables(mine))
    optimizer.restore(state_of(reference))
    back = network()
    dense = optimizer_of(back)
    dense.restore(state_of(optimizer))
    for model, each in ((whole, reference), (mine, optimizer), (back, dense)):
        learn(model, each, range(4, 8))
    for one, two, three in zip(*map(weights_of, (whole, mine, back)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_state_from_before_the_first_step() -> None:
    model = network()
    tables = embedding_tables(model)
    optimizer = optimizer_of(model, tables)
    optimizer.restore(state_of(optimizer))
    learn(model, optimizer, range(2))
    plain = network()
    learn(plain, optimizer_of(plain), range(2))
    assert all(map(torch.equal, weights_of(model), weights_of(plain)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight


def test_embedding_tables_excludes_shared_and_frozen_tables() -> None:
    assert embedding_tables(Tied()) == {}
    frozen = network()
    frozen[0].weight.requires_grad_(False)
    assert embedding_tables(frozen) == {}
    assert embedding_tables(nn.Sequential(nn.Embedding(WORDS, WIDTH, max_norm=1.0))) == {}
    assert embedding_tables(nn.Sequential(nn.Embedding(WORDS, 9))) == {}
    assert [*embedding_tables(nn.Embedding(WORDS, WIDTH))] == ["weight"]
    assert embedding_tables(nn.Embedding(WORDS, WIDTH, scale_grad_by_freq=True)) == {}


def test_tables_with_decay_are_not_split_by_rows() -> None:
    model = network()
    with pytest.raises(ValueError):
        optimizer_of(model, embedding_tables(model), weight_decay=0.1)
