"""Common parts of objectives that generate images: noise for held-out rows, and the Fréchet
distance.

The loss of such an objective says little about image quality. If a classifier of images is set,
each evaluation generates as many images as there are held-out rows, with equal classes or captions
and fixed noise. Real and generated images are compared in the features of the classifier's head
(:func:`~luthier.media.frechet.frechet_distance`), both at the size of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from luthier.data.inputs import PLURAL, Media
from luthier.errors import RecipeError
from luthier.media.frechet import frechet_distance
from luthier.media.processors import ImageProcessor
from luthier.objectives.base import Objective, RunModels, chat_of
from luthier.types import Example

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from luthier.data.chat import ChatFormat
    from luthier.media.decoding import Pixels
    from luthier.models.network import Network

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
    generates_images: ClassVar[bool] = True

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
        if other.objective.task != "sequence_classification":
            raise RecipeError(
                f"objective.feature_model is a classifier of images, and {self.feature_model} has no "
                "classes; tune it on images with labels, and name the model that comes of it",
                rule="objective.feature_model",
            )
        for each in (other.chat, models.chat):
            if each.reads != "image":
                raise RecipeError(
                    "objective.feature_model compares images, and one of both networks reads "
                    f"{PLURAL[each.reads]}; leave it out",
                    rule="objective.feature_model",
                )
        return super().bind(models)

    def validation_metrics(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> dict[str, Any]:
        """Return the loss, and the Fréchet distance if a classifier is set."""
        found = super().validation_metrics(network, examples, budget)
        return found | self.distance_metrics(network, examples)

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
        maker, to_pixels = self.in_few_steps(), chat.media.to_pixels
        generator = torch.Generator().manual_seed(0)
        at_once = images_at_once(chat.media)
        real_RD: list[NDArray[np.float32]] = []
        made_RD: list[NDArray[np.float32]] = []
        with torch.no_grad():
            for start in range(0, len(examples), at_once):
                part = examples[start : start + at_once]
                real = [each.media.array() for each in part if each.media is not None]
                labels = [self.label_of(each, chat) for each in part]
                made = maker.sample(network, labels, generator)
                real_RD.append(features_of(classifier, map(to_pixels, real)))
                made_RD.append(features_of(classifier, map(to_pixels, made.float().cpu().numpy())))
        distance = frechet_distance(np.concatenate(real_RD), np.concatenate(made_RD))
        return {"frechet_distance": distance}

    def label_of(self, example: Example, chat: ChatFormat) -> str:
        """Return the label for :meth:`sample` that describes a row: the class, or an empty text."""
        if not self.sample_labels or example.target is None:
            return ""
        return self.sample_labels[int(example.target[0])]


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


def images_at_once(processor: ImageProcessor) -> int:
    """Return the batch size for images of the size of ``processor``."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // (processor.height * processor.width)))


def features_of(classifier: Network, images: Iterable[Pixels]) -> NDArray[np.float32]:
    """Return the features ``[R, D]`` of images ``[H, W, 3]`` before the head of ``classifier``."""
    import torch

    from luthier.models.layouts import pooled_states

    assert classifier.chat is not None and isinstance(classifier.chat.media, ImageProcessor)
    read = classifier.chat.media.array
    arrays = np.stack([read(Media("image", "compared", array=image)) for image in images])
    pixels = torch.from_numpy(arrays).to(classifier.device, classifier.dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        states_RD = pooled_states(classifier.model.base_model, pixels)
    found: NDArray[np.float32] = states_RD.float().cpu().numpy()
    return found
