"""Denoising diffusion of images (Ho et al. 2020, arXiv:2006.11239).

Each image is mixed with noise of a random step ``t``. From the mixture and ``t``, the network
predicts the image or, as in the paper, the noise. The loss of an image is the mean squared error of
the prediction, weighted by the signal-to-noise ratio after ``t`` up to a bound (Hang et al. 2023,
arXiv:2303.09556), or by the ratio plus one (the loss of v in Salimans and Ho 2022,
arXiv:2202.00512). The paper's simple loss is ``epsilon`` without weights. A small network predicts
images instead of noise, because noise would have to pass through the network unchanged (Li and He
2025, arXiv:2511.13720). New images start as noise and are denoised in fewer steps
(:mod:`luthier.media.objectives.noise_schedule`).

Conditions are the classes of labeled rows or the words of captions, dropped for a share of the rows
of each step. The network thus learns both conditional and unconditional images, and classifier-free
guidance (Ho and Salimans 2022, arXiv:2207.12598) amplifies the difference. ``guidance_scale`` is
the scale of Imagen and diffusers: 1 plus the paper's ``w``. With a ``negative_prompt``, images move
away from that text instead, as in diffusers.

The network (:class:`Denoiser`) encodes images and captions. A
diffusers pipeline works on latents (latent diffusion, Rombach et al. 2022, arXiv:2112.10752) and
encodes whole captions. Noise and sampling steps of a pipeline follow its training.

Not implemented: the moving average of weights (the decaying learning rate has the same effect in a
short run), learned variances, word order of captions without a text encoder, offset noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

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
from luthier.media.objectives.generative import Generative, check_pixel_range, draw_noise
from luthier.media.objectives.noise_schedule import (
    BetaSchedule,
    LossWeighting,
    NoiseSchedule,
    PredictionType,
    TimestepSpacing,
    alphas_cumprod,
)
from luthier.media.tasks import DENOISING
from luthier.models.formats.pipelines import noise_settings
from luthier.models.networks.heads import Head
from luthier.models.networks.modalities import input_shape
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import RunModels, TrainingDefaults, chat_of, extra_of
from luthier.tasks import Task
from luthier.types import Example, IntArray, Loss, Row
from luthier.validation import describe_constraint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.modalities import Shape
    from luthier.models.networks.network import Network, TreeBatch


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


@dataclass(frozen=True)
class NoisyImages:
    """Random numbers of a micro-batch."""

    latents: Tensor
    """Latents of the images, ``[R, C, H, W]``."""
    noise: Tensor
    """Standard normal noise, ``[R, C, H, W]``."""
    time_R: Tensor
    """Noise step of each row, from 0."""
    condition: Tensor | None
    """Condition of each row, ``[R, …]``; dropped conditions are encoded as the empty condition."""


@dataclass(frozen=True)
class Guidance:
    """Conditions for new images."""

    condition: Tensor | None
    nothing: Tensor | None
    """The condition that images move away from: the empty condition or the negative prompt."""


FEW_STEPS = 20
"""Sampling steps for images that are only compared or shown during training."""


@dataclass(frozen=True)
class DenoisingSettings:
    """Sampling settings of one request; ``None`` keeps the model's setting."""

    steps: int | None = None
    """Sampling steps from noise to an image."""
    guidance_scale: float | None = None
    """Strength of the class or prompt; 1 is the strength in the training rows."""
    eta: float | None = None
    """Share of new noise in each step."""
    negative_prompt: str | None = None
    """Prompt that images move away from."""


