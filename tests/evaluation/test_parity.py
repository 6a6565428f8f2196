"""Comparison of networks, and rejection of models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from luthier.errors import LuthierError
from luthier.evaluation.parity import (
    TokenComparison,
    check_parity,
    compare_backends,
    compare_greedy,
    generate_greedily,
    greedy_prompts,
    target_logps,
)
from luthier.models.decoding.torch_backend import torch_backend
from luthier.models.load import as_network
from luthier.models.manifest import Parity, TokenDifference, TokenParity
from luthier.models.networks.network import Network
from luthier.types import Example

CPU = torch.device("cpu")
PROMPTS = [np.array(ids, dtype=np.int64) for ids in ([5, 6, 7, 8], [9, 10], [5, 6, 7, 8, 9, 30])]
DIFFERENCE = TokenDifference(
    row=2, position=17, token=12, other_token=345, margin=0.5, other_margin=0.25
)


def network_of(model: Any) -> Network:
    return as_network(model.eval(), CPU, torch.float32)


def backend_of(model: Any) -> Any:
    return torch_backend(network_of(model), 64)


def naive_greedy(model: Any, prompt: Any, count: int) -> list[int]:
    """Generate with transformers' forward pass over the whole text at every step."""
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return list(ids[len(prompt) :])


@pytest.mark.parametrize(
    ("trained", "reloaded", "rounded", "good"),
    [
        (2.0, 2.0, False, True),
        (2.0, 2.009, False, True),
        (2.0, 2.011, False, False),
        (2.0, 1.989, False, False),
        (0.1, 0.1049, False, True),
        (0.1, 0.1051, False, False),
        (2.0, 2.059, True, True),
        (2.0, 2.061, True, False),
        (2.0, float("nan"), True, False),
        (2.0, float("inf"), True, False),
        (float("nan"), float("nan"), True, False),
    ],
)
def test_the_gate_compares_losses(
    trained: float, reloaded: float, rounded: bool, good: bool
) -> None:
    parity = Parity(rows=16, trained=trained, reloaded=reloaded, rounded=rounded)
    if good:
        check_parity(parity)
    else:
        with pytest.raises(LuthierError) as caught:
            check_parity(parity)
        assert caught.value.exit_code == 1


@pytest.mark.parametrize("where", ["next_tokens", "greedy", "greedy_beside_base"])
@pytest.mark.parametrize(
    ("mean_kl", "rounded", "good"),
    [(1e-6, False, True), (2e-2, False, False), (2e-2, True, True), (0.04, True, False),
     (float("nan"), True, False)],
)  # fmt: skip
def test_parity_check_compares_tokens_within_tolerance(
    where: str, mean_kl: float, rounded: bool, good: bool
) -> None:
    tokens = TokenParity(
        tokens=64, agreement=0.75, mean_kl=mean_kl, max_kl=1.0, first_difference=DIFFERENCE
    )
    parity = Parity(rows=16, trained=2.0, reloaded=2.0, rounded=rounded, **{where: tokens})
    if where == "greedy_beside_base":  # nothing is merged there
        good = mean_kl < (5e-3 if rounded else 1e-3)
    if good:
        check_parity(parity)
        return
    with pytest.raises(LuthierError):
        check_parity(parity, lambda token: {12: "yes", 345: "no"}[token])


def test_parity_accepts_changed_experts_and_refuses_lost_adapter() -> None:
    def parity(mean_kl: float, median_kl: float, rounded: bool = True) -> Parity:
        tokens = TokenParity(
            tokens=64, agreement=0.9, mean_kl=mean_kl, max_kl=4.0, median_kl=median_kl
        )
        each = {"next_tokens": tokens, "greedy": tokens, "greedy_beside_base": tokens}
        return Parity(rows=16, trained=2.0, reloaded=2.0, rounded=rounded, **each)

    check_parity(parity(0.15, 0.002))
    for lost in (parity(0.15, 0.04), parity(0.4, 0.002), parity(0.15, 0.002, rounded=False)):
        with pytest.raises(LuthierError):
            check_parity(lost)


def test_the_limit_follows_the_rounding_of_the_base() -> None:
    tokens = TokenParity(tokens=64, agreement=0.9, mean_kl=0.09, max_kl=1.0, median_kl=0.06)
    parity = Parity(rows=16, trained=2.0, reloaded=2.1, rounded=True, next_tokens=tokens)
    base = tokens.model_copy(update={"mean_kl": 0.02, "median_kl": 0.01})
    check_parity(parity, base_rounding=lambda: base)
    for small in (None, tokens.model_copy(update={"mean_kl": 0.002, "median_kl": 0.001})):
        with pytest.raises(LuthierError):
            check_parity(parity, base_rounding=lambda small=small: small)
        near = parity.model_copy(update={"reloaded": 2.0})
        with pytest.raises(LuthierError):
            check_parity(near, base_rounding=lambda small=small: small)
    measured: list[int] = []
    check_parity(
        Parity(rows=16, trained=2.0, reloaded=2.0, rounded=True),
        base_rounding=lambda: measured.append(1),
    )
    assert not measured


