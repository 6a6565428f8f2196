"""Images in chat messages: tokens, loss, LoRA, merging, generation and serving of Idefics 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from luthier.cli.inference.generate import generate
from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID
from luthier.data.rows import load_rows
from luthier.data.tree import build_tree
from luthier.engine.train import train
from luthier.errors import DataError, RowRefused
from luthier.exports.writer import export
from luthier.inference.generation import Generator
from luthier.library.models import StoredModel, find, load
from luthier.models.decoding.sampling import Sampling
from luthier.models.load import as_network
from luthier.objectives.sft import SFT
from luthier.recipe import Recipe
from luthier.server.jobs.import_checks import accept_network
from luthier.types import Example
from vision_chat import save_base

CPU = torch.device("cpu")
SIZES = ((40, 30), (20, 60), (16, 16))
ROWS = [
    [("user", [0, "What is it?", 1, " and <image> this?"]), ("assistant", "red"),
     ("user", "And?"), ("assistant", "blue")],
    [("user", "What is it?"), ("assistant", "blue")],
    [("user", [0, "What is it?"]), ("assistant", "red")],
    [("user", [0, "What is it?", 2, "?"]), ("assistant", "green")],
]  # fmt: skip
"""Rows without images, and with one or two; a number is the index of an image."""


def turn(role: str, content: Any) -> dict[str, Any]:
    """Return a message in OpenAI's form."""
    if isinstance(content, str):
        return {"role": role, "content": content}
    parts = [
        {"type": "text", "text": each}
        if isinstance(each, str)
        else {"type": "image_url", "image_url": {"url": f"{each}.png"}}
        for each in content
    ]
    return {"role": role, "content": parts}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of rows next to its images."""
    folder, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [json.dumps({"messages": [turn(*each) for each in row]}) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


@pytest.fixture(
    scope="module", params=["idefics3", pytest.param("smolvlm", marks=pytest.mark.slow)]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a vision-language model."""
    return save_base(tmp_path_factory.mktemp("base"), request.param)


def encoded(stored: StoredModel, data: Path) -> list[Example]:
    """Return the rows of ``data`` as token ids."""
    return [SFT().encode(row, index, stored.chat) for index, row in enumerate(load_rows(data))]


def own_inputs(folder: Path, data: Path, row: Example) -> dict[str, torch.Tensor]:
    """Return transformers' inputs for the tokens of ``row``."""
    from transformers import AutoConfig, AutoImageProcessor

    image_id = AutoConfig.from_pretrained(folder).image_token_id
    ids_T = np.where(row.ids_T < FIRST_IMAGE_ID, row.ids_T, image_id)
    ids_1T = torch.from_numpy(ids_T)[None]
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    if row.images:
        images = [Image.open(data.parent / media.name) for media in row.images]
        process = AutoImageProcessor.from_pretrained(folder)
        inputs |= dict(process(images=[images], return_tensors="pt"))
    return inputs


def mean_loss(model: Any, folder: Path, data: Path, rows: list[Example]) -> float:
    """Return transformers' loss per learned token."""
    total, count = 0.0, 0
    for row in rows:
        learned_T = row.weight_T != 0
        labels = torch.from_numpy(np.where(learned_T, row.ids_T, -100))[None]
        with torch.no_grad():
            loss = model(**own_inputs(folder, data, row), labels=labels).loss
        total, count = total + float(loss) * int(learned_T.sum()), count + int(learned_T.sum())
    return total / count


