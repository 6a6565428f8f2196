"""What a network is to :class:`~luthier.media.objectives.diffusion.Diffusion`.

One network works on the pixels themselves and knows classes or words; another on latents, which an
autoencoder makes of images, and reads texts. The objective cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.modalities import Shape
    from luthier.types import IntArray


class Denoiser(Protocol):
    """A network that tells noise from latents ``[R, C, H, W]``, which may be the images themselves."""

    latent_bound: float | None
    """What numbers of a latent are at most, but for their sign; ``None`` without a bound."""

    def latent_shape(self, image: Shape) -> Shape:
        """That of the latent of an image of shape ``image``.

        Raises:
            RecipeError: for a size that the network cannot have.
        """

    def encode_images(self, images: Tensor) -> Tensor:
        """The latents of images. Without a gradient."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """The images of latents. Without a gradient."""

    def encode_conditions(self, targets: Sequence[IntArray]) -> Tensor | None:
        """What is to be seen, as :meth:`denoise` takes it, ``[R, …]``; ``None`` for one without any.

        ``targets`` are places of classes or words (none: it may be anything), or tokens of texts.
        Without a gradient where what encodes them is frozen.
        """

    def denoise(self, mixture: Tensor, time_R: Tensor, condition: Tensor | None) -> Tensor:
        """The prediction ``[R, C, H, W]`` for mixtures of latents and noise after steps ``[R]``."""
