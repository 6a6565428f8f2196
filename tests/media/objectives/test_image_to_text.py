"""Image to text: loss and greedy text compared with transformers, and metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel

import luthier
from luthier.data.conversations.chat import ChatFormat
from luthier.data.inputs import Media
from luthier.data.shapes.media import BareImage, CaptionedImage
from luthier.errors import RecipeError, RowRefused, UnknownModel
from luthier.library import models as store
from luthier.media.objectives.image_to_text import ImageToText
from luthier.models.folder import ModelFolder
from luthier.models.formats.tensors import load_tensors, save_tensors
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import EMBEDDING_HEAD
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives.base import RunModels
from luthier.objectives.means import mean_loss
from luthier.types import Example

CPU = torch.device("cpu")
TEXTS = ["yes", "Đây là một dòng chữ.", "no", "ba"]


def rows() -> list[CaptionedImage]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (len(TEXTS), 20, 31), dtype=np.uint8)
    return [
        CaptionedImage("f", n, Media("image", f"i[{n}]", array=image), text)
        for n, (image, text) in enumerate(zip(images, TEXTS, strict=True), 1)
    ]


@pytest.fixture
def chat(family_folder: Callable[[str], Path]) -> ChatFormat:
    return load_chat_format(family_folder("trocr"))


@pytest.fixture
def network(family_folder: Callable[[str], Path], chat: ChatFormat) -> Network:
    model = load_model(family_folder("trocr"), torch.float32, CPU, ImageToText().head())
    torch.manual_seed(1)
    for weight in model.parameters():  # avoids repetitive greedy text
        weight.data += 0.3 * torch.randn_like(weight)
    found = as_network(model, CPU, torch.float32)
    found.chat = chat
    return found


@pytest.fixture
def examples(chat: ChatFormat) -> list[Example]:
    return [ImageToText().encode(row, index, chat) for index, row in enumerate(rows())]


def pixels_of(examples: list[Example]) -> torch.Tensor:
    return torch.from_numpy(np.stack([each.media.array() for each in examples if each.media]))


@torch.no_grad()
@pytest.mark.parametrize("budget", [100, 2])
def test_loss_matches_transformers(network: Network, examples: list[Example], budget: int) -> None:
    model: VisionEncoderDecoderModel = network.model
    wanted = 0.0
    for example in examples:
        # transformers shifts the labels and returns a mean.
        labels = torch.from_numpy(example.ids_T[1:])[None]
        found = model(pixel_values=pixels_of([example]), labels=labels)
        wanted += float(found.loss) * labels.numel()
    weight = sum(example.weight for example in examples)
    assert weight == sum(len(text) + 1 for text in TEXTS)  # a token per letter, and the end
    loss = mean_loss(ImageToText(), network, examples, budget)
    assert loss == pytest.approx(wanted / weight, rel=1e-5)


@torch.no_grad()
def test_generated_text_matches_transformers(
    network: Network, examples: list[Example], chat: ChatFormat
) -> None:
    model: Any = network.model
    own = model.generate(
        pixel_values=pixels_of(examples), max_new_tokens=12, do_sample=False, num_beams=1
    )
    objective = ImageToText(max_tokens=12)
    found: dict[int, dict[str, Any]] = {}
    for batch in network.batches(examples, 3):  # a network of several micro-batches
        answers = objective.predict(network, batch)
        found |= {e.row: a for e, a in zip(batch.tree.examples, answers, strict=True)}
    texts = [found[row]["text"] for row in range(len(examples))]
    assert texts == [chat.replies.decode(ids) for ids in own]
    assert len({*texts}) > 1
    for row, answer in found.items():
        ids = own[row]
        logits = model(
            pixel_values=pixels_of([examples[row]]), decoder_input_ids=ids[None, :-1]
        ).logits
        logp = logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        ends = (ids[1:] == 2).nonzero()[:, 0].tolist()
        logp = logp[: ends[0] + 1] if ends else logp
        assert answer["probability"] == pytest.approx(float(logp.sum().exp()), rel=1e-3)
        assert ("cut" in answer) == (not ends)


def test_max_tokens_is_a_quarter_over_longest_text(chat: ChatFormat) -> None:
    longest = max(map(len, TEXTS))
    assert ImageToText().fit(rows(), chat).max_tokens == int(1.25 * longest) + 1
    assert ImageToText(max_tokens=7).fit(rows(), chat).max_tokens == 7


def test_held_out_rows_are_measured_in_characters_and_words(
    network: Network, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {"yes": "yes", "no": "on", "ba": "ba", TEXTS[1]: "Đây la một dòng"}

    def predict(self: ImageToText, network: Network, batch: Any) -> list[dict[str, Any]]:
        assert network.chat is not None
        texts = [network.chat.replies.decode(row.ids_T[1:]) for row in batch.tree.examples]
        return [{"text": written[text]} for text in texts]

    monkeypatch.setattr(ImageToText, "predict", predict)
    with torch.no_grad():
        found = ImageToText().validation_metrics(network, examples, 2)
    characters, words = sum(map(len, TEXTS)), sum(len(text.split()) for text in TEXTS)
    assert found["cer"] == pytest.approx((2 + 6) / characters)  # no: two; là and " chữ."
    assert found["wer"] == pytest.approx((1 + 2) / words)
    assert found["loss"] > 0
    assert found["cer_error"] > 0
    assert sum(found["rows"]["cer"]["parts"]) == 2 + 6


def test_bare_image_is_encoded_with_start_token(chat: ChatFormat) -> None:
    row = rows()[0]
    example = ImageToText().encode(BareImage("f", 1, row.media), 0, chat)
    assert example.ids_T.tolist() == [1] and not example.weight_T.any()
    assert example.media is not None and example.tokens == 1


def test_a_network_without_a_decoder_is_refused(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("vae")
    with pytest.raises(RecipeError) as refused:
        ImageToText().bind(RunModels(load_chat_format(folder), ModelFolder(folder)))
    assert refused.value.rule == "objective.network"


def test_letters_are_added_to_letters_of_rows_without_decoder_only(
    chat: ChatFormat, family_folder: Callable[[str], Path]
) -> None:
    line = replace(rows()[0], caption="nana")
    fitted = ImageToText(letters="zza").fit([line], load_chat_format(family_folder("pp_ocr")))
    assert fitted.letters == "zan"
    with pytest.raises(RecipeError):
        ImageToText(letters="z").bind(RunModels(chat))


LINES = ["no one", "ẽn", "yes"]
"""Texts with letters that the tiny CTC text recognizer knows, and with new letters."""


@pytest.fixture
def reader(family_folder: Callable[[str], Path]) -> tuple[Network, ImageToText, list[Example]]:
    """Return a CTC text recognizer with the letters of :data:`LINES`, the objective and examples."""
    folder = family_folder("pp_ocr")
    chat = load_chat_format(folder)
    images = [replace(row, caption=text) for row, text in zip(rows(), LINES, strict=False)]
    objective = ImageToText().fit(images, chat)
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU, objective.head())
    network = as_network(model, CPU, torch.float32)
    network.chat = chat
    return network, objective, [objective.encode(row, n, chat) for n, row in enumerate(images)]


def test_new_letters_are_added_and_known_letters_keep_their_weights(
    reader: tuple[Network, ImageToText, list[Example]], family_folder: Callable[[str], Path]
) -> None:
    network = reader[0]
    assert network.model.config.letters == "aeno " + "sy\u1ebd"
    stored = load_tensors(family_folder("pp_ocr") / "model.safetensors")
    known, new = network.model.head.head.weight.split([6, 3])
    torch.testing.assert_close(known, stored["head.head.weight"])
    assert new.abs().min() > 0
    torch.testing.assert_close(network.model.head.head.bias[:6], stored["head.head.bias"])


def test_wrong_shape_outside_the_head_is_refused_with_new_letters(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(family_folder("pp_ocr"), tmp_path / "reader")
    weights = load_tensors(folder / "model.safetensors")
    backbone = (name for name in weights if name.startswith("model."))
    name = next(name for name in backbone if weights[name].dim() == 4 and len(weights[name]) > 1)
    save_tensors(weights | {name: weights[name][:1]}, folder / "model.safetensors")
    with pytest.raises(UnknownModel):
        load_model(folder, torch.float32, CPU, ImageToText(letters="z").head())


@torch.no_grad()
def test_column_loss_is_ctc_of_transformers_probabilities(
    reader: tuple[Network, ImageToText, list[Example]],
) -> None:
    network, objective, examples = reader
    letters, total = network.model.config.letters, 0.0
    for example, text in zip(examples, LINES, strict=True):
        output = network.model(pixels_of([example])).last_hidden_state
        target = torch.tensor([[letters.index(letter) + 1 for letter in text]])
        loss = torch.nn.functional.ctc_loss(
            output[0].log(), target[0], torch.tensor(8), torch.tensor(len(text)), reduction="sum"
        )
        total += float(loss)
    found = mean_loss(objective, network, examples, 2)
    assert found == pytest.approx(total / len(LINES), rel=1e-5)


@torch.no_grad()
def test_columns_are_read_without_repetitions_and_blanks(
    reader: tuple[Network, ImageToText, list[Example]],
) -> None:
    network, objective, examples = reader
    answers: dict[int, dict[str, Any]] = {}
    for batch in network.batches(examples, 2):
        found = objective.predict(network, batch)
        answers |= {e.row: a for e, a in zip(batch.tree.examples, found, strict=True)}
    for number, example in enumerate(examples):
        best = network.model(pixels_of([example])).last_hidden_state[0].max(-1)
        runs = [key for key, _ in groupby(best.indices.tolist())]
        text = "".join(network.model.config.letters[key - 1] for key in runs if key)
        assert answers[number]["text"] == text
        assert answers[number]["probability"] == pytest.approx(float(best.values.prod()), rel=1e-4)
    assert any(answer["text"] for answer in answers.values())
    metrics = objective.validation_metrics(network, examples, 2)
    assert metrics["cer"] > 0 and metrics["loss"] > 0


@torch.no_grad()
def test_texts_of_more_letters_than_columns_are_refused(
    reader: tuple[Network, ImageToText, list[Example]],
) -> None:
    network, objective, examples = reader
    columns = network.model(pixels_of(examples[:1])).last_hidden_state.shape[1]
    assert columns == 8
    fits, doubled, longer = (
        replace(examples[0], target=np.array([*map(ord, text)]))
        for text in ("yesyesye", "yesyesee", "yesyesyes")
    )
    assert objective.length_problem(fits, 1) is None
    for example in (doubled, longer):
        problem = objective.length_problem(example, 1)
        assert problem is not None and problem.rule == "row.too_long"
        with pytest.raises(RowRefused):
            objective.truncate(example, 1)


@torch.no_grad()
def test_ctc_recognizer_without_head_is_an_encoder(
    reader: tuple[Network, ImageToText, list[Example]], family_folder: Callable[[str], Path]
) -> None:
    model = load_model(family_folder("pp_ocr"), torch.float32, CPU, EMBEDDING_HEAD)
    network = as_network(model, CPU, torch.float32)
    (batch,) = network.batches(reader[2], 100)
    assert network.row_states(batch, "last").shape == (len(LINES), 8)


def test_training_from_an_adapter_keeps_the_rows_of_learned_letters(
    family_folder: Callable[[str], Path], tmp_path: Path, luthier_home: Path
) -> None:
    lines = [replace(row, caption=text) for row, text in zip(rows(), ["yo", "zen"], strict=False)]
    for row in lines:
        Image.fromarray(np.asarray(row.media.array)).save(tmp_path / f"{row.line}.png")
    file = tmp_path / "rows.jsonl"
    texts = [{"image": f"{row.line}.png", "caption": row.caption} for row in lines]
    file.write_text("\n".join(map(json.dumps, texts)))
    settings: dict[str, Any] = {"adaptation.method": "lora", "training.max_steps": 1}
    luthier.tune(file, base=str(family_folder("pp_ocr")), name="first", **settings)
    first = store.find("pp_ocr:first")
    # Other letters, as many as before.
    other = [replace(row, caption=text) for row, text in zip(lines, ["bu", "no"], strict=True)]
    fitted = ImageToText().fit(other, first.chat)
    second = fitted.bind(RunModels(first.chat, first.network, first.objective))
    assert (first.objective.head().letters, second.letters) == ("enoyz", "enoyzbu")
    learned = store.load(first, torch.float32, CPU).get_parameter("head.head.weight")
    model: Any = store.load(first, torch.float32, CPU, second.head())
    assert model.config.letters == "aeno yzbu"
    known, new = model.head.head.weight.split([len(learned), 2])
    torch.testing.assert_close(known, learned)
    assert new.abs().min() > 0
    base = load_tensors(family_folder("pp_ocr") / "model.safetensors")["head.head.weight"]
    assert not torch.equal(learned[: len(base)], base)