def test_token_comparison_has_divergence_and_first_difference() -> None:
    one = torch.log(torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    other = torch.log(torch.tensor([[0.1, 0.8, 0.1], [0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]))
    comparison = TokenComparison()
    assert comparison.is_empty
    comparison.add_logps([(1, 4), (1, 3), (0, 9)], one, other)  # unsorted
    found = comparison.parity()
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    last = 0.1 * math.log(0.1 / 0.2) + 0.1 * math.log(0.1 / 0.7) + 0.8 * math.log(0.8 / 0.1)
    assert found.mean_kl == pytest.approx((first + last) / 3)
    assert found.max_kl == pytest.approx(last) and found.agreement == pytest.approx(1 / 3)
    difference = found.first_difference
    assert difference is not None and difference.other_margin is not None
    assert (difference.row, difference.position) == (0, 9)
    assert (difference.token, difference.other_token) == (2, 1)
    assert difference.margin == pytest.approx(math.log(8))
    assert difference.other_margin == pytest.approx(math.log(7))


def test_next_tokens_are_found_at_their_places(tiny_llama: Callable[..., Any]) -> None:
    """Rows with a common beginning share the positions of the first row."""
    model, plain = tiny_llama(), tiny_llama().eval()
    texts = [[5, 6, 7, 8, 9], [5, 6, 7, 30, 31, 32], [40, 41, 42]]
    weights = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1]]
    examples = [
        Example(np.array(ids), np.array(weight, dtype=np.float32), row)
        for row, (ids, weight) in enumerate(zip(texts, weights, strict=True))
    ]
    found = target_logps(network_of(model), examples, 1024)
    assert found is not None
    places = dict(zip(found.places, found.logp_PV, strict=True))
    # Trees are padded with position 1, the first token.
    learned = {(row, at) for row, each in enumerate(weights) for at, w in enumerate(each) if w}
    assert {(row, at) for row, at in places if at > 1} == learned - {(1, 3)}
    with torch.no_grad():
        for (row, at), logp_V in places.items():
            logits = plain(input_ids=torch.tensor([texts[row][:at]])).logits[0, -1]
            torch.testing.assert_close(logp_V, logits.log_softmax(-1), atol=1e-5, rtol=1e-4)
    assert found.beside(found).first_difference is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_generation_matches_naive_generation(
    family: str, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    make = tiny_gpt2 if family == "gpt2" else tiny_llama
    expected = [naive_greedy(make(), prompt, 8) for prompt in PROMPTS]
    text = generate_greedily(backend_of(make()), PROMPTS, 8)
    assert text.tokens == expected
    assert [logps.argmax(-1).tolist() for logps in text.logps] == expected
    # A stop token ends a reply; the remaining replies continue.
    stop = expected[0][2]
    cut = generate_greedily(backend_of(make()), PROMPTS, 8, {stop}).tokens
    ends = [ids.index(stop) + 1 if stop in ids else 8 for ids in expected]
    assert cut == [ids[:end] for ids, end in zip(expected, ends, strict=True)]
    assert min(ends) < 8


def test_damaged_weight_is_found_at_first_changed_token(
    tiny_llama: Callable[..., Any],
) -> None:
    def damaged() -> Any:
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[3] *= 30
        return model

    text = generate_greedily(backend_of(tiny_llama()), PROMPTS, 12)
    same = compare_greedy(text, backend_of(tiny_llama()))
    assert same.tokens == 36 and same.agreement == 1 and same.first_difference is None
    assert same.max_kl < 1e-6
    found = compare_greedy(text, backend_of(damaged()))
    assert found.agreement < 1 and found.mean_kl > 1e-3
    assert found == compare_backends(backend_of(tiny_llama()), backend_of(damaged()), PROMPTS, 12)
    others = [naive_greedy(damaged(), prompt, 12) for prompt in PROMPTS]
    row = next(row for row in range(len(PROMPTS)) if others[row] != text.tokens[row])
    at = next(at for at in range(12) if others[row][at] != text.tokens[row][at])
    token, other = text.tokens[row][at], others[row][at]
    first = found.first_difference
    assert first is not None
    assert (first.row, first.position) == (row, len(PROMPTS[row]) + at)
    assert (first.token, first.other_token) == (token, other)
    logp_V = text.logps[row][at]
    assert first.margin == pytest.approx(float(logp_V[token] - logp_V[other]), abs=1e-5)
    assert first.margin > 0 and first.other_margin is not None and first.other_margin > 0


def test_greedy_prompts_end_before_learned_tokens() -> None:
    def example(ids: list[int], learned: list[int], **fields: Any) -> Example:
        weight_T = np.zeros(len(ids), dtype=np.float32)
        weight_T[learned] = 1
        return Example(np.array(ids), weight_T, 0, **fields)

    reply, raw = example([5, 6, 7, 8], [2, 3]), example([*range(10)], [*range(1, 10)])
    asked, long = example([9, 10], []), example([*range(300)], [299])
    encoded = example([0, 1], [1], source_T=np.array([20, 21, 22]))
    rows = [reply, reply, raw, asked, long, encoded]
    found = [ids.tolist() for ids in greedy_prompts(rows, 9, 100)]
    assert found == [[5, 6], [0, 1, 2, 3, 4], [9, 10], [*range(100)], [20, 21, 22]]
    assert len(greedy_prompts(rows, 2, 100)) == 2
    assert len(greedy_prompts([long], 1, 9999)[0]) == 128
    assert greedy_prompts(rows, 9, 0) == []
