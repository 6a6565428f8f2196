"""Processors that convert images, audio and time series to arrays for a network.

A processor is stored as ``preprocessor_config.json``, and the stored object converts both training
rows and requests.

- Images follow transformers' image processors: resize, optional center crop, scaling to 0 to 1,
  normalization per color channel.
- Audio becomes a log mel spectrogram of fixed length (an image with one channel, height for pitch
  and
  width for time), or the features of a feature extractor in transformers.
- Time series become windows of the latest values.

Augmentation has a random generator per row and step, so a resumed run draws the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from luthier.data.inputs import LONGEST_WINDOW, MOST_COLUMNS, Media, MediaKind, Processor
from luthier.errors import UnknownModel
from luthier.media.augmentation import change_audio, change_image, mask_spectrogram, resample
from luthier.media.decoding import MOST_SECONDS, read_pixels, read_samples

if TYPE_CHECKING:
    from luthier.data.augmentation import Augmentation
    from luthier.media.decoding import Pixels

_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3, "lanczos": 1}
"""Pillow's resampling numbers in ``preprocessor_config.json``."""
_CROPPED_BELOW = 384
"""Sizes from 384 on are resized without cropping by processors with ``crop_pct``."""
PADDED = "PaddedImageProcessor"
"""A processor type of luthier: no processor in transformers pads lines on the right."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The configuration comes with a third-party model, so values are validated.
Side = Annotated[int, Field(ge=1, le=8192)]
"""Size in pixels."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=1000)]
SamplingRate = Annotated[int, Field(ge=100, le=1_000_000)]


@dataclass(frozen=True)
class ImageProcessor(Processor):
    """Converts pixels ``[H, W, 3]`` of any size to ``[3, height, width]``."""

    name: ClassVar[str] = "image"
    kind: ClassVar[MediaKind] = "image"

    height: Side
    width: Side
    mean: Annotated[tuple[Finite, ...], Field(min_length=3, max_length=3)] = IMAGENET_MEAN
    std: Annotated[tuple[Positive, ...], Field(min_length=3, max_length=3)] = IMAGENET_STD
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    shortest_edge: Annotated[int, Field(ge=0, le=8192)] = 0
    """Size of the shorter side before the center crop; 0 to resize without cropping."""
    pad: bool = False
    """Keep the aspect ratio and pad with white on the right and below, for lines of different
    length."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the network's input."""
        return (3, self.height, self.width)

    @property
    def settings(self) -> tuple[str, ...]:
        """Name of the size setting for square images."""
        return ("image_size",)

    def with_settings(self, *, image_size: int) -> ImageProcessor:  # type: ignore[override]
        """Return the processor for square images of another size."""
        edge = round(self.shortest_edge * image_size / max(1, self.height))
        return dataclasses.replace(self, height=image_size, width=image_size, shortest_edge=edge)

    @staticmethod
    def for_shape(shape: tuple[int, int, int]) -> ImageProcessor:
        """Return a processor with default settings."""
        return ImageProcessor(*shape[1:])

    def resize(self, media: Media) -> Pixels:
        """Return the resized image ``[height, width, 3]``, without normalization."""
        from PIL import Image

        image = Image.fromarray(read_pixels(media))
        method = Image.Resampling(_RESAMPLE[self.resample])
        if self.pad:
            scale = min(self.width / image.width, self.height / image.height)
            sides = [max(1, round(side * scale)) for side in image.size]
            whole = Image.new("RGB", (self.width, self.height), "white")
            whole.paste(image.resize((sides[0], sides[1]), method))
            return np.asarray(whole)
        if not self.shortest_edge:
            return np.asarray(image.resize((self.width, self.height), method))
        # Integer arithmetic: rounding could make the shorter side one pixel too short.
        size = [self.shortest_edge * side // min(image.size) for side in image.size]
        image = image.resize((size[0], size[1]), method)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        return np.asarray(image.crop((left, top, left + self.width, top + self.height)))

    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the network's input ``[3, height, width]``, changed at random with
        ``augmentation``."""
        pixels = RESIZED.resize(self, media)
        if augmentation is not None:
            pixels = change_image(augmentation, pixels, np.random.default_rng(seed))
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values: NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def to_pixels(self, values: NDArray[np.float32]) -> Pixels:
        """Convert a network's output ``[3, H, W]`` to an image ``[H, W, 3]``."""
        spread = values.transpose(1, 2, 0) * np.array(self.std) + np.array(self.mean)
        return np.asarray((np.clip(spread, 0, 1) * 255).round(), dtype=np.uint8)

    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json`` in transformers' format."""
        size = {"height": self.height, "width": self.width}
        fields: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge} if self.shortest_edge else size,
            "resample": _RESAMPLE[self.resample],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.pad:
            fields |= {"image_processor_type": PADDED, "do_pad": True}
        if self.shortest_edge:
            fields |= {
                "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": size,
            }  # fmt: skip
        return fields

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> ImageProcessor | None:
        """Return the processor of a published ``preprocessor_config.json``, if one of images."""
        if "image_processor_type" not in fields and "image_mean" not in fields:
            return None
        for name in ("do_flip_channel_order", "do_thumbnail"):  # MobileViT, Donut
            if fields.get(name):
                raise UnknownModel(f"unsupported image processing: {name}")
        crops, share = fields.get("do_center_crop", False), fields.get("crop_pct")
        size, crop = fields.get("size", 224), _sides(fields.get("crop_size", 0) if crops else 0)
        kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "")
        if isinstance(size, int) and (share or (crops and not kind.startswith("DeiT"))):
            size = {"shortest_edge": size}  # configurations before transformers 4.27
        size = _sides(size)
        edge = int(size.get("shortest_edge", 0))
        if edge and share and not crops:  # ConvNeXt, ResNet
            crop = _sides(edge)
            edge = int(edge / share) if edge < _CROPPED_BELOW else 0
        elif edge and (share or kind.startswith("Levit")):  # PoolFormer, LeViT
            edge = int(edge / share) if share else int(256 / 224 * edge)
        whole = crop if crop["height"] else size
        if whole.get("height", 0) < 1 or (not edge and crops and whole != size):
            raise UnknownModel(
                f"unsupported image size: {fields.get('size')} with crop_size {fields.get('crop_size')}"
            )
        names = {number: name for name, number in _RESAMPLE.items()}
        mean, std = _normalization(fields, kind)
        resample: Any = names.get(fields.get("resample", 2), "bilinear")
        pad = kind == PADDED
        return ImageProcessor(
            height=whole["height"],
            width=whole["width"],
            mean=mean,
            std=std,
            resample=resample,
            shortest_edge=edge,
            pad=pad,
        )


