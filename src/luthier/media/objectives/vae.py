"""Variational autoencoders of images and time series (Kingma and Welling 2014, arXiv:1312.6114).

The encoder maps an input ``x`` to a normal distribution over a few latent numbers ``z``, and the
decoder maps a sample of ``z`` back. The loss is the negative evidence lower bound in nats:

    -log N(x; decode(z), sigma^2)  +  beta KL(N(mean, variance) || N(0, 1))

without the constant ``D log(sigma sqrt(2 pi))``, so 0 is a perfect copy. ``beta`` above 1 gives
latents with separate meanings, at the price of worse copies (Higgins et al. 2017). ``beta`` grows
from 0 over the first part of a run, because latents may otherwise stay unused (Bowman et al. 2016,
arXiv:1511.06349, section 3.1).

Inputs unlike the training rows have bad copies and distant latents: the anomaly score is the
negative bound at the mean of the latents. The threshold is the smallest score that at most a share
of ``false_alarms`` of the held-out images, or of all windows of a time series, exceeds, fixed after
training. Windows with too few values are not scored. Values with the label of a fault are left out
of training.
The base ``z-score`` has no latents: the score is the network's, and the usual threshold is 3 unless
``false_alarms`` is set.

With ``likelihood = "bernoulli"``, the decoder gives the logit of each pixel, and the first term is the
binary cross-entropy less its smallest value, so 0 is a perfect copy here too. This likelihood is for
pixels near black and white, such as digits (appendix C.1 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from luthier.data.conversations.chat import ChatFormat
from luthier.data.disk_sequence import concatenate, spool
from luthier.data.shapes.media import BareWindow, LabelledWindow
from luthier.errors import RecipeError, RowRefused
from luthier.evaluation.thresholds import choose_threshold
from luthier.media.objectives.generative import Generative, draw_latents, draw_noise
from luthier.media.processors import ImageProcessor, WindowProcessor
from luthier.media.tasks import AUTOENCODING, Z_THRESHOLD
from luthier.models.networks.modalities import input_shape
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import (
    Finished,
    TrainingDefaults,
    chat_of,
    extra_of,
    rows_to_finish,
)
from luthier.objectives.means import loss_metrics
from luthier.tasks import Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.models.networks.network import Network, TreeBatch

ACTIVE = 0.01
"""Smallest variance of a latent's mean over the rows that counts as active (Burda et al. 2016)."""


LATENT_BYTES = 4
"""Size of a latent number in float32, in bytes."""


@dataclass(frozen=True)
class Compression:
    """Sizes of an input and of its latents."""

    numbers: int
    """Numbers in an input, after the processor."""
    latent_numbers: int
    """Numbers in the latents of an input."""
    bytes_each: int
    """Bytes per number of the input: 1 for a pixel channel, 4 for a value of a time series."""

    @property
    def ratio(self) -> float:
        """Input numbers per latent number."""
        return self.numbers / self.latent_numbers

    @property
    def bytes_ratio(self) -> float:
        """Input bytes per byte of latents."""
        return self.ratio * self.bytes_each / LATENT_BYTES

    def __str__(self) -> str:
        """Return, for example, ``3,072 numbers, compressed to 32: 96 : 1 (24 : 1 in bytes)``."""
        return (
            f"{self.numbers:,} numbers, compressed to {self.latent_numbers:,}: "
            f"{self.ratio:.3g} : 1 ({self.bytes_ratio:.3g} : 1 in bytes)"
        )


@dataclass(frozen=True)
class Draw:
    """Noise of a micro-batch, and the weight of the divergence in the current step."""

    noise_RZ: Tensor
    beta: float


