"""Pictures of what a model makes as training goes: one for each measurement, in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.data.chat import ChatFormat
from luthier.data.pictures import encode_png, grid
from luthier.data.processors import ImageProcessor
from luthier.encryption.files import new_data_file
from luthier.engine.runs import GRIDS
from luthier.models.network import Network
from luthier.objectives.base import Objective
from luthier.objectives.capabilities import (
    DenoisingSettings,
    SupportsDenoising,
    SupportsSampling,
)

IMAGES = 30
"""In a picture; of classes as many each."""
MOST_CLASSES = 10
"""That a picture shows."""
STEPS = 20
"""From noise to an image, where it takes several: a few are enough to see how it goes."""


@dataclass(frozen=True)
class SampleGrids:
    """What is drawn for each picture: the same noise each time, so that they can be compared."""

    folder: Path
    network: Network
    objective: SupportsSampling
    processor: ImageProcessor

    @staticmethod
    def of(
        objective: Objective, network: Network, chat: ChatFormat, run_folder: Path
    ) -> SampleGrids | None:
        """``None`` for models that make no images."""
        if not isinstance(objective, SupportsSampling) or not isinstance(
            chat.media, ImageProcessor
        ):
            return None
        if isinstance(objective, SupportsDenoising):
            steps = min(STEPS, objective.most_steps)
            objective = objective.with_sampling(DenoisingSettings(steps=steps))
        return SampleGrids(run_folder / GRIDS, network, objective, chat.media)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Write the picture of ``step``; nothing is drawn from torch's global generator."""
        classes = self.objective.sample_labels[:MOST_CLASSES]
        labels = [*classes] * (IMAGES // len(classes)) if classes else [""] * IMAGES
        self.network.model.eval()
        generator = torch.Generator().manual_seed(0)
        images = self.objective.sample(self.network, labels, generator).float().cpu().numpy()
        pixels = [self.processor.to_pixels(each) for each in images]
        self.folder.mkdir(exist_ok=True)
        with new_data_file(self.folder / f"{step:06}.png") as file:
            file.write(encode_png(grid(pixels, len(classes) or None)))
