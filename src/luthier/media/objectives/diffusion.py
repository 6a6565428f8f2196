"""Denoising diffusion of images (Ho et al. 2020, arXiv:2006.11239).

Each image is mixed with noise, as much of it as a step ``t`` drawn at random says, and the network
predicts from the mixture and ``t`` the image, or, as in the paper, the noise. The loss of an image
is the mean squared error of the prediction, weighed by the signal-to-noise ratio after ``t`` up to a
bound (Hang et al. 2023, arXiv:2303.09556) or by one more (the loss of v of Salimans and Ho 2022,
arXiv:2202.00512); the paper's simple loss is ``epsilon`` without weights. A small network predicts
images rather than noise, which would have to pass through it unchanged (Li and He 2025,
arXiv:2511.13720). New images begin as noise and come back in fewer steps
(:mod:`luthier.media.objectives.noise_schedule`).

Where all rows have labels the network is given them, and where they have captions the words in those,
but for a share of the rows of each step. So it knows images of a class and images of any, and what sets
the class apart can be made more of (classifier-free guidance, Ho and Salimans 2022,
arXiv:2207.12598). ``guidance_scale`` is that of Imagen and diffusers: 1 plus the paper's ``w``. With a
``negative_prompt`` images are moved away from those of that text instead, as in diffusers.

The network (:class:`~luthier.media.networks.denoiser.Denoiser`) encodes images and captions.
A pipeline of diffusers works on latents of images (latent
diffusion, Rombach et al. 2022, arXiv:2112.10752) and reads whole texts; of it the noise is that which
it was trained with, and so are the steps of the way back.

Left out: the moving average of weights, whose place in a short run has the learning rate that falls to
0; learned variances; without a text encoder the order of the words of a caption; offset noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from luthier.data.shapes.media import CaptionedImage, LabelledImage
from luthier.errors import RecipeError, RowRefused
from luthier.media.objectives.class_conditions import (
    class_target,
    classes_of,
    words_of,
    words_target,
)
from luthier.media.objectives.generative import Generative, draw_noise
from luthier.media.objectives.noise_schedule import (
    BetaSchedule,
    LossWeighting,
    NoiseSchedule,
    PredictionType,
    TimestepSpacing,
    alphas_cumprod,
)
from luthier.media.processors import ImageProcessor
from luthier.models.heads import Head, Task
from luthier.models.modalities import input_shape
from luthier.models.pipelines import noise_settings
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import RunModels, TrainingDefaults, chat_of, extra_of
from luthier.types import Example, IntArray, Loss, Row
from luthier.validation import describe_constraint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.media.networks.denoiser import Denoiser
    from luthier.models.network import Network, TreeBatch


@dataclass(frozen=True)
class NoisyImages:
    """What is drawn for a micro-batch."""

    latents: Tensor
    """Of the images, ``[R, C, H, W]``."""
    noise: Tensor
    """Standard normal, of that shape."""
    time_R: Tensor
    """How many steps of noise, less one."""
    condition: Tensor | None
    """What each row shows, ``[R, …]``, or that the network is not to know."""


@dataclass(frozen=True)
class Guidance:
    """What new images are to show."""

    condition: Tensor | None
    nothing: Tensor | None
    """The same where nothing is asked for, or of the negative prompt: they are moved away from it."""


FEW_STEPS = 20
"""Steps from noise to an image that is only compared or shown in training."""


@dataclass(frozen=True)
class DenoisingSettings:
    """Settings of one request for images; ``None`` keeps the model's own."""

    steps: int | None = None
    """Steps from noise to an image."""
    guidance_scale: float | None = None
    """Strength of the class or prompt; 1 is the strength in the training rows."""
    eta: float | None = None
    """Share of new noise in each step."""
    negative_prompt: str | None = None
    """Prompt that images are moved away from."""


