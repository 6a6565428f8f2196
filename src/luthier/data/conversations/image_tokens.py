"""Token ids of images in a conversation.

Each image token has an id of its own, made of the image's hash and the token's place in the image.
Therefore equal ids mean equal images: prompts with different images never share a prefix in the
token tree or in the prefix cache, and prompts with the same image do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np

from luthier.data.inputs import Media, Processor
from luthier.errors import RowRefused

if TYPE_CHECKING:
    from luthier.types import IntArray

FIRST_IMAGE_ID = 1 << 62
"""Ids from here on are image tokens; no vocabulary is that large."""
PLACE_BITS = 16
"""Low bits of an id with the place in the image; an image has at most 65,536 tokens."""
_HASH_DIGITS = 11
MOST_UNUSED = 4096
"""Number of keys from which keys without images are removed."""


def image_key(media: Media) -> int:
    """Return the part of an image's token ids that identifies the image."""
    return FIRST_IMAGE_ID >> PLACE_BITS | int(media.digest()[:_HASH_DIGITS], 16)


def image_ids(media: Media, count: int) -> IntArray:
    """Return the ids of the ``count`` tokens of an image."""
    return np.arange(count, dtype=np.int64) | (image_key(media) << PLACE_BITS)


class ImageTokens(Processor):
    """Base of processors for images inside a conversation."""

    in_text: ClassVar[bool] = True
    placeholder: ClassVar[str]
    """Name of the token that chat templates write for an image, and of each token of an image."""

    @abstractmethod
    def tokens(self, media: Media) -> str:
        """Return the text that replaces the template's token of an image.

        Raises:
            RowRefused: if the image cannot be opened.
        """

    @abstractmethod
    def check(self, media: Media) -> None:
        """Raise :class:`RowRefused` for an image that cannot be decoded."""

    def token_id(self, tokenizer: Any) -> int:
        """Return the id of :attr:`placeholder`."""
        return int(tokenizer.convert_tokens_to_ids(self.placeholder))

    def expand(self, text: str, images: Sequence[Media]) -> str:
        """Return a rendered conversation with the tokens of each image.

        Raises:
            RowRefused: if the number of images is not the number of the template's tokens.
        """
        between = text.split(self.placeholder)
        if images and len(between) != len(images) + 1:
            raise RowRefused(
                "row.template",
                f"the chat template writes {len(between) - 1} image tokens for {len(images)} images.",
                f"Remove {self.placeholder} from the assistant's text.",
            )
        if not images:
            return text
        parts = zip_longest(between, map(self.tokens, images), fillvalue="")
        return "".join(f"{before}{tokens}" for before, tokens in parts)

    def place(self, ids_T: IntArray, images: Sequence[Media], tokenizer: Any) -> IntArray:
        """Return token ids with the ids of ``images`` in place of :attr:`placeholder`."""
        if not images:
            return ids_T
        at = np.flatnonzero(ids_T == self.token_id(tokenizer))
        counts = [self.tokens(media).count(self.placeholder) for media in images]
        ids = [image_ids(media, count) for media, count in zip(images, counts, strict=True)]
        # The last turns of a row may be cut off, with their images.
        ids_T = ids_T.copy()
        ids_T[at] = np.concatenate(ids)[: len(at)]
        LIVE_IMAGES.add(images)
        return ids_T


class LiveImages:
    """Images of running requests and micro-batches by key. Images out of use disappear."""

    def __init__(self) -> None:
        self._images: dict[int, WeakValueDictionary[int, Media]] = {}
        self._lock = Lock()

    def add(self, images: Iterable[Media]) -> None:
        """Add ``images``; the caller keeps the objects alive."""
        for media in images:
            key = image_key(media)
            with self._lock:
                if len(self._images) > MOST_UNUSED and key not in self._images:
                    self._images = {key: each for key, each in self._images.items() if each}
                # Requests with equal images end at different times, so each object has an entry.
                self._images.setdefault(key, WeakValueDictionary())[id(media)] = media

    def find(self, key: int) -> Media:
        """Return an image with ``key``.

        Raises:
            KeyError: if no such image is in use.
        """
        with self._lock:
            return next(iter(self._images[key].values()))


LIVE_IMAGES = LiveImages()
"""The images of this process."""
