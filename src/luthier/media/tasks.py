"""Tasks of the objectives in this package: generation of images, and transcription."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from luthier.data.shapes.media import CaptionedImage, LabelledWindow
from luthier.errors import DataError, Problem
from luthier.evaluation.significance import RowScores
from luthier.evaluation.transcription import transcription_remarks, transcription_scores
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.evaluation.significance import Score


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

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return F1, precision and recall of faults, and the share of found events.

        An event is a run of faults on consecutive lines, found by one alarm.

        Raises:
            DataError: if no row is a fault.
        """
        fault_R = np.array([isinstance(row, LabelledWindow) and row.is_fault for row in rows])
        if not fault_R.any():
            message = "no row has the label of a fault, so nothing can be found."
            fix = "Add rows with faults, labelled 1."
            raise DataError([Problem("row.no_label", message, fix, rows[0].location)])
        alarm_R = np.array([answer.get("anomalous") is True for answer in answers])
        hit_R = fault_R & alarm_R
        files = [row.file for row in rows]
        begins = [
            is_fault and not (place and fault_R[place - 1] and files[place - 1] == files[place])
            for place, is_fault in enumerate(fault_R.tolist())
        ]
        event_K = (np.cumsum(begins) - 1)[fault_R]
        found_E = np.zeros(sum(begins), bool)
        np.logical_or.at(found_E, event_K, alarm_R[fault_R])
        return {
            "f1": RowScores.of(hit_R, (fault_R.astype(float) + alarm_R) / 2),
            "precision": RowScores.of(hit_R, alarm_R),
            "recall": RowScores.of(hit_R, fault_R),
            "events_found": RowScores.of(found_E),
        }


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
