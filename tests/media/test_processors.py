"""Processors compared with third-party code and formulas."""

from __future__ import annotations

import io
import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from luthier.data.augmentation import Augmentation
from luthier.data.inputs import (
    PREPROCESSOR_CONFIG,
    Media,
    Processor,
    read_processor,
    save_processor,
)
from luthier.errors import CorruptFile, UnknownModel
from luthier.files import write_json
from luthier.media.augmentation import resample
from luthier.media.decoding import read_samples
from luthier.media.processors import AudioProcessor, ImageProcessor, ResizedImages

VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 24},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.26, 0.26, 0.27],
    "do_convert_rgb": True,
}
CONVNEXT = {
    "image_processor_type": "ConvNextImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "crop_pct": 0.875,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
EFFICIENTNET = VIT | {"image_processor_type": "EfficientNetImageProcessor", "do_center_crop": False}
OFFSET = {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessorPil", VIT),
    "vit, old size": ("ViTImageProcessorPil", VIT | {"size": 32}),
    "vit, not normalized": ("ViTImageProcessorPil", VIT | {"do_normalize": False}),
    "vit, lanczos": ("ViTImageProcessorPil", VIT | {"resample": 1}),
    "vit, not rescaled": ("ViTImageProcessorPil", VIT | {"do_rescale": False}),
    "vit, rescaled otherwise": ("ViTImageProcessorPil", VIT | {"rescale_factor": 1 / 100}),
    "efficientnet": ("EfficientNetImageProcessorPil", EFFICIENTNET),
    "efficientnet, no top": (
        "EfficientNetImageProcessorPil",
        EFFICIENTNET | {"include_top": False},
    ),
    "efficientnet, from -1": ("EfficientNetImageProcessorPil", EFFICIENTNET | OFFSET),
    "clip": ("CLIPImageProcessorPil", CLIP),
    "levit": ("LevitImageProcessorPil", CLIP | {"image_processor_type": "LevitImageProcessor"}),
    "poolformer": (
        "PoolFormerImageProcessorPil",
        CLIP | {"image_processor_type": "PoolFormerImageProcessor", "crop_pct": 0.9},
    ),
    "clip, old sizes": ("CLIPImageProcessorPil", CLIP | {"size": 32, "crop_size": 32}),
    "convnext": ("ConvNextImageProcessorPil", CONVNEXT),
    "convnext, large": ("ConvNextImageProcessorPil", CONVNEXT | {"size": {"shortest_edge": 384}}),
}


def image(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    return np.stack([200 * x / width + noise, 255 * y / height, 120 + noise], -1).astype(np.uint8)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(50, 70), (49, 49), (61, 37), (20, 31)])
def test_image_arrays_match_transformers(name: str, shape: tuple[int, int]) -> None:
    import transformers

    kind, fields = CASES[name]
    theirs = getattr(transformers, kind)(**fields)
    pixels = image(*shape)
    expected = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    ours = ImageProcessor.parse(fields)
    given = ours.array(Media("image", "x", array=pixels))
    assert given.shape == expected.shape == ours.shape
    assert np.allclose(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "processor",
    [
        ImageProcessor(32, 24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lanczos"),
        ImageProcessor(224, 224, shortest_edge=256),
        ImageProcessor(32, 320, (0.5,) * 3, (0.5,) * 3, pad=True),
        AudioProcessor(8000, 2.5, 40, 20.0, 5.0, 60.0),
    ],
)
def test_processor_round_trip(processor: Processor, tmp_path: Path) -> None:
    save_processor(processor, tmp_path)
    assert read_processor(tmp_path) == processor


@pytest.mark.parametrize(("size", "filled"), [((40, 100), 80), ((50, 10), 6), ((10, 200), 160)])
def test_padded_image_keeps_proportions(size: tuple[int, int], filled: int) -> None:
    reads = ImageProcessor(32, 160, (0.0,) * 3, (1.0,) * 3, pad=True)
    dark = Media("image", "x", array=np.zeros(size, np.uint8))
    values = reads.array(dark)
    assert values.shape == (3, 32, 160)
    rows = min(32, round(size[0] * 160 / size[1]))
    assert not values[:, :rows, :filled].any()
    assert (values[:, rows:] == 1).all() and (values[:, :, filled:] == 1).all()


def test_a_folder_without_a_processor_reads_texts(tmp_path: Path) -> None:
    assert read_processor(tmp_path) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        VIT | {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        VIT | {"size": {"longest_edge": 32}},
        CLIP | {"do_flip_channel_order": True},
    ],
    ids=["waves", "crop of a squeezed image", "longest edge", "blue first"],
)
def test_unknown_processors_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", fields)
    with pytest.raises(UnknownModel) as refused:
        read_processor(tmp_path)
    assert refused.value.rule == "processor.unknown"


