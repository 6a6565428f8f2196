"""Random changes to training rows, drawn anew each time a row is seen, for more variety than they have.

*Texts*: two of the four operations of EDA (Wei & Zou 2019, arXiv:1901.11196): words are left out, and
pairs of words change places. Both keep what most texts are about, and take no resources. Left out:
synonyms and inserted words, which need a thesaurus; the copies that EDA stores. Words are those of the
tokenizer, so pieces of a word stay together.

*Images*: a random part at its old size (Szegedy et al. 2015, arXiv:1409.4842, section 6), a mirror
image, other brightness, contrast and saturation, and RandAugment (Cubuk et al. 2020,
arXiv:1909.13719). Left out: mixup and CutMix, which cost 4 points of accuracy on 200 pictures.

*Sounds*: moved in time, played slower or faster (Ko et al. 2015, Audio augmentation for speech
recognition), with noise added, and SpecAugment's masks over pitch and time (Park et al. 2019,
arXiv:1904.08779; its warping in time is left out).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from luthier.validation import StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luthier.data.media import MediaKind, Pixels
    from luthier.types import Example

SMALLEST_ASPECT = 3 / 4
"""Of width and height of a random part, the other way round 4/3 (Szegedy et al. 2015)."""


class Augmentation(StrictModel):
    """How much of each row is changed; off when not given."""

    delete: float = Field(default=0.0, ge=0, lt=1)
    """Texts: chance of each word to be left out; EDA's vetted setting is 0.1. One word always stays."""
    swap: float = Field(default=0.0, ge=0, le=1)
    """Texts: pairs of words that change places, as a share of the words; EDA uses 0.1."""
    crop: float = Field(default=0.0, ge=0, lt=1)
    """Images: up to this share of the area is cut away; 0.92 from scratch on photographs, else 0.2."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Images: chance to be mirrored left to right; 0.5, where that changes no class."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Images: how far brightness, contrast and saturation may move from 1; 0.4 is usual."""
    randaugment: int = Field(default=0, ge=0, le=10)
    """Images: operations of RandAugment, ``N`` in the paper, where 2 is usual."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of RandAugment's operations, ``M`` in the paper."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Sounds: moved in time by up to this share of the length that is read."""
    speed: float = Field(default=0.0, ge=0, le=0.5)
    """Sounds: played slower or faster by up to this share, which moves their pitch; 0.1 is usual."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """Sounds: Gaussian noise of up to this share of the sound's own strength."""
    masks: int = Field(default=0, ge=0, le=10)
    """Sounds: SpecAugment's masks over pitch, and as many over time; 2 is usual."""

    @property
    def kinds(self) -> set[str]:
        """What it changes: ``text``, ``image`` or ``audio``."""
        changed: dict[str, tuple[float, ...]] = {
            "text": (self.delete, self.swap),
            "image": (self.crop, self.flip, self.colour, self.randaugment),
            "audio": (self.shift, self.speed, self.noise, self.masks),
        }
        return {kind for kind, amounts in changed.items() if any(amounts)}

    def __bool__(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.kinds)

    @staticmethod
    def usual(kind: MediaKind) -> Augmentation:
        """What changes no class of most data sets, for rows that say nothing of it."""
        if kind == "image":
            return Augmentation(crop=0.3, colour=0.2)
        if kind == "window":
            return Augmentation()  # what is changed in a window may be what is anomalous
        return Augmentation(shift=0.1, speed=0.15, noise=0.05)

    @staticmethod
    def views(kind: MediaKind) -> Augmentation:
        """What makes two views of one row, to learn by contrast that they are the same."""
        if kind == "image":
            return Augmentation(crop=0.7, colour=0.4)
        return Augmentation(shift=0.2, speed=0.15, noise=0.2, masks=1)

    def change(self, example: Example, random: np.random.Generator) -> Example:
        """``example`` as the network is to see it this time, what it teaches unchanged.

        Special tokens, whose word is -1, stay where they are. The weight of a row that stands at its
        last token stays there.

        Raises:
            ValueError: for a text that does not say which words its tokens belong to.
        """
        if example.media is not None:
            seed = (int(random.integers(1 << 62)),)
            return replace(example, media=replace(example.media, augmentation=self, seed=seed))
        return self._change_words(example, random)

    def _change_words(self, example: Example, random: np.random.Generator) -> Example:
        import numpy as np

        if example.word_T is None:
            raise ValueError("the words of the row are not known")
        spans = [
            np.flatnonzero(example.word_T == word)
            for word in np.unique(example.word_T[example.word_T >= 0])
        ]
        if not spans:
            return example
        inside = np.concatenate(spans)
        before, after = np.arange(inside[0]), np.arange(inside[-1] + 1, len(example))
        words = np.arange(len(spans))
        for _ in range(max(1, round(self.swap * len(spans))) if self.swap else 0):
            first, second = random.integers(len(spans), size=2)
            words[[first, second]] = words[[second, first]]
        stays = random.random(len(spans)) >= self.delete
        if not stays.any():
            stays[random.integers(len(spans))] = True
        kept = np.concatenate([before, *(spans[word] for word in words[stays]), after])
        weight_T = np.zeros(len(kept), dtype=np.float32)
        weight_T[-1] = example.weight
        return replace(
            example,
            ids_T=example.ids_T[kept],
            weight_T=weight_T,
            word_T=example.word_T[kept],
        )

    def change_image(self, pixels: Pixels, random: np.random.Generator) -> Pixels:
        """Another view ``[H, W, 3]`` of an image of the same size."""
        import numpy as np
        from PIL import Image

        image: Any = Image.fromarray(pixels)
        if self.crop:
            image = self._part(image, random)
        if random.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            from PIL import ImageEnhance

            for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                factor = 1 + random.uniform(-self.colour, self.colour)
                image = kind(image).enhance(factor)
        for _ in range(self.randaugment):
            image = _randaugment(image, self.magnitude / 30, random)
        return np.asarray(image)

    def _part(self, image: Any, random: np.random.Generator) -> Any:
        """A random part of the image, brought to its size."""
        import numpy as np
        from PIL import Image

        width, height = image.size
        area = width * height * random.uniform(1 - self.crop, 1)
        limits = np.log([SMALLEST_ASPECT, 1 / SMALLEST_ASPECT])
        aspect = np.exp(random.uniform(*limits)) * width / height
        wide = min(width, max(1, round(np.sqrt(area * aspect))))
        high = min(height, max(1, round(np.sqrt(area / aspect))))
        left, top = random.integers(width - wide + 1), random.integers(height - high + 1)
        box = (left, top, left + wide, top + high)
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)

    def change_sound(
        self, samples: NDArray[np.float32], wanted: int, random: np.random.Generator
    ) -> NDArray[np.float32]:
        """The sound ``[T]`` otherwise played; ``wanted`` samples of it are read."""
        import numpy as np

        if self.speed:
            from luthier.media.processors import resample

            steps = 1000  # of a rate that means nothing
            rate = round(steps * random.uniform(1 - self.speed, 1 + self.speed))
            samples = resample(samples, rate, steps)
        if self.noise:
            strength = random.uniform(0, self.noise) * float(samples.std())
            noise = random.standard_normal(len(samples), dtype=np.float32)
            samples = samples + np.float32(strength) * noise
        if self.shift:
            by = round(random.uniform(-self.shift, self.shift) * wanted)
            # What is read is the middle: twice as much at one end moves it by so much.
            samples = np.pad(samples, (max(0, 2 * by), max(0, -2 * by)))
        return samples

    def mask_spectrogram(
        self, values: NDArray[np.float32], random: np.random.Generator
    ) -> NDArray[np.float32]:
        """``[bins, frames]`` with bands of pitch and spans of time at 0, the mean."""
        values = values.copy()
        for _ in range(self.masks):
            for axis, most in ((0, 0.25), (1, 0.2)):
                size = values.shape[axis]
                width = int(random.integers(int(most * size) + 1))
                start = int(random.integers(size - width + 1))
                values.swapaxes(0, axis)[start : start + width] = 0
        return values


def _randaugment(image: Any, strength: float, random: np.random.Generator) -> Any:
    """One of RandAugment's operations, at ``strength`` from 0 to 1, with either sign."""
    from PIL import Image, ImageEnhance, ImageOps

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