class Diffusion(Generative):
    """How images look, learned by telling noise from them: new images come from noise step by step."""

    method: Literal["diffusion"] = "diffusion"
    prediction_type: PredictionType = "sample"
    """What the network predicts from a noisy image: the image, its noise (epsilon), or v of both."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """How noise grows: squaredcos_cap_v2 (cosine) for small images; linear is the first paper's."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """Variance that the first step adds; squaredcos_cap_v2 has no use for it."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Variance that the last step adds; squaredcos_cap_v2 has no use for it."""
    num_train_timesteps: int = Field(default=1000, ge=2, le=10_000)
    """Steps from an image to noise."""
    loss_weighting: LossWeighting | None = None
    """What an error counts, by signal-to-noise ratio; snr_plus_one, of pipelines none if not given."""
    snr_gamma: float = Field(default=5.0, gt=0, le=1e6)
    """Bound of these weights."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows of a step whose class or caption is withheld, for the guidance."""
    num_inference_steps: int = Field(default=50, ge=1, le=10_000)
    """Steps from noise to a new image, where none are asked for."""
    guidance_scale: float | None = Field(default=None, ge=0, le=1e3)
    """How much is made of what is asked for, 1 as in the rows; 2, of pipelines 7.5 when not given."""
    eta: float | None = Field(default=None, ge=0, le=1)
    """Share of new noise in each step: 0 is DDIM, 1 DDPM; 1, of pipelines 0 when not given."""
    negative_prompt: str = ""
    """What new images are moved away from, of models of captions; images of anything if empty."""
    timestep_spacing: TimestepSpacing = "trailing"
    """Which steps the way back takes: from the end of noise (trailing), or as the base's files say."""
    steps_offset: int = Field(default=0, ge=0, le=1)
    """How many steps later they are with leading spacing."""
    set_alpha_to_one: bool = True
    """Whether the way back ends at the image, or at what is left of it after the first step."""
    labels: tuple[str, ...] | None = None
    """The classes in the order of the network; from the training rows when not given."""
    words: tuple[str, ...] | None = None
    """The words of captions it knows, in that order; from the training rows when not given."""
    reads_texts: bool = False
    """Whether the base model has a text encoder, which reads captions whole; as it has one."""

    task: ClassVar[Task] = "denoising"
    further_shapes: ClassVar[frozenset[str]] = frozenset(
        {"captioned_image", "image", "labelled_image"}
    )
    same_each_epoch: ClassVar[bool] = False
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        pretrained_rate_multiplier=0.15,
        batch_rows=32,
        batch_reason="the noise that diffusion draws is averaged over more rows",
        patience=0,
        min_epochs=10,
        max_epochs=100,
        scratch_steps=4_000,
        bases={"image": "small-unet"},
        min_steps=1_000,  # each step says little, of one amount of noise for each row
    )

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """The classes."""
        return self.labels or ()

    @property
    def schedule(self) -> NoiseSchedule:
        """How images become noise."""
        left_T = alphas_cumprod(
            self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end
        )
        return NoiseSchedule(
            left_T,
            self.prediction_type,
            self.timestep_spacing,
            self.steps_offset,
            self.set_alpha_to_one,
        )

    def head(self) -> Head:
        """What can be asked for."""
        return Head(self.task, self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        """Classes, or else words."""
        return self.labels or self.words or ()

    @property
    def reads_prompts(self) -> bool:
        """Whether it learned from captions."""
        return self.reads_texts or (bool(self.words) and not self.labels)

    def check_prompt(self, prompt: str) -> None:
        """Refuse a text of which no word is known."""
        if not self.reads_texts and not len(words_target(prompt, self.words or ())):
            raise RecipeError(
                f"no caption of the training rows has a word of {prompt[:64]!r}, so it says nothing to "
                "the model",
                setting="prompt",
            )

    def bind(self, models: RunModels) -> Self:
        """Check the range of pixels; use the noise that a pipeline was trained with."""
        reads, bound = models.chat.media, super().bind(models)
        # Noise of deviation 1 is added to the pixels.
        if isinstance(reads, ImageProcessor) and {*reads.mean, *reads.std} != {0.5}:
            raise RecipeError(
                "diffusion learns from pixels from -1 to 1, and the base model reads others. Set "
                "image_mean and image_std to 0.5 in its preprocessor_config.json",
                rule="image.range",
            )
        folder = models.network
        if folder is None or not folder.is_pipeline:
            return bound
        noise = noise_settings(folder.fields)
        for name, value in noise.items():
            # A recipe that was stored names all fields.
            if getattr(self, name) not in (value, type(self).model_fields[name].default):
                raise RecipeError(
                    f"the base model was trained with {name}={value}, and reads no other noise; "
                    f"leave objective.{name} out",
                    setting=f"objective.{name}",
                )
        try:
            return self.model_validate(self.model_dump() | noise | {"reads_texts": True})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RecipeError(
                f"the scheduler of {folder.path} has {name}={noise.get(name)}, which is unknown: "
                f"{describe_constraint(first)}",
                rule="scheduler.invalid",
            ) from error

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """See which classes there are, or else which words; none where a row has no label.

        Where the base model reads texts, labels are texts, too.
        """
        if chat is not None and chat.has_tokenizer:
            fitted = self.model_copy(update={"labels": (), "words": (), "reads_texts": True})
        else:
            labels = classes_of(rows, "diffusion") if self.labels is None else self.labels
            words = words_of(rows) if self.words is None else self.words
            fitted = self.model_copy(update={"labels": labels, "words": () if labels else words})
        if self.negative_prompt:
            fitted._check_negative_prompt("objective.negative_prompt")
            if fitted.reads_texts:
                _check_length(self.negative_prompt, chat, "objective.negative_prompt")
        return fitted

    def _check_negative_prompt(self, name: str) -> None:
        """Refuse the negative prompt, called ``name``, where it would change nothing."""
        if not self.reads_prompts:
            raise RecipeError(
                f"{name} is for models that learned from captions, and this one did not",
                setting=name,
            )
        if not self.reads_texts and not len(words_target(self.negative_prompt, self.words or ())):
            raise RecipeError(
                f"no caption of the training rows has a word of {self.negative_prompt[:64]!r}, so "
                f"{name} says nothing to the model",
                setting=name,
            )
        if self._scale == 1:
            raise RecipeError(
                f"{name} changes nothing where guidance_scale is 1: images are not moved away then",
                setting=name,
            )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The image, and its class or the words or tokens of its caption where such are known."""
        example = chat.encode_input(row, index)
        if self.reads_texts:
            return replace(example, target=_tokens(_caption(row), chat))
        if self.labels:
            return replace(example, target=class_target(row, self.labels))
        if self.words:
            return replace(example, target=words_target(_caption(row), self.words))
        return example

    def length_problem(self, example: Example, context: int) -> RowRefused | None:
        """Why a caption has no room in the text encoder, which reads ``context`` tokens."""
        if not self.reads_texts or len(_target_of(example)) <= context:
            return None
        tokens = len(_target_of(example))
        return RowRefused(
            "row.too_long",
            f"the caption has {tokens} tokens, and the text encoder of the base model reads {context}.",
            "Shorten the caption, or choose `data.long_rows=drop` or `data.long_rows=truncate`.",
        )

    def truncate(self, example: Example, context: int) -> Example:
        """``example`` with the end of its caption cut off; the token that ends a text stays."""
        ids_T = _target_of(example)
        if not self.reads_texts or len(ids_T) <= context:
            return example
        return replace(example, target=np.append(ids_T[: context - 1], ids_T[-1]))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Noise and step of each row: new in training, and else of the image alone."""
        import torch

        denoiser: Denoiser = network.model
        seed = draw_seed() if network.model.training else None
        found = []
        for batch in super().annotate(network, examples, budget):
            rows = batch.tree.examples
            latents = denoiser.encode_images(batch.plan)
            size = latents.shape[1:]
            targets = [_target_of(each) for each in rows]
            generators = row_generators(rows, seed)
            noise = draw_noise(generators, size.numel()).unflatten(-1, size)
            if seed is not None:
                times = [int(each.integers(self.num_train_timesteps)) for each in generators]
                if self._is_conditional:
                    nothing = self._nothing(network)
                    targets = [
                        target if each.random() >= self.condition_dropout else nothing
                        for target, each in zip(targets, generators, strict=True)
                    ]
            else:
                times = [self._fixed_time(each) for each in rows]
            time_R = torch.tensor(times)
            drawn = NoisyImages(
                latents.float(),
                noise.to(network.device),
                time_R.to(network.device),
                denoiser.encode_conditions(targets) if self._is_conditional else None,
            )
            found.append(replace(batch, extra=drawn))
        return found

    def _fixed_time(self, example: Example) -> int:
        """A step, the same whenever the image is read."""
        random = np.random.default_rng([int(example.ids_T[0]), 1])
        return int(random.integers(self.num_train_timesteps))

    @property
    def _is_conditional(self) -> bool:
        """Whether the network is told what an image shows."""
        return self.reads_texts or bool(self._names)

    def _nothing(self, network: Network) -> IntArray:
        """What stands for an image of which nothing is said."""
        if not self.reads_texts:
            return np.zeros(0, dtype=np.int64)
        return _tokens("", chat_of(network))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed over the rows: the mean squared error of the prediction for each."""
        drawn = extra_of(batch, NoisyImages)
        denoiser: Denoiser = network.model
        schedule = self.schedule
        noisy = schedule.add_noise(drawn.latents, drawn.noise, drawn.time_R)
        predicted = denoiser.denoise(noisy.to(network.dtype), drawn.time_R, drawn.condition).float()
        target = schedule.target(drawn.latents, drawn.noise, drawn.time_R)
        error_R = (predicted - target).square().flatten(1).mean(1)
        usual: LossWeighting = "none" if self.reads_texts else "snr_plus_one"
        weighting = self.loss_weighting or usual
        weight_R = schedule.weights(drawn.time_R, weighting, self.snr_gamma)
        return Loss.of_rows(error_R * weight_R, {})

    def in_few_steps(self) -> Self:
        """Return this objective with at most :data:`FEW_STEPS` steps from noise to an image."""
        steps = min(FEW_STEPS, self.num_train_timesteps)
        return self.with_sampling(DenoisingSettings(steps=steps))

    def with_sampling(self, settings: DenoisingSettings) -> Self:
        """This objective with what is asked for in the place of its own ``settings``."""
        asked = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "eta": settings.eta,
            "negative_prompt": settings.negative_prompt,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        if settings.steps is not None and settings.steps > self.num_train_timesteps:
            raise RecipeError(
                f"steps: the model knows {self.num_train_timesteps:,} steps from noise to an image, "
                f"and {settings.steps:,} are more",
                setting="steps",
            )
        try:
            found = self.model_validate(self.model_dump() | given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RecipeError(f"{name} {describe_constraint(first)}", setting=name) from error
        if settings.negative_prompt:
            found._check_negative_prompt("negative_prompt")
        return found

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """New images ``[R, C, H, W]`` of classes or prompts, each from noise of its own."""
        import torch

        most = torch.iinfo(torch.int64).max
        seeds = [int(torch.randint(most, (1,), generator=generator)) for _ in labels]
        # A generator for each: what is drawn for a row else depends on how many there are.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        denoiser: Denoiser = network.model
        reads = network.chat.media if network.chat is not None else None
        image = reads.shape if reads is not None else input_shape(network.model.config)
        size = denoiser.latent_shape(image)

        def draw() -> Tensor:
            drawn = torch.stack([torch.randn(size, generator=each) for each in generators])
            return drawn.to(network.device)

        return self.denoise(network, draw(), labels, draw)

    def denoise(
        self,
        network: Network,
        mixture: Tensor,
        labels: Sequence[str],
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """Images ``[R, C, H, W]`` of noise ``mixture``; ``draw`` gives new noise where ``eta`` asks.

        ``labels`` are classes or prompts, one for each.
        """
        import torch

        denoiser: Denoiser = network.model
        guidance = self._guidance(network, labels)
        schedule, eta = self.schedule, self._eta
        times = schedule.times(min(self.num_inference_steps, self.num_train_timesteps))
        for time, before in zip(times, [*times[1:], -1], strict=True):
            time_R = torch.full((len(mixture),), time, device=network.device)
            predicted = self._predict(network, mixture, time_R, guidance)
            latents = schedule.image(mixture, predicted, time_R)
            if denoiser.latent_bound is not None:
                latents = latents.clamp(-denoiser.latent_bound, denoiser.latent_bound)
            drawn = draw() if eta else None
            mixture = schedule.step_back(latents, mixture, time, before, eta, drawn)
        return denoiser.decode_latents(mixture.to(network.dtype))

    def label_of(self, example: Example, chat: ChatFormat) -> str:
        """The class of a row, its caption, or the words of that which are known."""
        if self.reads_texts:
            return _text_that_fits(_target_of(example), chat)
        if self.labels or example.target is None or not self.words:
            return super().label_of(example, chat)
        return " ".join(self.words[place] for place in example.target)

    @property
    def _eta(self) -> float:
        """Share of new noise: a pipeline is used without, as DDIM is."""
        return self.eta if self.eta is not None else float(not self.reads_texts)

    @property
    def _scale(self) -> float:
        """How far images are moved away from those of nothing."""
        usual = 7.5 if self.reads_texts else 2.0
        return self.guidance_scale if self.guidance_scale is not None else usual

    def _guidance(self, network: Network, labels: Sequence[str]) -> Guidance:
        """What the network is told for ``labels``, and for none of them."""
        denoiser: Denoiser = network.model
        if not self._is_conditional:
            return Guidance(None, None)
        condition = denoiser.encode_conditions([self._target(text, network) for text in labels])
        if self._scale == 1:
            return Guidance(condition, None)
        nothing = self._nothing(network)
        if self.negative_prompt:
            nothing = self._target(self.negative_prompt, network, "negative_prompt")
        return Guidance(condition, denoiser.encode_conditions([nothing] * len(labels)))

    def _target(self, text: str, network: Network, name: str = "prompt") -> IntArray:
        """The places of what is asked for, a class or the words of a prompt, or the prompt's tokens.

        ``name`` is what the text is called where it is refused.
        """
        if self.reads_texts:
            return _check_length(text, chat_of(network), name)
        if self.labels:
            return np.array([self.labels.index(text)])
        return words_target(text, self.words or ())

    def _predict(
        self, network: Network, mixture: Tensor, time_R: Tensor, guidance: Guidance
    ) -> Tensor:
        """Prediction for mixtures, moved away from that without the classes or words."""
        import torch

        denoiser: Denoiser = network.model
        noisy = mixture.to(network.dtype)
        if guidance.condition is None or guidance.nothing is None:
            return denoiser.denoise(noisy, time_R, guidance.condition).float()
        both = torch.cat([guidance.condition, guidance.nothing])
        predicted = denoiser.denoise(torch.cat([noisy, noisy]), time_R.repeat(2), both)
        conditional, unconditional = predicted.float().chunk(2)
        return torch.lerp(unconditional, conditional, self._scale)


def _caption(row: Row) -> str:
    """What a row says that its image shows."""
    if isinstance(row, CaptionedImage):
        return row.caption
    if isinstance(row, LabelledImage):
        return row.label if isinstance(row.label, str) else ", ".join(row.label)
    return ""


def _tokens(text: str, chat: ChatFormat) -> IntArray:
    """``[T]``: the tokens of a text between those that begin and end it, filled up to the longest."""
    found = chat.tokenizer(text, padding="max_length", truncation=False).input_ids
    return np.array(found, dtype=np.int64)


def _text_that_fits(ids_T: IntArray, chat: ChatFormat) -> str:
    """The text of tokens, cut until it has no more than the longest one when it is read again.

    What ends inside a word, as truncated captions do, may be read in more tokens than it was.
    """
    text = str(chat.tokenizer.decode(ids_T, skip_special_tokens=True))
    while len(_tokens(text, chat)) > chat.tokenizer.model_max_length:
        text = text[:-1]
    return text


def _check_length(text: str, chat: ChatFormat, name: str) -> IntArray:
    """The tokens of ``text``, called ``name``; refused where they are more than are read."""
    ids_T, most = _tokens(text, chat), chat.tokenizer.model_max_length
    if len(ids_T) > most:
        raise RecipeError(
            f"the {name.replace('_', ' ')} has {len(ids_T)} tokens, and the text encoder reads {most}",
            setting=name,
        )
    return ids_T


def _target_of(example: Example) -> IntArray:
    """What the example says that its image shows."""
    return np.asarray(example.target, dtype=np.int64)
