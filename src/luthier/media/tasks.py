"""Tasks of the objectives in this package: generation and restoration of images, and
transcription."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from luthier.data.conversations.turn_marks import truth_of
from luthier.data.files.parsing import quote
from luthier.data.inputs import MediaInput
from luthier.data.shapes import of_shape
from luthier.data.shapes.media import BareWindow, CaptionedImage, LabelledWindow
from luthier.errors import DataError, Problem
from luthier.evaluation.alarms import LEVELS_DIFFER, check_order
from luthier.evaluation.baselines import Z_SCORES, Method, States
from luthier.evaluation.significance import RowScores
from luthier.evaluation.transcription import transcription_remarks, transcription_scores
from luthier.formatting import list_some
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.evaluation.significance import Score


Z_THRESHOLD = 3.0
"""Usual threshold of z-scores, in standard deviations."""


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
    reads_states: ClassVar[bool] = False

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield z-scores of a time series, if the held-out rows have faults to find."""
        windows, asked = of_shape(BareWindow, train), of_shape(LabelledWindow, held)
        ordinary = [row for row in windows or () if row.target() != "fault"]
        if ordinary and asked and any(row.is_fault for row in asked):
            yield Method(Z_SCORES, lambda _: _z_alarms(ordinary, asked))

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the scores, with the numbers of found events and of false alarms."""
        (answers,) = sides
        scores = self.scores(rows.rows, answers)
        pairs = zip(rows.rows, answers, strict=True)
        judged = [
            (isinstance(row, LabelledWindow) and row.is_fault, answer["anomalous"])
            for row, answer in pairs
            if answer["anomalous"] is not None
        ]
        false = sum(alarm and not fault for fault, alarm in judged)
        normal = sum(not fault for fault, _ in judged)
        events = scores["events_found"]
        remarks = [
            f"{round(events.value * len(events))} of {len(events)} events found; {false:,} of "
            f"{normal:,} normal rows are false alarms"
        ]
        kinds = Counter(
            row.label for row in rows.rows if isinstance(row, LabelledWindow) and row.is_fault
        )
        if any(truth_of(kind) is None for kind in kinds):
            words = (f"{quote(kind)} ({count:,})" for kind, count in kinds.most_common())
            remarks.append(f"faults are {list_some(words, 8)}")
        if 2 * false > normal:
            of_column = Counter(each["column"] for each in answers if each.get("column"))
            often = [f", most of all of {name}" for name, _ in of_column.most_common(1)]
            remarks.append(LEVELS_DIFFER + "".join(often))
        return rows.evaluation(scores, answers, remarks)

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return F1, precision and recall of faults, and the share of found events.

        An event is a run of faults on consecutive lines, found by one alarm.

        Raises:
            DataError: if no row is a fault, or if all rows are.
        """
        check_order(row for row in rows if isinstance(row, BareWindow))
        fault_R = np.array([isinstance(row, LabelledWindow) and row.is_fault for row in rows])
        if not fault_R.any():
            message = "no row has the label of a fault, so nothing can be found."
            fix = "Add rows with faults, labelled 1."
            raise DataError([Problem("row.no_label", message, fix, rows[0].location)])
        if fault_R.all():
            raise DataError([_all_faults(rows)])
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


def _all_faults(rows: Sequence[Row]) -> Problem:
    """Return the problem of a time series without a normal value."""
    words = Counter(row.label for row in rows if isinstance(row, LabelledWindow))
    named = list_some((quote(word) for word, _ in words.most_common()), 5)
    message = f"All {len(rows):,} rows are faults, with the labels {named}."
    fix = "Label normal rows with 0 or normal, or choose the column with `data.columns.label`."
    return Problem("window.faults", message, fix, rows[0].location)


def _z_alarms(ordinary: Sequence[BareWindow], held: Sequence[BareWindow]) -> Answers:
    """Return the alarms of the base ``z-score``, fitted to the rows ``ordinary``."""
    import torch

    from luthier.media.catalog import Z_SCORE_FIELDS, Z_SCORE_READER
    from luthier.media.networks.z_score import ZScoreConfig, ZScoreModel

    names = ordinary[0].media.names
    network = ZScoreModel(ZScoreConfig(**Z_SCORE_FIELDS))
    network.fit([MediaInput(row.media.select(names), Z_SCORE_READER) for row in ordinary])
    windows = [MediaInput(row.media.select(names), Z_SCORE_READER) for row in held]
    with torch.no_grad():
        scores = network.scores(torch.from_numpy(np.stack([each.array() for each in windows])))
    return [
        {"anomalous": score > Z_THRESHOLD if each.is_whole else None}
        for score, each in zip(scores.tolist(), windows, strict=True)
    ]


class AdversarialTask(ImageGenerationTask):
    """New images of a generator."""

    head: ClassVar[HeadKind] = "adversarial"


class DenoisingTask(ImageGenerationTask):
    """New images from noise."""

    head: ClassVar[HeadKind] = "denoising"


class RestorationTask(Task):
    """Images without their noise, or of twice the resolution."""

    head: ClassVar[HeadKind] = "denoising"
    reconstructs: ClassVar[bool] = True
    two_sided: ClassVar[bool] = False

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True: all rows have a clean image."""
        return True

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield the degraded image, and the classic filter that is best on the training rows."""

        def by_filter(states: States) -> Answers:
            best = int(states.train_NH[:, 1:].mean(0).argmax()) + 1
            return [{"psnr": ratio} for ratio in states.held_QH[:, best].tolist()]

        def as_it_is(states: States) -> Answers:
            return [{"psnr": ratio} for ratio in states.held_QH[:, 0].tolist()]

        yield Method("degraded image (half size: bicubic enlargement)", as_it_is, reads_states=True)
        yield Method("best filter: blur, median or sharpening", by_filter, reads_states=True)

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return the mean peak signal-to-noise ratio of the restored images, and of the degraded
        images if known."""
        known = [name for name in ("psnr", "degraded_psnr") if name in answers[0]]
        return {
            name: RowScores.of([each[name] for each in answers], is_share=False) for name in known
        }

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return both ratios."""
        return f"{answer['psnr']:.2f} dB restored, {answer['degraded_psnr']:.2f} dB degraded"

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Restore images."""
        return f"sample {model_id} --reconstruct images/ --output restored/"


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
RESTORATION, TRANSCRIPTION = RestorationTask(), TranscriptionTask()
