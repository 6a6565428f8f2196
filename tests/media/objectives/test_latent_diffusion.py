"""Diffusion with a diffusers pipeline: loss and images compared with diffusers' own parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adaptations.lora import LoRA
from luthier.data.conversations.chat import ChatFormat
from luthier.data.conversations.chat_template import ChatTemplate
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, CaptionedImage, LabelledImage
from luthier.engine.memory import estimate_memory, preparation_bytes
from luthier.errors import RecipeError
from luthier.media.objectives.diffusion import DenoisingSettings, Diffusion
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.base import RunModels
from luthier.types import Example, Row

CPU = torch.device("cpu")
CAPTIONS = ("a red cat", "two dogs", "a red cat asleep")


def image(number: int) -> Media:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 18, 3), dtype=np.uint8)
    return Media("image", f"i[{number}]", array=pixels)


ROWS: list[Row] = [CaptionedImage("f", n, image(n), text) for n, text in enumerate(CAPTIONS)]


@dataclass
class Prepared:
    """A pipeline with a trained adapter."""

    objective: Diffusion
    network: Network
    examples: list[Example]
    chat: ChatFormat
    folder: Path


@pytest.fixture
def prepared(family_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Prepared]:
    def prepare(scheduler: dict[str, Any] | None = None, **fields: Any) -> Prepared:
        folder = family_folder("stable_diffusion")
        if scheduler:
            folder = shutil.copytree(folder, tmp_path / "pipeline")
            path = folder / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
        chat = load_chat_format(folder)
        objective = Diffusion(**fields).fit(ROWS, chat)
        examples = [objective.encode(row, index, chat) for index, row in enumerate(ROWS)]
        objective = objective.bind(RunModels(chat, ModelFolder(folder)))
        torch.manual_seed(0)
        model = load_model(folder, torch.float32, CPU, objective.head())
        network = as_network(model, CPU, torch.float32)
        network.chat = chat
        LoRA(rank=2).attach(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.1)
        return Prepared(objective, network, examples, chat, folder)

    return prepare


def pipeline_of(prepared: Prepared, spacing: str | None = None) -> Any:
    """Return diffusers' pipeline with the adapter merged into the U-Net."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(prepared.folder)
    more = {"timestep_spacing": spacing} if spacing else {}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **more)
    pipe.set_progress_bar_config(disable=True)
    LoRA(rank=2).merge(prepared.network.model)
    pipe.unet.load_state_dict(prepared.network.model.unet.state_dict())
    return pipe


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_matches_diffusers_training_script(
    prediction: str, prepared: Callable[..., Prepared]
) -> None:
    from diffusers import DDPMScheduler

    one = prepared({"prediction_type": prediction}, condition_dropout=0.0)
    assert one.objective.prediction_type == prediction
    one.network.model.train()
    (batch,) = one.objective.annotate(one.network, one.examples, 100)
    found = one.objective.loss(one.network, batch).total.detach()

    pipe, drawn = pipeline_of(one), batch.extra
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    texts = [CAPTIONS[example.row] for example in batch.tree.examples]
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        latents = pipe.vae.encode(batch.plan).latent_dist.mode() * pipe.vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, drawn.noise, drawn.time_R)
        states = pipe.text_encoder(ids)[0]
        predicted = pipe.unet(noisy, drawn.time_R, states).sample
    target = drawn.noise
    if prediction == "v_prediction":
        target = scheduler.get_velocity(latents, drawn.noise, drawn.time_R)
    wanted = (predicted - target).square().mean((1, 2, 3)).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("prediction", "spacing", "scale", "negative"),
    [
        ("epsilon", "leading", 3.0, None),
        ("v_prediction", "trailing", 3.0, None),
        ("epsilon", "trailing", 1.0, None),
        ("epsilon", "leading", 3.0, "a blue bird"),
    ],
)
def test_images_match_diffusers_pipeline(
    prediction: str,
    spacing: str,
    scale: float,
    negative: str | None,
    prepared: Callable[..., Prepared],
) -> None:
    one = prepared({"prediction_type": prediction, "timestep_spacing": spacing})
    one.network.model.eval()
    noise, texts = torch.randn(2, 4, 8, 8), ["two dogs", "a red cat"]
    asked = one.objective.with_sampling(DenoisingSettings(5, scale, negative_prompt=negative))
    found = asked.denoise(one.network, noise, texts, lambda: noise)
    made = pipeline_of(one)(
        texts,
        latents=noise.clone(),
        num_inference_steps=5,
        guidance_scale=scale,
        negative_prompt=negative and [negative] * 2,
        output_type="pt",
        height=16,
        width=16,
    )
    wanted = made.images
    assert wanted.std() > 0.05
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=1e-3, atol=1e-4)
    if negative is not None:
        plain = one.objective.with_sampling(DenoisingSettings(5, scale))
        other = plain.denoise(one.network, noise, texts, lambda: noise)
        assert (found - other).abs().max() > 1e-2


