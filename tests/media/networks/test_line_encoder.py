"""The line encoder: shapes, independence of rows, and use with transformers' decoder class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, VisionEncoderDecoderModel

from luthier.data.inputs import read_processor
from luthier.errors import RecipeError
from luthier.media.networks.line_encoder import LineEncoderConfig, LineEncoderModel
from luthier.media.processors import ImageProcessor
from luthier.models.catalog import CATALOG, pull
from luthier.models.characters import LETTERS, letter_tokenizer
from luthier.models.folder import ModelFolder
from luthier.models.load import load_model
from luthier.models.networks.heads import Head, head_in, hidden_size_of
from luthier.models.networks.modalities import (
    context_length,
    is_dual_encoder,
    media_config,
    text_config,
)


def encoder(**fields: object) -> LineEncoderModel:
    torch.manual_seed(0)
    config = LineEncoderConfig(hidden_sizes=(16, 16, 16), hidden_size=8, **fields)  # type: ignore[arg-type]
    return LineEncoderModel(config).eval()


@pytest.mark.parametrize("size", [(16, 40), (32, 64)])
def test_states_depend_only_on_their_row(size: tuple[int, int]) -> None:
    model = encoder(image_size=size)
    images = torch.randn(3, 3, *size)
    states = model(pixel_values=images).last_hidden_state
    assert states.shape == (3, size[1] // 4, 8)
    torch.testing.assert_close(model(pixel_values=images[1:2]).last_hidden_state[0], states[1])


def test_states_encode_position() -> None:
    model = encoder(image_size=(16, 160))
    states = model(pixel_values=torch.ones(1, 3, 16, 160)).last_hidden_state[0]
    assert (states[10] - states[20]).abs().max() > 1e-3  # far from both ends, all looks the same


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        encoder(image_size=(16, 40))(pixel_values=torch.ones(1, 3, 32, 40))
    assert refused.value.rule == "image.size"
    with pytest.raises(ValueError):
        encoder(image_size=(30, 40))


def test_catalogue_base_loads_with_transformers(tmp_path: Path) -> None:
    entry = CATALOG["small-ocr"]
    pull(entry, tmp_path, lambda text: None)
    model = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert sum(weight.numel() for weight in model.parameters()) == entry.parameters
    assert isinstance(model.encoder, LineEncoderModel)
    config = ModelFolder(tmp_path).config(Head("image_to_text"))
    assert media_config(config) is config.encoder and text_config(config) is config.decoder
    assert not is_dual_encoder(config)
    assert head_in(config) == Head("image_to_text")
    assert context_length(config.to_dict()) == entry.context
    reads = read_processor(tmp_path)
    assert isinstance(reads, ImageProcessor) and reads.pad and reads.shape == (3, 32, 320)
    loaded = load_model(tmp_path, torch.float32, torch.device("cpu"), head_in(config))
    assert hidden_size_of(loaded) == 128
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == config.decoder.vocab_size


def test_letters_are_tokens_and_unknown_scripts_are_bytes() -> None:
    tokenizer = letter_tokenizer()
    text = "Thổ Nhĩ  Kỳ — “Ωмега” (1)"
    assert len(tokenizer.encode(text)) == len(text)
    letters = [chr(code) for some in LETTERS for code in some]
    assert {len(tokenizer.encode(letter)) for letter in letters} == {1}
    for each in (text, "你好 😀", "a\u0323", "\n\t"):
        assert tokenizer.decode(tokenizer.encode(each)) == each
    assert len(tokenizer.encode("你")) <= 3
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
