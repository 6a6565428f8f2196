"""Images in chat messages: pixels and image tokens of Idefics 3 and SmolVLM by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from luthier.data.conversations.image_tokens import ImageTokens
from luthier.data.inputs import Media, MediaKind
from luthier.errors import RowRefused, UnknownModel
from luthier.media.decoding import image_size, read_pixels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from luthier.data.augmentation import Augmentation

_CLASSES = {
    "Idefics3ImageProcessor": "Idefics3ImageProcessorPil",
    "SmolVLMImageProcessor": "SmolVLMImageProcessorPil",
}
"""transformers' image processors for Pillow by the name in ``preprocessor_config.json``."""
USUAL_TOKENS = 169
"""transformers' default of ``image_seq_len``."""


@dataclass(frozen=True)
class TiledImages(ImageTokens):
    """Converts an image to tiles ``[N, 3, S, S]``: its parts in reading order, and the whole."""

    name: ClassVar[str] = "tiled_images"
    kind: ClassVar[MediaKind] = "image"
    placeholder: ClassVar[str] = "<image>"

    settings_json: str
    """Contents of ``preprocessor_config.json``; a text is immutable and comparable."""

    @cached_property
    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.settings_json)
        return fields

    @cached_property
    def _own(self) -> Any:
        """The image processor of transformers."""
        import transformers

        fields = self._fields
        kind = str(fields["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
        return getattr(transformers, _CLASSES[kind])(**fields)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a tile."""
        side = int(self._own.max_image_size["longest_edge"])
        return (3, side, side)

    @staticmethod
    def for_shape(shape: tuple[int, int, int]) -> TiledImages:
        """Raise: only published models have such a processor."""
        raise NotImplementedError

    def with_settings(self, **settings: Any) -> TiledImages:
        """Return the same processor, which has no settings."""
        return self

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> TiledImages | None:
        """Return the processor of a published ``preprocessor_config.json``, if one of tiles."""
        kind = str(fields.get("image_processor_type", ""))
        if kind.removesuffix("Fast").removesuffix("Pil") not in _CLASSES:
            return None
        processor = TiledImages(json.dumps(dict(fields), sort_keys=True))
        side, longest = processor.shape[1], int(processor._own.size["longest_edge"])
        if longest % side:  # transformers' count of tiles is wrong for such sizes
            raise UnknownModel(f"unsupported size: {longest} is not a multiple of {side}")
        return processor

    def fields(self) -> dict[str, Any]:
        """Return the contents of ``preprocessor_config.json``."""
        return dict(self._fields)

    def array(
        self, media: Media, augmentation: Augmentation | None = None, seed: tuple[int, ...] = ()
    ) -> NDArray[np.float32]:
        """Return the tiles of an image. Augmentation is not supported."""
        from PIL import Image

        image = Image.fromarray(read_pixels(media))
        found = self._own(images=[[image]], return_tensors="np")
        tiles: NDArray[np.float32] = found["pixel_values"][0]
        return tiles

    def check(self, media: Media) -> None:
        """Decode an image; see :meth:`ImageTokens.check`."""
        read_pixels(media)

    def tokens(self, media: Media) -> str:
        """Return the text of an image's tokens, with the row and column of each tile."""
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        try:
            width, height = image_size(media)
        except RowRefused as bad:
            problem = bad.problem
            message = f"{media.name}: {problem.message}"
            raise RowRefused(problem.rule, message, problem.advice) from bad
        _, rows, columns = self._own.get_number_of_image_patches(height, width)
        text: str = get_image_prompt_string(
            rows,
            columns,
            int(self._fields.get("image_seq_len", USUAL_TOKENS)),
            "<fake_token_around_image>",
            self.placeholder,
            "<global-img>",
        )
        return text