class Diffusion(Generative):
    """Denoising diffusion: a network learns to remove noise, and new images start as noise.

    Use ``gan`` or ``vae`` for fast sampling; ``vae`` also reconstructs images and detects
    anomalies.
    """

    method: Literal["diffusion"] = "diffusion"
    prediction_type: PredictionType = "sample"
    """Target of the network for a noisy image: the image, the noise (epsilon), or v of both."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """Growth of noise: squaredcos_cap_v2 (cosine) for small images; linear as in the first paper."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """Variance that the first step adds; unused with squaredcos_cap_v2."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Variance that the last step adds; unused with squaredcos_cap_v2."""
    num_train_timesteps: int = Field(default=1000, ge=2, le=10_000)
    """Steps from an image to noise."""
    loss_weighting: LossWeighting | None = None
    """Weight of an error by signal-to-noise ratio. Default: snr_plus_one; none for pipelines."""
    snr_gamma: float = Field(default=5.0, gt=0, le=1e6)
    """Upper bound of the loss weights."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of rows per step whose class or caption is dropped, for classifier-free guidance."""
    num_inference_steps: int = Field(default=50, ge=1, le=10_000)
    """Default number of sampling steps from noise to a new image."""
    guidance_scale: float | None = Field(default=None, ge=0, le=1e3)
    """Strength of the class or prompt; 1 as in the rows. Default: 2; 7.5 for pipelines."""
    eta: float | None = Field(default=None, ge=0, le=1)
    """Share of new noise in each step: 0 is DDIM, 1 is DDPM. Default: 1; 0 for pipelines."""
    negative_prompt: str = ""
    """Prompt that new images move away from, for models of captions; unconditional images if empty."""
    timestep_spacing: TimestepSpacing = "trailing"
    """Selection of sampling steps: trailing (starts at pure noise), or as in the base's files."""
    steps_offset: int = Field(default=0, ge=0, le=1)
    """Offset of the sampling steps with leading spacing."""
    set_alpha_to_one: bool = True
    """True if sampling ends at the clean image instead of the image after the first noise step."""
    labels: tuple[str, ...] | None = None
    """Classes in the order of the network. Default: from the training rows."""
    words: tuple[str, ...] | None = None
    """Words of captions in the order of the network. Default: from the training rows."""
    reads_texts: bool = False
    """True if the base model has a text encoder for whole captions. Default: from the base model."""

    task: ClassVar[Task] = DENOISING
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
        min_steps=1_000,  # one random noise level per row makes each step uninformative
    )

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """Classes that :meth:`sample` accepts."""
        return self.labels or ()

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the settings."""
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
        """Return the head, with the classes or words as labels."""
        return Head(self.task.head, self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        """Classes, or else words."""
        return self.labels or self.words or ()

    @property
    def reads_prompts(self) -> bool:
        """True if :meth:`sample` accepts prompts, because the training rows had captions."""
        return self.reads_texts or (bool(self.words) and not self.labels)

    def check_prompt(self, prompt: str) -> None:
        """Reject a prompt without a known word."""
        if not self.reads_texts and not len(words_target(prompt, self.words or ())):
            raise RecipeError(
                f"no training caption has a word of {prompt[:64]!r}. Use known words",
                setting="prompt",
            )

    def bind(self, models: RunModels) -> Self:
        """Check the range of pixels, and adopt the noise settings of a pipeline."""
        bound = super().bind(models)
        check_pixel_range(models.chat, self.method)  # noise of deviation 1 is added to the pixels
        folder = models.network
        if folder is None or not folder.is_pipeline:
            return bound
        noise = noise_settings(folder.fields)
        for name, value in noise.items():
            # A stored recipe has values for all fields.
            if getattr(self, name) not in (value, type(self).model_fields[name].default):
                raise RecipeError(
                    f"the base model was trained with {name}={value}. Omit `objective.{name}`",
                    setting=f"objective.{name}",
                )
        try:
            return self.model_validate(self.model_dump() | noise | {"reads_texts": True})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RecipeError(
                f"unknown value {name}={noise.get(name)} in the scheduler of {folder.path}: "
                f"{describe_constraint(first)}",
                rule="scheduler.invalid",
            ) from error

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the classes, or else the words, of the rows.

        If the base model has a text encoder, labels count as captions.
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
        """Reject a negative prompt without effect; ``name`` is the setting for the error message."""
        if not self.reads_prompts:
            raise RecipeError(
                f"{name} needs a model that was trained with captions",
                setting=name,
            )
        if not self.reads_texts and not len(words_target(self.negative_prompt, self.words or ())):
            raise RecipeError(
                f"{name}: no training caption has a word of {self.negative_prompt[:64]!r}",
                setting=name,
            )
        if self._scale == 1:
            raise RecipeError(
                f"{name} has no effect with guidance_scale 1. Use a larger guidance_scale",
                setting=name,
            )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Encode the image, with the class or the words or tokens of the caption as target."""
        example = chat.encode_input(row, index)
        if self.reads_texts:
            return replace(example, target=_tokens(_caption(row), chat))
        if self.labels:
            return replace(example, target=class_target(row, self.labels))
        if self.words:
            return replace(example, target=words_target(_caption(row), self.words))
        return example

    def length_problem(self, example: Example, context: int) -> RowRefused | None:
        """Return a problem if the caption exceeds ``context``, the token limit of the text encoder."""
        if not self.reads_texts or len(_condition_of(example)) <= context:
            return None
        tokens = len(_condition_of(example))
        return RowRefused(
            "row.too_long",
            f"the caption has {tokens} tokens, and the limit of the text encoder is {context}.",
            "Shorten the caption, or choose `data.long_rows=drop` or `data.long_rows=truncate`.",
        )

    def truncate(self, example: Example, context: int) -> Example:
        """Cut the caption to ``context`` tokens and keep the end token."""
        ids_T = _condition_of(example)
        if not self.reads_texts or len(ids_T) <= context:
            return example
        return replace(example, target=np.append(ids_T[: context - 1], ids_T[-1]))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Draw noise and step of each row: random in training, otherwise derived from the image."""
        import torch

        denoiser: Denoiser = network.model
        seed = draw_seed() if network.model.training else None
        annotated = []
        for batch in super().annotate(network, examples, budget):
            rows = batch.tree.examples
            latents = denoiser.encode_images(batch.plan)
            size = latents.shape[1:]
            targets = [_condition_of(each) for each in rows]
            generators = row_generators(rows, seed)
            noise = draw_noise(generators, size.numel()).unflatten(-1, size)
            if seed is not None:
                times = [int(each.integers(self.num_train_timesteps)) for each in generators]
                if self._is_conditional:
                    empty = self._empty_condition(network)
                    targets = [
                        target if each.random() >= self.condition_dropout else empty
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
            annotated.append(replace(batch, extra=drawn))
        return annotated

    def _fixed_time(self, example: Example) -> int:
        """Return a step that is fixed per image."""
        random = np.random.default_rng([int(example.ids_T[0]), 1])
        return int(random.integers(self.num_train_timesteps))

    @property
    def _is_conditional(self) -> bool:
        """True if the network receives conditions."""
        return self.reads_texts or bool(self._names)

    def _empty_condition(self, network: Network) -> IntArray:
        """Return the empty condition."""
        if not self.reads_texts:
            return np.zeros(0, dtype=np.int64)
        return _tokens("", chat_of(network))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the sum over rows of the mean squared error of each prediction."""
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
        return Loss.from_rows(error_R * weight_R, {})

    def in_few_steps(self) -> Self:
        """Return this objective with at most :data:`FEW_STEPS` steps from noise to an image."""
        steps = min(FEW_STEPS, self.num_train_timesteps)
        return self.with_sampling(DenoisingSettings(steps=steps))

    def with_sampling(self, settings: DenoisingSettings) -> Self:
        """Return this objective with the given sampling ``settings``."""
        fields = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "eta": settings.eta,
            "negative_prompt": settings.negative_prompt,
        }
        changes = {name: value for name, value in fields.items() if value is not None}
        if settings.steps is not None and settings.steps > self.num_train_timesteps:
            raise RecipeError(
                f"steps must be at most {self.num_train_timesteps:,}, not {settings.steps:,}",
                setting="steps",
            )
        try:
            changed = self.model_validate(self.model_dump() | changes)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RecipeError(f"{name} {describe_constraint(first)}", setting=name) from error
        if settings.negative_prompt:
            changed._check_negative_prompt("negative_prompt")
        return changed

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """Generate images ``[R, C, H, W]`` of classes or prompts, with independent noise for each."""
        import torch

        most = torch.iinfo(torch.int64).max
        seeds = [int(torch.randint(most, (1,), generator=generator)) for _ in labels]
        # One generator per row makes the noise of a row independent of the batch size.
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
        """Denoise ``mixture`` to images ``[R, C, H, W]``.

        Args:
            network: the network.
            mixture: noise, ``[R, C, H, W]`` in the shape of latents.
            labels: a class or prompt for each row.
            draw: returns new noise, called if ``eta`` is above 0.
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
        """Return the class of a row, the caption, or the known words of the caption."""
        if self.reads_texts:
            return _fitting_text(_condition_of(example), chat)
        if self.labels or example.target is None or not self.words:
            return super().label_of(example, chat)
        return " ".join(self.words[place] for place in example.target)

    @property
    def _eta(self) -> float:
        """Share of new noise; 0 by default for a pipeline, as in DDIM."""
        return self.eta if self.eta is not None else float(not self.reads_texts)

    @property
    def _scale(self) -> float:
        """Strength of the guidance."""
        usual = 7.5 if self.reads_texts else 2.0
        return self.guidance_scale if self.guidance_scale is not None else usual

    def _guidance(self, network: Network, labels: Sequence[str]) -> Guidance:
        """Return the conditions of ``labels``, and the conditions to move away from."""
        denoiser: Denoiser = network.model
        if not self._is_conditional:
            return Guidance(None, None)
        condition = denoiser.encode_conditions([self._target(text, network) for text in labels])
        if self._scale == 1:
            return Guidance(condition, None)
        unconditional = self._empty_condition(network)
        if self.negative_prompt:
            unconditional = self._target(self.negative_prompt, network, "negative_prompt")
        return Guidance(condition, denoiser.encode_conditions([unconditional] * len(labels)))

    def _target(self, text: str, network: Network, name: str = "prompt") -> IntArray:
        """Return the positions of a class or words, or the tokens of a prompt; ``name`` is for
        error messages."""
        if self.reads_texts:
            return _check_length(text, chat_of(network), name)
        if self.labels:
            return np.array([self.labels.index(text)])
        return words_target(text, self.words or ())

    def _predict(
        self, network: Network, mixture: Tensor, time_R: Tensor, guidance: Guidance
    ) -> Tensor:
        """Return the guided prediction for mixtures."""
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
    """Return the caption of a row, or the labels as a caption."""
    if isinstance(row, CaptionedImage):
        return row.caption
    if isinstance(row, LabelledImage):
        return row.label if isinstance(row.label, str) else ", ".join(row.label)
    return ""


def _tokens(text: str, chat: ChatFormat) -> IntArray:
    """Return the tokens ``[T]`` of a text with start and end tokens, padded to the maximum length."""
    ids = chat.tokenizer(text, padding="max_length", truncation=False).input_ids
    return np.array(ids, dtype=np.int64)


def _fitting_text(ids_T: IntArray, chat: ChatFormat) -> str:
    """Return the text of tokens, shortened until re-encoding fits the maximum length.

    A text that ends inside a word, such as a truncated caption, may have more tokens after
    re-encoding.
    """
    text = str(chat.tokenizer.decode(ids_T, skip_special_tokens=True))
    while len(_tokens(text, chat)) > chat.tokenizer.model_max_length:
        text = text[:-1]
    return text


def _check_length(text: str, chat: ChatFormat, name: str) -> IntArray:
    """Return the tokens of ``text``; raises :class:`RecipeError` naming ``name`` for too many
    tokens."""
    ids_T, most = _tokens(text, chat), chat.tokenizer.model_max_length
    if len(ids_T) > most:
        raise RecipeError(
            f"{name} has {len(ids_T)} tokens, and the limit of the text encoder is {most}",
            setting=name,
        )
    return ids_T


def _condition_of(example: Example) -> IntArray:
    """Return the condition of an example."""
    return np.asarray(example.target, dtype=np.int64)