@pytest.mark.usefixtures("in_float32")
def test_lora_on_rows_with_images_equals_transformers_and_peft(
    base: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    recipe = {
        "base": str(base), "name": "tuned", "adaptation": {"method": "lora", "rank": 4},
        "training": {"max_steps": 8, "learning_rate": 0.02, "precision": "float32", "threads": 1},
        "objective": "sft", "data": {"train": str(data), "validation_share": 0},
    }  # fmt: skip
    stored = find(train(Recipe.parse(recipe)).model_id)
    merged = export(stored, tmp_path / "merged", merged=True)
    adapter = export(stored, tmp_path / "adapter", merged=False)

    losses = []
    for model, folder in ((find(str(base)), base), (stored, merged), (find(str(merged)), merged)):
        rows = encoded(model, data)
        network = as_network(load(model, torch.float32, CPU), CPU, torch.float32)
        ours = SFT().parity_loss(network, rows, 1024)
        theirs = mean_loss(AutoModelForImageTextToText.from_pretrained(folder), base, data, rows)
        assert ours == pytest.approx(theirs, rel=1e-4)
        losses.append(ours)
    assert losses[1] < losses[0] - 1
    plain = AutoModelForImageTextToText.from_pretrained(base)
    by_peft = mean_loss(PeftModel.from_pretrained(plain, adapter), base, data, rows)
    assert by_peft == pytest.approx(losses[1], rel=1e-4)

    # The vision encoder of the merged model is that of the base model.
    both = [AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (base, merged)]
    changed = {name for name in both[0] if not torch.equal(both[0][name], both[1][name])}
    assert changed and all(name.startswith("model.text_model.layers.") for name in changed)


@pytest.mark.usefixtures("in_float32")
def test_generation_equals_transformers_and_knows_images_apart(base: Path, data: Path) -> None:
    from transformers import AutoModelForImageTextToText

    generator = Generator.open(find(str(base)))
    prompts = [row.prompt_turns() for row in load_rows(data)]
    own = AutoModelForImageTextToText.from_pretrained(base)
    expected = []
    for prompt in prompts:
        ids_T = generator.chat.encode_prompt(prompt)
        images = tuple(media for turn in prompt for media in turn.images)
        row = Example(ids_T, np.zeros(len(ids_T), np.float32), 0, images=images)
        inputs = own_inputs(base, data, row)
        with torch.no_grad():
            out = own.generate(**inputs, do_sample=False, max_new_tokens=12)[0]
        written = out[len(ids_T) :].tolist()
        expected.append(tuple(written[: [*written, 2].index(2)]))  # up to <end_of_utterance>
    answers = generator.answers(prompts, Sampling(max_tokens=12, temperature=0))
    assert [answer.ids for answer in answers] == expected
    assert len({*expected}) == len(expected)
    reply = generate(str(base), "What is it?", image=[data.parent / "0.png"], max_tokens=12).plain()
    assert reply["completion"] == answers[2].text
    # Penalties index the vocabulary by prompt tokens.
    penal = Sampling(max_tokens=4, temperature=0, repetition_penalty=1.3)
    assert len(generator.replies(prompts, penal)) == len(prompts)


def test_rows_share_the_tokens_of_equal_images_only(base: Path, data: Path) -> None:
    rows = encoded(find(str(base)), data)[2:]
    tree = build_tree(rows)
    opening = int(np.flatnonzero(rows[0].ids_T != rows[1].ids_T[: len(rows[0])])[0])
    assert opening > int(np.flatnonzero(rows[0].ids_T >= FIRST_IMAGE_ID)[-1])
    assert len(tree) == len(rows[0]) + len(rows[1]) - opening
    images = [row.ids_T[row.ids_T >= FIRST_IMAGE_ID] for row in rows]
    assert not {*images[0].tolist()} & {*images[1][len(images[0]) :].tolist()}


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
def test_a_model_learns_the_colour_of_an_image(base: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def image(name: str, colour: str) -> dict[str, Any]:
        pixels = random.integers(0, 60, (24, 24, 3), dtype=np.uint8)
        pixels[:, :, 0 if colour == "red" else 2] += 190
        Image.fromarray(pixels).save(tmp_path / name)
        parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        turns = [turn("assistant", colour)]
        return {"images": [name], "messages": [{"role": "user", "content": parts}, *turns]}

    rows = [image(f"{at}.png", ("red", "blue")[at % 2]) for at in range(12)]
    for name, part in (("train", rows[:8]), ("new", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    recipe = {
        "base": str(base), "name": "colours", "adaptation": {"method": "lora", "rank": 8},
        "training": {"max_steps": 40, "learning_rate": 0.01, "precision": "float32", "threads": 1},
        "objective": "sft", "data": {"train": str(tmp_path / "train.jsonl"), "validation_share": 0},
    }  # fmt: skip
    generator = Generator.open(find(train(Recipe.parse(recipe)).model_id))
    new = [*load_rows(tmp_path / "new.jsonl")]
    replies = generator.replies([row.prompt_turns() for row in new], Sampling(temperature=0))
    assert [reply.strip() for reply in replies] == ["red", "blue", "red", "blue"]


@pytest.mark.parametrize(
    ("content", "images", "rule"),
    [
        ([{"type": "image_url", "image_url": {"url": "no.png"}}], None, "media.missing"),
        ([{"type": "image_url", "image_url": {"url": "../0.png"}}], None, "media.outside"),
        ([{"type": "image", "url": "https://example.org/0.png"}], None, "media.remote"),
        ([{"type": "image"}], [], "media.count"),
        ([{"type": "image"}], ["0.png", "1.png"], "media.count"),
        ([{"type": "text", "text": "\ufffc"}], None, "message.part"),
        ([{"image": {"format": "png", "source": {"bytes": "?"}}}], None, "media.type"),
    ],
)
def test_rows_with_wrong_images_are_refused(
    data: Path, content: Any, images: Any, rule: str
) -> None:
    row = {"messages": [{"role": "user", "content": content}, turn("assistant", "red")]}
    path = data.parent / "wrong.jsonl"
    path.write_text(json.dumps(row if images is None else {**row, "images": images}))
    with pytest.raises(DataError) as refused:
        load_rows(path)
    assert [(each.rule, each.line) for each in refused.value.problems] == [(rule, 1)]


def test_a_text_model_refuses_rows_with_images(tiny_model_folder: Path, data: Path) -> None:
    with pytest.raises(RowRefused) as refused:
        encoded(find(str(tiny_model_folder)), data)
    assert refused.value.rule == "media.base"


def test_imported_model_keeps_image_processor(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "imported")
    assert accept_network(folder, "imported", trusted=True).manifest.kind == "causal_lm"
    assert find(str(folder)).chat.template.images == find(str(base)).chat.template.images


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("method", ["full", "freeze", "qlora", "prompt"])
def test_adaptations_train_the_text_part(
    base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    from transformers import AutoModelForImageTextToText

    recipe = {
        "base": str(base), "name": "tuned", "adaptation": {"method": method},
        "training": {"max_steps": 8, "learning_rate": 0.02, "precision": "float32", "threads": 1},
        "objective": "sft", "data": {"train": str(data), "validation_share": 0},
    }  # fmt: skip
    stored = find(train(Recipe.parse(recipe)).model_id)
    rows, losses = encoded(stored, data), []
    for model in (find(str(base)), stored):
        network = as_network(load(model, torch.float32, CPU), CPU, torch.float32)
        losses.append(SFT().parity_loss(network, rows, 1024))
    assert losses[1] < losses[0]
    if stored.adaptation.mergeable:
        merged = export(stored, tmp_path / "merged", merged=True)
        own = AutoModelForImageTextToText.from_pretrained(merged)
        assert losses[1] == pytest.approx(mean_loss(own, base, data, rows), rel=1e-4)