def _normalization(fields: Mapping[str, Any], kind: str) -> tuple[tuple[float, ...], ...]:
    """Return mean and deviation for pixels from 0 to 1, whatever range the published settings
    expect."""
    plain = not fields.get("do_normalize", True)
    mean = (0.0,) * 3 if plain else tuple(fields.get("image_mean", IMAGENET_MEAN))
    std = (1.0,) * 3 if plain else tuple(fields.get("image_std", IMAGENET_STD))
    unscaled = fields.get("do_rescale") is False
    scale = 255 * (1.0 if unscaled else fields.get("rescale_factor", 1 / 255))
    offset = 0.0
    if kind.startswith("EfficientNet"):
        offset = 1.0 if fields.get("rescale_offset") else 0.0
        if fields.get("include_top", True):  # classifiers divide by the deviation twice
            again = fields.get("image_std", IMAGENET_STD)
            std = tuple(own * other for own, other in zip(std, again, strict=True))
    if (scale, offset) == (1.0, 0.0):
        return mean, std
    return tuple((each + offset) / scale for each in mean), tuple(each / scale for each in std)


def _sides(size: Any) -> dict[str, int]:
    return {"height": size, "width": size} if isinstance(size, int) else dict(size)


MOST_CACHED = 256 * 1024 * 1024
"""Maximum size of cached images, in bytes. Decoding and resizing take longer than a small network."""


