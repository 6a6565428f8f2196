"""Tasks of the objectives in this package: generation of images, and transcription."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from luthier.data.shapes.media import CaptionedImage
from luthier.evaluation.transcription import transcription_remarks, transcription_scores
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows


class ImageGenerationTask(Task):
    """New images. The network and its head depend on the objective."""

    draws: ClassVar[bool] = True

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Generate images."""
        return f"sample {model_id} --output samples.png"


class AutoencodingTask(Task):
    """New images, reconstructions, and scores of unusual rows."""

    head: ClassVar[HeadKind] = "autoencoding"
    draws: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = True


class AdversarialTask(ImageGenerationTask):
    """New images of a generator."""

    head: ClassVar[HeadKind] = "adversarial"


class DenoisingTask(ImageGenerationTask):
    """New images from noise."""

    head: ClassVar[HeadKind] = "denoising"


class TranscriptionTask(Task):
    """Text in an image, or a caption."""

    head: ClassVar[HeadKind] = "image_to_text"
    two_sided: ClassVar[bool] = False

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the error rates of the texts."""
        (answers,) = sides
        images = cast("Sequence[CaptionedImage]", rows.rows)
        pairs = [(a["text"], row.caption) for a, row in zip(answers, images, strict=True)]
        remarks = transcription_remarks(images, answers)
        return rows.evaluation(transcription_scores(pairs), answers, remarks)

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the text."""
        return str(answer["text"] or "(no text)")


AUTOENCODING, ADVERSARIAL, DENOISING = AutoencodingTask(), AdversarialTask(), DenoisingTask()
TRANSCRIPTION = TranscriptionTask()
