"""A convolutional generator and discriminator (DCGAN, Radford et al. 2016, arXiv:1511.06434).

The generator doubles the sides of a small map up to an image. The discriminator halves an image
down to one score. Differences from the paper: group norms in the generator only, because batch
norms would make the images of a micro-batch depend on each other; the generator enlarges before
each convolution (Odena et al. 2016). With classes, an embedding of the class is added to the
generator's noise, and the agreement of image and class to the discriminator's score (Miyato and
Koyama 2018, arXiv:1802.05637). Each weight of the discriminator can be divided by its spectral norm
(Miyato et al. 2018, arXiv:1802.05957), with one power iteration per turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from luthier.media.networks.image_stages import (
    ImagePreTrainedConfig,
    ImagePreTrainedModel,
    enlarging_stages,
)


class DCGANConfig(ImagePreTrainedConfig):
    """Configuration with the number of noise values per image."""

    model_type = "dcgan"

    def __init__(self, latent_size: int = 64, **kwargs: Any) -> None:
        self.latent_size = latent_size
        super().__init__(**kwargs)


@dataclass
class DCGANOutput(ModelOutput):
    """Output of the discriminator."""

    scores: Tensor | None = None
    """Scores ``[R]``, above 0 for images that look real."""
    features: Tensor | None = None
    """Features ``[R, H]`` before the score."""


def spectral_weight(layer: Any) -> Tensor:
    """Return the weight of a layer divided by an estimate of its largest singular value.

    The estimate is one power iteration from the buffer ``u``, which stays unchanged: all
    micro-batches of a turn use an equal weight, whatever their number and process.
    """
    weight: Tensor = layer.weight
    flat = weight.flatten(1)
    u, v = _iterate(flat, layer.u)
    return weight / (u @ (flat @ v)).clamp_min(1e-4)


@torch.no_grad()
def _iterate(flat: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular vectors of ``flat`` after one power iteration from ``u``."""
    v = F.normalize(flat.T @ u, dim=0)
    return F.normalize(flat @ v, dim=0), v


