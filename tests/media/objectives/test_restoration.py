"""Restoration: degraded images and the loss against numpy, classic filters, and restored files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import luthier
from luthier.cli.inference.images import sample
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.inference.batcher import Work
from luthier.inference.inference import ImageRequest, InferenceRefused
from luthier.inference.sequential import SerialModel
from luthier.library.models import find
from luthier.media.objectives.restoration import DegradedImages, Restoration, filtered, peak_ratios
from luthier.media.tasks import RESTORATION
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.base import extra_of
from luthier.recipe import Recipe
from luthier.types import Example

CPU = torch.device("cpu")
Prepare = Callable[..., tuple[Restoration, Network, list[Example]]]


def smooth_images(count: int, side: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return gradients of random colours, so that noise differs from content."""
    random = np.random.default_rng(0)
    ends = random.integers(0, 256, (2, count, 1, 1, 3))
    share = np.linspace(0, 1, side)[None, :, None, None]
    pixels = (1 - share) * ends[0] + share * ends[1] + np.zeros((1, 1, side, 1))
    images: np.ndarray[Any, np.dtype[np.uint8]] = pixels.round().astype(np.uint8)
    return images


@pytest.fixture
def prepared(family_folder: Callable[[str], Path]) -> Prepare:
    def prepare(**fields: Any) -> tuple[Restoration, Network, list[Example]]:
        folder = family_folder("unet")
        chat, objective = load_chat_format(folder), Restoration(**fields)
        torch.manual_seed(0)
        network = as_network(
            load_model(folder, torch.float32, CPU, objective.head()), CPU, torch.float32
        )
        rows = [
            BareImage("f", n, Media("image", f"i[{n}]", array=each))
            for n, each in enumerate(smooth_images(6))
        ]
        return objective, network, [objective.encode(row, n, chat) for n, row in enumerate(rows)]

    return prepare


def drawn_from(objective: Restoration, network: Network, examples: list[Example]) -> DegradedImages:
    return extra_of(objective.annotate(network, examples, 100)[0], DegradedImages)


@pytest.mark.parametrize("degradation", ["noise", "downsampling"])
def test_loss_is_mean_absolute_error_of_restored_pixels(
    prepared: Prepare, degradation: str
) -> None:
    objective, network, examples = prepared(degradation=degradation)
    network.model.eval()
    (batch,) = objective.annotate(network, examples, 100)
    drawn = extra_of(batch, DegradedImages)
    output = network.model(2 * drawn.degraded - 1).prediction.detach()
    start = 2 * drawn.degraded - 1 if degradation == "downsampling" else 0
    error = (output + start - batch.plan).abs() / 2
    loss = objective.loss(network, batch)
    assert float(loss.total.detach()) == pytest.approx(float(error.mean((1, 2, 3)).sum()), rel=1e-4)


def test_noise_has_given_deviation_and_varies_in_training_only(prepared: Prepare) -> None:
    objective, network, examples = prepared(noise_std=0.05)
    network.model.train()
    one, other = (drawn_from(objective, network, examples) for _ in range(2))
    assert not torch.equal(one.degraded, other.degraded) and torch.equal(one.clean, other.clean)
    inside = (one.clean > 0.2) & (one.clean < 0.8)
    assert float((one.degraded - one.clean)[inside].std()) == pytest.approx(0.05, rel=0.15)
    network.model.eval()
    one, other = (drawn_from(objective, network, examples) for _ in range(2))
    assert torch.equal(one.degraded, other.degraded)
    parity = [objective.parity_loss(network, examples, budget) for budget in (100, 2)]
    assert parity[0] == pytest.approx(parity[1], rel=1e-5)