class VAE(Generative):
    """Variational autoencoder: samples images, reconstructs images, and scores anomalies.

    Use ``gan`` for sharper images, or ``diffusion`` for the best images and for captions.
    """

    method: Literal["vae"] = "vae"
    beta: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the divergence of latents; above 1, fewer latents with clearer meanings."""
    kl_warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which beta grows from 0."""
    sigma: float = Field(default=1.0, gt=0, le=1e3)
    """Deviation of the input around its copy; smaller gives sharper copies. Time series: 0.3."""
    likelihood: Literal["normal", "bernoulli"] = "normal"
    """``bernoulli``: binary cross-entropy, for images near black and white such as digits."""
    score_over: Literal["all", "last"] | None = None
    """Scored part of a row: all values, or the last. Default: last for time series, otherwise all."""
    false_alarms: float = Field(default=0.01, ge=0, lt=1)
    """Largest share of ordinary rows that may count as anomalous."""
    threshold: float | None = None
    """Score above which a row is anomalous. Default: from held-out rows after training."""
    columns: tuple[str, ...] | None = None
    """Columns of a series, in the order of the input. Default: from the training rows."""

    task: ClassVar[Task] = AUTOENCODING
    shapes: ClassVar[frozenset[str]] = frozenset({"labelled_window", "window"})
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"labelled_window"})
    further_shapes: ClassVar[frozenset[str]] = frozenset(
        {"captioned_image", "image", "labelled_image"}
    )
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        min_epochs=3,
        max_epochs=20,
        bases={"image": "small-vae", "window": "small-window-vae", "columns": "small-sensor-vae"},
        min_steps=1_000,  # training starts from random weights
    )

    @property
    def decision_threshold(self) -> float | None:
        """See :attr:`Objective.decision_threshold`."""
        return self.threshold

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return rows without labels, captions and faults."""
        faults = (row for row in rows if isinstance(row, LabelledWindow) and row.is_fault)
        skipped = {(row.file, row.line) for row in faults}
        return spool(row.bare() for row in rows if (row.file, row.line) not in skipped)

    def regroup_scored(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return all rows: faults are scored."""
        return rows

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Choose settings for the rows: windows of a time series have few values, of deviation 1."""
        windows = all(isinstance(row, BareWindow) for row in rows)
        if windows and self.likelihood == "bernoulli":
            raise RecipeError(
                "`objective.likelihood=bernoulli` is for images, whose values are from 0 to 1. Remove "
                "the setting",
                setting="objective.likelihood",
            )
        chosen: dict[str, Any] = {} if self.score_over else {"score_over": "all"}
        if windows:
            usual = {"score_over": "last", "sigma": 0.3}
            chosen = {name: usual[name] for name in usual.keys() - self.model_fields_set}
            names = next((row.media.names for row in rows if isinstance(row, BareWindow)), ())
            chosen["columns"] = self.columns or names or None
        return self.model_copy(update=chosen)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Encode the image or window.

        Raises:
            RowRefused: for a series with more columns than the network, or without a column of the
                training rows.
        """
        if isinstance(row, BareWindow) and self.columns:
            row = replace(row, media=row.media.select(self.columns))
        if isinstance(row, BareWindow) and isinstance(chat.media, WindowProcessor):
            count, most = row.media.columns, chat.media.columns
            if count > most:
                raise RowRefused(
                    "window.columns",
                    f"the series has {count:,} columns, and the base model reads {most:,}.",
                    "Use `--base small-sensor-vae` or `--base z-score`, or choose a column with "
                    "`data.columns.value`.",
                )
        return chat.encode_input(row, index)

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Draw the noise of each row: random in training, otherwise derived from the input."""
        size, annotated = int(network.model.config.latent_size), []
        seed = draw_seed() if network.model.training else None
        for batch in super().annotate(network, examples, budget):
            noise_RZ = draw_noise(row_generators(batch.tree.examples, seed), size)
            drawn = Draw(
                noise_RZ.to(network.device), self._beta_after(network.done, seed is not None)
            )
            annotated.append(replace(batch, extra=drawn))
        return annotated

    def _beta_after(self, done: float, training: bool) -> float:
        """Return the weight of the divergence after the share ``done`` of a run."""
        share = min(1.0, done / self.kl_warmup) if training and self.kl_warmup else 1.0
        return self.beta * share

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed negative evidence lower bound, with one sample per row."""
        if network.is_stepless:
            return Loss.from_rows(self._scores(network, batch), {})
        mean_RZ, log_variance_RZ = (each.float() for each in network.model.encode(batch.plan))
        drawn = extra_of(batch, Draw)
        latent_RZ = mean_RZ + (0.5 * log_variance_RZ).exp() * drawn.noise_RZ
        copy_R = self._copy_error(network, batch, latent_RZ)
        kl_R = divergence(mean_RZ, log_variance_RZ)
        metrics = {"reconstruction": float(copy_R.detach().sum()), "kl": float(kl_R.detach().sum())}
        return Loss.from_rows(copy_R + drawn.beta * kl_R, metrics, states=mean_RZ.detach())

    def _copy_error(self, network: Network, batch: TreeBatch, latent_RZ: Tensor) -> Tensor:
        """Return the reconstruction errors ``[R]`` in nats."""
        copies = network.model.decode(latent_RZ.to(network.dtype)).float()
        if self.likelihood == "bernoulli":
            from torch.nn import functional as F

            mean, spread = _pixel_scale(network)
            pixels = (batch.plan.float() * spread + mean).clamp(0, 1)
            cost = F.binary_cross_entropy_with_logits(copies, pixels, reduction="none")
            least = F.binary_cross_entropy(pixels, pixels, reduction="none")
            total: Tensor = (cost - least).flatten(1).sum(-1)
            return total
        off: Tensor = (copies - batch.plan.float()).square().flatten(1).sum(-1)
        return off / (2 * self.sigma**2)

    def decode(self, network: Network, latent_RZ: Tensor) -> Tensor:
        """Return the images ``[R, C, H, W]`` of latents, in the scale of the inputs."""
        images: Tensor = network.model.decode(latent_RZ.to(network.device, network.dtype))
        if self.likelihood == "bernoulli":
            mean, spread = _pixel_scale(network)
            images = (images.float().sigmoid() - mean) / spread
        return images

    def codes(self, network: Network, batch: TreeBatch) -> list[list[float]]:
        """Return the mean of the latents of each row, in tree order."""
        codes: list[list[float]] = network.model.encode(batch.plan)[0].float().tolist()
        return codes

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return the loss, both parts of the loss, and the number of active latents."""
        import torch

        means: list[Tensor] = []

        def collect(loss: Loss) -> None:
            if loss.states is not None:
                means.append(loss.states)

        metrics = loss_metrics(self, network, examples, budget, collect)
        if means and len(examples) > 1:
            none = torch.zeros(0, int(network.model.config.latent_size), device=network.device)
            means_RZ = network.group.concatenate(torch.cat([none, *means]))
            metrics["active_units"] = int((means_RZ.var(0) > ACTIVE).sum())
        return metrics | self.distance_metrics(network, examples)

    def finish(
        self, network: Network, held: Sequence[Example], train: Sequence[Example], budget: int
    ) -> Finished:
        """Set the threshold so that at most :attr:`false_alarms` of the rows exceed it."""
        if self.threshold is not None:
            return Finished(self)
        if network.is_stepless and "false_alarms" not in self.model_fields_set:
            return Finished(self.model_copy(update={"threshold": Z_THRESHOLD}))
        wanted_rows = math.ceil(1 / self.false_alarms) if self.false_alarms else 1
        # The held-out windows of a series are neighbours, so a few hours would set the threshold.
        of_series = isinstance(chat_of(network).media, WindowProcessor)
        examples = (
            concatenate([held, train]) if of_series else rows_to_finish(held, train, wanted_rows)
        )
        whole = [example for example in examples if _is_whole(example)]
        batches = network.batches(whole or examples, budget)
        scores = [score for batch in batches for score in self._scores(network, batch).tolist()]
        threshold = choose_threshold(scores, self.false_alarms)
        done = self.model_copy(update={"threshold": threshold})
        return Finished(done, len(examples), wanted_rows)

    def _scores(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the anomaly scores ``[R]``: the negative bound, or the error of the last value
        alone."""
        if network.is_stepless:
            found_R: Tensor = network.model.anomaly_scores(network, batch)
            return found_R
        mean_RZ, log_variance_RZ = (each.float() for each in network.model.encode(batch.plan))
        if self.score_over == "last":
            copies = self.decode(network, mean_RZ).float()
            off_RCH = (copies - batch.plan.float())[..., -1]
            off_R: Tensor = off_RCH.square().flatten(1).sum(-1) / (2 * self.sigma**2)
            return off_R
        return self._copy_error(network, batch, mean_RZ) + divergence(mean_RZ, log_variance_RZ)

    def _column_errors(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the squared errors ``[R, C]`` of the columns, the parts of the score."""
        if network.is_stepless:
            found_RC: Tensor = network.model.column_errors(network, batch)
            return found_RC
        off_RCHL = self.reconstruct(network, batch).float() - batch.plan.float()
        if self.score_over == "last":
            off_RCHL = off_RCHL[..., -1:]
        error_RC: Tensor = off_RCHL.square().sum((2, 3))
        return error_RC

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return score and verdict of each row in the order of the tree.

        ``anomalous`` is ``None`` for a window with too few values. ``column`` is the column of a
        series of several columns with the largest part of the score.
        """
        scores = self._scores(network, batch).tolist()
        threshold = self.threshold
        if threshold is None:  # an untrained base model
            return [{"score": score} for score in scores]
        answers: list[dict[str, Any]] = [
            {"score": score, "anomalous": score > threshold if _is_whole(example) else None}
            for score, example in zip(scores, batch.tree.examples, strict=True)
        ]
        if self.columns:
            errors_RC = self._column_errors(network, batch)[:, : len(self.columns)]
            for answer, place in zip(answers, errors_RC.argmax(1).tolist(), strict=True):
                answer["column"] = self.columns[place]
        return answers

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """Generate images ``[R, C, H, W]`` from standard normal latents."""
        size = int(network.model.config.latent_size)
        return self.decode(network, draw_latents(len(labels), size, generator))

    def compression(self, network: Network) -> Compression:
        """Return the sizes of an input and of its latents."""
        channels, height, width = input_shape(network.model.config)
        channels = len(self.columns) if self.columns else channels  # the others are padding
        is_image = isinstance(chat_of(network).media, ImageProcessor)
        return Compression(
            channels * height * width, int(network.model.config.latent_size), 1 if is_image else 4
        )

    def describe_copies(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Return the compression, and the error of copies if ``examples`` are held out."""
        if network.is_stepless:
            return ""
        text = f"Each row has {self.compression(network)}"
        if examples:
            error = self.copy_error(network, examples, budget)
            text += f"; copies of held-out rows have a mean squared error of {error:.5f}"
        return text

    def copy_error(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the mean squared error of reconstructions; pixels are from 0 to 1."""
        import torch

        processor = chat_of(network).media
        # Pixels have a deviation per color channel, and are clipped at black and white.
        spread = torch.ones(1)
        low, high = torch.tensor(-math.inf), torch.tensor(math.inf)
        if isinstance(processor, ImageProcessor):
            mean = torch.tensor(processor.mean)[:, None, None]
            spread = torch.tensor(processor.std)[:, None, None]
            low, high = -mean / spread, (1 - mean) / spread
        errors: list[float] = []
        for batch in network.batches(examples, budget):
            pair = (self.reconstruct(network, batch), batch.plan)
            copies, rows = (each.float().cpu().clamp(low, high) * spread for each in pair)
            errors += (copies - rows).square().flatten(1).mean(1).tolist()
        return math.fsum(errors) / len(errors)

    def reconstruct(self, network: Network, batch: TreeBatch) -> Tensor:
        """Return the copies ``[R, C, H, W]`` of the rows at the means of the latents."""
        return self.decode(network, network.model.encode(batch.plan)[0])

    def interpolate(self, network: Network, batch: TreeBatch, steps: int) -> Tensor:
        """Return images ``[steps, C, H, W]`` on the line between the latents of two rows."""
        import torch

        mean_2Z = network.model.encode(batch.plan)[0]
        share_S1 = torch.linspace(0, 1, steps, device=mean_2Z.device, dtype=mean_2Z.dtype)[:, None]
        return self.decode(network, torch.lerp(mean_2Z[:1], mean_2Z[1:], share_S1))


def _pixel_scale(network: Network) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the colours in an input, ``[C, 1, 1]``."""
    import torch

    processor = chat_of(network).media
    assert isinstance(processor, ImageProcessor)
    mean, spread = (torch.tensor(each)[:, None, None] for each in (processor.mean, processor.std))
    return mean.to(network.device), spread.to(network.device)


def _is_whole(example: Example) -> bool:
    return example.media is None or example.media.is_whole


def divergence(mean_RZ: Tensor, log_variance_RZ: Tensor) -> Tensor:
    """Return ``KL(N(mean, variance) || N(0, 1))`` of each row, ``[R]`` in nats (appendix B of the
    paper)."""
    each_RZ = mean_RZ.square() + log_variance_RZ.exp() - 1 - log_variance_RZ
    return 0.5 * each_RZ.sum(-1)
