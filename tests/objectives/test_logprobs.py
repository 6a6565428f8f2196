"""The chunked loss against log-softmax written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.objectives import logprobs
from luthier.objectives.logprobs import row_sums, token_logps, weighted_nll

Edges = Sequence[tuple[int, int, float]]
"""Parent, following token and weight; ordered by parent."""


@dataclass
class Head:
    """A network with only hidden states and an output head."""

    hidden_NH: Tensor
    head_VH: Tensor

    head_bias_V: Tensor | None = None
    logit_cap: float | None = None

    def hidden(self, batch: Any, node_S: Tensor) -> Tensor:
        return self.hidden_NH[node_S]

    def before_vocabulary(self, hidden_SH: Tensor) -> Tensor:
        return hidden_SH


def batch_of(edges: Edges, fill: int = 0) -> Any:
    parents = sorted({parent for parent, _, _ in edges})
    return SimpleNamespace(
        source_S=torch.tensor(parents + [0] * fill),
        edge_source_E=torch.tensor([parents.index(parent) for parent, _, _ in edges]),
        target_E=torch.tensor([target for _, target, _ in edges]),
        weight_E=torch.tensor([weight for _, _, weight in edges]),
    )


def written_out(
    hidden_NH: Tensor, head_VH: Tensor, edges: Edges, cap: float | None = None
) -> Tensor:
    logits_NV = (hidden_NH @ head_VH.t()).double()
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return -sum(
        weight * (logits_NV[parent, target] - logits_NV[parent].logsumexp(0))
        for parent, target, weight in edges
    )


def random_edges(nodes: int, vocabulary: int) -> Edges:
    torch.manual_seed(3)
    edges = []
    for parent in range(0, nodes, 2):
        for _ in range(1 + parent % 3):
            target = int(torch.randint(vocabulary, ()))
            edges.append((parent, target, float(torch.randn(()))))
    return edges


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize(("fill", "cap"), [(0, None), (5, None), (0, 2.0)])
def test_loss_and_gradients_match_formula(
    chunk: int, fill: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TRAINED", chunk)
    edges = random_edges(nodes=24, vocabulary=11)
    torch.manual_seed(0)
    hidden, head = torch.randn(24, 6), torch.randn(11, 6)
    mine = Head(hidden.clone().requires_grad_(), head.clone().requires_grad_(), logit_cap=cap)
    loss = weighted_nll(mine, batch_of(edges, fill))  # type: ignore[arg-type]
    (loss * 0.25).backward()
    hidden.requires_grad_(), head.requires_grad_()
    expected = written_out(hidden, head, edges, cap)
    (expected * 0.25).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.hidden_NH.grad, hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.head_VH.grad, head.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_a_bias_of_the_head_counts_and_learns(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TRAINED", chunk)
    edges = random_edges(nodes=24, vocabulary=11)
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(24, 6), torch.randn(11, 6), torch.randn(11)
    mine = Head(hidden, head.clone().requires_grad_(), bias.clone().requires_grad_())
    weighted_nll(mine, batch_of(edges)).backward()  # type: ignore[arg-type]
    # A bias is the weight of a state that is always 1.
    wide_hidden = torch.cat([hidden, torch.ones(24, 1)], 1)
    wide_head = torch.cat([head, bias[:, None]], 1).requires_grad_()
    written_out(wide_hidden, wide_head, edges).backward()
    assert mine.head_bias_V is not None
    torch.testing.assert_close(mine.head_bias_V.grad, wide_head.grad[:, -1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.head_VH.grad, wide_head.grad[:, :-1], rtol=1e-5, atol=1e-6)


def test_two_choices_of_equal_logit_cost_ln_two() -> None:
    network = Head(torch.zeros(1, 3), torch.randn(2, 3))
    loss = weighted_nll(network, batch_of([(0, 1, 1.0), (0, 0, 2.0)]))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(3 * 0.6931472, rel=1e-6)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_frozen_tensor_has_no_gradient(frozen: str) -> None:
    edges = random_edges(nodes=24, vocabulary=11)
    torch.manual_seed(0)
    hidden = torch.randn(24, 6, requires_grad=frozen != "hidden")
    head = torch.randn(11, 6, requires_grad=frozen != "head")
    weighted_nll(Head(hidden, head), batch_of(edges)).backward()  # type: ignore[arg-type]
    moving, still = (hidden, head) if frozen == "head" else (head, hidden)
    (expected,) = torch.autograd.grad(written_out(hidden, head, edges), moving)
    torch.testing.assert_close(moving.grad, expected, rtol=1e-5, atol=1e-6)
    assert still.grad is None


def test_empty_batch_has_zero_loss() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    batch = SimpleNamespace(
        source_S=torch.zeros(0, dtype=torch.int64),
        edge_source_E=torch.zeros(0, dtype=torch.int64),
        target_E=torch.zeros(0, dtype=torch.int64),
        weight_E=torch.zeros(0),
    )
    loss = weighted_nll(Head(hidden, torch.randn(11, 6)), batch)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any()


class LargestTensor(TorchDispatchMode):
    """Dispatch mode with the largest first dimension of tensors with vocabulary size."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2:
                rows, columns = tensor.shape
                if columns == self.vocabulary:
                    self.rows = max(self.rows, rows)
        return made


