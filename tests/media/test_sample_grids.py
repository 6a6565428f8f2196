"""Grids of generated images during training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from luthier.data.conversations.chat import ChatFormat
from luthier.data.inputs import Media
from luthier.data.shapes.media import CaptionedImage
from luthier.engine.runs import GRIDS, METRICS
from luthier.engine.train import train
from luthier.media.image_grid import GAP
from luthier.media.objectives.diffusion import Diffusion
from luthier.media.objectives.gan import GAN
from luthier.media.objectives.vae import VAE
from luthier.media.processors import ImageProcessor
from luthier.media.sample_grids import IMAGES, SampleGrids
from luthier.models.load import as_network, load_model
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import SFT
from luthier.recipe import Recipe
from luthier.types import Row

HEIGHT, WIDTH = 9, 7


@pytest.mark.parametrize(
    ("method", "family", "columns"),
    [("vae", "vae", 6), ("gan", "dcgan", 3), ("diffusion", "unet", 3)],
)
def test_each_measurement_leaves_a_picture(
    method: str,
    family: str,
    columns: int,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    luthier_home: Path,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, HEIGHT, WIDTH), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(30) % 3)
    fields: dict[str, Any] = {
        "base": str(family_folder(family)),
        "name": "one",
        "data": {"train": str(tmp_path / "images.npz")},
        "objective": {"method": method},
        "adaptation": {"method": "full"},
        "training": {"max_steps": 4, "evaluate_every": 2, "batch_size": 4, "precision": "float32"},
    }
    result = train(Recipe.parse(fields))
    files = sorted((Path(result.run_dir) / GRIDS).iterdir())
    assert [file.name for file in files] == ["000000.png", "000002.png", "000004.png"]
    pictures = [np.asarray(Image.open(file)) for file in files]
    rows = -(-IMAGES // columns)
    size = (rows * (HEIGHT + GAP) + GAP, columns * (WIDTH + GAP) + GAP, 3)
    assert {each.shape for each in pictures} == {size}
    assert not np.array_equal(pictures[0], pictures[-1])
    if method == "gan":  # each player has turns of its own
        line = json.loads((Path(result.run_dir) / METRICS).read_text().split("\n")[0])
        assert {"generator_loss", "discriminator_loss", "discriminator_accuracy"} <= line.keys()


def test_a_picture_moves_no_draw_of_the_training(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, cpu = family_folder("unet"), torch.device("cpu")
    objective, chat = Diffusion(labels=()), load_chat_format(folder)
    model = load_model(folder, torch.float32, cpu, objective.head())
    network = as_network(model, cpu, torch.float32)
    grids = SampleGrids.of(objective, network, chat, tmp_path)
    assert grids is not None
    before = torch.get_rng_state()
    grids.draw(7)
    first = (tmp_path / GRIDS / "000007.png").read_bytes()
    grids.draw(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / GRIDS / "000007.png").read_bytes() == first


def test_sample_grids_exist_only_for_image_generators(tmp_path: Path) -> None:
    chat = ChatFormat.reading(ImageProcessor(HEIGHT, WIDTH))
    network: Any = None
    assert SampleGrids.of(SFT(), network, chat, tmp_path) is None
    assert all(SampleGrids.of(each, network, chat, tmp_path) for each in (VAE(), GAN()))


def test_grid_has_row_captions_and_fewer_large_images(
    tmp_path: Path,
) -> None:
    captions = ("a red disc", "a blue disc", "a red square")
    media = Media("image", "i", array=np.zeros((4, 4, 3), np.uint8))
    rows: list[Row] = [CaptionedImage("f", n, media, text) for n, text in enumerate(captions)]
    network: Any = None
    for side, images in ((32, IMAGES), (256, 16), (512, 4), (2048, 1)):
        chat = ChatFormat.reading(ImageProcessor(side, side))
        objective = Diffusion().fit(rows, chat)
        examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
        grids = SampleGrids.of(objective, network, chat, tmp_path, examples)
        assert grids is not None and len(grids.labels) == images
        wanted = [objective.label_of(each, chat) for each in examples]
        assert [*grids.labels] == [wanted[index % 3] for index in range(images)]
        assert len(set(wanted)) == 3
        ten = Diffusion(labels=tuple("abcdefghij"))
        grids = SampleGrids.of(ten, network, chat, tmp_path, examples)
        assert grids is not None and len(grids.labels) <= images
        assert [*grids.labels] == [*ten.sample_labels[:images]] * max(1, images // 10)
