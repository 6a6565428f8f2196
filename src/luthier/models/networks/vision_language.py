"""Vision-language models: a text network whose embedding also embeds image tokens.

luthier runs the text part of Idefics 3 and SmolVLM as an ordinary language model. The vision
encoder and its connector stay frozen: image features are inputs, not weights. The whole model shares
the modules of the text part, so saving the whole model saves the tuned text part.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.conversations.image_tokens import (
    FIRST_IMAGE_ID,
    LIVE_IMAGES,
    PLACE_BITS,
    image_ids,
    image_key,
)
from luthier.data.inputs import Media

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.inputs import Processor
    from luthier.types import IntArray

FEATURE_BYTES = 256 << 20
"""Most bytes of cached image features."""
TILES = 16
"""Most tiles per pass of the vision encoder."""


class WholeModel:
    """The vision-language model around a text part."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeModel:
        """Return the same object: copies of the text part share the vision encoder."""
        return self


def text_network(whole: Any, processor: Processor | None = None) -> Any:
    """Return the text part of a vision-language model as a causal language model.

    Args:
        processor: the processor of images; ``None`` for a sketch on the meta device.
    """
    from transformers import AutoModelForCausalLM

    backbone: Any = whole.model.text_model
    kind: Any = AutoModelForCausalLM._model_mapping[type(backbone.config)]
    with torch.device("meta"):
        model = kind(backbone.config)
    setattr(model, model.base_model_prefix, backbone)
    model.lm_head = whole.lm_head
    model.config.tie_word_embeddings = whole.lm_head.weight is backbone.embed_tokens.weight
    model.generation_config = whole.generation_config
    model.__dict__["whole"] = WholeModel(whole)  # not a submodule: vision weights never train
    whole.requires_grad_(False)
    model.requires_grad_(True)
    if processor is not None:
        backbone.embed_tokens.__class__ = ImageEmbedding
        backbone.embed_tokens.__dict__["features"] = ImageFeatures(whole, processor)
    return model.eval()


class ImageEmbedding(nn.Embedding):
    """Embedding of text tokens, and of image tokens by the vision encoder."""

    features: ImageFeatures

    def forward(self, input: Tensor) -> Tensor:
        """Return the states of the ids ``input``, ``[..., H]``."""
        is_image = input >= FIRST_IMAGE_ID
        if not is_image.any():
            return super().forward(input)
        states = super().forward(input.masked_fill(is_image, 0))
        images_KH = self.features.of(input[is_image]).to(states.dtype)
        return states.masked_scatter(is_image[..., None], images_KH)


class ImageFeatures:
    """States of image tokens, computed once per image while the cache has room."""

    def __init__(self, whole: Any, processor: Processor) -> None:
        self._whole, self._processor = whole, processor
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._lock = Lock()

    def of(self, ids_K: Tensor) -> Tensor:
        """Return the states ``[K, H]`` of image tokens."""
        ids = ids_K.cpu().numpy()
        keys, image_K = np.unique(ids >> PLACE_BITS, return_inverse=True)
        with self._lock:
            features = self._of_images(keys.tolist())
            while (
                len(self._cache) > 1 and sum(f.nbytes for f in self._cache.values()) > FEATURE_BYTES
            ):
                self._cache.popitem(last=False)
        first = np.cumsum([0, *(len(each) for each in features)])
        rows = first[image_K] + (ids & ((1 << PLACE_BITS) - 1))
        return torch.cat(features)[torch.from_numpy(rows).to(ids_K.device)]

    def _of_images(self, keys: list[int]) -> list[Tensor]:
        missing = [key for key in keys if key not in self._cache]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        arrays = [self._processor.array(LIVE_IMAGES.find(key)) for key in missing]
        found.update(zip(missing, self._encode(arrays), strict=True))
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        return [found[key] for key in keys]

    @torch.no_grad()
    def _encode(self, arrays: list[NDArray[np.float32]]) -> list[Tensor]:
        """Return the features ``[K, H]`` of each image ``[tiles, 3, S, S]``."""
        if not arrays:
            return []
        # Whole models stay in eval mode: train() reaches the modules of the text part only.
        weight = next(self._whole.model.vision_model.parameters())
        tiles = torch.from_numpy(np.concatenate(arrays)).to(weight.device, weight.dtype)
        features = [
            torch.cat(self._whole.get_image_features(pixel_values=part[None]).pooler_output)
            for part in tiles.split(TILES)
        ]
        of_tile = sum(map(len, features)) // len(tiles)
        return [*torch.cat(features).split([of_tile * len(array) for array in arrays])]

    def trial(self) -> tuple[Tensor, IntArray]:
        """Return the pixels ``[1, 1, 3, S, S]`` of a random tile, and the ids of the tile's tokens."""
        generator = torch.Generator().manual_seed(0)
        tile = torch.randn(1, *self._processor.shape, generator=generator)
        media = Media("image", "a random tile", array=tile.numpy())
        (features,) = self._encode([tile.numpy()])
        with self._lock:
            self._cache[image_key(media)] = features
        weight = next(self._whole.model.vision_model.parameters())
        return tile[None].to(weight.device, weight.dtype), image_ids(media, len(features))


@torch.no_grad()
def trial_row(model: Any) -> tuple[IntArray, Tensor] | None:
    """Return a row with an image and transformers' logits ``[T, V]``; ``None`` for text models.

    Must run before luthier replaces the attention of the text part.
    """
    features: ImageFeatures | None = getattr(model.get_input_embeddings(), "features", None)
    if features is None:
        return None
    pixels, image_T = features.trial()
    whole = model.whole.model
    text_T = np.arange(10, 14)
    ids_T = np.concatenate([text_T, image_T, text_T])
    own_T = np.where(ids_T < FIRST_IMAGE_ID, ids_T, whole.config.image_token_id)
    ids_1T = torch.from_numpy(own_T)[None].to(pixels.device)
    logits_TV: Tensor = whole(input_ids=ids_1T, pixel_values=pixels, use_cache=False).logits[0]
    return ids_T, logits_TV.float()
