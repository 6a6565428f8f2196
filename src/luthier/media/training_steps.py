"""Pictures of augmented rows before training, and steps for objectives that generate images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.inputs import PLURAL
from luthier.engine import defaults
from luthier.engine.runs import AUGMENTED, GRIDS
from luthier.engine.steps import TrainingStep
from luthier.files import write_bytes
from luthier.media.image_grid import encode_png, grid
from luthier.media.objectives.generative import MOST_COMPARED, Generative
from luthier.media.objectives.restoration import Restoration
from luthier.media.processors import ImageProcessor
from luthier.media.sample_grids import SampleGrids

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.train import Trainer
    from luthier.media.decoding import Pixels

AUGMENTED_ROWS, DRAWS = 6, 4
"""Rows of the picture of augmented rows, and the changes of each row."""
RESTORED_ROWS, RESTORED_COLUMNS = 12, 3
"""Rows of a picture of restored rows, and rows on one line."""
FRAME = 400
"""Samples of a frame in the picture of a waveform."""


class AugmentedRows(TrainingStep):
    """A picture of images or spectrograms before and after random changes."""

    first_process_only = True
    in_trials = False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return whether the run changes images or audio."""
        changes = job.recipe.data.augmentation
        return changes is not None and bool(changes.kinds & {"image", "audio"})

    def before_training(self, trainer: Trainer) -> None:
        """Write the picture: each line is a row, and the first column is unchanged."""
        job, path = trainer.job, trainer.run_folder.folder / AUGMENTED
        changes, media = job.recipe.data.augmentation, job.chat.media
        rows = [example for example in job.data.train[:AUGMENTED_ROWS] if example.media]
        if path.exists() or changes is None or not rows:
            return
        pictures = []
        for place, row in enumerate(rows):
            random = np.random.default_rng([job.recipe.training.seed, place])
            for example in (row, *(changes.change(row, random) for _ in range(DRAWS))):
                assert example.media is not None
                array = example.media.array()
                to_pixels = media.to_pixels if isinstance(media, ImageProcessor) else spectrogram_of
                pictures.append(to_pixels(array))
        write_bytes(path, encode_png(grid(pictures, 1 + DRAWS)))
        kind = PLURAL[job.chat.reads]
        trainer.reporter.note(f"{kind} before and after random changes: {path}")


def spectrogram_of(array: np.ndarray[Any, Any]) -> Pixels:
    """Return the input of an audio network ``[1, H, W]`` as a grey picture, time from left to right.

    A waveform ``[1, 1, T]`` becomes a spectrogram.
    """
    values = array[0]
    if len(values) == 1:
        frames = values[0][: values.shape[1] // FRAME * FRAME].reshape(-1, FRAME)
        power = np.abs(np.fft.rfft(frames * np.hanning(FRAME)))
        values = np.log(power + 1e-5 * power.max() + 1e-12)
    values = values.T if values.shape[0] > values.shape[1] or array.shape[1] == 1 else values
    low, high = values.min(), values.max()
    grey = np.round(255 * (values[::-1] - low) / max(high - low, 1e-12)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


class SamplePictures(TrainingStep):
    """Grids of generated images during training."""

    first_process_only = True

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return whether the objective generates images."""
        return isinstance(job.data.objective, Generative)

    def before_training(self, trainer: Trainer) -> None:
        """Choose the labels of the grids."""
        data, folder = trainer.job.data, trainer.run_folder.folder
        rows = data.validation or data.train
        chat = trainer.job.chat
        self.grids = SampleGrids.of(data.objective, trainer.network, chat, folder, rows)

    def after_evaluation(self, trainer: Trainer, step: int) -> None:
        """Write the grid of a step."""
        if self.grids is not None:
            self.grids.draw(step)


class RestoredPictures(TrainingStep):
    """Pictures of held-out images during training: clean, degraded and restored."""

    first_process_only = True
    in_trials = False

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return whether the objective restores images."""
        return isinstance(job.data.objective, Restoration)

    @torch.no_grad()
    def after_evaluation(self, trainer: Trainer, step: int) -> None:
        """Write the picture of a step."""
        data, network, media = trainer.job.data, trainer.network, trainer.job.chat.media
        objective = data.objective
        assert isinstance(objective, Restoration) and isinstance(media, ImageProcessor)
        network.model.eval()
        pictures: list[Pixels] = []
        rows = [*(data.validation or data.train)[:RESTORED_ROWS]]
        for batch in network.batches(rows, trainer.reading_budget):
            drawn = objective.degrade(network, batch)
            restored = objective.restore(network, drawn.degraded).clamp(0, 1)
            for row in torch.stack([drawn.clean, drawn.degraded, restored], 1):
                pictures += [*(row * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
        run = trainer.run_folder.folder
        made = encode_png(grid(pictures, 3 * RESTORED_COLUMNS), f"{run.parent.name}:{run.name}")
        (run / GRIDS).mkdir(exist_ok=True)
        write_bytes(run / GRIDS / f"{step:06}.png", made)


class GenerativeVerdict(TrainingStep):
    """Additions to the verdict on a network that generates images."""

    @classmethod
    def applies(cls, job: TrainingJob) -> bool:
        """Return whether the objective generates images."""
        return isinstance(job.data.objective, Generative)

    @torch.no_grad()
    def before_storing(self, trainer: Trainer) -> None:
        """Add the quality of copies, and advice if training from random weights was short."""
        objective, network, verdict = trainer.job.data.objective, trainer.network, trainer.verdict
        assert isinstance(objective, Generative) and verdict is not None
        network.model.eval()
        examples = trainer.job.data.validation[:MOST_COMPARED]
        if copied := objective.describe_copies(network, examples, trainer.reading_budget):
            verdict = replace(verdict, text=f"{verdict.text}. {copied}")
        steps = trainer.progress.step
        overfitted = verdict.outcome == "overfitted"
        if not (trainer.is_final or overfitted) and (usual := advised_steps(trainer.job, steps)):
            noun = PLURAL[trainer.job.chat.reads]
            advice = (
                f"{steps:,} steps from random weights are few for {noun}: try "
                f"`training.max_steps={usual}` or more"
            )
            verdict = replace(verdict, cause="few_steps", advice=advice)
        trainer.verdict = verdict


def advised_steps(job: TrainingJob, steps: int) -> int:
    """Return the advised number of steps if training from random weights was short; otherwise 0."""
    objective = job.data.objective
    usual = max(defaults.least_steps(objective), objective.defaults.scratch_steps)
    return usual if job.base.manifest.is_random and 2 * steps <= usual else 0
