"""AdamW over float32 masters, against the AdamW of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.engine.optimizers import MasterAdamW, rate_shares
from luthier.errors import Diverged
from luthier.models.networks.layers import layer_names
from luthier.recipe import Training

RATE = 1e-2


def make_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"matrix": (5, 4), "bias": (5,), "cube": (2, 3, 2)}
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(100 + step)
    return {n: torch.randn(w.shape).to(dtype) * 3 for n, w in make_weights().items()}


def give(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.grad = values[name].clone()


def train(
    optimizer: MasterAdamW, weights: dict[str, nn.Parameter], steps: range, dtype: Any
) -> None:
    for step in steps:
        give(weights, gradients(step, dtype))
        optimizer.collect()
        optimizer.step(RATE / (1 + step))


def test_float32_equals_adamw_with_matrix_decay_and_clipping() -> None:
    mine, theirs = make_weights(), make_weights()
    training = Training(learning_rate=RATE, weight_decay=0.1, beta2=0.95, max_gradient_norm=2.0)
    optimizer = MasterAdamW(mine.items(), training)
    groups = [
        {"params": [theirs["matrix"], theirs["cube"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(6):
        give(mine, gradients(step))
        give(theirs, gradients(step))
        optimizer.collect()
        norm = optimizer.step(RATE / (1 + step))
        expected = nn.utils.clip_grad_norm_(
            [theirs["matrix"], theirs["cube"], theirs["bias"]], 2.0, foreach=True
        )
        for group in adamw.param_groups:
            group["lr"] = RATE / (1 + step)
        adamw.step()
        assert norm == pytest.approx(float(expected), rel=1e-6) and norm > 2.0
        for name, weight in mine.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def test_float32_without_clipping_equals_adamw_bits() -> None:
    mine, theirs = make_weights(), make_weights()
    optimizer = MasterAdamW(mine.items(), Training(learning_rate=RATE, max_gradient_norm=0.0))
    adamw = torch.optim.AdamW(theirs.values(), weight_decay=0.0, fused=True)
    for step in range(6):
        give(mine, gradients(step))
        give(theirs, gradients(step))
        optimizer.collect()
        optimizer.step(RATE / (1 + step))
        adamw.param_groups[0]["lr"] = RATE / (1 + step)
        adamw.step()
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name]), name


def test_adam_equals_adam_of_torch_with_decay_of_matrices() -> None:
    mine, theirs = make_weights(), make_weights()
    training = Training(optimizer="adam", learning_rate=RATE, weight_decay=0.3, max_gradient_norm=0)
    optimizer = MasterAdamW(mine.items(), training)
    groups = [
        {"params": [theirs["matrix"], theirs["cube"]], "weight_decay": 0.3},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.Adam(groups, fused=True)
    for step in range(6):
        give(mine, gradients(step))
        give(theirs, gradients(step))
        optimizer.collect()
        optimizer.step(RATE / (1 + step))
        for group in adam.param_groups:
            group["lr"] = RATE / (1 + step)
        adam.step()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def test_two_steps_by_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    training = Training(learning_rate=0.1, weight_decay=0.5, epsilon=0.1, max_gradient_norm=0.0)
    optimizer = MasterAdamW([("w", weight)], training)
    value, mean, square = 2.0, 0.0, 0.0
    for step, slope in enumerate((0.3, -0.2), start=1):
        weight.grad = torch.tensor([[slope]])
        optimizer.collect()
        assert optimizer.step(0.1) == pytest.approx(abs(slope))
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 0.1)
        assert weight.item() == pytest.approx(value, rel=1e-6)


def test_gradients_of_micro_batches_are_summed_and_freed() -> None:
    weights = make_weights()
    alone = make_weights()
    training = Training(learning_rate=RATE, max_gradient_norm=0.0)
    optimizer, once = MasterAdamW(weights.items(), training), MasterAdamW(alone.items(), training)
    parts = [gradients(step) for step in range(3)]
    for part in parts:
        give(weights, part)
        optimizer.collect()
        assert all(weight.grad is None for weight in weights.values())
    give(alone, {name: parts[0][name] + parts[1][name] + parts[2][name] for name in weights})
    once.collect()
    assert optimizer.step(RATE) == once.step(RATE)
    for name, weight in weights.items():
        assert torch.equal(weight, alone[name])


def test_micro_batch_sums_are_float32() -> None:
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", weight)], Training(learning_rate=RATE, max_gradient_norm=0.0))
    for value in [1.0] + [2**-10] * 1024:
        weight.grad = torch.tensor([[value]], dtype=torch.bfloat16)
        optimizer.collect()
    assert optimizer.step(RATE) == 2.0


def test_small_steps_accumulate_in_master_weights() -> None:
    mine, theirs = (nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterAdamW([("w", mine)], Training(learning_rate=1e-4))
    adamw = torch.optim.AdamW([theirs], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        for weight in (mine, theirs):
            weight.grad = torch.ones_like(weight)
        optimizer.collect()
        optimizer.step(1e-4)
        adamw.step()
    assert set(theirs.flatten().tolist()) == {1.0}
    assert optimizer.masters["w"].flatten().tolist() == pytest.approx([0.99] * 9, abs=1e-5)
    # The bfloat16 numbers on both sides of 0.99.
    assert set(mine.flatten().tolist()) <= {253 / 256, 254 / 256}


def test_bfloat16_copy_follows_masters_on_average() -> None:
    """Rounded to nearest, no weight would have moved: half a spacing is 2e-3 and more."""
    torch.manual_seed(0)
    weight = nn.Parameter((1 + torch.rand(200, 300)).bfloat16())
    start = weight.detach().float().clone()
    optimizer = MasterAdamW([("w", weight)], Training(learning_rate=1e-4))
    weight.grad = torch.ones_like(weight)
    optimizer.collect()
    optimizer.step(1e-4)
    assert torch.equal(optimizer.masters["w"].bfloat16().float(), start)
    assert (weight.float() - start).mean().item() == pytest.approx(-1e-4, rel=0.1)


def test_frozen_weights_have_no_state_and_do_not_move() -> None:
    weights = make_weights()
    weights["cube"].requires_grad_(False)
    before = weights["cube"].clone()
    optimizer = MasterAdamW(weights.items(), Training(learning_rate=RATE, weight_decay=0.1))
    give({n: w for n, w in weights.items() if n != "cube"}, gradients(0))
    optimizer.collect()
    optimizer.step(RATE)
    assert torch.equal(weights["cube"], before)
    assert {name.partition(".")[2] for name in optimizer.state()} == {"matrix", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_optimizer_continues_bit_equal(dtype: torch.dtype) -> None:
    training = Training(learning_rate=RATE, weight_decay=0.1)
    straight = make_weights(dtype)
    optimizer = MasterAdamW(straight.items(), training)
    train(optimizer, straight, range(3), dtype)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    train(optimizer, straight, range(3, 6), dtype)

    resumed = make_weights(dtype)
    for weight in resumed.values():
        weight.data.zero_()
    again = MasterAdamW(resumed.items(), training)
    again.restore(saved)
    train(again, resumed, range(3, 6), dtype)
    for name, weight in straight.items():
        assert weight.dtype == dtype and torch.equal(resumed[name], weight), name
    first, second = optimizer.state(), again.state()
    assert first.keys() == second.keys() and len(first) == 3 * 4
    assert all(torch.equal(first[name], second[name]) for name in first)


LAYERED = {
    "embed.weight": 0.5**4,
    "embed.norm": 0.5**4,
    "body.layer.0.matrix": 0.5**3,
    "body.layer.0.bias": 0.5**3,
    "body.layer.1.matrix": 0.5**2,
    "body.layer.2.matrix": 0.5,
    "body.norm": 1.0,
    "score.weight": 1.0,
}
STACK = ["body.layer.0", "body.layer.1", "body.layer.2"]


def make_layered(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    names = list(LAYERED)
    shape = {name: (4,) if name.endswith(("norm", "bias")) else (3, 4) for name in names}
    return {name: nn.Parameter(torch.randn(shape[name]).to(dtype)) for name in names}


def push(optimizer: MasterAdamW, weights: dict[str, nn.Parameter], step: int) -> None:
    torch.manual_seed(step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape).to(weight.dtype)
    optimizer.collect()
    optimizer.step(RATE)


def test_layer_decay_scales_rate_by_layer() -> None:
    """AdamW's first step moves a weight by the rate, independent of the gradient."""
    weights = make_layered()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    training = Training(learning_rate=RATE, layer_decay=0.5, max_gradient_norm=0.0)
    optimizer = MasterAdamW(weights.items(), training, STACK)
    push(optimizer, weights, 0)
    for name, weight in weights.items():
        moved = (weight.detach() - before[name]).abs()
        assert torch.allclose(moved, torch.full_like(moved, RATE * LAYERED[name]), rtol=1e-3), name


