"""Sizes of preset networks, and built networks compared with their configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.errors import RecipeError
from luthier.models.build import build, read_configuration
from luthier.models.load import sketch
from luthier.models.network_shapes import SHAPES, configuration
from luthier.models.networks import classic as nets
from luthier.models.networks.heads import Head
from luthier.models.networks.modalities import context_length

SMALL: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 8, "n_head": 4,
    "n_positions": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("size", SHAPES["llama"])
def test_weight_count_matches_preset_name(family: Any, size: Any) -> None:
    from transformers import AutoConfig

    nets.register(family)
    shape = SHAPES[family][size]
    config = AutoConfig.for_model(**configuration(family, shape, 0))
    head = Head("masked_lm" if family == "bert" else "causal_lm")
    weights = sum(w.numel() for w in sketch(config, head).parameters())
    said = 1.3e6 if size == "tiny" else float(size.removesuffix("m")) * 1e6
    assert 0.85 < weights / said < 1.2
    # Relative positions have no limit: the context of T5 is only the length of its pieces.
    assert context_length(config.to_dict()) == (4096 if family == "t5" else shape.context)
    assert shape.hidden % shape.heads == 0


def test_the_llama_of_135_million_is_smollm2() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**configuration("llama", SHAPES["llama"]["135m"], 0))
    model = sketch(config, Head("causal_lm"))
    assert sum(w.numel() for w in model.parameters()) == 134_515_008  # as the catalogue says


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(SMALL, seed, tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_gpt2_initial_weights_match_paper(tmp_path: Path) -> None:
    build(SMALL, 0, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    inner = torch.cat([w.flatten() for n, w in weights.items() if n.endswith("mlp.c_fc.weight")])
    ends = torch.cat([w.flatten() for n, w in weights.items() if n.endswith("c_proj.weight")])
    assert inner.std().item() == pytest.approx(0.02, rel=0.05)
    assert ends.std().item() == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({**SMALL, "n_head": 5}, "config.rejected"),
        ({"model_type": "nothing"}, "config.rejected"),
        ({"model_type": "bert", "vocab_size": 300}, "network.head"),
        ({"model_type": "xlnet", "vocab_size": 300}, "network.head"),
    ],
)
def test_invalid_presets_are_refused(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        build(fields, 0, tmp_path)
    assert refused.value.rule == rule


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"model_type": 3}'])
def test_invalid_configuration_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError) as refused:
        read_configuration(path)
    assert refused.value.rule in {"config.invalid", "config.missing"}


def test_configuration_is_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMALL, "_name_or_path": "x"}))
    assert read_configuration(path) == SMALL
