"""QLoRA: packing against tables written out here, the layer against autograd, files against PEFT."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from luthier.adaptations import LoRA, QLoRA
from luthier.adaptations.lora_layer import LoRALinear
from luthier.adaptations.qlora_layer import (
    Packing,
    QLoRALinear,
    QuantizedExperts,
    QuantizedLinear,
)
from luthier.engine.memory import PROCESS, estimate_memory, weight_bytes
from luthier.errors import RecipeError
from luthier.models.folder import ModelFolder
from luthier.models.formats.save import save_adapter
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import CAUSAL_LM
from luthier.models.rounding import Rounding

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
LEVELS = {
    # Appendix E of the paper.
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [s * v / 12 for s in (-1, 1) for v in (0, 0.0625, 2, 3, 4, 6, 8, 12)],
    "int8": [k / 127 for k in range(-127, 128)],
}  # fmt: skip


def packed(weight_OI: Tensor, kind: str, block: int = 64, double: bool = False) -> Any:
    base = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], dtype=weight_OI.dtype)
    base.weight.data = weight_OI
    return QuantizedLinear(base.requires_grad_(False), Packing(kind, block, double))


def by_hand(weight_OI: Tensor, kind: str, block: int) -> Tensor:
    """The nearest level times the largest magnitude of each block, by exhaustive search."""
    levels = torch.tensor(LEVELS[kind], dtype=torch.float64)
    flat = weight_OI.double().flatten()
    parts = []
    for part in flat.split(block):
        scale = part.abs().max()
        nearest = (part[:, None] / scale - levels).abs().argmin(1)
        parts.append(levels[nearest] * scale)
    return torch.cat(parts).view_as(weight_OI)


def branch(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A.weight, layer.lora_B.weight


def made(dtype: torch.dtype, dropout: float = 0.0, kind: str = "nf4", size: int = 96) -> Any:
    """Return a packed layer ``[40, size]`` with a bias and an effective branch."""
    torch.manual_seed(0)
    base = nn.Linear(size, 40, dtype=dtype).requires_grad_(False)
    quantized = QuantizedLinear(base, Packing(kind, 64, double=True))
    layer = QLoRALinear(quantized, rank=4, scale=0.7, dropout=dropout)
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    return layer


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(48, 80), (5, 7), (96, 64)])
def test_packed_weight_is_nearest_level(kind: str, block: int, shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = packed(weight_OI, kind, block).weight_OI
    assert found.shape == shape
    # A weight half way between two levels may go either way.
    near = torch.isclose(found.double(), by_hand(weight_OI, kind, block), rtol=1e-5, atol=1e-6)
    assert near.float().mean() > 0.999


@pytest.mark.parametrize("kind", LEVELS)
def test_scales_stored_in_8_bits_change_little(kind: str) -> None:
    weight_OI = torch.randn(256, 320, generator=torch.Generator().manual_seed(1))
    once, twice = (packed(weight_OI, kind, double=double) for double in (False, True))
    moved = float((twice.weight_OI - once.weight_OI).norm() / once.weight_OI.norm())
    assert 0 < moved < 0.01
    blocks = weight_OI.numel() // 64
    assert (once.scales.nbytes, twice.scales.nbytes) == (4 * blocks, blocks)
    assert twice.scales_of_scales.nbytes == 4 * blocks // 256


@pytest.mark.parametrize("double", [False, True])
def test_zero_and_single_block_layers_are_finite(double: bool) -> None:
    assert not packed(torch.zeros(8, 64), "nf4", double=double).weight_OI.any()
    one = packed(torch.full((4, 8), 0.25), "nf4", double=double)
    torch.testing.assert_close(one.weight_OI, torch.full((4, 8), 0.25))


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layer_and_gradients_match_dequantized_autograd(kind: str, dropout: float) -> None:
    layer = made(torch.float32, dropout, kind)
    x, grad = torch.randn(2, 9, 96, requires_grad=True), torch.randn(2, 9, 40)
    torch.manual_seed(3)
    found = layer(x)
    found.backward(grad)
    ours = [x.grad, *(weight.grad for weight in branch(layer))]
    again = [t.detach().clone().requires_grad_() for t in (x, *branch(layer))]
    torch.manual_seed(3)
    weight_OI = layer.base_layer.weight_OI.detach()
    dropped = layer.dropout(again[0].view(-1, 96)).view(2, 9, 96)
    expected = F.linear(again[0], weight_OI, layer.base_layer.bias)
    expected = expected + 0.7 * dropped @ again[1].t() @ again[2].t()
    expected.backward(grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, again, strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-5)
    assert layer.base_layer.bias.grad is None


def test_a_packed_layer_without_a_branch_passes_gradients_on() -> None:
    layer = made(torch.float32).base_layer
    x = torch.randn(7, 96, requires_grad=True)
    grad = torch.randn(7, 40)
    layer(x).backward(grad)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight_OI, layer.bias))
    torch.testing.assert_close(x.grad, grad @ layer.weight_OI)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_backward_pass_saves_no_dequantized_weight(dropout: float) -> None:
    layer = made(torch.float32, dropout)
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id)
    with hooks:
        layer(torch.randn(7, 96, requires_grad=True))
        layer.base_layer(torch.randn(7, 96, requires_grad=True))
    assert kept and max(kept) == 7 * 96 < 40 * 96


def test_packed_experts_save_no_dequantized_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_local_experts=4,
        experts_implementation="grouped_mm",
    )
    experts: Any = MixtralExperts(config).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_()
    number = sum(weight.numel() for weight in experts.parameters())
    layer = QuantizedExperts(experts, Packing("nf4", 64, False))
    assert sum(buffer.nbytes for buffer in layer.buffers()) < 0.6 * number
    assert not [*layer.parameters()]
    made, dequantize = [], QuantizedLinear.weight_OI.fget

    def remembered(self: Any) -> Tensor:
        weight: Tensor = dequantize(self)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(QuantizedLinear, "weight_OI", property(remembered))
    x = torch.randn(6, 32, requires_grad=True)
    routing = torch.tensor([[0, 1]] * 3 + [[3, 1]] * 3), torch.full((6, 2), 0.5)
    y, grad = layer(x, *routing), torch.randn(6, 32)
    assert len(made) == 2 and not any(storage() for storage in made)
    y.backward(grad)
    plain = layer.plain()
    wanted = x.detach().requires_grad_(True)
    expected = plain(wanted, *routing)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, wanted.grad)


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
def test_small_update_survives_large_output(dropout: float) -> None:
    """In bfloat16 the update is below half the spacing of most outputs; on average all of it counts."""
    torch.manual_seed(0)
    base = nn.Linear(576, 576, bias=False).bfloat16().requires_grad_(False)
    nn.init.normal_(base.weight, std=576**-0.5)
    layer = QLoRALinear(QuantizedLinear(base, Packing("nf4", 64, True)), 16, 2.0, dropout)
    nn.init.normal_(layer.lora_B.weight, std=2e-4)
    x = torch.randn(512, 576).bfloat16()
    with torch.no_grad():
        a, b = (weight.double() for weight in branch(layer))
        update = 2.0 * (x.double() @ a.t()).bfloat16().double() @ b.t()
        frozen = x.double() @ layer.weight_OI.double().t()
        kept = ((layer(x).double() - frozen) * update).sum() / update.square().sum()
    assert float(kept) == pytest.approx(1.0, abs=0.02)


def test_merged_weight_is_dequantized_weight_plus_update() -> None:
    layer = made(torch.float32)
    a, b = branch(layer)
    expected = layer.base_layer.weight_OI + 0.7 * b @ a
    merged = layer.merge(Rounding())
    assert type(merged) is nn.Linear and merged.bias is layer.base_layer.bias
    torch.testing.assert_close(merged.weight, expected, rtol=1e-6, atol=1e-7)
    layer = made(torch.bfloat16)
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer.merge(Rounding()).weight, layer.base_layer.weight_OI)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_without_adapter_are_packed_and_restored(
    family: str, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]
) -> None:
    base = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]()
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family]
    adaptation, model = QLoRA(targets=target, rank=2), copy.deepcopy(base)
    adaptation.attach(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    weights = {n.removesuffix(".base_layer"): m.weight_OI for n, m in layers.items()}
    moving = [n for n, w in model.named_parameters() if w.requires_grad]
    assert moving and all(f".{target}.lora_" in name for name in moving)
    adaptation.merge(model)
    plain = dict(base.named_parameters())
    assert [n for n, _ in model.named_parameters()] == list(plain)
    for name, weight in model.named_parameters():
        layer = weights.get(name.removesuffix(".weight")) if name.endswith("weight") else None
        if layer is None:
            assert torch.equal(weight, plain[name]), name
        else:
            dequantized = layer if family == "llama" else layer.t()
            assert torch.equal(weight, dequantized) and not torch.equal(weight, plain[name])


@pytest.mark.parametrize(
    ("fields", "most"),
    [({}, 0.27), ({"double_quantization": False}, 0.29), ({"quantization": "int8"}, 0.52)],
)
def test_memory_estimate_matches_packed_base(
    fields: dict[str, Any], most: float, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    tiny_llama(**wide).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16, CPU)
    linear = sum(w.numel() for n, w in model.named_parameters() if "proj" in n)
    before = weight_bytes(model, 2)
    adaptation = QLoRA(rank=4, **fields)
    adaptation.attach(model)
    branches = sum(w.nbytes for n, w in model.named_parameters() if "lora_" in n)
    after = weight_bytes(model, 2) - branches
    assert 0 < 2 * linear - (before - after) < most * 2 * linear
    assert sum(m.packed.nbytes > 0 for m in model.modules() if hasattr(m, "packed")) == 14

    drawn = ModelFolder(tmp_path).sketch(CAUSAL_LM)
    plain = weight_bytes(drawn, 2)
    with torch.device("meta"):
        adaptation.attach(drawn)
    assert weight_bytes(drawn, 2) == after + branches
    beside = ModelFolder(tmp_path).sketch(CAUSAL_LM)
    with torch.device("meta"):
        LoRA(rank=4).attach(beside)
    estimate = estimate_memory(drawn, 2, plain)
    assert estimate_memory(beside, 2, plain).fixed - estimate.fixed == before - after
    assert estimate.peak(0) >= PROCESS + plain  # loading needs the full weights


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Compute in training mode, which only makes bitsandbytes keep float32."""
    with torch.no_grad():
        logits: Tensor = model.train()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("double", [False, True])
