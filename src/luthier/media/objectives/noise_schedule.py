"""How an image becomes noise step by step, and the way back (Ho et al. 2020, arXiv:2006.11239).

After step ``t`` of ``T`` an image ``x`` is ``signal x + noise e``, with ``e`` standard normal,
``signal`` the root of ``alphas_cumprod[t]`` and ``noise`` that of the rest. A network predicts from
such a mixture ``x`` (``sample``), ``e`` (``epsilon``) or ``signal e - noise x`` (``v_prediction``,
Salimans and Ho 2022, arXiv:2202.00512); each gives ``x`` and ``e``. The way back takes fewer steps than
there were, as DDIM does (Song et al. 2021, arXiv:2010.02502): with ``eta`` 0 it draws nothing, and with
``eta`` 1 and all ``T`` steps it is DDPM's.

Numbers are those of diffusers' ``DDPMScheduler``, and of its ``DDIMScheduler``. With trailing spacing
(Lin et al. 2024, arXiv:2305.08891) the way back starts where there is least of the image; the first
pipelines of diffusers have leading spacing, moved by one step. With ``linspace`` each step ends
where the next begins; diffusers' ``DDIMScheduler`` goes back a fixed way from each and so misses them.
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
"""Of the cosine schedule, whose last step would else leave nothing (Nichol and Dhariwal 2021)."""


@cache
def alphas_cumprod(
    schedule: BetaSchedule, steps: int, start: float = 1e-4, end: float = 0.02
) -> Tensor:
    """``[T]``: the share of an image's variance that is left after each step, from much to little.

    ``start`` and ``end`` are the variances that the first and last step add; the cosine schedule
    (Nichol and Dhariwal 2021, arXiv:2102.09672) has no use for them.
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
    """How much of image and noise there is after each step, and what a network predicts from it."""

    alphas_cumprod_T: Tensor
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "trailing"
    """Which steps the way back takes."""
    steps_offset: int = 0
    """How many later they are, with leading spacing."""
    set_alpha_to_one: bool = True
    """Whether the way back ends at the image; else at what is left of it after the first step."""

    @property
    def steps(self) -> int:
        """``T``."""
        return len(self.alphas_cumprod_T)

    def shares(self, time_R: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise ``[R, 1, 1, 1]`` after steps ``[R]``."""
        left_R111 = self.alphas_cumprod_T.to(time_R.device)[time_R][:, None, None, None]
        return left_R111.sqrt(), (1 - left_R111).sqrt()

    def add_noise(self, image: Tensor, noise: Tensor, time_R: Tensor) -> Tensor:
        """The mixtures ``[R, C, H, W]``."""
        signal, rest = self.shares(time_R)
        return signal * image + rest * noise

    def target(self, image: Tensor, noise: Tensor, time_R: Tensor) -> Tensor:
        """What the network is to predict from the mixtures, ``[R, C, H, W]``."""
        if self.prediction_type == "sample":
            return image
        if self.prediction_type == "epsilon":
            return noise
        signal, rest = self.shares(time_R)
        return signal * noise - rest * image

    def weights(self, time_R: Tensor, weighting: LossWeighting, bound: float) -> Tensor:
        """What the squared error ``[R]`` of a prediction counts after steps ``[R]``.

        Weights are those of the error of the image: the signal-to-noise ratio there (``snr``) or one
        more (``snr_plus_one``), at most ``bound``.
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
        """What the network takes the images of mixtures ``[R, C, H, W]`` to be."""
        signal, rest = self.shares(time_R)
        if self.prediction_type == "sample":
            return predicted
        if self.prediction_type == "epsilon":
            return (mixture - rest * predicted) / signal
        return signal * mixture - rest * predicted

    def times(self, count: int) -> list[int]:
        """``count`` steps of ``T`` on the way back, the last one first."""
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
        """The mixtures after step ``before`` from those after ``time``; the last ones where it is -1.

        ``image`` is what the network takes the images to be, ``drawn`` new noise where ``eta`` is above
        0 (equation 12 of DDIM).
        """
        left = float(self.alphas_cumprod_T[time])
        end = 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod_T[0])
        then = float(self.alphas_cumprod_T[before]) if before >= 0 else end
        noise = (mixture - left**0.5 * image) / (1 - left) ** 0.5
        variance = (1 - then) / (1 - left) * (1 - left / then) * eta**2
        found: Tensor = then**0.5 * image + max(0.0, 1 - then - variance) ** 0.5 * noise
        return found if drawn is None else found + variance**0.5 * drawn
