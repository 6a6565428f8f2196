"""Grids of generated images during training: one file per evaluation, in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.engine.runs import GRIDS
from luthier.files import new_file
from luthier.media.image_grid import encode_png, grid
from luthier.media.objectives.generative import Generative, images_at_once
from luthier.media.processors import ImageProcessor
from luthier.models.networks.network import Network
from luthier.objectives.base import Objective
from luthier.types import Example

IMAGES = 30
"""Maximum number of images in a grid; fewer for large images. Each class gets an equal number."""
MOST_CLASSES = 10
"""Maximum number of classes in a grid."""


@dataclass(frozen=True)
class SampleGrids:
    """Settings of the grids. The noise is fixed, so the grids of a run are comparable."""

    folder: Path
    network: Network
    objective: Generative
    processor: ImageProcessor
    labels: Sequence[str]
    """Label of each image: a class, a caption, or an empty text."""

    @staticmethod
    def of(
        objective: Objective,
        network: Network,
        chat: ChatFormat,
        run_folder: Path,
        examples: Sequence[Example] = (),
    ) -> SampleGrids | None:
        """Return the grids of a run; ``None`` for models that generate no images.

        Labels are the classes in turn, or captions of ``examples`` in turn.
        """
        if not isinstance(objective, Generative) or not isinstance(chat.media, ImageProcessor):
            return None
        sampler = objective.in_few_steps()
        count = min(IMAGES, images_at_once(chat.media))
        labels = [*sampler.sample_labels[: min(MOST_CLASSES, count)]]
        if labels:
            labels *= count // len(labels)
        elif examples:
            captions = [objective.label_of(each, chat) for each in examples[:count]]
            labels = [captions[index % len(captions)] for index in range(count)]
        return SampleGrids(run_folder / GRIDS, network, sampler, chat.media, labels or [""] * count)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Write the grid of ``step``, without using torch's global random generator."""
        self.network.model.eval()
        generator = torch.Generator().manual_seed(0)
        images = self.objective.sample(self.network, self.labels, generator).float().cpu().numpy()
        pixels = [self.processor.to_pixels(each) for each in images]
        self.folder.mkdir(exist_ok=True)
        with new_file(self.folder / f"{step:06}.png") as file:
            columns = len(set(self.labels)) if self.objective.sample_labels else None
            run = self.folder.parent
            file.write(encode_png(grid(pixels, columns), f"{run.parent.name}:{run.name}"))
