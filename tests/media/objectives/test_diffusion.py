"""Denoising diffusion: loss, random numbers, conditions and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.conversations.chat import ChatFormat
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, CaptionedImage, LabelledImage
from luthier.errors import RecipeError, RowRefused
from luthier.media.objectives.diffusion import DenoisingSettings, Diffusion
from luthier.media.processors import ImageProcessor
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.base import RunModels
from luthier.types import Example, Row

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "fox")
CAPTIONS = ("a red Cat", "A red dog, asleep", "two dogs and a cat")


def image(number: int) -> Media:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Media("image", f"i[{number}]", array=pixels)


ROWS: dict[str, list[Row]] = {
    "labels": [LabelledImage("f", n, image(n), NAMES[n % 3]) for n in range(6)],
    "captions": [CaptionedImage("f", n, image(n), CAPTIONS[n % 3]) for n in range(6)],
    "images": [BareImage("f", n, image(n)) for n in range(6)],
}
Prepare = Callable[..., tuple[Diffusion, Network, list[Example]]]


@pytest.fixture
def prepared(family_folder: Callable[[str], Path]) -> Prepare:
    def prepare(rows: str = "labels", **fields: Any) -> tuple[Diffusion, Network, list[Example]]:
        folder = family_folder("unet")
        chat = load_chat_format(folder)
        objective = Diffusion(**fields).fit(ROWS[rows], chat)
        torch.manual_seed(0)
        model = load_model(folder, torch.float32, CPU, objective.head())
        examples = [objective.encode(row, index, chat) for index, row in enumerate(ROWS[rows])]
        return objective, as_network(model, CPU, torch.float32), examples

    return prepare


def test_the_simple_loss_is_the_error_of_the_noise(prepared: Prepare) -> None:
    objective, network, examples = prepared(
        prediction_type="epsilon",
        loss_weighting="none",
        beta_schedule="linear",
        condition_dropout=0.0,
    )
    network.model.train()
    (batch,) = objective.annotate(network, examples, 100)
    beta_T = torch.linspace(1e-4, 0.02, 1000)
    wanted = 0.0
    for row, example in enumerate(batch.tree.examples):
        time, noise = int(batch.extra.time_R[row]), batch.extra.noise[row]
        left = float(torch.prod(1 - beta_T[: time + 1]))
        noisy = left**0.5 * batch.plan[row] + (1 - left) ** 0.5 * noise
        told = torch.eye(3)[int(np.asarray(example.target)[0])][None]
        found = network.model(noisy[None], torch.tensor([time]), told).prediction[0]
        wanted += float((found - noise).square().mean().detach())
    assert float(objective.loss(network, batch).total.detach()) == pytest.approx(wanted, rel=1e-4)


def test_noise_varies_in_training_and_is_fixed_in_validation(prepared: Prepare) -> None:
    objective, network, examples = prepared()
    network.model.train()
    one, other = (objective.annotate(network, examples, 100)[0].extra for _ in range(2))
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.time_R, other.time_R)
    network.model.eval()
    one, other = (objective.annotate(network, examples, 100)[0].extra for _ in range(2))
    assert torch.equal(one.noise, other.noise) and torch.equal(one.time_R, other.time_R)
    assert len(set(one.time_R.tolist())) > 1 and abs(float(one.noise.mean())) < 0.1
    parity = [objective.parity_loss(network, examples, budget) for budget in (100, 2)]
    assert parity[0] == pytest.approx(parity[1], rel=1e-5)


def test_condition_dropout_applies_only_in_training(prepared: Prepare) -> None:
    objective, network, examples = prepared(condition_dropout=0.4)
    network.model.train()
    torch.manual_seed(0)
    seen = torch.cat(
        [objective.annotate(network, examples, 100)[0].extra.condition for _ in range(50)]
    )
    assert float((seen.sum(1) == 0).float().mean()) == pytest.approx(0.4, abs=0.1)
    network.model.eval()
    told = objective.annotate(network, examples, 100)[0].extra.condition
    assert torch.equal(told.sum(1), torch.ones(6))


def test_caption_vocabulary_omits_rare_words(prepared: Prepare) -> None:
    objective, network, examples = prepared("captions")
    assert objective.words == ("a", "and", "asleep", "cat", "dog", "dogs", "red", "two")
    assert objective.reads_prompts and objective.sample_labels == ()
    network.model.eval()
    told = objective.annotate(network, examples[:1], 100)[0].extra.condition
    wanted = torch.zeros(8)
    wanted[[0, 3, 6]] = 3**-0.5
    torch.testing.assert_close(told[0], wanted)
    with pytest.raises(RecipeError) as refused:
        objective.check_prompt("zebra")
    assert refused.value.setting == "prompt"
    objective.check_prompt("a zebra")
    once = Diffusion().fit(ROWS["captions"][:2], None)  # type: ignore[arg-type]
    assert once.words == ("a", "red")  # words of a single caption are dropped


def test_rows_without_labels_train_unconditionally(
    prepared: Prepare, family_folder: Callable[[str], Path]
) -> None:
    objective, network, examples = prepared("images")
    assert objective.labels == objective.words == () and not objective.reads_prompts
    assert network.model.conditions is None
    network.model.train()
    (batch,) = objective.annotate(network, examples, 100)
    assert batch.extra.condition is None
    assert float(objective.loss(network, batch).total.detach()) > 0
    made = objective.sample(network, ["", ""], torch.Generator().manual_seed(0))
    assert made.shape == (2, 3, 9, 7)
    with pytest.raises(RowRefused) as refused:
        prepared()[0].encode(ROWS["images"][0], 0, load_chat_format(family_folder("unet")))
    assert refused.value.rule == "label.unseen"


@torch.no_grad()
def test_sample_is_independent_of_batch(prepared: Prepare) -> None:
    objective, network, _ = prepared(num_inference_steps=4, eta=1.0)
    network.model.eval()
    cats, dogs = (
        objective.sample(network, [name], torch.Generator().manual_seed(0)) for name in NAMES[:2]
    )
    both = objective.sample(network, NAMES[:2], torch.Generator().manual_seed(0))
    torch.testing.assert_close(both[:1], cats)
    assert not torch.equal(cats, dogs)
    assert cats.abs().max() <= 1


@torch.no_grad()
def test_guidance_extrapolates_from_unconditional_prediction(prepared: Prepare) -> None:
    objective, network, _ = prepared()
    network.model.eval()
    noisy, time_R = torch.randn(3, 3, 9, 7), torch.tensor([5, 500, 900])
    conditional = network.model(noisy, time_R, torch.eye(3)).prediction
    unconditional = network.model(noisy, time_R).prediction
    for scale in (0.0, 1.0, 3.0):
        asked = objective.with_sampling(DenoisingSettings(guidance_scale=scale))
        guidance = asked._guidance(network, NAMES)
        found = asked._predict(network, noisy, time_R, guidance)
        torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional))


@torch.no_grad()
def test_negative_prompt_replaces_empty_condition(prepared: Prepare) -> None:
    objective, network, _ = prepared("captions")
    network.model.eval()
    word = (objective.words or ())[0]
    noisy, time_R = torch.randn(3, 3, 9, 7), torch.tensor([5, 500, 900])
    settings = DenoisingSettings(guidance_scale=3.0, negative_prompt=f"{word.upper()} unheard-of")
    found = objective.with_sampling(settings)._guidance(network, CAPTIONS)
    away = network.model.encode_conditions([np.array([0])] * 3)
    assert found.nothing is not None and torch.equal(found.nothing, away)
    conditional, negative = (
        network.model.denoise(noisy, time_R, each) for each in (found.condition, away)
    )
    predicted = objective.with_sampling(settings)._predict(network, noisy, time_R, found)
    torch.testing.assert_close(predicted, negative + 3.0 * (conditional - negative))
    stored = objective.model_copy(update={"negative_prompt": word})
    kept = stored.with_sampling(DenoisingSettings(guidance_scale=3.0))._guidance(network, CAPTIONS)
    assert kept.nothing is not None and torch.equal(kept.nothing, away)


def test_negative_prompt_without_known_words_is_refused(prepared: Prepare) -> None:
    for rows, text in (("labels", "cat"), ("captions", "unheard-of")):
        objective, _, _ = prepared(rows)
        with pytest.raises(RecipeError) as refused:
            objective.with_sampling(DenoisingSettings(negative_prompt=text))
        assert refused.value.setting == "negative_prompt"
        with pytest.raises(RecipeError) as refused:
            prepared(rows, negative_prompt=text)
        assert refused.value.setting == "objective.negative_prompt"


def test_requested_settings_override_stored_settings() -> None:
    stored = Diffusion(num_inference_steps=7)
    asked = stored.with_sampling(DenoisingSettings(guidance_scale=3.0))
    assert (asked.num_inference_steps, asked.guidance_scale) == (7, 3.0)
    with pytest.raises(RecipeError) as refused:
        stored.with_sampling(DenoisingSettings(eta=2.0))
    assert refused.value.setting == "eta"


def test_invalid_pixel_range_is_refused() -> None:
    with pytest.raises(RecipeError) as refused:
        Diffusion().bind(RunModels(ChatFormat.reading(ImageProcessor(9, 7))))
    assert refused.value.rule == "image.range"
