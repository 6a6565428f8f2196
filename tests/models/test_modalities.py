"""What networks read, by their configurations."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from luthier.errors import RecipeError
from luthier.models.modalities import (
    context_length,
    is_dual_encoder,
    media_config,
    reads_sound,
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
def test_which_part_reads_what(family: str, media: str | None, text: str | None) -> None:
    config = AutoConfig.for_model(family)
    for found, name in ((media_config(config), media), (text_config(config), text)):
        assert found is (None if name is None else getattr(config, name) if name else config)
    assert is_dual_encoder(config) == (family == "clip")
    assert reads_sound(config) == (family in ("wav2vec2", "audio-spectrogram-transformer"))


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx"])
def test_context_length(key: str) -> None:
    assert context_length({key: 77}) == 77
    assert (
        context_length({"decoder": {key: 77}}) == context_length({"text_config": {key: 77}}) == 77
    )
    with pytest.raises(RecipeError, match="context length"):
        context_length({key: None})
