"""Divergences and gradients against torch's autograd, and against TRL if installed."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.objectives import logprobs
from luthier.objectives.distillation.divergence import Divergence
from luthier.objectives.logprobs import chunked_loss

TRL_PYTHON = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def written_out(kind: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """Return the divergence of distributions over the last dimension, by definition."""

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one / other).log()).sum(-1)

    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    mean = beta * p + (1 - beta) * q
    return beta * kl(p, mean) + (1 - beta) * kl(q, mean)


def top_k(logp_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ids of the likeliest tokens, and log-probabilities with all other tokens last."""
    values, ids = logp_CV.topk(k)
    rest = (1 - values.double().exp().sum(-1, keepdim=True)).clamp_min(1e-30).log()
    return ids, torch.cat([values, rest.to(values.dtype)], -1)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_divergence_value_and_slope_match_definition(
    kind: str, beta: float, temperature: float, spread: float
) -> None:
    torch.manual_seed(0)
    student, teacher = spread * torch.randn(2, 7, 30)
    leaf = student.double().requires_grad_()
    p = (teacher.double() / temperature).softmax(-1)
    expected = written_out(kind, beta, p, (leaf / temperature).softmax(-1))
    expected.sum().backward()
    measure = Divergence(kind, beta, temperature)
    logp = (teacher / temperature).log_softmax(-1)
    value, slope = measure.between(student.clone(), None, logp, True)
    assert slope is not None and leaf.grad is not None
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double() / temperature, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("k", [1, 5, 29])
def test_top_k_divergence_merges_remaining_tokens(kind: str, beta: float, k: int) -> None:
    torch.manual_seed(1)
    student, teacher = 2 * torch.randn(2, 7, 30)
    ids, few = top_k(teacher.double().log_softmax(-1), k)
    few = few.float()
    leaf = student.double().requires_grad_()
    q, p = leaf.softmax(-1), teacher.double().softmax(-1)

    def merged(all_CV: Tensor) -> Tensor:
        chosen = all_CV.gather(-1, ids)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    expected = written_out(kind, beta, merged(p), merged(q))
    expected.sum().backward()
    value, slope = Divergence(kind, beta, 1.0).between(student.clone(), ids, few, True)
    assert slope is not None and leaf.grad is not None
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    whole = written_out(kind, beta, p, q)
    assert (expected <= whole + 1e-9).all()


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_top_k_of_all_tokens_equals_full_divergence(kind: str, beta: float) -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 7, 30)
    logp = teacher.log_softmax(-1)
    measure = Divergence(kind, beta, 1.0)
    ids, few = top_k(logp, 30)
    for one, other in zip(
        measure.between(student.clone(), ids, few, True),
        measure.between(student.clone(), None, logp.clone(), True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padded_embeddings_of_either_side_are_left_out() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(4, 12), torch.randn(4, 10)
    value, slope = Divergence("forward", 0.5, 1.0).between(
        student.clone(), None, teacher.log_softmax(-1), True
    )
    p, q = teacher.softmax(-1), student[:, :10].softmax(-1)
    torch.testing.assert_close(value, written_out("forward", 0.5, p, q))
    assert slope is not None and slope.shape == (4, 12)
    assert not slope[:, 10:].any() and slope[:, :10].any()


def head(positions: int, vocabulary: int, trained: bool) -> tuple[Any, Any, Tensor]:
    """Return hidden states with a head, a batch, and the weight of each position."""
    torch.manual_seed(4)
    hidden = torch.randn(positions, 6).requires_grad_()
    network = SimpleNamespace(
        hidden=lambda batch, node_S: hidden[node_S],
        before_vocabulary=lambda states: states,
        head_VH=torch.randn(vocabulary, 6, requires_grad=trained),
        head_bias_V=torch.randn(vocabulary, requires_grad=trained),
        logit_cap=None,
        leaf=hidden,
    )
    source_E = torch.tensor([n for n in range(positions - 2) for _ in range(1 + n % 2)])
    weight_E = torch.rand(len(source_E))
    batch = SimpleNamespace(
        source_S=torch.arange(positions),
        edge_source_E=source_E,
        target_E=torch.randint(vocabulary, (len(source_E),)),
        weight_E=weight_E,
    )
    return network, batch, torch.zeros(positions).index_add_(0, source_E, weight_E)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_loss_includes_data_cross_entropy(
    chunk: int, mix: float, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TRAINED", chunk)
    network, batch, scale_S = head(9, 13, trained)
    teacher = torch.randn(9, 13)
    measure = Divergence("jsd", 0.4, 2.0)
    compare = measure.compare(
        batch, lambda rows: (None, (teacher[rows] / 2.0).log_softmax(-1)), mix
    )
    total = chunked_loss(network, batch, compare, chunk)
    (3 * total).backward()
    names = ("leaf", "head_VH", "head_bias_V")
    leaves = [getattr(network, name).detach().double().requires_grad_() for name in names]
    logits = leaves[0] @ leaves[1].t() + leaves[2]
    nll_E = -logits.log_softmax(-1)[batch.edge_source_E, batch.target_E]
    p = (teacher.double() / 2).softmax(-1)
    soft_S = 4 * written_out("jsd", 0.4, p, (logits / 2).softmax(-1))
    expected = mix * (nll_E * batch.weight_E).sum() + (1 - mix) * (soft_S * scale_S).sum()
    (3 * expected).backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, leaf in zip(names, leaves, strict=True):
        given = getattr(network, name)
        if given.requires_grad:
            torch.testing.assert_close(given.grad.double(), leaf.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not TRL_PYTHON.exists(), reason="TRL's environment (benchmarks) is not made")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_matches_trl(temperature: float) -> None:
    torch.manual_seed(5)
    student, teacher = 3 * torch.randn(2, 6, 40)
    script = (
        "import json, sys, torch\n"
        "from trl.experimental.gkd import GKDTrainer\n"
        "s, t, betas, temperature = json.load(sys.stdin)\n"
        "s, t = torch.tensor([s]), torch.tensor([t])\n"
        "loss = GKDTrainer.generalized_jsd_loss\n"
        "print(json.dumps([float(loss(s, t, beta=b, temperature=temperature, reduction='sum'))"
        " for b in betas]))\n"
    )
    betas = [{"forward": 0.0, "reverse": 1.0}.get(kind, beta) for kind, beta in KINDS]
    given = json.dumps([student.tolist(), teacher.tolist(), betas, temperature])
    done = subprocess.run(
        [str(TRL_PYTHON), "-c", script], input=given, capture_output=True, text=True, check=True
    )
    for (kind, beta), theirs in zip(KINDS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        logp = (teacher / temperature).log_softmax(-1)
        value, _ = Divergence(kind, beta, temperature).between(student.clone(), None, logp, False)
        assert float(value.sum()) == pytest.approx(theirs, rel=1e-5)
    assert math.isfinite(theirs)