@pytest.mark.parametrize(("trained", "rows"), [(False, 128), (True, 512)])
def test_logits_exist_only_for_single_chunks(trained: bool, rows: int) -> None:
    edges = [(parent, parent % 50, 1.0) for parent in range(1000)]
    head = torch.randn(50, 6, requires_grad=trained)
    network = Head(torch.randn(1000, 6, requires_grad=True), head)
    with LargestTensor(vocabulary=50) as seen:
        weighted_nll(network, batch_of(edges)).backward()  # type: ignore[arg-type]
    assert seen.rows == rows


def test_small_terms_survive_large_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 1)
    # In float32, 2**23 + 0.25 is 2**23.
    edges = [(0, 0, 2.0**24), *[(parent, 0, 0.25) for parent in range(1, 401)]]
    loss = weighted_nll(Head(torch.zeros(401, 1), torch.zeros(2, 1)), batch_of(edges))  # type: ignore[arg-type]
    assert float(loss) == pytest.approx((2**24 + 100) * 0.69314718056, rel=1e-7)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.7, None), (0.7, 2.0)])
@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_token_log_probabilities_and_gradients(
    chunk: int,
    temperature: float,
    cap: float | None,
    trained: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    monkeypatch.setattr(logprobs, "CHUNK_TRAINED", chunk)
    edges = random_edges(nodes=24, vocabulary=11)
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(24, 6), torch.randn(11, 6), torch.randn(11)
    mine = Head(
        hidden.clone().requires_grad_(),
        head.clone().requires_grad_(trained),
        bias.clone().requires_grad_(trained),
        cap,
    )
    order = torch.randperm(len(edges))
    row_M = torch.randint(3, (len(edges),)).sort().values
    batch = batch_of(edges, fill=5)
    batch.learned_edges = (row_M, order)
    batch.tree = SimpleNamespace(examples=range(3))
    logp_M = token_logps(mine, batch, temperature)  # type: ignore[arg-type]
    factor_R = torch.tensor([0.3, -2.0, 1.1])
    (row_sums(batch, logp_M).square() * factor_R).sum().backward()

    leaves = [each.double().requires_grad_() for each in (hidden, head, bias)]
    logits_NV = leaves[0] @ leaves[1].t() + leaves[2]
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    full_NV = (logits_NV / temperature).log_softmax(-1)
    expected_M = torch.stack([full_NV[edges[e][0], edges[e][1]] for e in order])
    sums_R = torch.stack([expected_M[row_M == row].sum() for row in range(3)])
    (sums_R.square() * factor_R).sum().backward()
    torch.testing.assert_close(logp_M.double(), expected_M, rtol=1e-5, atol=1e-6)
    for given, wanted in zip((mine.hidden_NH, mine.head_VH, mine.head_bias_V), leaves, strict=True):
        if given is None or not given.requires_grad:
            continue
        torch.testing.assert_close(given.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)