def test_long_and_unused_negative_prompts_are_refused(prepared: Callable[..., Prepared]) -> None:
    one = prepared(num_inference_steps=2)
    long = one.objective.with_sampling(DenoisingSettings(negative_prompt="a b " * 60))
    with pytest.raises(RecipeError) as refused:
        long.sample(one.network, ["a cat"], torch.Generator().manual_seed(0))
    assert refused.value.setting == "negative_prompt"
    assert refused.value.setting == "negative_prompt"
    with pytest.raises(RecipeError) as refused:
        one.objective.with_sampling(DenoisingSettings(guidance_scale=1, negative_prompt="a"))
    assert refused.value.setting == "negative_prompt"


@torch.no_grad()
def test_sample_is_independent_of_batch(prepared: Callable[..., Prepared]) -> None:
    one = prepared(num_inference_steps=3)
    one.network.model.eval()
    cat, dogs = (
        one.objective.sample(one.network, [text], torch.Generator().manual_seed(0))
        for text in CAPTIONS[:2]
    )
    both = one.objective.sample(one.network, CAPTIONS[:2], torch.Generator().manual_seed(0))
    assert both.shape == (2, 3, 16, 16)
    torch.testing.assert_close(both[:1], cat, rtol=1e-3, atol=1e-4)
    assert not torch.equal(cat, dogs)


def test_noise_settings_come_from_base(prepared: Callable[..., Prepared]) -> None:
    bound = prepared().objective
    assert (bound.beta_start, bound.beta_schedule) == (0.00085, "scaled_linear")
    assert (bound.timestep_spacing, bound.steps_offset) == ("leading", 1)
    assert bound.reads_prompts and bound.sample_labels == () and bound.words == ()
    assert (bound._scale, bound._eta) == (7.5, 0.0)
    assert (Diffusion()._scale, Diffusion()._eta) == (2.0, 1.0)
    with pytest.raises(RecipeError) as refused:
        prepared(prediction_type="v_prediction")
    assert refused.value.setting == "objective.prediction_type"
    stored, folder = Diffusion.model_validate(bound.model_dump()), prepared().folder
    assert stored.bind(RunModels(load_chat_format(folder), ModelFolder(folder))) == bound


