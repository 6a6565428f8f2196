"""Input modalities by configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, ViTConfig, ViTModel

from luthier.errors import RecipeError
from luthier.models.networks.modalities import (
    context_length,
    is_dual_encoder,
    is_recurrent,
    media_config,
    reads_sound,
    run_media,
    text_config,
)


@pytest.mark.parametrize(
    ("family", "media", "text"),
    [
        ("llama", None, ""),
        ("t5", None, ""),
        ("vit", "", None),
        ("wav2vec2", "", None),
        ("audio-spectrogram-transformer", "", None),
        ("clip", "vision_config", "text_config"),
        ("vision-encoder-decoder", "encoder", "decoder"),
    ],
)
def test_media_and_text_configs_of_families(
    family: str, media: str | None, text: str | None
) -> None:
    config = AutoConfig.for_model(family)
    for found, name in ((media_config(config), media), (text_config(config), text)):
        assert found is (None if name is None else getattr(config, name) if name else config)
    assert is_dual_encoder(config) == (family == "clip")
    assert reads_sound(config) == (family in ("wav2vec2", "audio-spectrogram-transformer"))


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("llama", None, False),
        ("gemma3_text", ["sliding_attention", "full_attention"], False),
        ("lfm2", ["conv", "full_attention"], True),
        ("granitemoehybrid", ["mamba", "attention"], True),
        ("falcon_h1", None, True),
        ("mamba", None, True),
    ],
)
def test_recurrent_layers_are_recognized(
    family: str, layers: list[str] | None, expected: bool
) -> None:
    fields: dict[str, Any] = {} if layers is None else {"layer_types": layers}
    assert is_recurrent(AutoConfig.for_model(family, num_hidden_layers=2, **fields)) == expected


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx", "seq_length"])
def test_context_length(key: str) -> None:
    assert context_length({key: 77}) == 77
    assert (
        context_length({"decoder": {key: 77}}) == context_length({"text_config": {key: 77}}) == 77
    )
    with pytest.raises(RecipeError) as refused:
        context_length({key: None})
    assert refused.value.rule == "network.unsupported"


def test_image_size_error_only_for_mismatched_size() -> None:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_attention_heads": 1}
    vit = ViTModel(ViTConfig(num_hidden_layers=1, intermediate_size=8, **sizes))
    with pytest.raises(RecipeError) as refused:
        run_media(vit, torch.zeros(1, 3, 24, 24))
    assert refused.value.rule == "data.image_size"

    def fail(**_: object) -> None:
        raise ValueError("something else")

    vit.forward = fail
    with pytest.raises(ValueError):
        run_media(vit, torch.zeros(1, 3, 16, 16))
