"""Denoising diffusion of images (Ho et al. 2020, arXiv:2006.11239).

Each image is mixed with noise, as much of it as a step ``t`` drawn at random says, and the network
predicts from the mixture and ``t`` the image, or, as in the paper, the noise. The loss of an image
is the mean squared error of the prediction, weighed by the signal-to-noise ratio after ``t`` up to a
bound (Hang et al. 2023, arXiv:2303.09556) or by one more (the loss of v of Salimans and Ho 2022,
arXiv:2202.00512); the paper's simple loss is ``epsilon`` without weights. A small network predicts
images rather than noise, which would have to pass through it unchanged (Li and He 2025,
arXiv:2511.13720). New images begin as noise and come back in fewer steps
(:mod:`luthier.objectives.noise_schedule`).

Where all rows have labels the network is given them, and where they have captions the words in those,
but for a share of the rows of each step. So it knows images of a class and images of any, and what sets
the class apart can be made more of (classifier-free guidance, Ho and Salimans 2022,
arXiv:2207.12598). ``guidance_scale`` is that of Imagen and diffusers: 1 plus the paper's ``w``.

Left out: the moving average of weights, whose place in a short run has the learning rate that falls to
0; learned variances; the order of the words of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from luthier.data.processors import ImageProcessor
from luthier.data.shapes import CaptionedImage
from luthier.errors import RecipeError
from luthier.models.heads import Head, Task
from luthier.objectives.base import TrainingDefaults
from luthier.objectives.capabilities import DenoisingSettings
from luthier.objectives.conditions import class_target, classes_of, words_of, words_target
from luthier.objectives.generative import Generative
from luthier.objectives.noise_schedule import (
    BetaSchedule,
    LossWeighting,
    NoiseSchedule,
    PredictionType,
    alphas_cumprod,
)
from luthier.objectives.vae import fixed_noise
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


@dataclass(frozen=True)
class Mixture:
    """What a micro-batch draws."""

    noise: Tensor
    """Standard normal, ``[R, C, H, W]``."""
    time_R: Tensor
    """How many steps of noise, less one."""
    condition_RL: Tensor | None
    """What each row shows; zeros where the network is not to know."""


class Diffusion(Generative):
    """How images look, learned by telling noise from them: new images come from noise step by step."""

    method: Literal["diffusion"] = "diffusion"
    prediction_type: PredictionType = "sample"
    """What the network predicts from a noisy image: the image, its noise (epsilon), or v of both."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """How noise grows: squaredcos_cap_v2 (cosine) for small images; linear is the first paper's."""
    num_train_timesteps: int = Field(default=1000, ge=2, le=10_000)
    """Steps from an image to noise."""
    loss_weighting: LossWeighting = "snr_plus_one"
    """What the error of an image counts: its signal-to-noise ratio, that and 1, or all the same."""
    snr_gamma: float = Field(default=5.0, gt=0, le=1e6)
    """Bound of these weights."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows of a step whose class the network is not given, for the guidance."""
    num_inference_steps: int = Field(default=50, ge=1, le=10_000)
    """Steps from noise to a new image, where none are asked for."""
    guidance_scale: float = Field(default=2.0, ge=0, le=1e3)
    """How much is made of the class: 1 is as the rows are, more is clearer and less varied."""
    eta: float = Field(default=1.0, ge=0, le=1)
    """Share of new noise in each step to a new image: 0 is DDIM, 1 with all steps DDPM."""
    labels: tuple[str, ...] | None = None
    """The classes in the order of the network; from the training rows when not given."""
    words: tuple[str, ...] | None = None
    """The words of captions it knows, in that order; from the training rows when not given."""

    task: ClassVar[Task] = "denoising"
    shapes: ClassVar[frozenset[str]] = frozenset({"image"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"captioned_image", "labelled_image"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset()
    chosen_by_shape: ClassVar[bool] = False
    same_each_epoch: ClassVar[bool] = False
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        batch_rows=32,
        batch_reason="the noise that diffusion draws is averaged over more rows",
        patience=0,
        min_epochs=10,
        max_epochs=100,
        bases={"image": "small-unet"},
    )

    @property
    def min_steps(self) -> int:
        """All weights start from random numbers, and each step says little."""
        return 4_000

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """The classes."""
        return self.labels or ()

    @property
    def schedule(self) -> NoiseSchedule:
        """How images become noise."""
        left_T = _alphas_cumprod(self.beta_schedule, self.num_train_timesteps)
        return NoiseSchedule(left_T, self.prediction_type)

    def head(self) -> Head:
        """What can be asked for."""
        return Head(self.task, self._known)

    @property
    def _known(self) -> tuple[str, ...]:
        """Classes, or else words."""
        return self.labels or self.words or ()

    @property
    def reads_prompts(self) -> bool:
        """Whether it learned from captions."""
        return bool(self.words) and not self.labels

    def check_prompt(self, prompt: str) -> None:
        """Refuse a text of which no word is known."""
        if not len(words_target(prompt, self.words or ())):
            raise RecipeError(
                f"no caption of the training rows has a word of {prompt[:64]!r}, so it says nothing to "
                "the model",
                "prompt",
            )

    def check(self, chat: ChatFormat) -> None:
        """Images must be read as numbers from -1 to 1, as noise of deviation 1 is put on them."""
        reads = chat.media
        if isinstance(reads, ImageProcessor) and {*reads.mean, *reads.std} != {0.5}:
            raise RecipeError(
                "diffusion learns from pixels from -1 to 1, and the base model reads others. Set "
                "image_mean and image_std to 0.5 in its preprocessor_config.json"
            )

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """See which classes there are, or else which words; none where a row has no label."""
        labels = classes_of(rows, "diffusion") if self.labels is None else self.labels
        words = words_of(rows) if self.words is None else self.words
        return self.model_copy(update={"labels": labels, "words": () if labels else words})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The image, and its class or the words of its caption where such are known."""
        example = chat.encode_input(row, index)
        if self.labels:
            return replace(example, target=class_target(row, self.labels))
        if self.words:
            caption = row.caption if isinstance(row, CaptionedImage) else ""
            return replace(example, target=words_target(caption, self.words))
        return example

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Noise and step of each row: new in training, and else of the image alone."""
        import torch

        found = []
        for batch in super().annotate(network, examples, budget):
            rows, size = batch.tree.examples, batch.plan.shape[1:]
            condition_RL = self._conditions([each.target for each in rows])
            if network.model.training:
                noise = torch.randn(batch.plan.shape)
                time_R = torch.randint(self.num_train_timesteps, (len(rows),))
                if condition_RL is not None:
                    condition_RL *= torch.rand(len(rows), 1) >= self.condition_dropout
            else:
                flat = [fixed_noise(each, size.numel()) for each in rows]
                noise = torch.from_numpy(np.stack(flat)).unflatten(-1, size)
                time_R = torch.tensor([self._fixed_time(each) for each in rows])
            drawn = Mixture(
                noise.to(network.device),
                time_R.to(network.device),
                None if condition_RL is None else condition_RL.to(network.device),
            )
            found.append(replace(batch, extra=drawn))
        return found

    def _fixed_time(self, example: Example) -> int:
        """A step, the same whenever the image is read."""
        random = np.random.default_rng([int(example.ids_T[0]), 1])
        return int(random.integers(self.num_train_timesteps))

    def _conditions(self, targets: Sequence[Any]) -> Tensor | None:
        """Classes or words as the network reads them, ``[R, L]``: rows of length 1, or 0 for none."""
        import torch

        if not self._known:
            return None
        condition_RL = torch.zeros(len(targets), len(self._known))
        for row, target in enumerate(targets):
            condition_RL[row, torch.from_numpy(target)] = 1
        return torch.nn.functional.normalize(condition_RL)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed over the rows: the mean squared error of the prediction for each."""
        drawn: Mixture = batch.extra
        images, schedule = batch.plan.float(), self.schedule
        noisy = schedule.add_noise(images, drawn.noise, drawn.time_R)
        predicted = network.model(
            noisy.to(network.dtype), drawn.time_R, drawn.condition_RL
        ).prediction.float()
        target = schedule.target(images, drawn.noise, drawn.time_R)
        error_R = (predicted - target).square().flatten(1).mean(1)
        weight_R = schedule.weights(drawn.time_R, self.loss_weighting, self.snr_gamma)
        return Loss.of_rows(error_R * weight_R, {})

    def with_sampling(self, settings: DenoisingSettings) -> Self:
        """This objective with what is asked for in the place of its own ``settings``."""
        asked = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "eta": settings.eta,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        try:
            return self.model_validate(self.model_dump() | given)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(f"{first['loc'][0]}: {first['msg']}", str(first["loc"][0])) from error

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """New images ``[R, C, H, W]`` of classes or prompts, each from noise of its own."""
        import torch

        most = torch.iinfo(torch.int64).max
        seeds = [int(torch.randint(most, (1,), generator=generator)) for _ in labels]
        # A generator for each: what is drawn for a row else depends on how many there are.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = network.model.config.shape

        def draw() -> Tensor:
            drawn = torch.stack([torch.randn(size, generator=each) for each in generators])
            return drawn.to(network.device)

        condition_RL = self._conditions([self._target(text) for text in labels])
        if condition_RL is not None:
            condition_RL = condition_RL.to(network.device)
        schedule, mixture = self.schedule, draw()
        times = schedule.times(min(self.num_inference_steps, self.num_train_timesteps))
        for time, before in zip(times, [*times[1:], -1], strict=True):
            time_R = torch.full((len(mixture),), time, device=network.device)
            predicted = self._guided(network, mixture, time_R, condition_RL)
            image = schedule.image(mixture, predicted, time_R).clamp(-1, 1)
            drawn = draw() if self.eta else None
            mixture = schedule.step_back(image, mixture, time, before, self.eta, drawn)
        return mixture

    def shown(self, example: Example) -> str:
        """The class of a row, or the words of its caption that are known."""
        if self.labels or example.target is None or not self.words:
            return super().shown(example)
        return " ".join(self.words[place] for place in example.target)

    def _target(self, text: str) -> IntArray:
        """The places of what is asked for: a class, or the words of a prompt."""
        if self.labels:
            return np.array([self.labels.index(text)])
        return words_target(text, self.words or ())

    def _guided(
        self, network: Network, mixture: Tensor, time_R: Tensor, condition_RL: Tensor | None
    ) -> Tensor:
        """Prediction for mixtures, moved away from that without the classes or words."""
        import torch

        noisy = mixture.to(network.dtype)
        if condition_RL is None or self.guidance_scale == 1:
            alone: Tensor = network.model(noisy, time_R, condition_RL).prediction
            return alone.float()
        both = torch.cat([condition_RL, torch.zeros_like(condition_RL)])
        predicted = network.model(torch.cat([noisy, noisy]), time_R.repeat(2), both).prediction
        conditional, unconditional = predicted.float().chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance_scale)


@cache
def _alphas_cumprod(schedule: BetaSchedule, steps: int) -> Tensor:
    return alphas_cumprod(schedule, steps)
