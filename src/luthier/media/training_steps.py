"""Steps of a training run for objectives that generate images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from luthier.data.inputs import PLURAL
from luthier.engine import defaults
from luthier.engine.steps import TrainingStep
from luthier.media.objectives.generative import MOST_COMPARED, Generative
from luthier.media.sample_grids import SampleGrids

if TYPE_CHECKING:
    from luthier.engine.job import TrainingJob
    from luthier.engine.train import Trainer


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
        if usual := advised_steps(trainer.job, steps):
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
