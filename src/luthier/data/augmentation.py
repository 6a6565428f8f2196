"""Random changes to images, audio and text, drawn again in every epoch.

*Images*: random crop (Szegedy et al. 2015, arXiv:1409.4842, section 6), mirror image, jitter of
brightness, contrast and saturation, and RandAugment (Cubuk et al. 2020, arXiv:1909.13719). Not
included: mixup and CutMix, which cost 4 points of accuracy on 200 images.

*Audio*: shift in time, change of speed (Ko et al. 2015, Audio augmentation for speech recognition),
noise, and SpecAugment's masks over pitch and time (Park et al. 2019, arXiv:1904.08779), without
time warping.

*Text*: words left out and pairs of words swapped (Wei & Zou 2019, EDA, arXiv:1901.11196), with a new
draw in every epoch instead of stored copies. Not included: synonyms, which need a thesaurus for each
language.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from pydantic import Field

from luthier.validation import StrictModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.inputs import MediaKind
    from luthier.types import Example


class Augmentation(StrictModel):
    """Strength of each random change; off by default."""

    crop: float = Field(default=0.0, ge=0, lt=1)
    """Images: up to this share of the area is cut away; 0.92 from scratch on photographs, else 0.2."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Images: probability of a left-right mirror image; 0.5 if that keeps all classes."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Images: how far brightness, contrast and saturation may move from 1; 0.4 is usual."""
    randaugment: int = Field(default=0, ge=0, le=10)
    """Images: operations of RandAugment, ``N`` in the paper, where 2 is usual."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of RandAugment's operations, ``M`` in the paper."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Audio: largest shift in time, as a share of the length."""
    speed: float = Field(default=0.0, ge=0, le=0.5)
    """Audio: largest change of speed and pitch, as a share; 0.1 is usual."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """Audio: largest standard deviation of Gaussian noise, as a share of the signal's."""
    masks: int = Field(default=0, ge=0, le=10)
    """Audio: number of SpecAugment masks over pitch, and also over time; 2 is usual."""

    drop: float = Field(default=0.0, ge=0, lt=1)
    """Text: probability of each word to be left out; 0.1 is usual."""
    swap: float = Field(default=0.0, ge=0, le=1)
    """Text: pairs of words that change places, as a share of the words; 0.1 is usual."""

    @property
    def kinds(self) -> set[str]:
        """Kinds of input with a change: ``image``, ``audio`` or ``text``."""
        changed: dict[str, tuple[float, ...]] = {
            "image": (self.crop, self.flip, self.colour, self.randaugment),
            "audio": (self.shift, self.speed, self.noise, self.masks),
            "text": (self.drop, self.swap),
        }
        return {kind for kind, amounts in changed.items() if any(amounts)}

    def __bool__(self) -> bool:
        """Return True if any change is on."""
        return bool(self.kinds)

    @staticmethod
    def usual(kind: MediaKind) -> Augmentation:
        """Return the default for a kind of input: changes that keep the class in most data sets."""
        if kind == "image":
            return Augmentation(crop=0.3, colour=0.2)
        if kind == "window":
            return Augmentation()  # a changed window may become an anomaly
        return Augmentation(shift=0.1, speed=0.15, noise=0.05)

    @staticmethod
    def views(kind: MediaKind) -> Augmentation:
        """Return the changes that create two views of a row for contrastive learning."""
        if kind == "image":
            return Augmentation(crop=0.7, colour=0.4)
        return Augmentation(shift=0.2, speed=0.15, noise=0.2, masks=1)

    def for_inputs(self, chat: ChatFormat) -> RowChange:
        """Return the change for the inputs of ``chat``."""
        return self if "text" not in self.kinds else WordChange.of(self, chat)

    def change(self, example: Example, random: np.random.Generator) -> Example:
        """Return ``example`` with a new random change of the media input."""
        assert example.media is not None
        seed = (int(random.integers(1 << 62)),)
        return replace(example, media=replace(example.media, augmentation=self, seed=seed))


class RowChange(Protocol):
    """A random change of rows."""

    def change(self, example: Example, random: np.random.Generator) -> Example:
        """Return ``example`` with a new random change."""


@dataclass(frozen=True)
class WordChange:
    """Left-out and swapped words of encoded texts. Special tokens keep their places."""

    settings: Augmentation
    starts_V: NDArray[np.bool_]
    """For each token of the vocabulary: whether the token starts a word."""
    special_V: NDArray[np.bool_]

    @staticmethod
    def of(settings: Augmentation, chat: ChatFormat) -> WordChange:
        """Return the change for the tokens of ``chat``."""
        starts_V = chat.text_tokenizer.word_starts
        special_V = np.zeros_like(starts_V)
        special_V[chat.tokenizer.all_special_ids] = True
        return WordChange(settings, starts_V & ~special_V, special_V)

    def change(self, example: Example, random: np.random.Generator) -> Example:
        """Return ``example`` with other words. The weight of the last token stays at the end."""
        ids_T = example.ids_T
        special_T = self.special_V[ids_T]
        # A word ends before the next word and before a special token.
        begins_T = self.starts_V[ids_T] | special_T
        begins_T[1:] |= special_T[:-1]
        parts = np.split(ids_T, np.flatnonzero(begins_T[1:]) + 1)
        words = [n for n, part in enumerate(parts) if not self.special_V[part[0]]]
        # Byte-level tokens start a text without a space, and would join the word before.
        movable = [n for n in words if self.starts_V[parts[n][0]]]
        for _ in range(round(self.settings.swap * len(movable))):
            one, other = random.choice(movable, 2)
            parts[one], parts[other] = parts[other], parts[one]
        left_out = {n for n in words if random.random() < self.settings.drop}
        if len(left_out) == len(words) and words:
            left_out.remove(int(random.choice(words)))
        new_T = np.concatenate([part for n, part in enumerate(parts) if n not in left_out])
        weight_T = np.zeros(len(new_T), np.float32)
        weight_T[-1] = example.weight_T[-1]
        return replace(example, ids_T=new_T, weight_T=weight_T)
