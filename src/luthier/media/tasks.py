"""Tasks of the objectives in this package: generation of images, and transcription."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks import Task
from luthier.tasks.base import Answer

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat


class ImageGeneration(Task):
    """New images. The network and its head depend on the objective."""

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Generate images."""
        return f"sample {model_id} --output samples.png"


class Autoencoding(Task):
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

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the text."""
        return str(answer["text"] or "(no text)")


AUTOENCODING, ADVERSARIAL, DENOISING = Autoencoding(), Adversarial(), Denoising()
TRANSCRIPTION = Transcription()
