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
from typing import TYPE_CHECKING

from pydantic import Field

from luthier.validation import StrictModel

if TYPE_CHECKING:
    import numpy as np

    from luthier.data.inputs import MediaKind
    from luthier.types import Example


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
