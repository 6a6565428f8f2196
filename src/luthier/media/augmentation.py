"""Random changes of images and audio in training, and resampling of audio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.augmentation import Augmentation
    from luthier.media.decoding import Pixels

SMALLEST_ASPECT = 3 / 4
"""Smallest aspect ratio of a random crop; the largest is 4/3 (Szegedy et al. 2015)."""


def change_image(settings: Augmentation, pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Return a randomly changed image ``[H, W, 3]`` of the same size."""
    image: Any = Image.fromarray(pixels)
    if settings.crop:
        image = _random_crop(settings, image, random)
    if random.random() < settings.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if settings.colour:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            factor = 1 + random.uniform(-settings.colour, settings.colour)
            image = kind(image).enhance(factor)
    for _ in range(settings.randaugment):
        image = _randaugment(image, settings.magnitude / 30, random)
    return np.asarray(image)


def _random_crop(settings: Augmentation, image: Any, random: np.random.Generator) -> Any:
    """Return a random crop, resized to the size of the image."""
    width, height = image.size
    area = width * height * random.uniform(1 - settings.crop, 1)
    limits = np.log([SMALLEST_ASPECT, 1 / SMALLEST_ASPECT])
    aspect = np.exp(random.uniform(*limits)) * width / height
    wide = min(width, max(1, round(np.sqrt(area * aspect))))
    high = min(height, max(1, round(np.sqrt(area / aspect))))
    left, top = random.integers(width - wide + 1), random.integers(height - high + 1)
    box = (left, top, left + wide, top + high)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def change_audio(
    settings: Augmentation, samples: NDArray[np.float32], length: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """Return audio ``[T]`` with random speed, noise and shift. The network reads ``length``
    samples."""

    if settings.speed:
        steps = 1000  # of a rate that means nothing
        rate = round(steps * random.uniform(1 - settings.speed, 1 + settings.speed))
        samples = resample(samples, rate, steps)
    if settings.noise:
        strength = random.uniform(0, settings.noise) * float(samples.std())
        noise = random.standard_normal(len(samples), dtype=np.float32)
        samples = samples + np.float32(strength) * noise
    if settings.shift:
        offset = round(random.uniform(-settings.shift, settings.shift) * length)
        # What is read is the middle: twice as much at one end moves it by so much.
        samples = np.pad(samples, (max(0, 2 * offset), max(0, -2 * offset)))
    return samples


def mask_spectrogram(
    settings: Augmentation, values: NDArray[np.float32], random: np.random.Generator
) -> NDArray[np.float32]:
    """Return a spectrogram ``[bins, frames]`` with random bands and spans set to 0, the mean."""
    values = values.copy()
    for _ in range(settings.masks):
        for axis, most in ((0, 0.25), (1, 0.2)):
            size = values.shape[axis]
            width = int(random.integers(int(most * size) + 1))
            start = int(random.integers(size - width + 1))
            values.swapaxes(0, axis)[start : start + width] = 0
    return values


def resample(samples: NDArray[np.float32], rate: int, target_rate: int) -> NDArray[np.float32]:
    """Return audio ``[T]`` at another sampling rate, by Fourier transform, so without aliases."""
    if rate == target_rate or not len(samples):
        return samples
    count = max(1, round(len(samples) * target_rate / rate))
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    spectrum = np.pad(spectrum, (0, count // 2 + 1 - len(spectrum)))
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


def _randaugment(image: Any, strength: float, random: np.random.Generator) -> Any:
    """Apply one random operation of RandAugment with ``strength`` from 0 to 1 and a random sign."""
    width, height = image.size
    signed = strength * (1 if random.random() < 0.5 else -1)
    grey = (128, 128, 128)

    def transform(*matrix: float) -> Any:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey
        )

    operations = (
        lambda: image,
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: image.rotate(30 * signed, Image.Resampling.BILINEAR, fillcolor=grey),
        lambda: ImageOps.solarize(image, round(256 * (1 - strength))),
        lambda: ImageOps.posterize(image, 8 - round(4 * strength)),
        lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * signed),
        lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * signed),
        lambda: transform(1, 0.3 * signed, 0, 0, 1, 0),
        lambda: transform(1, 0, 0, 0.3 * signed, 1, 0),
        lambda: transform(1, 0, 0.45 * signed * width, 0, 1, 0),
        lambda: transform(1, 0, 0, 0, 1, 0.45 * signed * height),
    )
    return operations[int(random.integers(len(operations)))]()
