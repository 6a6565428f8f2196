"""Restoration of degraded images: noise, or half the resolution.

Training needs clean images only. Each image is degraded at random, and the network learns to restore
the clean image. The loss of an image is the mean absolute error of its pixels, as in EDSR (Lim et al.
2017, arXiv:1707.02921):

    noise           mean |network(degraded) - clean|
    downsampling    mean |degraded + network(degraded) - clean|

Noise is normal, as in DnCNN (Zhang et al. 2017, arXiv:1608.03981), but degraded images have whole
numbers from 0 to 255, as in a file. Unlike DnCNN, the network predicts the clean image instead of the
noise: a small network with patches learns to pass on noise slowly (docs/log/media.md). For half the
resolution, the input is the small image after bicubic enlargement, and the network predicts the
difference (VDSR, Kim et al. 2016, arXiv:1511.04587).

Held-out images have fixed noise, and the score is the peak signal-to-noise ratio (PSNR). Classic
filters restore the same degraded images for comparison (:func:`filtered`).

Not implemented: unknown noise levels, other degradations such as compression, larger factors,
perceptual and adversarial losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.errors import RecipeError
from luthier.media.objectives.generative import check_pixel_range, draw_noise
from luthier.media.tasks import RESTORATION
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import Objective, RunModels, TrainingDefaults, extra_of
from luthier.tasks import Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

NOISE = 0.1
"""Default deviation of the noise. DnCNN reports 15, 25 and 50 of 255."""
LEAST_ERROR = 1e-6
"""Smallest mean squared error of an image: a perfect copy has 60 dB instead of an infinite ratio."""
BLURS = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
"""Deviations of the Gaussian filters, in pixels."""
SHARPENING = (0.5, 1.0)
"""Strengths of the unsharp masks."""


@dataclass(frozen=True)
class DegradedImages:
    """Clean and degraded images of a micro-batch, ``[R, C, H, W]`` with pixels from 0 to 1."""

    clean: Tensor
    degraded: Tensor


class Restoration(Objective):
    """Removal of noise from images, or enlargement of images by 2.

    Use ``diffusion`` to generate new images.
    """

    method: Literal["restoration"] = "restoration"
    degradation: Literal["noise", "downsampling"] = "noise"
    """``noise``: normal noise. ``downsampling``: half the resolution, for enlargement by 2."""
    noise_std: float | None = Field(default=None, gt=0, le=1)
    """Deviation of the noise, of pixels from 0 to 1. Default: 0.1; without noise for downsampling."""

    task: ClassVar[Task] = RESTORATION
    further_shapes: ClassVar[frozenset[str]] = frozenset(
        {"captioned_image", "image", "labelled_image"}
    )
    evaluation_shapes: ClassVar[frozenset[str]] = further_shapes
    same_each_epoch: ClassVar[bool] = False
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=60,
        bases={"image": "small-unet"},
        min_steps=1_000,
    )

    def bind(self, models: RunModels) -> Self:
        """Reject pipelines, which denoise latents, and other pixels than -1 to 1."""
        check_pixel_range(models.chat, self.method)
        if models.network is not None and models.network.is_pipeline:
            raise RecipeError(
                "a pipeline denoises latents, and restoration needs a network of pixels. Use "
                "`--base small-unet`",
                rule="objective.network",
            )
        return super().bind(models)

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return rows without labels and captions."""
        return spool(row.bare() for row in rows)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Encode the clean image."""
        return chat.encode_input(row, index)

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Degrade each image: at random in training, otherwise by the image alone."""
        seed = draw_seed() if network.model.training else None
        return [
            replace(batch, extra=self.degrade(network, batch, seed))
            for batch in super().annotate(network, examples, budget)
        ]

    def degrade(
        self, network: Network, batch: TreeBatch, seed: int | None = None
    ) -> DegradedImages:
        """Return the clean and the degraded images of a micro-batch."""
        from torch.nn import functional as F

        clean = _pixels_of(batch)
        small, size = clean, clean.shape[-2:]
        if self.degradation == "downsampling":
            half = [-(-side // 2) for side in size]
            small = F.interpolate(clean, half, mode="bicubic", antialias=True)
        deviation = self.noise_std or (NOISE if self.degradation == "noise" else 0.0)
        if deviation:
            generators = row_generators(batch.tree.examples, seed)
            noise = draw_noise(generators, small[0].numel()).view(small.shape)
            small = small + deviation * noise.to(network.device)
        degraded = _as_in_file(small)
        if degraded.shape != clean.shape:
            degraded = F.interpolate(degraded, size, mode="bicubic", antialias=True)
        return DegradedImages(clean, _as_in_file(degraded))

    def restore(self, network: Network, degraded: Tensor) -> Tensor:
        """Return the restored images; pixels may exceed 0 to 1."""
        import torch

        time_R = torch.zeros(len(degraded), device=network.device)
        values = (2 * degraded - 1).to(network.dtype)
        predicted: Tensor = network.model.denoise(values, time_R, None).float() / 2
        return predicted + (0.5 if self.degradation == "noise" else degraded)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the sum over rows of the mean absolute error of the pixels."""
        drawn = extra_of(batch, DegradedImages)
        restored = self.restore(network, drawn.degraded)
        error_R = (restored - drawn.clean).abs().flatten(1).mean(1)
        psnr_R = peak_ratios(restored.detach(), drawn.clean)
        return Loss.from_rows(error_R, {"psnr": float(psnr_R.sum())})

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the ratios of each row after degradation and after restoration, in decibels."""
        drawn = self.degrade(network, batch)
        restored = self.restore(network, drawn.degraded)
        pairs = zip(
            peak_ratios(restored, drawn.clean).tolist(),
            peak_ratios(drawn.degraded, drawn.clean).tolist(),
            strict=True,
        )
        return [{"psnr": restored, "degraded_psnr": degraded} for restored, degraded in pairs]

    def states(self, network: Network, batch: TreeBatch) -> Sequence[Tensor]:
        """Return the ratios ``[1, F]`` of each row without a filter and after each classic filter."""
        import torch

        drawn = self.degrade(network, batch)
        ratios = [peak_ratios(each, drawn.clean) for each in filtered(drawn.degraded)]
        return [*torch.stack(ratios, -1).split(1)]

    def reconstruct(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the rows restored, ``[R, C, H, W]`` in the scale of the inputs."""
        return 2 * self.restore(network, _pixels_of(batch)) - 1


def _pixels_of(batch: TreeBatch) -> Tensor:
    """Return the images of a micro-batch ``[R, C, H, W]``, with pixels from 0 to 1."""
    images: Tensor = batch.plan
    return ((images.float() + 1) / 2).clamp(0, 1)


def _as_in_file(images: Tensor) -> Tensor:
    """Return pixels from 0 to 1 in 256 levels."""
    return (images.clamp(0, 1) * 255).round() / 255


def peak_ratios(images: Tensor, clean: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio ``[R]`` of each image, in decibels: ``-10 log10(MSE)``."""
    error_R = (images.clamp(0, 1) - clean).square().flatten(1).mean(1)
    return -10 * error_R.clamp(min=LEAST_ERROR).log10()


def filtered(images: Tensor) -> list[Tensor]:
    """Return the images unchanged, then after Gaussian filters, a median of 3 x 3 and unsharp masks."""
    import torch
    from torch.nn import functional as F

    channels, (height, width) = images.shape[1], images.shape[-2:]

    def blur(deviation: float) -> Tensor:
        place = torch.arange(-4, 5, device=images.device)
        weight = (-(place**2) / (2 * deviation**2)).exp()
        kernel = torch.outer(weight, weight) / weight.sum() ** 2
        padded = F.pad(images, (4, 4, 4, 4), "replicate")
        return F.conv2d(padded, kernel.repeat(channels, 1, 1, 1), groups=channels)

    around = F.unfold(F.pad(images, (1, 1, 1, 1), "replicate"), 3)
    median = around.unflatten(1, (channels, 9)).median(2)[0].unflatten(-1, (height, width))
    blurred = [blur(each) for each in BLURS]
    sharp = [images + each * (images - blur(1.0)) for each in SHARPENING]
    return [images, *blurred, median, *sharp]