def test_shares_of_the_rate_by_name() -> None:
    names = list(LAYERED)
    assert rate_shares(names, STACK, 0.5) == LAYERED
    assert set(rate_shares(names, STACK, 1.0).values()) == {1.0}
    eleven = [f"h.{index}" for index in range(11)]
    found = rate_shares(["e", *(f"{name}.w" for name in eleven), "top"], eleven, 0.9)
    assert [found[f"h.{index}.w"] for index in (0, 1, 10)] == [0.9**11, 0.9**10, 0.9]
    assert (found["e"], found["top"]) == (0.9**12, 1.0)


@pytest.mark.parametrize(
    ("family", "below", "above"),
    [
        ("llama", "model.embed_tokens.weight", {"model.norm.weight", "lm_head.weight"}),
        ("gpt2", "transformer.wpe.weight", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("bert", "bert.embeddings.LayerNorm.weight", {"cls.predictions.bias"}),
        ("roberta", "roberta.embeddings.word_embeddings.weight", {"lm_head.dense.weight"}),
    ],
)
def test_weights_below_and_above_layers_of_real_networks(
    family: str, below: str, above: set[str], family_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if family in ("bert", "roberta") else AutoModelForCausalLM
    model = kind.from_pretrained(family_folder(family))
    layers = layer_names(model)
    shares = rate_shares([name for name, _ in model.named_parameters()], layers, 0.5)
    assert shares[below] == min(shares.values()) == 0.5 ** (len(layers) + 1)
    assert above <= {name for name, share in shares.items() if share == 1.0}
    for depth, layer in enumerate(reversed(layers), start=1):
        assert {s for n, s in shares.items() if n.startswith(f"{layer}.")} == {0.5**depth}


def test_frozen_bottom_does_not_change_rates_above() -> None:
    weights = make_layered()
    for name in ("embed.weight", "embed.norm", *(n for n in weights if ".layer." in n)):
        weights[name].requires_grad_(False)
    before = weights["score.weight"].detach().clone()
    training = Training(learning_rate=RATE, layer_decay=0.5, max_gradient_norm=0.0)
    optimizer = MasterAdamW(weights.items(), training, STACK)
    push(optimizer, weights, 0)
    moved = (weights["score.weight"].detach() - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, RATE), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_wise_rates_go_on_with_the_same_bits(dtype: torch.dtype) -> None:
    training = Training(learning_rate=RATE, layer_decay=0.7, weight_decay=0.1)
    straight = make_layered(dtype)
    optimizer = MasterAdamW(straight.items(), training, STACK)
    for step in range(3):
        push(optimizer, straight, step)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    for step in range(3, 6):
        push(optimizer, straight, step)
    resumed = make_layered(dtype)
    again = MasterAdamW(resumed.items(), training, STACK)
    again.restore(saved)
    for step in range(3, 6):
        push(again, resumed, step)
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


def test_restoring_sets_the_weights_of_the_network() -> None:
    weights = make_weights(torch.bfloat16)
    optimizer = MasterAdamW(weights.items(), Training(learning_rate=RATE))
    train(optimizer, weights, range(1), torch.bfloat16)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    expected = {name: weight.detach().clone() for name, weight in weights.items()}
    train(optimizer, weights, range(1, 3), torch.bfloat16)
    optimizer.restore(saved)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])