class SpectralConv2d(nn.Conv2d):
    """A convolution with an optional spectral norm."""

    u: Tensor
    spectral = False

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("u", torch.zeros(self.out_channels))

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, C, H, W]`` to ``[R, C', H', W']``."""
        weight = spectral_weight(self) if self.spectral else self.weight
        convolved: Tensor = self._conv_forward(states, weight, self.bias)
        return convolved


class SpectralLinear(nn.Linear):
    """A linear layer with an optional spectral norm."""

    u: Tensor
    spectral = False

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.register_buffer("u", torch.zeros(outer))

    def forward(self, states: Tensor) -> Tensor:
        """Map ``[R, H]`` to ``[R, H']``."""
        weight = spectral_weight(self) if self.spectral else self.weight
        return F.linear(states, weight, self.bias)


class DCGANGenerator(nn.Module):
    """Generator of images from -1 to 1."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes = config.hidden_sizes
        self.inside = (sizes[-1], *config.sides[-1])
        self.start = nn.Linear(config.latent_size, int(torch.Size(self.inside).numel()))
        self.stages = nn.ModuleList(enlarging_stages(config, F.relu))
        self.to_pixels = nn.Conv2d(sizes[0], config.num_channels, 3, 1, 1)

    def forward(self, latent_RZ: Tensor) -> Tensor:
        """Map noise ``[R, Z]`` to images ``[R, C, H, W]``."""
        states = F.relu(self.start(latent_RZ).unflatten(-1, self.inside))
        for stage in self.stages:
            states = stage(states)
        return torch.tanh(self.to_pixels(states))


class DCGANDiscriminator(nn.Module):
    """Discriminator without the final score."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        sizes = config.hidden_sizes
        self.stages = nn.ModuleList(
            SpectralConv2d(inner, outer, 4 if min(side) > 3 else 3, 2, 1)
            for inner, outer, side in zip(
                [config.num_channels, *sizes], sizes, config.sides, strict=False
            )
        )
        self.width = sizes[-1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images ``[R, C, H, W]`` to features ``[R, H]``."""
        states = pixel_values
        for stage in self.stages:
            states = F.leaky_relu(stage(states), 0.2)
        return states.sum((-2, -1))


class DCGANPreTrainedModel(ImagePreTrainedModel):
    """Base class with configuration and initialization."""

    config_class = DCGANConfig
    base_model_prefix = "dcgan"
    embedding_std = 1.0

    def draw_weight(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Draw a small weight, and the initial vector of the power iteration."""
        if isinstance(layer, SpectralConv2d | SpectralLinear):
            init.normal_(layer.u, 0.0, 1.0)
        init.normal_(layer.weight, 0.0, 0.05)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DCGANForPreTraining) and module.has_classes:
            # The one is added to noise of deviation 1, the other multiplied as a weight is.
            init.normal_(module.class_features.weight, 0.0, 0.05)


class DCGANModel(DCGANPreTrainedModel):
    """Generator and discriminator without classes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generator = DCGANGenerator(config)
        self.discriminator = DCGANDiscriminator(config)
        self.score = SpectralLinear(self.discriminator.width, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> DCGANOutput:
        """Return the discriminator's output for images ``[R, C, H, W]``."""
        features_RH = self.discriminator(pixel_values)
        return DCGANOutput(self.score(features_RH)[:, 0], features_RH)


class DCGANForPreTraining(DCGANPreTrainedModel):
    """Generator and discriminator with embeddings of ``num_labels`` classes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dcgan = DCGANModel(config)
        self.has_classes = config.num_labels > 1
        if self.has_classes:
            self.class_noise = nn.Embedding(config.num_labels, config.latent_size)
            self.class_features = nn.Embedding(config.num_labels, self.dcgan.discriminator.width)
        self.post_init()

    @property
    def players(self) -> dict[str, list[nn.Module]]:
        """Modules of the generator and of the discriminator."""
        model = self.dcgan
        own = (self.class_noise, self.class_features) if self.has_classes else ()
        return {
            "generator": [model.generator, *own[:1]],
            "discriminator": [model.discriminator, model.score, *own[1:]],
        }

    @property
    def has_whole_weights(self) -> bool:
        """True if the discriminator's layers are unwrapped, so that spectral norms cover whole
        weights."""
        layers = [*self.dcgan.discriminator.stages, self.dcgan.score]
        return all(isinstance(each, SpectralConv2d | SpectralLinear) for each in layers)

    def generate(self, latent_RZ: Tensor, class_R: Tensor | None = None) -> Tensor:
        """Generate images ``[R, C, H, W]`` from noise ``[R, Z]`` and classes ``[R]``, if any."""
        if self.has_classes and class_R is not None:
            latent_RZ = latent_RZ + self.class_noise(class_R)
        images: Tensor = self.dcgan.generator(latent_RZ)
        return images

    def discriminate(
        self, pixel_values: Tensor, class_R: Tensor | None = None, spectral: bool = False
    ) -> Tensor:
        """Return the scores ``[R]`` of images, as images of their class."""
        for module in self.modules():
            if isinstance(module, SpectralConv2d | SpectralLinear):
                module.spectral = spectral
        features_RH = self.dcgan.discriminator(pixel_values)
        score_R: Tensor = self.dcgan.score(features_RH)[:, 0]
        if self.has_classes and class_R is not None:
            score_R = score_R + (features_RH * self.class_features(class_R)).sum(-1)
        return score_R

    @torch.no_grad()
    def iterate_norms(self) -> None:
        """Run one power iteration of all spectral norms. Call once per turn."""
        for module in self.modules():
            if isinstance(module, SpectralConv2d | SpectralLinear):
                module.u.copy_(_iterate(module.weight.flatten(1), module.u)[0])

    def forward(self, pixel_values: Tensor, **_: Any) -> DCGANOutput:
        """Return the scores of images ``[R, C, H, W]`` and of equally many generated images."""
        self.config.check_images(pixel_values)
        latent_RZ = pixel_values.new_zeros(len(pixel_values), self.config.latent_size)
        images = torch.cat([pixel_values, self.generate(latent_RZ)])
        return DCGANOutput(self.discriminate(images), None)


Config = DCGANConfig
CLASSES = {"AutoModel": DCGANModel, "AutoModelForPreTraining": DCGANForPreTraining}
"""Model class by automatic class of transformers."""