def test_downsampling_equals_bicubic_resizing_of_pillow(prepared: Prepare) -> None:
    objective, network, examples = prepared(degradation="downsampling")
    drawn = drawn_from(objective, network, examples)
    for clean, degraded in zip(drawn.clean, drawn.degraded, strict=True):
        pixels = (clean * 255).round().byte().permute(1, 2, 0).numpy()
        height, width, _ = pixels.shape
        small = Image.fromarray(pixels).resize(
            (-(-width // 2), -(-height // 2)), Image.Resampling.BICUBIC
        )
        wanted = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        found = degraded.permute(1, 2, 0).numpy() * 255
        assert np.abs(found - wanted).max() <= 3  # Pillow rounds between both passes


def test_peak_ratios_are_decibels_of_squared_error() -> None:
    clean = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    assert peak_ratios(clean + 0.1, clean).tolist() == pytest.approx([20.0, 20.0], rel=1e-4)
    assert peak_ratios(clean, clean).tolist() == pytest.approx([60.0, 60.0])


def test_filters_start_with_unchanged_image_and_contain_median_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    found = filtered(images)
    assert torch.equal(found[0], images)
    wanted = np.asarray(Image.fromarray(pixels).filter(ImageFilter.MedianFilter(3)))
    medians = [(each[0] * 255).round().byte().permute(1, 2, 0).numpy() for each in found]
    assert any(np.array_equal(each[1:-1, 1:-1], wanted[1:-1, 1:-1]) for each in medians)


def test_filter_baseline_is_best_column_of_training_rows() -> None:
    from luthier.evaluation.baselines import States

    train_NF = torch.tensor([[20.0, 21.0, 25.0], [20.0, 22.0, 24.0]])
    states = States(train_NF, torch.tensor([[10.0, 30.0, 11.0]]), 2)
    unchanged, filters = (each.answers(states) for each in RESTORATION.baselines([], []))
    assert [*unchanged, *filters] == [{"psnr": 10.0}, {"psnr": 11.0}]


def test_restoration_of_latents_is_rejected(
    tmp_path: Path, luthier_home: Path, family_folder: Callable[[str], Path]
) -> None:
    np.savez(tmp_path / "clean.npz", images=smooth_images(20))
    fields = {
        "base": str(family_folder("stable_diffusion")),
        "objective": {"method": "restoration"},
        "data": {"train": str(tmp_path / "clean.npz")},
    }
    with pytest.raises(RecipeError) as refused:
        train(Recipe.parse(fields))
    assert refused.value.rule == "objective.network"


def test_trained_model_restores_files_and_is_measured(
    tmp_path: Path, luthier_home: Path, family_folder: Callable[[str], Path]
) -> None:
    data, pictures = tmp_path / "clean.npz", tmp_path / "pictures"
    images = smooth_images(40)
    np.savez(data, images=images)
    pictures.mkdir()
    for number in range(3):
        Image.fromarray(images[number]).save(pictures / f"{number}.png")
    fields: dict[str, Any] = {
        "base": str(family_folder("unet")),
        "name": "one",
        "objective": {"method": "restoration"},
        "data": {"train": str(data)},
        "training": {"max_steps": 3, "batch_size": 4, "precision": "float32"},
    }
    result = train(Recipe.parse(fields))
    compared = result.comparison
    assert compared is not None and compared.measure == "psnr" and len(compared.baselines) == 2
    assert compared.tuned is not None and compared.tuned > 0
    grids = sorted((luthier_home / "runs").rglob("grids/*.png"))
    with Image.open(grids[0]) as picture:
        assert picture.info["Title"] == "synthetic image"

    found = luthier.evaluate(result.model_id, data)
    assert 0 < found.scores["degraded_psnr"] < 60 and found.row_scores["psnr"].interval[1] > 1

    made = sample(result.model_id, tmp_path / "restored", reconstruct=str(pictures))
    with Image.open(tmp_path / "restored" / "00001-0.png") as restored:
        size = restored.size
        assert made.images == 3 and restored.info["Source"] == result.model_id
    with pytest.raises(RecipeError):
        sample(result.model_id, tmp_path / "new.png")
    with pytest.raises(RecipeError):
        luthier.load(result.model_id).sample(1)

    served = SerialModel.open(find(result.model_id))
    image = Media("image", "i", array=images[0])
    (copy,) = served.reconstruct([image], Work())
    assert copy.compression is None and copy.copy.shape == (*size[::-1], 3)
    with pytest.raises(InferenceRefused):
        served.sample(ImageRequest(), 0, Work(), lambda count: None)
