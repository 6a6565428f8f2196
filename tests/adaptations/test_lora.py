"""LoRA against PEFT, the origin of weights, names and file format."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MambaConfig

from luthier.adaptations import LoRA
from luthier.adaptations.lora_layer import LoRALinear
from luthier.adaptations.peft import lora_of
from luthier.data.tree import build_tree
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.errors import RecipeError
from luthier.models.formats.save import save_adapter
from luthier.models.load import as_network
from luthier.models.networks.frozen_layer_cache import frozen_layers
from luthier.models.networks.layers import modules_of
from luthier.models.networks.network import Network
from luthier.objectives import SFT
from luthier.recipe import Training
from luthier.types import Example

CPU = torch.device("cpu")
STEPS, ROWS_A_STEP, RATE = 5, 4, 1e-3
LORA = LoRA(rank=4, alpha=8.0)
ENDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def make_rows() -> list[Example]:
    random = np.random.default_rng(3)
    prefix = random.integers(0, 320, 10)
    rows = []
    for index in range(STEPS * ROWS_A_STEP):
        own = random.integers(0, 320, 3 + index % 5)
        ids = np.concatenate([prefix, own])
        rows.append(Example(ids, (np.arange(len(ids)) >= 10).astype(np.float32), index))
    return rows


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the branches, by the name of the layer they belong to."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def row_logits(model: Any, row: Example) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.from_numpy(row.ids_T)[None]).logits[0]
    return logits


def tree_logits(network: Network, row: Example) -> Tensor:
    network.model.eval()
    with torch.no_grad():
        logits = network.hidden(network.batch(build_tree([row]))) @ network.head_VH.t()
    return logits[: len(row)]


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def train_here(network: Network, rows: list[Example], folder: Path) -> list[float]:
    training = Training(
        batch_size=ROWS_A_STEP,
        learning_rate=RATE,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.01,
        shuffle=False,
        micro_batch_tokens=30,
    )
    loop = Loop(
        network=network,
        objective=SFT(),
        training=training,
        examples=rows,
        validation=[],
        steps=STEPS,
        checkpoints=Checkpoints(folder / "checkpoints"),
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Reporter(),
    )
    loop.run()
    return [line["loss"] for line in loop.metrics.read()]


def train_with_peft(model: Any, rows: list[Example]) -> list[float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for row in rows[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]:
            ids = torch.from_numpy(row.ids_T)
            logits = model(input_ids=ids[None]).logits[0]
            total = total + F.cross_entropy(logits[9:-1], ids[10:], reduction="sum")
            count += len(ids) - 10
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def peft_model(base: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


@pytest.fixture
def trained(tiny_llama: Callable[..., Any], tmp_path: Path) -> tuple[Any, Network, list[float]]:
    """Return an unchanged base, a network trained from the base, and the losses."""
    base = tiny_llama()
    model = copy.deepcopy(base)
    network = as_network(model, CPU, torch.float32)
    torch.manual_seed(5)
    LORA.attach(model)
    losses = train_here(network, make_rows(), tmp_path)
    return base, network, losses


def test_lora_training_matches_peft(trained: tuple[Any, Network, list[float]]) -> None:
    base, network, losses = trained
    torch.manual_seed(5)
    theirs = peft_model(copy.deepcopy(base))
    started = adapter_of(theirs)
    expected = train_with_peft(theirs, make_rows())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    found, wanted = adapter_of(network.model), adapter_of(theirs)
    assert found.keys() == wanted.keys() and len(found) == 4 * 7 * 2
    for name, weight in found.items():
        moved = wanted[name] - started[name]
        assert float((weight - wanted[name]).norm()) < 1e-3 * float(moved.norm()), name


def test_a_seed_starts_where_peft_starts(tiny_llama: Callable[..., Any]) -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype)
        torch.manual_seed(11)
        LORA.attach(model)
        starts.append(adapter_of(model))
    base = tiny_llama()
    torch.manual_seed(11)
    theirs = adapter_of(peft_model(base))
    assert starts[0].keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(starts[0][name], weight), name
        assert torch.equal(starts[1][name], weight.bfloat16()), name


def test_frozen_weights_stay_unchanged(trained: tuple[Any, Network, list[float]]) -> None:
    base, network, _ = trained
    before = dict(base.named_parameters())
    still = {
        name.replace(".base_layer", ""): weight
        for name, weight in network.model.named_parameters()
        if "lora_" not in name
    }
    assert still.keys() == before.keys()
    for name, weight in still.items():
        assert not weight.requires_grad and torch.equal(weight, before[name]), name
    for name, weight in adapter_of(network.model).items():
        assert "lora_A" in name or weight.any(), name


def test_peft_loads_saved_adapter(
    trained: tuple[Any, Network, list[float]], tmp_path: Path
) -> None:
    base, network, _ = trained
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(network.model, LORA, LORA.adapter_config(network.model, "some/base"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == sorted(modules_of(network.model, LoRALinear))
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "some/base")
    own = peft.PeftConfig.from_pretrained(str(folder)).to_dict()  # omitted fields have defaults
    assert (
        config.items()
        <= {k: sorted(v) if isinstance(v, set) else v for k, v in own.items()}.items()
    )
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    row = make_rows()[0]
    logits = tree_logits(network, row)
    assert_near(row_logits(theirs, row), logits)
    assert float((logits - row_logits(base, row)).norm()) > 1e-3 * float(logits.norm())
    assert adapter_of(theirs).keys() == adapter_of(network.model).keys()


def test_merge_keeps_logits(
    trained: tuple[Any, Network, list[float]],
) -> None:
    base, network, _ = trained
    row = make_rows()[1]
    before = tree_logits(network, row)
    LORA.merge(network.model)
    assert_near(tree_logits(network, row), before)
    names = [name for name, _ in base.named_parameters()]
    assert [name for name, _ in network.model.named_parameters()] == names
    plain = copy.deepcopy(base)
    plain.load_state_dict(network.model.state_dict())
    assert_near(row_logits(plain, row), before)


def test_training_with_dropout_moves_the_branches_alone(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    network = as_network(model, CPU, torch.float32)
    LoRA(rank=4, dropout=0.3).attach(model)
    losses = train_here(network, make_rows(), tmp_path)
    assert all(np.isfinite(losses))
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    assert model.model.layers[0].self_attn.q_proj.lora_B.weight.any()


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_means_all_but_the_output_head(
    tied: bool, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(tied=tied)
    LORA.attach(model)
    ends = {name.rpartition(".")[2] for name in adapted(model)}
    assert ends == set(ENDS) and len(adapted(model)) == 28
    moving = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(moving) == 56 and all("lora_" in name for name in moving)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {f"model.layers.{n}.self_attn.q_proj" for n in range(4)}),
        ("mlp.up_proj", {f"model.layers.{n}.mlp.up_proj" for n in range(4)}),
        (
            ("model.layers.2.self_attn.v_proj", "layers.0.mlp.down_proj"),
            {"model.layers.2.self_attn.v_proj", "model.layers.0.mlp.down_proj"},
        ),
    ],
)
def test_target_layers_match_by_name_suffix(
    targets: Any, expected: set[str], tiny_llama: Callable[..., Any]
) -> None:
    model, lora = tiny_llama(), LoRA(rank=2, targets=targets)
    lora.attach(model)
    assert adapted(model) == expected
    config = peft.LoraConfig(**lora.adapter_config(model, "") | {"base_model_name_or_path": None})
    theirs = peft.get_peft_model(tiny_llama(), config)
    assert adapter_of(theirs).keys() == adapter_of(model).keys()


def test_layers_to_transform_matches_peft(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, lora = tiny_llama(), LoRA(rank=2, layers_to_transform=(1,))
    lora.attach(model)
    assert adapter_of(model) and all(".layers.1." in name for name in adapter_of(model))
    assert frozen_layers(model) == 1  # the layers below are cached
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(**lora.adapter_config(model, "") | {"base_model_name_or_path": None}),
    )
    assert adapter_of(theirs).keys() == adapter_of(model).keys()
    save_adapter(model, lora, lora.adapter_config(model, ""), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    again, fresh = lora_of(fields, weights, tiny_llama()), tiny_llama()
    again.attach(fresh)
    assert adapter_of(fresh).keys() == adapter_of(model).keys()
    for wrong in ((99,), ()):
        with pytest.raises(RecipeError) as refused:
            LoRA(layers_to_transform=wrong).attach(tiny_llama())
        assert refused.value.setting == "adaptation.layers_to_transform"


def test_mamba_kernel_layers_are_excluded() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RecipeError) as refused:
        LoRA(targets=("in_proj", "dt_proj")).attach(model)
    assert refused.value.rule == "adapter.targets"
    LoRA().attach(model)
    assert adapted(model) == {f"backbone.layers.{n}.mixer.in_proj" for n in range(2)}


def test_unknown_target_layer_lists_known_layers(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama()
    with pytest.raises(RecipeError) as refusal:
        LoRA(targets=("q_proj", "query")).attach(model)
    assert "no linear layer is called query." in str(refusal.value)
    assert ", ".join(ENDS) in str(refusal.value)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        LORA.attach(nn.Sequential(nn.LayerNorm(3)))
    assert refused.value.rule == "adapter.network"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dora": True, "rslora": True},
        pytest.param({"rslora": True}, marks=pytest.mark.slow),
        pytest.param({"dora": True}, marks=pytest.mark.slow),
    ],
)
def test_variants_and_families_train_as_in_peft(
    fields: dict[str, bool],
    family: str,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family]()
    lora = LoRA(rank=4, alpha=8, **fields)
    model = copy.deepcopy(base)
    network = as_network(model, CPU, torch.float32)
    torch.manual_seed(5)
    lora.attach(model)
    losses = train_here(network, make_rows(), tmp_path)
    torch.manual_seed(5)
    config = lora.adapter_config(model, "") | {
        "base_model_name_or_path": None,
        "inference_mode": False,
    }
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    assert losses == pytest.approx(train_with_peft(theirs, make_rows()), rel=1e-4)

    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(model, lora, lora.adapter_config(model, "some/base"), folder)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    row = make_rows()[1]
    before = tree_logits(network, row)
    assert_near(row_logits(again, row), before)
    lora.merge(model)
    assert_near(tree_logits(network, row), before)


def test_a_fractional_alpha_survives_the_configuration(tiny_llama: Callable[..., Any]) -> None:
    model, lora = tiny_llama(), LoRA(rank=8, alpha=12.5)
    lora.attach(model)
    assert lora.adapter_config(model, "base")["lora_alpha"] == 12.5
    assert model.model.layers[0].mlp.up_proj.scale == 12.5 / 8
