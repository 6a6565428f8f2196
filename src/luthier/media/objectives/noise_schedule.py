"""Noise schedules: how an image becomes noise step by step, and sampling steps in the opposite
direction.

After step ``t`` of ``T`` an image ``x`` is ``signal x + noise e`` (Ho et al. 2020,
arXiv:2006.11239), with ``e`` standard normal, ``signal`` the root of ``alphas_cumprod[t]`` and
``noise`` the root of the rest. A network predicts ``x`` (``sample``), ``e`` (``epsilon``) or
``signal e - noise x`` (``v_prediction``, Salimans and Ho 2022, arXiv:2202.00512) from the mixture;
each prediction determines ``x`` and ``e``. Sampling takes fewer steps, as in DDIM (Song et al.
2021, arXiv:2010.02502): ``eta`` 0 draws no noise, and ``eta`` 1 with all ``T`` steps equals DDPM.

Numbers equal diffusers' ``DDPMScheduler`` and ``DDIMScheduler``. Trailing spacing (Lin et al. 2024,
arXiv:2305.08891) starts at the noisiest step. The first pipelines of diffusers use leading spacing
with an offset of one. With ``linspace`` each step ends at the start of the next; diffusers'
``DDIMScheduler`` subtracts a constant from each step instead and misses the next start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PredictionType = Literal["sample", "epsilon", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
LossWeighting = Literal["snr_plus_one", "snr", "none"]
TimestepSpacing = Literal["trailing", "leading", "linspace"]
LARGEST_BETA = 0.999
"""Largest variance that a step of the cosine schedule adds: the last step would otherwise leave no
signal (Nichol and Dhariwal 2021)."""


@cache
def alphas_cumprod(
    schedule: BetaSchedule, steps: int, start: float = 1e-4, end: float = 0.02
) -> Tensor:
    """Return the remaining share of the image's variance after each step, ``[T]``, decreasing.

    Args:
        schedule: the growth of noise; the cosine schedule is from Nichol and Dhariwal 2021
            (arXiv:2102.09672).
        steps: ``T``.
        start: variance that the first step adds; unused by the cosine schedule.
        end: variance that the last step adds; unused by the cosine schedule.
    """
    import torch

    if schedule == "linear":
        beta_T = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":  # of the roots, as latent diffusion has it
        beta_T = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    else:
        done = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        left = ((done + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta_T = (1 - left[1:] / left[:-1]).clamp_max(LARGEST_BETA)
    return torch.cumprod(1 - beta_T, 0).float()


@dataclass(frozen=True)
class NoiseSchedule:
    """Shares of image and noise after each step, and the target of the network."""

    alphas_cumprod_T: Tensor
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "trailing"
    """Selection of the sampling steps."""
    steps_offset: int = 0
    """Offset of the sampling steps with leading spacing."""
    set_alpha_to_one: bool = True
    """True if sampling ends at the clean image instead of the image after the first noise step."""

    @property
    def steps(self) -> int:
        """Number of noise steps, ``T``."""
        return len(self.alphas_cumprod_T)

    def shares(self, time_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise, ``[R, 1, 1, 1]``, after steps ``[R]``."""
        left_R111 = self.alphas_cumprod_T.to(time_R.device)[time_R][:, None, None, None]
        return left_R111.sqrt(), (1 - left_R111).sqrt()

    def add_noise(self, image: Tensor, noise: Tensor, time_R: Tensor) -> Tensor:
        """Return the mixtures ``[R, C, H, W]``."""
        signal, rest = self.shares(time_R)
        return signal * image + rest * noise

    def target(self, image: Tensor, noise: Tensor, time_R: Tensor) -> Tensor:
        """Return the target of the network for the mixtures, ``[R, C, H, W]``."""
        if self.prediction_type == "sample":
            return image
        if self.prediction_type == "epsilon":
            return noise
        signal, rest = self.shares(time_R)
        return signal * noise - rest * image

    def weights(self, time_R: Tensor, weighting: LossWeighting, bound: float) -> Tensor:
        """Return the weights ``[R]`` of the squared errors of predictions after steps ``[R]``.

        The weight of an error in the image is the signal-to-noise ratio (``snr``) or the ratio plus
        one (``snr_plus_one``), at most ``bound``. Weights of other targets follow from the weight
        of the image.
        """
        import torch

        left_R = self.alphas_cumprod_T.to(time_R.device)[time_R]
        if weighting == "none":
            return torch.ones_like(left_R)
        ratio_R = left_R / (1 - left_R)
        # The error of v is that of the image by the root of the ratio and 1, that of noise by its root.
        own: dict[str, Tensor | int] = {
            "sample": 1,
            "epsilon": ratio_R,
            "v_prediction": ratio_R + 1,
        }
        weight_R: Tensor = (ratio_R + (weighting == "snr_plus_one")).clamp_max(bound) / own[
            self.prediction_type
        ]
        return weight_R

    def image(self, mixture: Tensor, predicted: Tensor, time_R: Tensor) -> Tensor:
        """Return the network's estimate of the images, ``[R, C, H, W]``."""
        signal, rest = self.shares(time_R)
        if self.prediction_type == "sample":
            return predicted
        if self.prediction_type == "epsilon":
            return (mixture - rest * predicted) / signal
        return signal * mixture - rest * predicted

    def times(self, count: int) -> list[int]:
        """Return ``count`` of ``T`` steps for sampling, the noisiest first."""
        back = range(count - 1, -1, -1)
        if self.timestep_spacing == "leading":
            apart, last = self.steps // count, self.steps - 1
            return [min(each * apart + self.steps_offset, last) for each in back]
        if self.timestep_spacing == "linspace":
            return [round((self.steps - 1) * each / max(1, count - 1)) for each in back]
        return [round(self.steps * (each + 1) / count) - 1 for each in back]

    def step_back(
        self,
        image: Tensor,
        mixture: Tensor,
        time: int,
        before: int,
        eta: float = 0.0,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """Return the mixtures at step ``before`` from the mixtures at ``time`` (equation 12 of
        DDIM).

        Args:
            image: the network's estimate of the images.
            mixture: the mixtures at ``time``.
            time: the current step.
            before: the next, less noisy step; -1 for the final images.
            eta: share of new noise.
            drawn: new noise, if ``eta`` is above 0.
        """
        left = float(self.alphas_cumprod_T[time])
        end = 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod_T[0])
        next_left = float(self.alphas_cumprod_T[before]) if before >= 0 else end
        noise = (mixture - left**0.5 * image) / (1 - left) ** 0.5
        variance = (1 - next_left) / (1 - left) * (1 - left / next_left) * eta**2
        mean: Tensor = next_left**0.5 * image + max(0.0, 1 - next_left - variance) ** 0.5 * noise
        return mean if drawn is None else mean + variance**0.5 * drawn
