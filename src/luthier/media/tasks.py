"""Tasks of the objectives in this package: generation of images, and transcription."""

from __future__ import annotations

from typing import ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks import Task


class ImageGeneration(Task):
    """New images. The network and its head depend on the objective."""


class Autoencoding(ImageGeneration):
    """New images, reconstructions, and scores of unusual rows."""

    head: ClassVar[HeadKind] = "autoencoding"


class Adversarial(ImageGeneration):
    """New images of a generator."""

    head: ClassVar[HeadKind] = "adversarial"


class Denoising(ImageGeneration):
    """New images from noise."""

    head: ClassVar[HeadKind] = "denoising"


class Transcription(Task):
    """Text in an image, or a caption."""

    head: ClassVar[HeadKind] = "image_to_text"
    two_sided: ClassVar[bool] = False


AUTOENCODING, ADVERSARIAL, DENOISING = Autoencoding(), Adversarial(), Denoising()
TRANSCRIPTION = Transcription()
