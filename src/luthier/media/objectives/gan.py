"""Generative adversarial networks of images (Goodfellow et al. 2014, arXiv:1406.2661).

Generator and discriminator learn in turns from each batch of rows. The networks follow DCGAN
(Radford et al. 2016, arXiv:1511.06434). With ``D`` the score of an image and ``G`` the image of
some noise, ``non_saturating`` has the losses

    discriminator  softplus(-D(x)) + softplus(D(G(z)))        generator  softplus(-D(G(z)))

with the discriminator's weights divided by their spectral norms (Miyato et al. 2018,
arXiv:1802.05957). ``wgan_gp`` (Gulrajani et al. 2017, arXiv:1704.00028) has the losses

    discriminator  D(G(z)) - D(x) + 10 (|grad D(between)| - 1)^2        generator  -D(G(z))

with ``between`` a random mixture of the real and the generated image. The discriminator of
``wgan_gp`` takes more steps than the generator (five in the paper, two here), on equal rows with
new noise. If rows have labels, both networks are conditional (:mod:`luthier.media.networks.dcgan`).

Neither loss measures the quality of images. The metric on held-out rows, which selects the stored
weights, is the sliced Wasserstein distance (Rabin et al. 2011) between the pixels of held-out and
generated images, along fixed directions. ``diversity`` is the spread of generated images within
classes relative to the spread of real images: near 0, the generator ignores the noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.conversations.chat import ChatFormat
from luthier.errors import RecipeError
from luthier.media.objectives.class_conditions import class_target, classes_of
from luthier.media.objectives.generative import MOST_COMPARED, Generative, draw_latents, draw_noise
from luthier.media.tasks import ADVERSARIAL
from luthier.models.networks.heads import Head
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import TrainingDefaults, extra_of
from luthier.objectives.means import Means
from luthier.tasks import Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from luthier.models.networks.network import Network, TreeBatch

PENALTY = 10.0
"""Weight of the gradient penalty (the paper's lambda)."""
DIRECTIONS = 256
"""Number of directions of the sliced Wasserstein distance."""


@dataclass(frozen=True)
class Game:
    """Random numbers of a micro-batch for all turns, or for one turn."""

    class_R: Tensor | None
    """Classes of the rows, if any."""
    latent_TRZ: Tensor
    """Noise of each turn; the generator's turn is the last."""
    between_TR: Tensor
    """Share of the real image in the mixture for the gradient penalty, per turn."""
    player: Literal["discriminator", "generator", "both"] = "both"
    """The network that learns in this turn; ``both`` to measure without gradients."""
    ends_turn: bool = False
    """True if the micro-batch is the last of this process in the turn."""


class GAN(Generative):
    """Generative adversarial network: a generator learns from a discriminator of real and new
    images.

    Use ``diffusion`` for better images, or ``vae`` for short runs, reconstruction and anomalies.
    """

    method: Literal["gan"] = "gan"
    loss_type: Literal["wgan_gp", "non_saturating"] = "wgan_gp"
    """Losses of both networks. non_saturating is faster, but collapsed on digits."""
    discriminator_steps: int | None = Field(default=None, ge=1, le=100)
    """Discriminator steps per generator step. Default: 2 with wgan_gp, otherwise 1."""
    spectral_norm: bool | None = None
    """Divide the discriminator's weights by their spectral norms. Default: not with wgan_gp."""
    labels: tuple[str, ...] | None = None
    """Classes in the order of the network. Default: from the training rows."""

    task: ClassVar[Task] = ADVERSARIAL
    further_shapes: ClassVar[frozenset[str]] = frozenset(
        {"captioned_image", "image", "labelled_image"}
    )
    same_each_epoch: ClassVar[bool] = False
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(
        learning_rate_multiplier=0.2,
        beta1=0.5,
        patience=0,
        min_epochs=10,
        max_epochs=100,
        bases={"image": "small-dcgan"},
        min_steps=3_000,  # two networks with random weights need many steps
    )

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """Classes that :meth:`sample` accepts."""
        return self.labels or ()

    @property
    def _turns(self) -> int:
        """Steps of the discriminator per step of the generator."""
        return self.discriminator_steps or (2 if self.loss_type == "wgan_gp" else 1)

    @property
    def _spectral(self) -> bool:
        return self.loss_type != "wgan_gp" if self.spectral_norm is None else self.spectral_norm

    def head(self) -> Head:
        """Return the head, with the classes as labels."""
        return Head(self.task.head, self.labels or ())

    def attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Reject an adaptation that trains only one player or wraps weights of the discriminator."""
        players: Any = model.players
        if not model.has_whole_weights:
            raise RecipeError(
                "the adaptation adds weights to the discriminator, and the spectral norm needs plain "
                "weights. Use full or bitfit",
                rule="adapter.network",
            )
        for name, modules in players.items():
            if not any(w.requires_grad for module in modules for w in module.parameters()):
                raise RecipeError(
                    f"the adaptation freezes the {name}, and both networks must learn. Use full or "
                    "bitfit",
                    rule="adapter.network",
                )
        return {}

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Collect the classes of the rows."""
        classes = classes_of(rows, "a gan")
        return self.model_copy(update={"labels": classes if self.labels is None else self.labels})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Encode the image, with the class as target."""
        example = chat.encode_input(row, index)
        if not self.labels:
            return example
        return replace(example, target=class_target(row, self.labels))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Draw noise for each turn: random in training, otherwise derived from the images."""
        import torch

        size, turns = int(network.model.config.latent_size), self._turns + 1
        seed = draw_seed() if network.model.training else None
        annotated = []
        for batch in super().annotate(network, examples, budget):
            rows = batch.tree.examples
            generators = row_generators(rows, seed)
            if seed is not None:
                noise_RZ = draw_noise(generators, turns * size)
                latent_TRZ = noise_RZ.unflatten(1, (turns, size)).transpose(0, 1)
                share_RT = np.stack([each.random(turns, np.float32) for each in generators])
                between_TR = torch.from_numpy(share_RT).t()
            else:
                latent_TRZ = draw_noise(generators, size).expand(turns, -1, -1)
                between_TR = torch.full((turns, len(rows)), 0.5)
            class_R = None
            if self.labels:
                targets = np.concatenate([np.asarray(row.target) for row in rows])
                class_R = torch.from_numpy(targets).to(network.device)
            latent_TRZ = latent_TRZ.to(network.device, network.dtype)
            between_TR = between_TR.to(network.device, network.dtype)
            annotated.append(replace(batch, extra=Game(class_R, latent_TRZ, between_TR)))
        return annotated

    def turns(self, batches: list[TreeBatch]) -> Iterator[list[TreeBatch]]:
        """Yield the batches of the discriminator's turns, then of the generator's turn."""
        for turn in range(self._turns + 1):
            player: Any = "generator" if turn == self._turns else "discriminator"
            yield [
                replace(
                    batch,
                    extra=replace(
                        game,
                        player=player,
                        latent_TRZ=game.latent_TRZ[turn : turn + 1],
                        between_TR=game.between_TR[turn : turn + 1],
                        ends_turn=number == len(batches),
                    ),
                )
                for number, batch in enumerate(batches, 1)
                for game in [extra_of(batch, Game)]
            ]

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss of the current player. Only that player gets gradients.

        Metrics are the loss of each player and the accuracy of the discriminator: the share of
        pairs in which the real image has the higher score.
        """
        game = extra_of(batch, Game)
        if game.player == "generator":
            own_loss = self._generator_loss(network, game)
        else:
            own_loss = self._discriminator_loss(network, batch, game)
        if game.player == "both":
            generator_loss = self._generator_loss(network, game)
            return Loss(
                own_loss.total + generator_loss.total,
                {**own_loss.metrics, **generator_loss.metrics},
            )
        if game.ends_turn and self._spectral:
            # Each process updates, so all processes have equal norms.
            network.model.iterate_norms()
        return own_loss

    def _generator_loss(self, network: Network, game: Game) -> Loss:
        from torch.nn import functional as F

        model = network.model
        with _frozen(model.players["discriminator"]):
            images = model.generate(game.latent_TRZ[-1], game.class_R)
            score_R = model.discriminate(images, game.class_R, self._spectral).float()
        loss_R = -score_R if self.loss_type == "wgan_gp" else F.softplus(-score_R)
        total: Tensor = loss_R.sum()
        return Loss(total, {"generator_loss": float(total.detach())})

    def _discriminator_loss(self, network: Network, batch: TreeBatch, game: Game) -> Loss:
        import torch
        from torch.nn import functional as F

        model = network.model
        with torch.no_grad():
            images = model.generate(game.latent_TRZ[0], game.class_R)
        class_2R = None if game.class_R is None else torch.cat([game.class_R] * 2)
        both_2R = model.discriminate(torch.cat([batch.plan, images]), class_2R, self._spectral)
        real_R, generated_R = both_2R.float().chunk(2)
        right = (real_R > generated_R).sum()  # scores of wgan_gp have no fixed threshold
        if self.loss_type == "wgan_gp":
            loss_R = generated_R - real_R
            if game.player == "discriminator":
                loss_R = loss_R + PENALTY * self._penalty(network, batch, game, images)
        else:
            loss_R = F.softplus(-real_R) + F.softplus(generated_R)
        total: Tensor = loss_R.sum()
        metrics = {
            "discriminator_loss": float(total.detach()),
            "discriminator_accuracy": float(right),
        }
        return Loss(total, metrics)

    def _penalty(self, network: Network, batch: TreeBatch, game: Game, images: Tensor) -> Tensor:
        """Return the gradient penalty ``[R]`` at mixtures of real and generated images."""
        import torch

        share_R111 = game.between_TR[0][:, None, None, None]
        between = torch.lerp(images, batch.plan, share_R111).requires_grad_(True)
        score_R = network.model.discriminate(between, game.class_R, self._spectral)
        (slope,) = torch.autograd.grad(score_R.sum(), between, create_graph=True)
        penalty_R: Tensor = (slope.float().flatten(1).norm(dim=1) - 1).square()
        return penalty_R

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return the distance of generated from held-out images as ``loss``, diversity, and
        players' losses."""
        import torch

        network.model.eval()
        batches = self.annotate(network, examples[:MOST_COMPARED], budget)
        real, generated, classes = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        means = Means()
        with torch.no_grad():
            for batch in batches:
                game = extra_of(batch, Game)
                means.add(self.loss(network, batch), batch.weight)
                real.append(batch.plan.float().flatten(1))
                images = network.model.generate(game.latent_TRZ[0], game.class_R)
                generated.append(images.float().flatten(1))
                none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
                classes.append(none if game.class_R is None else game.class_R)
        real_RD, generated_RD, class_R = torch.cat(real), torch.cat(generated), torch.cat(classes)
        spread = _spread(real_RD, class_R)
        return {
            **means.values(),
            "loss": sliced_distance(real_RD, generated_RD),
            "diversity": _spread(generated_RD, class_R) / spread if spread else 0.0,
            **self.distance_metrics(network, examples),
        }

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """Generate images ``[R, C, H, W]`` of the given classes."""
        import torch

        size = int(network.model.config.latent_size)
        latent_RZ = draw_latents(len(labels), size, generator)
        class_R = None
        if self.labels:
            indices = [self.labels.index(label) for label in labels]
            class_R = torch.tensor(indices, device=network.device)
        latent_RZ = latent_RZ.to(network.device, network.dtype)
        images: Tensor = network.model.generate(latent_RZ, class_R)
        return images


@contextmanager
def _frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Disable the gradients of ``modules`` within the block."""
    weights = [w for module in modules for w in module.parameters() if w.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def sliced_distance(one_RD: Tensor, other_RD: Tensor) -> float:
    """Return the sliced Wasserstein distance between equally many rows, along fixed directions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    direction_DS = torch.randn(one_RD.shape[1], DIRECTIONS, generator=generator)
    direction_DS = (direction_DS / direction_DS.norm(dim=0)).to(one_RD.device)
    sorted_RS = [(each @ direction_DS).sort(0).values for each in (one_RD, other_RD)]
    return float((sorted_RS[0] - sorted_RS[1]).square().mean().sqrt())


def _spread(each_RD: Tensor, class_R: Tensor) -> float:
    """Return the root mean squared distance of rows from the mean of their class."""
    off = [each_RD[class_R == name] - each_RD[class_R == name].mean(0) for name in class_R.unique()]
    squares = sum(float(each.square().sum()) for each in off)
    return float(np.sqrt(squares / len(each_RD)))
