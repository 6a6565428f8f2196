"""Pictures of what a model makes as training goes: one for each measurement, in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.data.chat import ChatFormat
from luthier.engine.runs import GRIDS
from luthier.files import new_file
from luthier.media.image_grid import encode_png, grid
from luthier.media.objectives.generative import Generative, images_at_once
from luthier.media.processors import ImageProcessor
from luthier.models.network import Network
from luthier.objectives.base import Objective
from luthier.types import Example

IMAGES = 30
"""In a picture, or as many as are made at once where they are large; of classes as many each."""
MOST_CLASSES = 10
"""That a picture shows."""


@dataclass(frozen=True)
class SampleGrids:
    """What is drawn for each picture: the same noise each time, so that they can be compared."""

    folder: Path
    network: Network
    objective: Generative
    processor: ImageProcessor
    labels: Sequence[str]
    """What each image is asked to show: classes in turn, captions of rows, or anything."""

    @staticmethod
    def of(
        objective: Objective,
        network: Network,
        chat: ChatFormat,
        run_folder: Path,
        examples: Sequence[Example] = (),
    ) -> SampleGrids | None:
        """``None`` for models that make no images; captions are those of ``examples``, in turn."""
        if not isinstance(objective, Generative) or not isinstance(chat.media, ImageProcessor):
            return None
        maker = objective.in_few_steps()
        count = min(IMAGES, images_at_once(chat.media))
        labels = [*maker.sample_labels[: min(MOST_CLASSES, count)]]
        if labels:
            labels *= count // len(labels)
        elif examples:
            own = [objective.label_of(each, chat) for each in examples[:count]]
            labels = [own[index % len(own)] for index in range(count)]
        return SampleGrids(run_folder / GRIDS, network, maker, chat.media, labels or [""] * count)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Write the picture of ``step``; nothing is drawn from torch's global generator."""
        self.network.model.eval()
        generator = torch.Generator().manual_seed(0)
        images = self.objective.sample(self.network, self.labels, generator).float().cpu().numpy()
        pixels = [self.processor.to_pixels(each) for each in images]
        self.folder.mkdir(exist_ok=True)
        with new_file(self.folder / f"{step:06}.png") as file:
            columns = len(set(self.labels)) if self.objective.sample_labels else None
            file.write(encode_png(grid(pixels, columns)))
