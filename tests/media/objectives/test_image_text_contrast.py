"""CLIP: loss and embeddings compared with transformers, and training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import luthier
from luthier.cli.tune import print_result
from luthier.data.inputs import Media
from luthier.data.shapes.media import CaptionedImage
from luthier.errors import RecipeError
from luthier.exports.writer import export
from luthier.library.models import find
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Contrastive
from luthier.types import Example, Row

CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (20, 20, 230), "white": (250,) * 3}
CAPTIONS = [f"{kind} {colour}" for colour in COLOURS for kind in ("all", "half")]


def picture(caption: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a square of one color, or black with a colored lower half."""
    kind, colour = caption.split()
    pixels = np.zeros((20, 16, 3))
    pixels[10 if kind == "half" else 0 :] = COLOURS[colour]
    pixels += np.random.default_rng(seed).normal(0, 12, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def rows(captions: list[str] = CAPTIONS) -> list[Row]:
    return [
        CaptionedImage("f", n, Media("image", f"i[{n}]", array=picture(each, n)), each)
        for n, each in enumerate(captions)
    ]


def ready(folder: Path, objective: Contrastive) -> tuple[Network, list[Example]]:
    chat = load_chat_format(folder)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    return network, [objective.encode(row, n, chat) for n, row in enumerate(rows())]


def own_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Return the rows as encoded by transformers' processor."""
    images = [Image.fromarray(picture(each, n)) for n, each in enumerate(CAPTIONS)]
    processor = CLIPProcessor.from_pretrained(folder)
    return dict(processor(text=CAPTIONS, images=images, padding=True, return_tensors="pt"))


def step(network: Network, objective: Contrastive, examples: list[Example], budget: int) -> float:
    network.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        batches = objective.annotate(network, examples, budget)
    assert len(batches) == (1 if budget >= 2 * len(examples) else 4)
    total = 0.0
    for batch in batches:
        loss = objective.loss(network, batch)
        loss.total.backward()
        total += float(loss.total.detach())
    return total


@pytest.mark.parametrize("scale", [None, math.log(100) - 0.01, 7.0])
@pytest.mark.parametrize("budget", [100, 4])
def test_loss_and_gradient_match_transformers(
    budget: int, scale: float | None, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder("clip")
    objective = Contrastive().fit(rows(), load_chat_format(folder))
    assert objective.temperature is None
    network, examples = ready(folder, objective)
    own: Any = CLIPModel.from_pretrained(folder)
    if scale is not None:
        network.model.logit_scale.data.fill_(scale)
        own.logit_scale.data.fill_(min(scale, math.log(100)))  # the limit of the paper
    network.model.eval()
    expected = own.eval()(**own_inputs(folder), return_loss=True).loss
    expected.backward()
    total = step(network, objective, examples, budget) / len(examples)
    assert total == pytest.approx(float(expected.detach()), rel=1e-4)
    wanted = {name: weight.grad for name, weight in own.named_parameters()}
    for name, weight in network.model.named_parameters():
        gradient = weight.grad / len(examples)
        if name == "logit_scale" and scale == 7.0:  # at the limit the scale can only fall
            assert gradient == pytest.approx(max(0.0, float(wanted[name])), rel=1e-3)
            continue
        assert (gradient - wanted[name]).norm() <= 2e-4 * wanted[name].norm() + 1e-5, name


def test_scale_above_limit_can_decrease(
    family_folder: Callable[[str], Path],
) -> None:
    objective = Contrastive()
    network, examples = ready(family_folder("clip"), objective)
    network.model.logit_scale.data.fill_(math.log(100) + 1e-3)
    network.model.eval()
    step(network, objective, examples, 100)
    # A large scale makes random embeddings confidently wrong.
    assert network.model.logit_scale.grad > 0


def test_given_temperature_replaces_learned_scale(family_folder: Callable[[str], Path]) -> None:
    network, examples = ready(family_folder("clip"), Contrastive())
    network.model.eval()
    learned = float(network.model.logit_scale.detach())
    same = step(network, Contrastive(temperature=math.exp(-learned)), examples, 100)
    assert network.model.logit_scale.grad is None
    assert same == pytest.approx(step(network, Contrastive(), examples, 100), rel=1e-5)
    other = step(network, Contrastive(temperature=0.5), examples, 100)
    assert abs(other - same) > 1e-3 * same


def test_captions_need_an_encoder_of_texts(family_folder: Callable[[str], Path]) -> None:
    for family in ("small_cnn", "trocr"):
        with pytest.raises(RecipeError) as refused:
            Contrastive().fit(rows(), load_chat_format(family_folder(family)))
        assert refused.value.rule == "objective.network"


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir()
    lines = []
    for n in range(count):
        caption = CAPTIONS[n % len(CAPTIONS)]
        Image.fromarray(picture(caption, seed + n)).save(folder / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_texts_find_images_and_images_find_texts(
    adaptation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family_folder: Callable[[str], Path],
) -> None:
    train = write_pictures(tmp_path / "photos", 32)
    test = write_pictures(tmp_path / "test", 16, 1_000)
    base = str(family_folder("clip"))
    before = luthier.evaluate(base, test).scores  # a CLIP answers without being tuned
    tuned = luthier.tune(
        train, base=base, name=f"colours-{adaptation}", objective="contrastive",
        adaptation=adaptation, training__max_steps=50, training__batch_size=8,
        training__learning_rate=5e-3, training__precision="float32", data__validation_share=0,
    )  # fmt: skip
    print_result(tuned)
    said = capsys.readouterr().out
    assert "50 steps, 400 images in" in said  # eight a step, whatever their captions have of tokens
    for query in ("photo.png", '"some text"'):
        assert f"luthier nearest {tuned.model_id} DATA {query}\n" in said
    found = luthier.evaluate(tuned.model_id, test)
    assert found.scores["text_to_image_recall_at_1"] > 0.7 > before["text_to_image_recall_at_1"]
    assert found.scores["image_to_text_recall_at_1"] > 0.7 > before["image_to_text_recall_at_1"]
    assert "16 images searches 8 texts" in " ".join(found.remarks)
    model = luthier.load(tuned.model_id)
    near = model.nearest("half blue", test, count=2)
    assert {Path(each.name).name for each in near} == {"5.png", "13.png"}
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n")
    assert model.nearest(str(test / "5.png"), captions, count=1)[0].name == "half blue"
    vectors = model.embed(["half blue", str(test / "5.png")])
    assert vectors.shape == (2, 12)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-4)
    monkeypatch.chdir(test)  # rows name files in the same folder
    answer = model.predict({"image": "5.png", "other": "half blue"})["predicted"]
    assert answer["score"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-4)
    out = tmp_path / "out"
    export(find(tuned.model_id), out, merged=adaptation == "lora")
    own: Any = CLIPModel.from_pretrained(out).eval()
    inputs: Any = CLIPProcessor.from_pretrained(out)(
        text=["half blue"], images=[Image.open(test / "5.png")], return_tensors="pt"
    )
    with torch.no_grad():
        output = own(**inputs)
    assert vectors[0] == pytest.approx(output.text_embeds[0].numpy(), abs=1e-4)
    assert vectors[1] == pytest.approx(output.image_embeds[0].numpy(), abs=1e-4)