class ResizedImages:
    """A cache of resized images, in at most ``most`` bytes.

    A full cache drops the images of the least recently used processor. The images of the current
    processor are never dropped: rows repeat in a fixed order, so least-recently-used eviction would
    always drop the next image.
    """

    def __init__(self, most: int = MOST_CACHED) -> None:
        self.most, self.bytes = most, 0
        self._images: OrderedDict[ImageProcessor, dict[Any, Pixels]] = OrderedDict()
        self._lock = Lock()

    def resize(self, processor: ImageProcessor, media: Media) -> Pixels:
        """Return the resized image, from the cache if possible."""
        version = media.version()
        if version is None:  # the pixels are in memory
            return processor.resize(media)
        with self._lock:
            own = self._images.setdefault(processor, {})
            self._images.move_to_end(processor)
            resized = own.get(version)
        if resized is None:
            resized = processor.resize(media)
            with self._lock:
                self._add(processor, version, resized)
        return resized

    def clear(self) -> None:
        """Drop all images."""
        with self._lock:
            self._images.clear()
            self.bytes = 0

    def _add(self, processor: ImageProcessor, version: Any, pixels: Pixels) -> None:
        while self.bytes + pixels.nbytes > self.most and len(self._images) > 1:
            _, dropped = self._images.popitem(last=False)
            self.bytes -= sum(each.nbytes for each in dropped.values())
        own = self._images.setdefault(processor, {})
        if version not in own and self.bytes + pixels.nbytes <= self.most:
            own[version] = pixels
            self.bytes += pixels.nbytes


RESIZED = ResizedImages()
"""The cache of this process."""