def test_state_before_first_step_is_restored() -> None:
    weights, other = make_weights(), make_weights()
    training = Training(learning_rate=RATE)
    fresh = MasterAdamW(weights.items(), training)
    again = MasterAdamW(other.items(), training)
    again.restore({name: tensor.clone() for name, tensor in fresh.state().items()})
    train(fresh, weights, range(2), torch.float32)
    train(again, other, range(2), torch.float32)
    assert all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_stops_before_update(bad: float) -> None:
    weights = make_weights()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = MasterAdamW(weights.items(), Training(learning_rate=RATE))
    values = gradients(0)
    values["bias"][2] = bad
    give(weights, values)
    optimizer.collect()
    with pytest.raises(Diverged) as refused:
        optimizer.step(RATE)
    assert refused.value.rule == "training.diverged"
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_head_has_separate_rate() -> None:
    """The first step of Adam moves each weight by the rate, independent of the gradient."""
    weights = {name: nn.Parameter(torch.ones(3)) for name in ("body", "head")}
    training = Training(learning_rate=RATE, head_rate_multiplier=10.0, max_gradient_norm=0.0)
    optimizer = MasterAdamW(weights.items(), training, heads={"head"})
    for weight in weights.values():
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.collect()
    optimizer.step(RATE)
    moved = {name: 1 - weight.detach() for name, weight in weights.items()}
    assert torch.allclose(moved["head"], 10 * moved["body"], rtol=1e-4)
    assert torch.allclose(moved["body"], torch.full((3,), RATE), rtol=1e-3)


def test_rounding_of_whole_weights_is_independent_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noise moves on once in 262,144 numbers, and processes have shards of other lengths."""
    monkeypatch.setattr("luthier.engine.optimizers.is_sharded", lambda weight: weight.dim() == 1)

    def published(size: int) -> Tensor:
        weights = {"shard": nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))}
        weights["whole"] = nn.Parameter(torch.zeros(512, 512, dtype=torch.bfloat16))
        optimizer = MasterAdamW(weights.items(), Training(learning_rate=1e-3))
        optimizer.masters["whole"].copy_(torch.linspace(1, 2, 1 << 18).view(512, 512))
        optimizer.publish()
        return weights["whole"].detach()

    assert torch.equal(published(1 << 18), published(1 << 19))
