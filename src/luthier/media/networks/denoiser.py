"""The interface between :class:`~luthier.media.objectives.diffusion.Diffusion` and its networks.

One network works on pixels, with classes or words as conditions. Another works on the latents of an
autoencoder, with texts as conditions. The objective does not distinguish the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.modalities import Shape
    from luthier.types import IntArray


class Denoiser(Protocol):
    """A denoising network for latents ``[R, C, H, W]``. The latents may be the images."""

    latent_bound: float | None
    """Largest absolute value of a latent number; ``None`` without a bound."""

    def latent_shape(self, image: Shape) -> Shape:
        """Return the shape of the latents of an image of shape ``image``.

        Raises:
            RecipeError: for an unsupported image size.
        """

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents of images, without gradients."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the images of latents, without gradients."""

    def encode_conditions(self, targets: Sequence[IntArray]) -> Tensor | None:
        """Return the encoded conditions ``[R, …]`` for :meth:`denoise`; ``None`` for a network
        without any.

        Args:
            targets: positions of classes or words (empty for the empty condition), or text tokens.
                A frozen
                encoder creates no gradients.
        """

    def denoise(self, mixture: Tensor, time_R: Tensor, condition: Tensor | None) -> Tensor:
        """Return the prediction ``[R, C, H, W]`` for mixtures of latents and noise after steps
        ``[R]``."""
