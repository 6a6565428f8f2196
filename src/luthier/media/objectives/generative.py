"""Common parts of objectives that generate images: noise for held-out rows, and the Fréchet
distance.

The loss of such an objective says little about image quality. If a classifier of images is set,
each evaluation generates as many images as there are held-out rows, with equal classes or captions
and fixed noise. Real and generated images are compared in the features of the classifier's head
(:func:`frechet_distance`), both at the size of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from luthier.data.inputs import PLURAL, Media
from luthier.errors import RecipeError
from luthier.media.processors import ImageProcessor
from luthier.objectives.base import Objective, RunModels, chat_of
from luthier.tasks import CLASSIFICATION
from luthier.types import Example

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.media.decoding import Pixels
    from luthier.models.networks.network import Network

MOST_COMPARED = 1_000
"""Maximum number of held-out rows that generated images are compared with."""
AT_ONCE = 32
"""Maximum batch size for small images."""
PIXELS_AT_ONCE = 1 << 20
"""Maximum number of pixels in a batch: four images of 512 x 512."""


class Generative(Objective):
    """Base class of objectives that generate images."""

    feature_model: str | None = None
    """Image classifier whose features define the Fréchet distance of generated images."""

    evaluation_shapes: ClassVar[frozenset[str]] = frozenset()

    @property
    def sample_labels(self) -> tuple[str, ...]:
        """Classes that :meth:`sample` accepts; empty without classes."""
        return ()

    @property
    def reads_prompts(self) -> bool:
        """True if :meth:`sample` accepts prompts, because the training rows had captions."""
        return False

    def check_prompt(self, prompt: str) -> None:
        """Reject a prompt without a known word.

        Raises:
            RecipeError: with the reason.
        """

    def sample(self, network: Network, labels: Sequence[str], generator: torch.Generator) -> Tensor:
        """Generate an image for each of ``labels``, ``[R, C, H, W]`` in the network's scale.

        Args:
            network: the network.
            labels: classes or prompts; empty texts for a model with neither.
            generator: source of all random numbers, on the CPU.
        """
        raise NotImplementedError

    def in_few_steps(self) -> Self:
        """Return this objective with fast settings, for images that are compared or shown during
        training."""
        return self

    def describe_copies(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Return a sentence about copies of ``examples`` for the verdict; empty without copies."""
        return ""

    @property
    def other_models(self) -> Mapping[str, str]:
        """The classifier, if set."""
        return {"features": self.feature_model} if self.feature_model else {}

    def bind(self, models: RunModels) -> Self:
        """Reject a feature model that is not an image classifier, and networks of other inputs."""
        other = models.others.get("features")
        if other is None:
            return super().bind(models)
        if other.objective.task is not CLASSIFICATION:
            raise RecipeError(
                f"objective.feature_model={self.feature_model} is not a classifier. Use a model with "
                "classes of images",
                rule="objective.feature_model",
            )
        for each in (other.chat, models.chat):
            if each.reads != "image":
                raise RecipeError(
                    "`objective.feature_model` needs two image networks, and one network is for "
                    f"{PLURAL[each.reads]}. Omit `objective.feature_model`",
                    rule="objective.feature_model",
                )
        return super().bind(models)

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return the loss, and the Fréchet distance if a classifier is set."""
        metrics = super().validation_metrics(network, examples, budget)
        return metrics | self.distance_metrics(network, examples)

    def distance_metrics(self, network: Network, examples: Sequence[Example]) -> dict[str, float]:
        """Return the Fréchet distance of generated images from ``examples``, if a classifier is
        set."""
        import torch

        classifier = network.others.get("features")
        examples = examples[:MOST_COMPARED]
        if classifier is None or len(examples) < 2:
            return {}
        chat = chat_of(network)
        assert isinstance(chat.media, ImageProcessor)
        sampler, to_pixels = self.in_few_steps(), chat.media.to_pixels
        generator = torch.Generator().manual_seed(0)
        at_once = images_at_once(chat.media)
        real_RD: list[NDArray[np.float32]] = []
        generated_RD: list[NDArray[np.float32]] = []
        with torch.no_grad():
            for start in range(0, len(examples), at_once):
                part = examples[start : start + at_once]
                real = [each.media.array() for each in part if each.media is not None]
                labels = [self.label_of(each, chat) for each in part]
                generated = sampler.sample(network, labels, generator)
                real_RD.append(features_of(classifier, map(to_pixels, real)))
                generated_RD.append(
                    features_of(classifier, map(to_pixels, generated.float().cpu().numpy()))
                )
        distance = frechet_distance(np.concatenate(real_RD), np.concatenate(generated_RD))
        return {"frechet_distance": distance}

    def label_of(self, example: Example, chat: ChatFormat) -> str:
        """Return the label for :meth:`sample` that describes a row: the class, or an empty text."""
        if not self.sample_labels or example.target is None:
            return ""
        return self.sample_labels[int(example.target[0])]


def frechet_distance(one_ND: NDArray[Any], other_ND: NDArray[Any]) -> float:
    """Return the Fréchet distance between normal distributions that fit two sets of features.

    The distance is ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` for the means and covariances of both sets
    (Heusel et al. 2017, arXiv:1706.08500, equation 6). Near 0, means and covariances agree, so the
    distance detects both unrealistic images and missing kinds of images. FID is the distance in an
    ImageNet-trained Inception network with about 50,000 images. Compare distances only for one
    classifier and one number of images.

    Raises:
        ValueError: for a set with fewer than two rows or with numbers that are not finite.
    """
    sets = [np.asarray(each, np.float64) for each in (one_ND, other_ND)]
    if any(len(each_ND) < 2 or not np.isfinite(each_ND).all() for each_ND in sets):
        raise ValueError("a Fréchet distance needs at least two finite rows per set")
    one_D, other_D = (each_ND.mean(0) for each_ND in sets)
    one_DD, other_DD = (np.atleast_2d(np.cov(each_ND, rowvar=False)) for each_ND in sets)
    # S^(1/2) T S^(1/2) has the eigenvalues of S T and is symmetric, so none of them is complex.
    values_D, vectors_DD = np.linalg.eigh(one_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T
    crossed_D = np.linalg.eigvalsh(root_DD @ other_DD @ root_DD).clip(0)
    apart = np.square(one_D - other_D).sum() + np.trace(one_DD) + np.trace(other_DD)
    return max(0.0, float(apart - 2 * np.sqrt(crossed_D).sum()))


def draw_latents(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` latents ``[R, size]``, one after the other.

    A single call of torch would draw other numbers for the first rows if ``count`` differs.
    """
    import torch

    return torch.stack([torch.randn(size, generator=generator) for _ in range(count)])


def draw_noise(generators: Sequence[np.random.Generator], size: int) -> Tensor:
    """Draw normal noise ``[R, size]`` from one generator per row."""
    import torch

    return torch.from_numpy(np.stack([g.standard_normal(size, np.float32) for g in generators]))


def check_pixel_range(chat: ChatFormat, method: str) -> None:
    """Reject a base model whose pixels are not from -1 to 1.

    Raises:
        RecipeError: with the fields to change.
    """
    reads = chat.media
    if isinstance(reads, ImageProcessor) and {*reads.mean, *reads.std} != {0.5}:
        raise RecipeError(
            f"{method} needs pixels from -1 to 1. Set image_mean and image_std to 0.5 in the base "
            "model's preprocessor_config.json",
            rule="image.range",
        )


def images_at_once(processor: ImageProcessor) -> int:
    """Return the batch size for images of the size of ``processor``."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // (processor.height * processor.width)))


def features_of(classifier: Network, images: Iterable[Pixels]) -> NDArray[np.float32]:
    """Return the features ``[R, D]`` of images ``[H, W, 3]`` before the head of ``classifier``."""
    import torch

    from luthier.models.networks.layouts import pooled_states

    assert classifier.chat is not None and isinstance(classifier.chat.media, ImageProcessor)
    to_array = classifier.chat.media.array
    arrays = np.stack([to_array(Media("image", "compared", array=image)) for image in images])
    pixels = torch.from_numpy(arrays).to(classifier.device, classifier.dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        states_RD = pooled_states(classifier.model.base_model, pixels)
    features: NDArray[np.float32] = states_RD.float().cpu().numpy()
    return features