def test_new_size_keeps_crop_share() -> None:
    larger = ImageProcessor(224, 224, shortest_edge=256).with_settings(image_size=448)
    assert (larger.height, larger.width, larger.shortest_edge) == (448, 448, 512)
    assert ImageProcessor(32, 32).with_settings(image_size=64).shortest_edge == 0


def test_to_pixels_inverts_array() -> None:
    pixels = image(32, 32)
    processor = ImageProcessor(32, 32)
    back = processor.to_pixels(processor.array(Media("image", "x", array=pixels)))
    assert np.abs(back.astype(int) - pixels).max() <= 1


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    processor = ImageProcessor(8, 8, (0.0,) * 3, (1.0,) * 3)
    for number, level in enumerate((0, 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(path)
        os.utime(path, ns=(number, number))
        assert processor.array(Media("image", "a", path)).max() == level / 255


def test_cache_evicts_images_of_different_size_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [Media("image", str(n), str(tmp_path / f"{n}.png")) for n in range(4)]
    for media in images:
        Image.new("RGB", (4, 4)).save(str(media.path))
    small, large = (ImageProcessor(size, size) for size in (4, 8))
    resized, kept = list[tuple[int, str]](), ResizedImages(3 * 4 * 4 * 3)
    resize = ImageProcessor.resize
    monkeypatch.setattr(
        ImageProcessor,
        "resize",
        lambda self, media: (resized.append((self.height, media.name)), resize(self, media))[1],
    )
    for _ in range(2):
        for media in images:
            kept.resize(small, media)
    # Three images fit; the fourth is resized each time and evicts none.
    assert resized == [(4, "0"), (4, "1"), (4, "2"), (4, "3"), (4, "3")]
    assert kept.bytes == 3 * 4 * 4 * 3
    resized.clear()
    for processor in (large, large, small):
        assert kept.resize(processor, images[0]).shape == (processor.height, processor.height, 3)
    assert resized == [(8, "0"), (8, "0"), (4, "0")] and kept.bytes == 4 * 4 * 3


SAMPLES = np.random.default_rng(1).standard_normal(8000).astype(np.float32) * 0.1
SAMPLES += 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype(np.float32)


def sound(samples: NDArray[np.float32], rate: int) -> Media:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return Media("audio", "x", data=stream.getvalue())


def mel_spectrogram(samples: NDArray[np.float64], rate: int, bins: int) -> NDArray[np.float64]:
    """Compute a spectrogram with Slaney's mel scale and a Hann window of 25 ms every 10 ms, bin by
    bin."""

    def mel(hertz: float) -> float:
        steps = np.log(6.4) / 27
        return 3 * hertz / 200 if hertz < 1000 else 15 + float(np.log(hertz / 1000)) / steps

    def hertz(mel: float) -> float:
        steps = np.log(6.4) / 27
        return 200 * mel / 3 if mel < 15 else 1000 * float(np.exp(steps * (mel - 15)))

    window, hop = round(rate * 0.025), round(rate * 0.01)
    size = 1
    while size < window:
        size *= 2
    edges = [hertz(mel(rate / 2) * k / (bins + 1)) for k in range(bins + 2)]
    before = (size - window) // 2
    count = len(samples) // hop + 1
    padded = np.concatenate(
        [samples[size // 2 : 0 : -1], samples, samples[-2 : -size // 2 - 2 : -1]]
    )
    found = np.zeros((bins, count))
    for frame in range(count):
        part = padded[frame * hop : frame * hop + size].copy()
        for k in range(size):
            inside = before <= k < before + window
            part[k] *= 0.5 - 0.5 * np.cos(2 * np.pi * (k - before) / window) if inside else 0
        power = np.abs(np.fft.fft(part)[: size // 2 + 1]) ** 2
        for b in range(bins):
            low, top, high = edges[b : b + 3]
            for k in range(size // 2 + 1):
                f = k * rate / size
                weight = max(0.0, min((f - low) / (top - low), (high - f) / (high - top)))
                found[b, frame] += weight * 2 / (high - low) * power[k]
    log = np.log(np.maximum(found, found.max() * 1e-8))
    return np.asarray((log - log.mean()) / log.std())


def test_audio_arrays_match_formulas() -> None:
    processor = AudioProcessor(8000, 0.2, 20)
    media = sound(SAMPLES[:1600], 8000)
    given = processor.array(media)
    expected = mel_spectrogram(read_samples(media)[0].astype(np.float64), 8000, 20)
    assert given.shape == processor.shape == (1, 20, 21)
    assert np.abs(given[0] - expected).max() < 1e-3


def test_audio_arrays_match_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    processor = AudioProcessor(16_000, 0.5, 64, top_db=80)
    media = sound(SAMPLES, 16_000)
    filters = mel_filter_bank(257, 64, 0.0, 8000, 16_000, norm="slaney", mel_scale="slaney")
    log = spectrogram(
        read_samples(media)[0].astype(np.float64), window_function(400, "hann", frame_length=512),
        frame_length=512, hop_length=160, power=2.0, mel_filters=filters, mel_floor=1e-10,
        log_mel="log",
    )  # fmt: skip
    expected = (log - log.mean()) / log.std()
    assert np.abs(processor.array(media)[0] - expected).max() < 1e-3


def test_loudness_is_normalized_and_silence_accepted() -> None:
    processor = AudioProcessor(8000, 1.0)
    loud, quiet = (processor.array(sound(SAMPLES * by, 8000)) for by in (0.9, 0.09))
    assert np.abs(loud - quiet).mean() < 0.02
    silent = processor.array(sound(np.zeros(100, np.float32), 8000))
    assert np.isfinite(silent).all() and np.abs(silent).max() < 1e-6


def test_values_far_below_peak_are_clipped() -> None:
    """Without a floor, padding would dominate the contrast of short audio."""
    soft = np.where(np.arange(8000) < 4000, np.float32(1e-3), np.float32(1))  # 60 dB
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10
    media = sound(noise * soft, 8000)
    for top_db, is_flat in ((80.0, False), (50.0, True)):
        values = AudioProcessor(8000, 1.0, top_db=top_db).array(media)[0]
        assert bool(np.ptp(values[:, 10:30]) == 0) is is_flat
        assert values[:, 10:30].max() < values[:, 60:90].min()


def test_long_audio_is_cropped_and_short_audio_padded_centrally() -> None:
    processor = AudioProcessor(8000, 0.5)
    whole = processor.array(sound(SAMPLES, 8000))
    assert (whole == processor.array(sound(SAMPLES[2000:6000], 8000))).all()
    short = processor.array(sound(SAMPLES[:2000], 8000))
    filled = np.pad(SAMPLES[:2000], 1000)
    assert (short == processor.array(sound(filled, 8000))).all()


def test_resampling_keeps_tones_and_drops_high_frequencies() -> None:
    time = np.arange(16_000) / 16_000
    low = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    high = np.sin(2 * np.pi * 6000 * time).astype(np.float32)
    down = resample(low + high, 16_000, 8000)
    expected = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert down.dtype == np.float32 and np.abs(down - expected).max() < 1e-3
    back = resample(down, 8000, 16_000)
    assert np.abs(back - low).max() < 1e-3
    assert resample(low, 16_000, 16_000) is low
    assert len(resample(low[:7], 16_000, 11_025)) == 5


def test_random_changes_are_a_function_of_the_seed() -> None:
    pixels = image(40, 40)
    pictures = ImageProcessor(32, 32), Media("image", "x", array=pixels), Augmentation(crop=0.5)
    sounds = AudioProcessor(8000), sound(SAMPLES, 8000), Augmentation(shift=0.3, masks=2)
    for processor, media, augmentation in (pictures, sounds):
        plain = processor.array(media)
        one, same, other = (processor.array(media, augmentation, (seed,)) for seed in (1, 1, 2))
        assert (one == same).all() and (one != other).any() and (one != plain).any()
        assert (processor.array(media) == plain).all()  # the array in memory stays unchanged


AST = {
    "feature_extractor_type": "ASTFeatureExtractor",
    "max_length": 40,
    "num_mel_bins": 16,
    "sampling_rate": 8000,
}


@pytest.mark.parametrize(
    ("form", "changes", "name"),
    [
        (VIT, {"size": {"height": 10**6, "width": 24}}, "height=1000000"),
        (VIT, {"size": {"height": 32, "width": -3}}, "width=-3"),
        (VIT, {"size": "224"}, ""),
        (VIT, {"size": {"height": 32, "width": None}}, "width=None"),
        (VIT, {"image_mean": 3}, ""),
        (VIT, {"image_std": [0.5, 0, 0.5]}, r"std\.1=0"),
        (VIT, {"image_mean": [0.5, float("nan"), 0.5]}, r"mean\.1=nan"),
        (AST, {"max_length": 10**9}, "1000000000 x 16"),
        (AST, {"max_length": "many"}, ""),
        (AST, {"sampling_rate": 0}, ""),
        (AudioProcessor().fields(), {"hop_ms": 0}, "hop_ms=0"),
        (AudioProcessor().fields(), {"max_seconds": 1e9}, "max_seconds=1000000000"),
        ({"feature_extractor_type": "TimeSeriesWindow"}, {"length": 10**9}, "length=1000000000"),
        ({"feature_extractor_type": "TimeSeriesWindow"}, {}, "length"),
        ([], {}, ""),
    ],
)
def test_invalid_processor_sizes_are_refused(
    form: Any, changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    fields = {**form, **changes} if isinstance(form, dict) else form
    write_json(tmp_path / PREPROCESSOR_CONFIG, fields)
    with pytest.raises((CorruptFile, UnknownModel)) as refused:
        read_processor(tmp_path)
    assert refused.value.rule in {"processor.invalid", "processor.unknown"}
