"""Making images: counts, seeds, labels, copies, and the files they become."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.inference.batcher import Work
from luthier.inference.inference import ImageRequest, InferenceFailed, InferenceRefused
from luthier.inference.prediction import Predictor
from luthier.inference.sequential import SerialModel
from luthier.library.models import find
from luthier.media.image_generation import ImageGenerator
from luthier.media.image_grid import encode_png, grid
from luthier.media.objectives.diffusion import DenoisingSettings
from luthier.recipe import Recipe


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(40) % 2)
    return tmp_path / "images.npz"


def trained(base: Path, data: Path, method: str = "") -> ImageGenerator:
    fields: dict[str, Any] = {
        "base": str(base),
        "name": "one",
        "data": {"train": str(data)},
        "training": {"max_steps": 3, "batch_size": 4, "precision": "float32"},
    }
    if method:
        fields["objective"] = {"method": method}
    return ImageGenerator.open(find(train(Recipe.parse(fields)).model_id))


@pytest.fixture
def generator(
    images: Path, family_folder: Callable[[str], Path], luthier_home: Path
) -> ImageGenerator:
    return trained(family_folder("vae"), images, "vae")


def test_trained_model_stores_threshold_and_samples_by_seed(generator: ImageGenerator) -> None:
    assert generator.objective.threshold is not None  # type: ignore[attr-defined]
    one, same, other = (generator.sample(35, seed) for seed in (1, 1, 2))
    assert len(one) == 35 and {each.label for each in one} == {""}
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0].pixels, other[0].pixels)
    # The first images do not depend on how many follow.
    assert np.array_equal(generator.sample(3, 1)[2].pixels, one[2].pixels)


def test_copies_come_with_original_images(generator: ImageGenerator) -> None:
    pixels = np.full((9, 7, 3), 200, dtype=np.uint8)
    rows = [BareImage("f", n, Media("image", "i", array=pixels // (n + 1))) for n in range(3)]
    found = generator.reconstruct(rows)
    size = (generator.processor.height, generator.processor.width, 3)
    assert [each.original.shape for each in found] == [size] * 3
    assert [int(each.original.mean()) for each in found] == [200, 100, 66]
    each = found[1]
    difference = (each.original.astype(float) - each.copy) / 255
    assert each.error == pytest.approx((difference**2).mean())
    ways = generator.interpolate(rows, 4)
    assert [len(way) for way in ways] == [4, 4]
    # Batches of three and two rows: float sums differ in the last bits.
    for way, start in zip(ways, found, strict=False):
        assert np.abs(way[0].astype(int) - start.copy).max() <= 1


def test_invalid_image_requests_are_refused(generator: ImageGenerator) -> None:
    with pytest.raises(RecipeError):
        generator.sample(1, label="cat")
    with pytest.raises(RecipeError):
        generator.sample(0)
    with pytest.raises(RecipeError):
        generator.sample(1, seed=2**64)
    with pytest.raises(RecipeError):
        generator.interpolate([], 3)
    with pytest.raises(RecipeError):
        generator.sample(1, settings=DenoisingSettings(steps=3))
    with pytest.raises(RecipeError):
        generator.sample(1, prompt="a cat")


def test_diffusion_uses_requested_step_count(
    images: Path, family_folder: Callable[[str], Path], luthier_home: Path
) -> None:
    generator = trained(family_folder("unet"), images, "diffusion")
    few = DenoisingSettings(steps=3)
    made = generator.sample(34, 1, settings=few)
    assert [each.label for each in made[:3]] == ["0", "1", "0"]
    assert np.array_equal(generator.sample(3, 1, settings=few)[2].pixels, made[2].pixels)
    more = generator.sample(3, 1, settings=DenoisingSettings(steps=4))
    assert not np.array_equal(more[2].pixels, made[2].pixels)
    (one,) = generator.sample(1, 1, "1", settings=few)
    assert one.label == "1"
    with pytest.raises(RecipeError):
        generator.sample(1, prompt="one")
    with pytest.raises(RecipeError):
        Predictor.open(find("unet:one"))


@pytest.mark.slow
def test_time_limit_excludes_waiting_requests(
    images: Path, family_folder: Callable[[str], Path], luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    served = SerialModel(None, trained(family_folder("unet"), images, "diffusion"))
    turn, second, waits = served._turn, Work(0.0), threading.Event()

    def seen(work: Work) -> Any:
        if work is second:
            waits.set()
        return turn(work)

    def ask() -> None:
        with contextlib.suppress(InferenceFailed):  # the time limit is 0
            served.sample(ImageRequest(steps=2), 0, second, lambda count: None)

    other = threading.Thread(target=ask)

    def begin(*_: Any) -> None:
        if not waits.is_set():
            other.start()
            assert waits.wait(20)

    monkeypatch.setattr(served, "_turn", seen)
    assert served._generator is not None
    hook = served._generator.network.model.register_forward_pre_hook(begin)
    made = served.sample(ImageRequest(steps=4), 0, Work(), lambda count: None)
    hook.remove()
    other.join(20)
    assert len(made) == 1 and not other.is_alive()


@pytest.mark.slow
def test_prompt_words_select_the_image(
    tmp_path: Path, family_folder: Callable[[str], Path], luthier_home: Path
) -> None:
    random, lines = np.random.default_rng(0), []
    for number in range(30):
        pixels = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encode_png(pixels))
        caption = f"a picture of {('one', 'two')[number % 2]}"
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    generator = trained(family_folder("unet"), tmp_path / "rows.jsonl", "diffusion")
    few = DenoisingSettings(steps=2)
    one, two = (generator.sample(1, prompt=text, settings=few)[0] for text in ("One", "two"))
    assert one.label == "" and not np.array_equal(one.pixels, two.pixels)
    with pytest.raises(RecipeError):
        generator.sample(1, prompt="zebra")
    served = SerialModel(None, generator)
    asked = ImageRequest(label="One")
    (answer,) = served.sample(asked, 0, Work(), lambda count: None)
    assert np.array_equal(answer.pixels, generator.sample(1, prompt="one")[0].pixels)
    with pytest.raises(InferenceRefused):
        served.sample(ImageRequest(label="zebra"), 0, Work(), lambda count: None)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
def test_adapter_export_matches_diffusers_images(
    images: Path, family_folder: Callable[[str], Path], luthier_home: Path, tmp_path: Path
) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from luthier.exports.writer import export

    base = family_folder("stable_diffusion")
    generator = trained(base, images)
    assert generator.objective.method == "diffusion"
    few = DenoisingSettings(steps=3)
    made = generator.sample(3, 1, prompt="0", settings=few)
    again = ImageGenerator.open(find("stable_diffusion:one")).sample(1, 1, prompt="0", settings=few)
    assert np.array_equal(made[0].pixels, again[0].pixels)
    before = ImageGenerator.open(find(str(base))).sample(1, 1, prompt="0", settings=few)
    assert not np.array_equal(made[0].pixels, before[0].pixels)

    noise = torch.randn(2, 4, 8, 8)
    objective = generator.objective.with_sampling(few)  # type: ignore[attr-defined]
    with torch.no_grad():
        found = objective.denoise(generator.network, noise, ["0", "1"], lambda: noise)
    adapter = export(find("stable_diffusion:one"), tmp_path / "adapter", merged=False)
    whole = export(find("stable_diffusion:one"), tmp_path / "whole", merged=True)
    assert [path.name for path in adapter.iterdir()] == ["pytorch_lora_weights.safetensors"]
    for folder in (base, whole):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if folder == base:
            pipe.load_lora_weights(adapter)
        theirs = pipe(
            ["0", "1"], latents=noise.clone(), num_inference_steps=3, guidance_scale=7.5,
            height=16, width=16, output_type="pt",
        ).images  # fmt: skip
        ours = (found / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_model_of_texts_makes_no_images(tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError):
        ImageGenerator.open(find(str(tiny_model_folder)))


def test_a_grid_shows_each_image_once() -> None:
    tiles = [np.full((4, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    whole = grid(tiles)
    assert whole.shape == (2 * 6 + 2, 2 * 5 + 2, 3)
    assert [int((whole == value).all(-1).sum()) for value in (10, 20, 30)] == [12, 12, 12]
    assert grid(tiles, columns=3).shape == (8, 17, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(whole)))), whole)


def test_metadata_of_a_generated_image_name_the_model() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    made = Image.open(io.BytesIO(encode_png(pixels, "small-vae:digits")))
    assert "synthetic" in made.info["Title"] and made.info["Source"] == "small-vae:digits"
    assert "Title" not in Image.open(io.BytesIO(encode_png(pixels))).info