@dataclass(frozen=True)
class AudioProcessor(Processor):
    """Converts audio to a log mel spectrogram ``[1, num_mel_bins, frames]``.

    Each spectrogram is normalized to mean 0 and deviation 1, so loudness has no effect.
    """

    name: ClassVar[str] = "audio"
    kind: ClassVar[MediaKind] = "audio"

    sampling_rate: SamplingRate = 16_000
    max_seconds: Annotated[float, Field(gt=0, le=MOST_SECONDS)] = 1.0
    """Length in seconds. Longer audio is cut to its middle; shorter audio is padded with silence."""
    num_mel_bins: Annotated[int, Field(ge=1, le=1024)] = 64
    window_ms: Milliseconds = 25.0
    hop_ms: Milliseconds = 10.0
    top_db: Positive = 80.0
    """Dynamic range of a spectrogram in dB below the maximum, as in Whisper (Radford et al. 2022)."""

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings for sampling rate and length."""
        return ("sampling_rate", "max_seconds")

    def with_settings(self, **settings: float) -> AudioProcessor:
        """Return the processor for another sampling rate or length."""
        return dataclasses.replace(self, **settings)  # type: ignore[arg-type]

    @staticmethod
    def for_shape(shape: tuple[int, int, int]) -> AudioProcessor:
        """Return a processor with default settings for any shape."""
        return AudioProcessor()

    @property
    def frames(self) -> int:
        """Width of the spectrogram in frames."""
        return 1 + self._samples // self._hop

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the network's input."""
        return (1, self.num_mel_bins, self.frames)

    @property
    def _samples(self) -> int:
        return int(self.max_seconds * self.sampling_rate)

    @property
    def _hop(self) -> int:
        return max(1, round(self.sampling_rate * self.hop_ms / 1000))

    @property
    def _window(self) -> int:
        return round(self.sampling_rate * self.window_ms / 1000)

    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the network's input ``[1, num_mel_bins, frames]``, changed at random with
        ``augmentation``."""
        samples, rate = read_samples(media)
        samples = resample(samples, rate, self.sampling_rate)
        random = np.random.default_rng(seed)
        target = self._samples
        if augmentation is not None:
            samples = change_audio(augmentation, samples, target, random)
        excess = len(samples) - target
        if excess > 0:
            samples = samples[excess // 2 : excess // 2 + target]
        samples = np.pad(samples, (max(0, -excess) // 2, max(0, -excess) - max(0, -excess) // 2))
        spectrogram = self._spectrogram(samples)
        if augmentation is not None:
            spectrogram = mask_spectrogram(augmentation, spectrogram, random)
        return spectrogram[None]

    def _spectrogram(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a spectrogram ``[num_mel_bins, frames]`` of mean 0 and deviation 1."""
        window = self._window
        size = 1 << (window - 1).bit_length()
        padded = np.pad(samples.astype(np.float32), size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: self._hop][: self.frames]
        shape = np.zeros(size, np.float32)  # a Hann window in the middle of the frame
        shape[(size - window) // 2 :][:window] = np.hanning(window + 1)[:-1]
        power = np.abs(np.fft.rfft(frames * shape)) ** 2
        mel = _mel_filters(size, self.num_mel_bins, self.sampling_rate).T @ power.T
        # Padding, and pitches above half the rate of the recording, are far below the noise of
        # any recording. Without a floor, padding would dominate the contrast.
        least = float(mel.max()) * 10 ** (-self.top_db / 10)
        log = np.log(np.maximum(mel, max(least, 1e-10)))
        return np.asarray((log - log.mean()) / (log.std() + 1e-5), dtype=np.float32)

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> AudioProcessor | None:
        """Return the processor of a ``preprocessor_config.json`` from :meth:`fields`."""
        if fields.get("feature_extractor_type") != "LogMelSpectrogram":
            return None
        names = ("sampling_rate", "max_seconds", "num_mel_bins", "window_ms", "hop_ms", "top_db")
        return AudioProcessor(**{name: fields[name] for name in names})

    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``, in luthier's own format."""
        return {
            "feature_extractor_type": "LogMelSpectrogram",
            "sampling_rate": self.sampling_rate,
            "max_seconds": self.max_seconds,
            "num_mel_bins": self.num_mel_bins,
            "window_ms": self.window_ms,
            "hop_ms": self.hop_ms,
            "top_db": self.top_db,
        }


@dataclass(frozen=True)
class FeatureExtractor(AudioProcessor):
    """Converts audio with transformers' feature extractors for AST (spectrogram) or Wav2Vec2
    (samples).

    Shapes are ``[1, frames, num_mel_bins]`` and ``[1, 1, samples]``. As in transformers, longer
    audio is cut at the end. Without the package torchaudio, transformers computes AST's spectrogram
    with numpy.
    """

    name: ClassVar[str] = "feature_extractor"

    published: tuple[tuple[str, Any], ...] = ()
    """Contents of the published ``preprocessor_config.json``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the network's input."""
        if self._makes_spectrogram:
            return (1, int(dict(self.published)["max_length"]), self.num_mel_bins)
        return (1, 1, self._samples)

    @property
    def _makes_spectrogram(self) -> bool:
        return ("feature_extractor_type", "ASTFeatureExtractor") in self.published

    @property
    def settings(self) -> tuple[str, ...]:
        """Name of the length setting. AST has none, because the network has a position for each
        frame."""
        return () if self._makes_spectrogram else ("max_seconds",)

    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the network's input, changed at random with ``augmentation``."""
        samples, rate = read_samples(media)
        samples = resample(samples, rate, self.sampling_rate)[: self._samples]
        random, count = np.random.default_rng(seed), len(samples)
        if augmentation is not None:
            samples = change_audio(augmentation, samples, count, random)
            excess = max(0, len(samples) - count) // 2
            samples = samples[excess : excess + count]
        extractor = _extractor(self.published)
        if not self._makes_spectrogram:
            values = extractor(
                samples,
                sampling_rate=self.sampling_rate,
                padding="max_length",
                max_length=self._samples,
                truncation=True,
                return_tensors="np",
            )["input_values"]
            return np.asarray(values, dtype=np.float32)[None]
        samples = np.pad(samples, (0, max(0, SHORTEST_FRAME - len(samples))))
        values = extractor(samples, sampling_rate=self.sampling_rate, return_tensors="np")
        spectrogram = np.asarray(values["input_values"][0], dtype=np.float32)
        if augmentation is not None:
            spectrogram = mask_spectrogram(augmentation, spectrogram.T, random).T
        return np.ascontiguousarray(spectrogram[None])

    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``: the published fields and the maximum
        length."""
        return {**dict(self.published), "max_seconds": self.max_seconds}

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> FeatureExtractor | None:
        """Return the feature extractor of a published ``preprocessor_config.json``, if supported."""
        if fields.get("feature_extractor_type") not in FEATURE_EXTRACTORS:
            return None
        rate = int(fields.get("sampling_rate", 16_000))
        seconds = float(fields.get("max_seconds", 1.0))
        published = {name: value for name, value in fields.items() if name != "max_seconds"}
        bins = int(published.setdefault("num_mel_bins", 128))
        if fields["feature_extractor_type"] == "ASTFeatureExtractor":
            frames = int(published.setdefault("max_length", 1024))
            if not 1 <= frames <= MOST_FRAMES or not 1 <= bins <= SHORTEST_FRAME:
                raise UnknownModel(f"unsupported spectrogram size {frames} x {bins}")
            seconds = (SHORTEST_FRAME + AST_HOP * (frames - 1)) / rate
        else:
            del published["num_mel_bins"]
        scalars = {n: v for n, v in published.items() if isinstance(v, str | int | float)}
        return FeatureExtractor(
            sampling_rate=rate,
            max_seconds=seconds,
            num_mel_bins=bins,
            published=tuple(sorted(scalars.items())),
        )


SHORTEST_FRAME, AST_HOP = 400, 160
"""Length and hop of a frame of AST's spectrogram, in samples."""
MOST_FRAMES = 100_000
FEATURE_EXTRACTORS = ("ASTFeatureExtractor", "Wav2Vec2FeatureExtractor")
"""Feature extractors of transformers that are used unchanged."""


@lru_cache(maxsize=4)
def _extractor(published: tuple[tuple[str, Any], ...]) -> Any:
    import transformers

    fields = dict(published)
    return getattr(transformers, fields.pop("feature_extractor_type"))(**fields)


@lru_cache(maxsize=8)
def _mel_filters(size: int, bins: int, rate: int) -> NDArray[np.float64]:
    from transformers.audio_utils import mel_filter_bank

    filters: NDArray[np.float64] = mel_filter_bank(
        size // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    return filters


LARGEST_DEVIATION = 10.0
"""Largest absolute value of a normalized window: without a limit, a far outlier would dominate."""


@dataclass(frozen=True)
class WindowProcessor(Processor):
    """Converts a time series to a window of the latest values, ``[columns, 1, length]``.

    Each column is normalized by the mean and deviation of the values before the last value, so a
    series may drift. The deviation includes a tenth of the deviation of all known values, for flat
    windows. A series with fewer columns is padded with zeros.
    """

    name: ClassVar[str] = "window"
    kind: ClassVar[MediaKind] = "window"

    length: Annotated[int, Field(ge=2, le=LONGEST_WINDOW)] = 48
    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)] = 1
    scaled: bool = True
    """False for a network that knows the level of each column."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the network's input."""
        return (self.columns, 1, self.length)

    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the network's input ``[columns, 1, length]``. A short history is mirrored at the
        start.
        """
        values_TC = media.values()
        values_TC = values_TC.reshape(len(values_TC), -1)
        window_LC = values_TC[-self.length :]
        if len(window_LC) < self.length:
            missing = self.length - len(window_LC)
            window_LC = np.pad(window_LC, ((missing, 0), (0, 0)), mode="symmetric")
        if self.scaled:
            before = window_LC[:-1]
            scale_C = before.std(0) + 0.1 * values_TC.std(0)
            scale_C[scale_C == 0] = 1.0  # constant column
            window_LC = ((window_LC - before.mean(0)) / scale_C).clip(
                -LARGEST_DEVIATION, LARGEST_DEVIATION
            )
        array = np.zeros(self.shape, np.float32)
        array[: window_LC.shape[1], 0] = window_LC.T
        return array

    def with_settings(self, **settings: Any) -> WindowProcessor:
        """Return this processor: windows have no settings."""
        return self

    @staticmethod
    def for_shape(shape: tuple[int, int, int]) -> WindowProcessor:
        """Return a processor for windows with the columns and the length of ``shape``."""
        return WindowProcessor(shape[-1], shape[0])

    def is_whole(self, media: Media) -> bool:
        """Return whether the series has enough values for a window."""
        return len(media.values()) >= self.length

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> WindowProcessor | None:
        """Return the processor of a ``preprocessor_config.json`` from :meth:`fields`."""
        if fields.get("feature_extractor_type") != "TimeSeriesWindow":
            return None
        return WindowProcessor(
            fields["length"], fields.get("columns", 1), fields.get("scaled", True)
        )

    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``, in luthier's own format."""
        columns = {"columns": self.columns} if self.columns > 1 else {}
        scaled = {} if self.scaled else {"scaled": False}
        return {
            "feature_extractor_type": "TimeSeriesWindow", "length": self.length, **columns, **scaled
        }  # fmt: skip