def test_peft_loads_saved_adapter_on_quantized_and_plain_base(
    double: bool, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Wide enough that no block of 64 begins in one row and ends in the next (see the layer).
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(base)
    adapter.mkdir()
    adaptation = QLoRA(rank=4, double_quantization=double)
    model = load_model(base, torch.float32, CPU)
    network = as_network(model, CPU, torch.float32)
    adaptation.attach(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    save_adapter(model, adaptation, adaptation.adapter_config(model, str(base)), adapter)
    assert set(load_file(adapter / "adapter_model.safetensors")) == {
        f"base_model.model.{n}" for n, w in model.named_parameters() if w.requires_grad
    }
    adaptation.merge(network.model)
    network.model.set_attn_implementation("sdpa")
    ids = torch.arange(20, 40)[None]
    ours = logits_of(network.model, ids)

    alike = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    theirs = logits_of(peft.PeftModel.from_pretrained(alike, str(adapter)), ids)
    assert float((theirs - ours).norm() / ours.norm()) < 1e-4

    plain = load_model(base, torch.float32, CPU)
    before = logits_of(plain, ids)
    other = logits_of(peft.PeftModel.from_pretrained(plain, str(adapter)), ids)
    apart = float((other - ours).norm() / ours.norm())
    assert 1e-3 < apart < float((before - ours).norm() / ours.norm())


def test_missing_bitsandbytes_is_refused_before_changes(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = tiny_llama()
    with pytest.raises(RecipeError) as refused:
        QLoRA().attach(model)
    assert refused.value.rule == "adapter.extra"
    assert all(weight.requires_grad for weight in model.parameters())


def test_unknown_target_layer_is_refused_before_packing(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama()
    with pytest.raises(RecipeError) as refused:
        QLoRA(targets="query").attach(model)
    assert refused.value.rule == "adapter.targets"
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
