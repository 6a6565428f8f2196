"""Bottleneck adapters and BitFit: positions, computation, and number of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import luthier
from luthier.adaptations import Adapters, BitFit
from luthier.adaptations.adapter_layer import Bottleneck, ConvBottleneck
from luthier.errors import RecipeError
from luthier.library.models import find
from luthier.models.load import load_model
from luthier.models.networks.heads import Head
from luthier.models.networks.modalities import input_shape, run_media
from luthier.objectives import MaskedLM

CPU = torch.device("cpu")


def network(folder: Path, family: str) -> Any:
    if family in ("llama", "gpt2"):
        return load_model(folder, torch.float32, CPU)
    return load_model(folder, torch.float32, CPU, MaskedLM().head())


@pytest.mark.parametrize(
    ("placement", "family", "count"),
    [
        ("pfeiffer", "llama", 4),
        ("houlsby", "llama", 8),
        ("pfeiffer", "gpt2", 3),
        ("houlsby", "gpt2", 6),
        ("pfeiffer", "bert", 3),
        ("houlsby", "bert", 6),
        ("houlsby", "roberta", 6),
        ("pfeiffer", "albert", 1),
        ("houlsby", "albert", 2),
    ],
)
def test_a_bottleneck_ends_each_sublayer(
    placement: Any, family: str, count: int, family_folder: Callable[[str], Path]
) -> None:
    model = network(family_folder(family), family)
    ids = torch.arange(6, 14)[None]
    model.eval()
    before = model(input_ids=ids).logits
    Adapters(placement=placement, reduction_factor=8).attach(model)
    found = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert len(found) == count
    assert all(m.adapter_down.weight.shape == (4, 32) for m in found)
    # Zero at the start: the network is the base network.
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("placement", "family", "projections", "convolutions"),
    [
        ("pfeiffer", "vit", 3, 0),
        ("houlsby", "vit", 6, 0),
        ("pfeiffer", "ast", 3, 0),
        ("houlsby", "ast", 6, 0),
        ("pfeiffer", "wav2vec2", 3, 0),
        ("houlsby", "wav2vec2", 6, 0),
        ("pfeiffer", "convnext", 4, 0),
        ("pfeiffer", "resnet", 0, 4),
        ("houlsby", "resnet", 0, 12),
        (None, "resnet", 0, 12),
        (None, "vit", 3, 0),
        (None, "vgg", 0, 8),
        ("pfeiffer", "mobilenet_v2", 0, 17),
        ("houlsby", "mobilenet_v2", 0, 33),
        ("pfeiffer", "efficientnet", 0, 4),
        ("houlsby", "efficientnet", 0, 7),
        ("pfeiffer", "vgg", 0, 8),
        ("pfeiffer", "small_cnn", 0, 2),
        ("houlsby", "small_cnn", 0, 4),
    ],
)
def test_image_and_audio_blocks_end_with_bottleneck(
    placement: Any,
    family: str,
    projections: int,
    convolutions: int,
    family_folder: Callable[[str], Path],
) -> None:
    head = Head("sequence_classification", ("a", "b", "c"))
    model = load_model(family_folder(family), torch.float32, CPU, head)
    torch.manual_seed(0)
    arrays = torch.randn(2, *input_shape(model.config))
    model.eval()
    before = run_media(model, arrays).logits
    Adapters(placement=placement, reduction_factor=4).attach(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Bottleneck) == projections
    assert kinds.count(ConvBottleneck) == convolutions
    assert torch.equal(run_media(model, arrays).logits, before)
    heads = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert heads and all(
        "adapter_" in n or n.startswith(("classifier", "projector")) for n in heads
    )


def test_clip_encoders_have_bottlenecks_of_matching_width(
    family_folder: Callable[[str], Path],
) -> None:
    model = load_model(family_folder("clip"), torch.float32, CPU, Head("embedding"))
    Adapters(placement="houlsby", reduction_factor=8).attach(model)
    widths = {
        name.partition(".")[0]: module.adapter_down.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, Bottleneck)
    }
    assert widths == {"text_model": (2, 16), "vision_model": (3, 24)}


def test_pipeline_has_adapters_only_in_unet(family_folder: Callable[[str], Path]) -> None:
    model = load_model(family_folder("stable_diffusion"), torch.float32, CPU, Head("denoising"))
    Adapters().attach(model)
    kinds = (Bottleneck, ConvBottleneck)
    found = [(n, type(m)) for n, m in model.named_modules() if isinstance(m, kinds)]
    assert {kind for _, kind in found} == {*kinds}
    assert all(name.startswith("unet.") for name, _ in found)


def test_residual_block_has_adapter_after_last_convolution(
    family_folder: Callable[[str], Path],
) -> None:
    model = load_model(family_folder("resnet"), torch.float32, CPU, Head("embedding"))
    Adapters(placement="pfeiffer", reduction_factor=8).attach(model)
    names = [n for n, m in model.named_modules() if isinstance(m, ConvBottleneck)]
    assert [name.partition("stages.")[2] for name in names] == [
        f"{stage}.layers.{layer}.layer.2.convolution"
        for stage, layer in ((0, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert [model.get_submodule(n).adapter_down.weight.shape for n in names] == [
        (2, 16, 1, 1), (3, 24, 1, 1), (3, 24, 1, 1), (4, 32, 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["vgg", "convnext"])
def test_houlsby_on_single_layer_blocks_is_refused(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    model = load_model(family_folder(family), torch.float32, CPU, Head("embedding"))
    with pytest.raises(RecipeError) as refused:
        Adapters(placement="houlsby").attach(model)
    assert refused.value.rule == "adapter.network"


def test_adapters_stack_on_existing_adapters(family_folder: Callable[[str], Path]) -> None:
    model = network(family_folder("gpt2"), "gpt2")
    Adapters(reduction_factor=8).attach(model)
    Adapters(reduction_factor=4).attach(model)
    outer = [
        m
        for m in model.modules()
        if isinstance(m, Bottleneck) and m.adapter_up.weight.requires_grad
    ]
    assert [m.adapter_down.weight.shape for m in outer] == [(8, 32)] * 3
    assert all(isinstance(m.base_layer, Bottleneck) for m in outer)


def test_convolution_bottleneck_matches_formula() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(3, 4, 3, stride=2)
    layer = ConvBottleneck(base, 4, 2, "gelu")
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randn(2, 3, 7, 9)
    y = base(x).movedim(1, -1)
    down, up = layer.adapter_down, layer.adapter_up
    narrow = nn.functional.gelu(y @ down.weight[:, :, 0, 0].t() + down.bias)
    expected = y + narrow @ up.weight[:, :, 0, 0].t() + up.bias
    torch.testing.assert_close(layer(x), expected.movedim(-1, 1))


def test_bottleneck_matches_formula() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = Bottleneck(base, 5, 3, "relu")
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randn(7, 6)
    y = x @ base.weight.t() + base.bias
    narrow = (y @ layer.adapter_down.weight.t() + layer.adapter_down.bias).clamp(min=0)
    expected = y + narrow @ layer.adapter_up.weight.t() + layer.adapter_up.bias
    torch.testing.assert_close(layer(x), expected)


def test_bitfit_trains_only_biases(family_folder: Callable[[str], Path]) -> None:
    model = network(family_folder("gpt2"), "gpt2")
    BitFit().attach(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == name.endswith(".bias")
        assert not weight.requires_grad or weight.dim() == 1


def test_bitfit_without_biases_is_refused(
    tiny_llama: Callable[..., Any],
) -> None:
    with pytest.raises(RecipeError) as refused:
        BitFit().attach(tiny_llama())
    assert refused.value.rule == "adapter.network"


def test_manifest_records_chosen_placement(
    family_folder: Callable[[str], Path], luthier_home: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "row {n}", "label": "{n % 2}"}}\n' for n in range(8)))
    recipe = luthier.Recipe.parse(
        {
            "base": str(family_folder("bert")), "name": "x", "adaptation": {"method": "adapters"},
            "data": {"train": str(rows), "validation_share": 0},
            "training": {"max_steps": 1, "precision": "float32", "threads": 1},
        }
    )  # fmt: skip
    stored = find(luthier.tune(recipe).model_id)
    assert stored.adaptation.placement == "pfeiffer"
    for family, placement in {"resnet": "houlsby", "vgg": "pfeiffer"}.items():
        model = load_model(family_folder(family), torch.float32, CPU, Head("embedding"))
        assert Adapters().bind_network(model).placement == placement
        given = Adapters(placement="pfeiffer").bind_network(model)
        assert given.placement == "pfeiffer"
