"""The Fréchet distance of generated images from held-out images, for each objective."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.inputs import Media
from luthier.data.shapes.media import CaptionedImage, LabelledImage
from luthier.engine.metrics import draw_curves
from luthier.engine.runs import METRICS
from luthier.engine.train import train
from luthier.errors import RecipeError
from luthier.media.objectives.diffusion import Diffusion
from luthier.media.objectives.gan import GAN
from luthier.media.objectives.generative import Generative, features_of, frechet_distance
from luthier.media.objectives.vae import VAE
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.base import OtherModel, RunModels
from luthier.objectives.classification import Classification
from luthier.objectives.sft import SFT
from luthier.recipe import Recipe

CPU = torch.device("cpu")
MAKERS: list[tuple[type[Generative], str]] = [(GAN, "dcgan"), (VAE, "vae"), (Diffusion, "unet")]


def pixels(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def opened(folder: Path, head: Head) -> Network:
    torch.manual_seed(0)
    network = as_network(load_model(folder, torch.float32, CPU, head), CPU, torch.float32)
    network.chat = load_chat_format(folder)
    network.model.eval()
    return network


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), MAKERS)
def test_generators_measure_frechet_distance_of_samples(
    kind: type[Generative], family: str, family_folder: Callable[[str], Path]
) -> None:
    folder, judge_folder = family_folder(family), family_folder("small_cnn")
    chat = load_chat_format(folder)
    media = [Media("image", f"i[{n}]", array=pixels(n)) for n in range(40)]
    rows = [LabelledImage("f", n, each, "cat" if n % 2 else "dog") for n, each in enumerate(media)]
    objective: Any = kind(feature_model="judge").fit(rows, chat)
    network = opened(folder, objective.head())
    learned = objective.regroup(rows)
    examples = [objective.encode(row, n, chat) for n, row in enumerate(learned)]
    assert "frechet_distance" not in objective.validation_metrics(network, examples, 64)

    judge = opened(judge_folder, Head("sequence_classification", ("cat", "dog")))
    network.others["features"] = judge
    random_state = torch.get_rng_state()
    measured = objective.validation_metrics(network, examples, 64)
    assert torch.equal(random_state, torch.get_rng_state())  # a run that goes on draws the same

    # The same by hand: all images at once, their features and the formula.
    maker = objective.with_sampling(_twenty_steps()) if kind is Diffusion else objective
    labels = ["" if kind is VAE else row.label for row in rows]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = [maker.sample(network, part, generator) for part in (labels[:32], labels[32:])]
        made = [chat.media.to_pixels(each) for each in torch.cat(parts).float().numpy()]
        real = [chat.media.resize(each) for each in media]
        expected = frechet_distance(features_of(judge, real), features_of(judge, made))
    assert measured["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def _twenty_steps() -> Any:
    from luthier.media.objectives.diffusion import DenoisingSettings

    return DenoisingSettings(steps=20)


def test_caption_label_contains_only_known_words(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("unet"))
    captions = ["a red disc", "a red ring", "a disc alone"]
    rows = [
        CaptionedImage("f", n, Media("image", f"i[{n}]", array=pixels(n)), caption)
        for n, caption in enumerate(captions)
    ]
    objective = Diffusion().fit(rows, chat)
    examples = [objective.encode(row, n, chat) for n, row in enumerate(rows)]
    assert [objective.label_of(each, chat) for each in examples] == [
        "a red disc",
        "a red",
        "a disc",
    ]


def test_feature_model_must_be_an_image_classifier(
    family_folder: Callable[[str], Path],
) -> None:
    objective = GAN(feature_model="other")
    images, texts = (load_chat_format(family_folder(name)) for name in ("dcgan", "bert"))
    with pytest.raises(RecipeError) as refused:
        objective.bind(RunModels(images, others={"features": OtherModel(SFT(), 8, images)}))
    assert refused.value.rule == "objective.feature_model"
    classifier = OtherModel(Classification(), 8, images)
    assert objective.bind(RunModels(images, others={"features": classifier})) is objective
    with pytest.raises(RecipeError) as refused:
        objective.bind(RunModels(images, others={"features": replace(classifier, chat=texts)}))
    assert refused.value.rule == "objective.feature_model"


def test_features_are_inputs_of_the_classifier_head(
    family_folder: Callable[[str], Path],
) -> None:
    judge = opened(family_folder("small_cnn"), Head("sequence_classification", ("cat", "dog")))
    images = [pixels(n) for n in range(3)]
    found = features_of(judge, images)
    scores = judge.model.classifier(torch.from_numpy(found))
    read = judge.chat.media.array  # type: ignore[union-attr]
    arrays = torch.from_numpy(
        np.stack([read(Media("image", "x", array=image)) for image in images])
    )
    with torch.no_grad():
        assert torch.allclose(scores, judge.model(arrays).logits, atol=1e-5)


@pytest.mark.slow
def test_run_records_frechet_distance_at_each_validation(
    family_folder: Callable[[str], Path], tmp_path: Path, luthier_home: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(60) % 3)
    common = {
        "data": {"train": str(tmp_path / "images.npz"), "validation_share": 0.2},
        "adaptation": {"method": "full"},
        "training": {"max_steps": 2, "evaluate_every": 1, "batch_size": 4, "baseline_seconds": 0},
    }
    judge = {"base": str(family_folder("small_cnn")), "name": "judge"}
    learned = train(Recipe.parse({**common, **judge}))
    maker = {"base": str(family_folder("dcgan")), "name": "maker"}
    objective = {"method": "gan", "feature_model": learned.model_id}
    result = train(Recipe.parse({**common, **maker, "objective": objective}))
    lines = [json.loads(line) for line in Path(result.run_dir, METRICS).read_text().splitlines()]
    measured = [line["frechet_distance"] for line in lines if line["event"] == "validation"]
    assert len(measured) == 3
    assert min(measured) > 0
    draw_curves(lines, tmp_path, "maker")
    assert "Fréchet distance" in (tmp_path / "loss.svg").read_text()
    assert "frechet_distance" in result.verdict.kept
