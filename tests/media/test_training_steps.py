"""Pictures of augmented rows, and advice on the number of steps of generators."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import luthier
from luthier.engine.runs import AUGMENTED
from luthier.media.image_grid import GAP
from luthier.media.training_steps import (
    AUGMENTED_ROWS,
    DRAWS,
    GenerativeVerdict,
    advised_steps,
    spectrogram_of,
)
from luthier.objectives import OBJECTIVES


@pytest.mark.parametrize(
    ("method", "steps", "random", "expected"),
    [
        ("diffusion", 172, True, 4_000),
        ("gan", 172, True, 3_000),
        ("vae", 172, True, 1_000),
        ("diffusion", 2_001, True, 0),
        ("gan", 1_501, True, 0),
        ("diffusion", 172, False, 0),
        ("sft", 40, False, 0),
    ],
)
def test_few_steps_from_random_weights_get_advice(
    method: str, steps: int, random: bool, expected: int
) -> None:
    objective = OBJECTIVES[method].model_validate({})
    base = SimpleNamespace(manifest=SimpleNamespace(is_random=random))
    job: Any = SimpleNamespace(base=base, data=SimpleNamespace(objective=objective))
    assert GenerativeVerdict.applies(job) == (method in ("diffusion", "gan", "vae"))
    assert advised_steps(job, steps) == expected


@pytest.mark.slow
def test_picture_of_augmented_rows_starts_each_line_with_the_row(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(8) % 2)
    result = luthier.tune(
        tmp_path / "images.npz", base="small-cnn", name="x", data__validation_share=0,
        data__image_size=12, data__augmentation={"flip": 1.0}, training__max_steps=1,
    )  # fmt: skip
    picture = np.asarray(Image.open(Path(result.run_dir) / AUGMENTED))
    cell = 12 + GAP
    assert picture.shape == (AUGMENTED_ROWS * cell + GAP, (1 + DRAWS) * cell + GAP, 3)
    row, changed = (picture[GAP:cell, GAP + n * cell : (n + 1) * cell] for n in (0, 1))
    assert np.abs(changed[:, ::-1].astype(int) - row).max() <= 1
    assert np.abs(row.astype(int) - images[0]).max() <= 1
    assert "data:image/png" in result.html()


def test_tone_in_a_waveform_is_a_bright_line() -> None:
    tone = np.sin(2 * np.pi * 0.1 * np.arange(4000)).astype(np.float32)
    grey = spectrogram_of(tone[None, None])[..., 0]
    # A tenth of the sampling rate is a fifth of the height, from below.
    assert grey.shape == (201, 10) and abs(int(grey.mean(1).argmax()) - 160) <= 1