def test_unknown_schedule_is_refused(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(RecipeError) as refused:
        prepared({"beta_schedule": "laplace"})
    assert refused.value.rule == "scheduler.invalid"


def test_condition_comes_from_caption_or_label(prepared: Callable[..., Prepared]) -> None:
    one = prepared()
    rows: list[Row] = [
        CaptionedImage("f", 0, image(0), "two dogs"),
        LabelledImage("f", 1, image(0), "two dogs"),
        BareImage("f", 2, image(0)),
    ]
    caption, label, none = (one.objective.encode(row, 0, one.chat).target for row in rows)
    np.testing.assert_array_equal(caption, label)
    np.testing.assert_array_equal(none, one.objective._empty_condition(one.network))
    assert len(none) == len(caption) == 48
    asked = [one.objective.label_of(each, one.chat) for each in one.examples]
    assert asked == [*CAPTIONS]


def test_a_share_of_the_captions_is_withheld_in_training(prepared: Callable[..., Prepared]) -> None:
    one = prepared(condition_dropout=0.4)
    nothing = one.network.model.encode_conditions([one.objective._empty_condition(one.network)])
    one.network.model.train()
    drawn = [one.objective.annotate(one.network, one.examples, 100)[0].extra for _ in range(30)]
    hidden = [torch.equal(row[None], nothing) for each in drawn for row in each.condition]
    assert np.mean(hidden) == pytest.approx(0.4, abs=0.15)
    one.network.model.eval()
    shown = one.objective.annotate(one.network, one.examples, 100)[0].extra.condition
    assert not any(torch.equal(row[None], nothing) for row in shown)


def test_long_caption_is_refused_or_truncated(prepared: Callable[..., Prepared]) -> None:
    one = prepared()
    row = CaptionedImage("f", 0, image(0), "z" * 60)
    example = one.objective.encode(row, 0, one.chat)
    problem = one.objective.length_problem(example, 48)
    assert problem is not None and problem.rule == "row.too_long" and "62 tokens" in str(problem)
    cut = one.objective.truncate(example, 48)
    assert len(cut.target) == 48 and cut.target[-1] == example.target[-1]  # type: ignore[arg-type]
    assert one.objective.length_problem(cut, 48) is None
    one.network.model.eval()
    with pytest.raises(RecipeError) as refused:
        one.objective.sample(one.network, ["z" * 60], torch.Generator())
    assert refused.value.setting == "prompt"


def test_lora_trains_only_attention_layers(prepared: Callable[..., Prepared]) -> None:
    one = prepared()
    one.network.model.train()
    (batch,) = one.objective.annotate(one.network, one.examples, 100)
    one.objective.loss(one.network, batch).total.backward()
    trained = {n for n, weight in one.network.model.named_parameters() if weight.requires_grad}
    ends = {name.rpartition(".lora_")[0].partition(".attn")[2][2:] for name in trained}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}
    for name, weight in one.network.model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (name in trained), name


def test_caption_cut_inside_word_is_decoded(
    family_folder: Callable[[str], Path],
) -> None:
    chat = load_chat_format(family_folder("stable_diffusion"))
    merged = ChatFormat(ChatTemplate(CutWords(chat.tokenizer), "plain", ()))
    ids_T = np.array(merged.tokenizer("a" * 60).input_ids)
    row = CaptionedImage("f", 1, image(1), "a" * 60)
    example = dataclasses.replace(chat.encode_input(row, 0), target=ids_T[:48])
    objective = Diffusion().fit(ROWS, chat)
    text = objective.label_of(example, merged)
    assert text == "a" * 46 and len(merged.tokenizer(text).input_ids) == 48


class CutWords:
    """A tokenizer that encodes the end of a word with an additional token."""

    def __init__(self, own: Any) -> None:
        self.own, self.model_max_length = own, own.model_max_length

    def __call__(self, text: str, **settings: Any) -> Any:
        return self.own(text, **settings)

    def decode(self, ids_T: Any, **settings: Any) -> str:
        return str(self.own.decode(ids_T, **settings)) + "a"


@pytest.mark.parametrize(
    ("side", "at_once"),
    [(512, 4), *(pytest.param(*e, marks=pytest.mark.slow) for e in ((16, 32), (2048, 1)))],
)
def test_memory_estimate_uses_largest_autoencoder_map(
    side: int, at_once: int, family_folder: Callable[[str], Path]
) -> None:
    """The decoder's last stage enlarges maps before reducing channels."""
    model = ModelFolder(family_folder("stable_diffusion")).sketch(Diffusion().head())
    channels = 16
    found = preparation_bytes(model, 2, (3, side, side))
    assert found == 4 * channels * side * side * at_once * 2
    fixed = [estimate_memory(model, 2, reads=(3, each, each)).fixed for each in (16, side)]
    assert fixed[1] - fixed[0] == found - preparation_bytes(model, 2, (3, 16, 16))
    assert preparation_bytes(ModelFolder(family_folder("unet")).sketch(Diffusion().head()), 2) == 0
