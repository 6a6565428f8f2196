"""LoRA on stacked experts against dense updates and PEFT's ``target_parameters``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.adaptations import ADAPTATIONS, LoRA
from luthier.adaptations.lora_experts import LoRAExperts
from luthier.adaptations.peft import lora_of
from luthier.errors import RecipeError
from luthier.models.formats.save import read_adapter, save_adapter
from luthier.models.networks.layers import modules_of
from model_families import DECODERS

IDS = torch.arange(5, 21).view(2, 8)
BOTH = LoRA(rank=3, alpha=6.0, targets=("all-linear", "experts"))
FAMILIES = (
    "glm4_moe",  # shared experts, grouped products
    "gpt_oss",  # transposed weights, biases
    "llama4_text",  # batched products
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (
            "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "phimoe", "olmoe",
            "flex_olmo", "granitemoe", "ernie4_5_moe", "lfm2_moe", "qwen3_next", "jamba",
        )
    ),
)  # fmt: skip


def made(model_type: str) -> Any:
    """Return a network with random weights, biases included."""
    torch.manual_seed(0)
    family = next(each for each in DECODERS if each.model_type == model_type)
    model: Any = AutoModelForCausalLM.from_config(family.config(), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


def adapted(model: Any, lora: LoRA = BOTH) -> Any:
    """Return ``model`` with branches that change the output."""
    lora.attach(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {
        name.replace(".default", "").removeprefix("base_model.model."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_gradients_equal_peft_and_the_merged_weights(
    model_type: str, tmp_path: Path
) -> None:
    plain = made(model_type)
    model = adapted(copy.deepcopy(plain))
    save_adapter(model, BOTH, BOTH.adapter_config(model, "base"), tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        assert (logits - plain(IDS).logits).abs().max() > 0.05
        torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)

    ours, wanted = gradients(model), gradients(theirs)
    assert ours.keys() == wanted.keys()
    assert sum(".experts." in name for name in ours) >= 4  # A and B of two weights
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)

    BOTH.merge(model)
    assert not modules_of(model, LoRAExperts)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_peft_adapter_with_experts_is_imported(tmp_path: Path) -> None:
    model = adapted(made("mixtral"), LoRA(rank=3, targets=("q_proj", "experts")))
    config = BOTH.adapter_config(model, "base")
    save_adapter(model, BOTH, config, tmp_path)
    found = lora_of(config, read_adapter(tmp_path), made("mixtral"))
    assert found.rank == 3 and set(found.targets or ()) == {"q_proj", "experts"}


def test_experts_are_adapted_only_by_name() -> None:
    usual = adapted(made("phimoe"), LoRA(rank=2))
    assert not modules_of(usual, LoRAExperts)
    # The router inherits from nn.Linear, but returns the chosen experts.
    assert not any("router" in name for name, _ in usual.named_parameters() if "lora_" in name)
    assert LoRA().shares_base and not BOTH.shares_base
    chosen = adapted(made("phimoe"), LoRA(rank=2, targets="experts", layers_to_transform=(1,)))
    assert {name.split(".")[2] for name in modules_of(chosen, LoRAExperts)} == {"1"}


@pytest.mark.parametrize("settings", [{"method": "lora", "dora": True}, {"method": "sparse"}])
def test_unsupported_methods_refuse_expert_targets(settings: dict[str, Any]) -> None:
    method = ADAPTATIONS[settings["method"]].model_validate({**settings, "targets": ("experts",)})
    with pytest.raises(RecipeError) as refused:
        method.attach(made("mixtral"))
    assert refused.value.rule == "adapter.targets"


def test_eager_experts_match_grouped_products() -> None:
    model = adapted(made("gpt_oss"))
    with torch.no_grad():
        grouped = model(IDS).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(IDS).logits, grouped, rtol=1e-4, atol=1e-5)


def test_experts_train_in_bfloat16() -> None:
    model = adapted(made("qwen3_moe").to(torch.bfloat16))
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    with torch.no_grad():
        before = model(IDS).logits.float()
        BOTH.merge(model)
        assert (model(IDS).logits.float() - before).norm() < 0.1 * before.norm()
