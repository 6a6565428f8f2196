"""AST and Wav2Vec2 of transformers: outputs and training."""

from __future__ import annotations

import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

import luthier
from luthier.adaptations.full import Full
from luthier.data.augmentation import Augmentation
from luthier.data.inputs import Media, read_processor
from luthier.engine.memory import sketch_training
from luthier.errors import RecipeError
from luthier.exports.onnx import export_onnx
from luthier.exports.writer import export
from luthier.library.models import find
from luthier.media.decoding import decode_audio
from luthier.media.processors import FeatureExtractor
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.head_forward import classifier_input, media_scores
from luthier.models.networks.heads import Head
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification

CPU = torch.device("cpu")
FAMILIES = ("ast", "wav2vec2")
RATE = 8_000


FamilyFolder = Callable[[str], Path]


def write_sound(path: Path, pitch: float, count: int, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    values = 0.4 * np.sin(2 * np.pi * pitch * np.arange(count) / RATE)
    values += 0.02 * random.standard_normal(count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())
    return path


def own_inputs(family: str, folder: Path, file: Path) -> Any:
    """Return the features of transformers' feature extractor; Wav2Vec2's are padded to one second."""
    samples, rate = decode_audio(file.read_bytes())
    fill = {"padding": "max_length", "max_length": RATE, "truncation": True}
    more: Any = fill if family == "wav2vec2" else {}
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    return extractor(samples, sampling_rate=rate, return_tensors="pt", **more)


@pytest.mark.parametrize("count", [3_000, 8_000, 12_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_audio_scores_match_transformers(
    family: str, count: int, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    base = family_folder(family)
    own: Any = AutoModelForAudioClassification.from_pretrained(base).eval()
    file = write_sound(tmp_path / "a.wav", 440, count)
    processor = read_processor(base)
    assert isinstance(processor, FeatureExtractor)
    found = processor.array(Media("audio", "a", str(file)))
    inputs = own_inputs(family, base, file)
    wanted = inputs["input_values"][0].numpy()
    assert found.shape == processor.shape
    assert np.array_equal(found.reshape(wanted.shape), wanted)
    head = Head("sequence_classification", ("a", "b"))
    model = load_model(base, torch.float32, CPU, head)
    network = as_network(model, CPU, torch.float32)
    with torch.no_grad():
        states = classifier_input(network.model, torch.from_numpy(found)[None])
        scores = media_scores(network.model, states)
        assert torch.allclose(scores, own(**inputs).logits, atol=1e-5)


def test_changes_are_drawn_by_seed_and_keep_the_shape(
    tmp_path: Path, family_folder: FamilyFolder
) -> None:
    file = write_sound(tmp_path / "a.wav", 440, 6_000)
    changes = Augmentation(shift=0.2, speed=0.2, noise=0.2, masks=2)
    for family in FAMILIES:
        processor = read_processor(family_folder(family))
        assert isinstance(processor, FeatureExtractor)
        sound = Media("audio", "a", str(file))
        one, other, again = (processor.array(sound, changes, (n,)) for n in (1, 2, 1))
        assert one.shape == other.shape == processor.shape
        assert np.array_equal(one, again) and not np.array_equal(one, other)
        tiny = write_sound(tmp_path / "b.wav", 440, 50)
        assert np.isfinite(processor.array(Media("audio", "b", str(tiny)))).all()


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("family", "adaptation"),
    [
        ("ast", "feature_extraction"),
        ("wav2vec2", "lora"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("ast", "lora"), ("ast", "freeze"),
                ("wav2vec2", "freeze"), ("wav2vec2", "feature_extraction"),
            )
        ),
    ],
)  # fmt: skip
def test_audio_classifier_separates_two_tones(
    family: str, adaptation: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    shutil.copytree(family_folder(family), tmp_path / "base")
    (tmp_path / "base" / "vocab.json").write_text("{}")  # left over from speech recognition
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    assert not load_chat_format(tmp_path / "base").has_tokenizer
    for n in range(8):
        for tone, pitch in (("low", 300), ("high", 2_000)):
            write_sound(tmp_path / "sounds" / tone / f"{n}.wav", pitch + 20 * n, 6_000, n)
    tuned = luthier.tune(
        tmp_path / "sounds", base=str(tmp_path / "base"), name="tones", adaptation=adaptation,
        training__max_steps=40, training__batch_size=8, training__learning_rate=1e-2,
        training__precision="float32", data__validation_share=0, training__refit=False,
    )  # fmt: skip
    scores = luthier.evaluate(tuned.model_id, tmp_path / "sounds").scores
    # Frozen random convolutions of samples separate tones poorly.
    least = {"feature_extraction": 0.5, "freeze": 0.6, "lora": 0.7}[adaptation]
    assert scores["accuracy"] > (0.9 if family == "ast" else least)
    file = tmp_path / "sounds" / "low" / "3.wav"
    answer = luthier.load(tuned.model_id).predict(str(file))
    out = tmp_path / "out"
    export(find(tuned.model_id), out, merged=adaptation != "freeze")
    own: Any = AutoModelForAudioClassification.from_pretrained(out).eval()
    with torch.no_grad():
        p_C = own(**own_inputs(family, out, file)).logits.softmax(-1)[0]
    assert answer["scores"]["low"] == pytest.approx(
        float(p_C[own.config.label2id["low"]]), abs=1e-4
    )


def test_unsupported_sampling_rate_is_refused(family_folder: FamilyFolder) -> None:
    for family in FAMILIES:
        chat = load_chat_format(family_folder(family))
        with pytest.raises(RecipeError) as refused:
            chat.with_media_settings(sampling_rate=4_000)
        assert refused.value.setting == "data.sampling_rate"
    longer = chat.with_media_settings(max_seconds=2.0).media
    assert longer is not None and longer.shape == (1, 1, 2 * RATE)
    with pytest.raises(RecipeError) as refused:
        load_chat_format(family_folder("ast")).with_media_settings(max_seconds=2.0)
    assert refused.value.setting == "data.max_seconds"


@pytest.mark.slow
def test_memory_estimate_grows_with_audio_length(
    family_folder: FamilyFolder,
) -> None:
    objective = Classification(labels=("a", "b"))
    config = ModelFolder(family_folder("wav2vec2")).config(objective.head())
    counted = {
        samples: sketch_training(config, objective, Full(), 4, reads=(1, 1, samples)).memory
        for samples in (8_000, 16_000, 32_000)
    }
    assert config.layerdrop > 0  # layers are dropped at random, and all are counted
    for _ in range(8):
        assert sketch_training(config, objective, Full(), 4).memory == counted[16_000]
    short, _, long = (each.per_token for each in counted.values())
    assert long > 3.5 * short  # attention grows faster than the sound


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_gives_the_same_scores_of_a_sound(
    family: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    base = family_folder(family)
    for n in range(4):
        for tone, pitch in (("low", 300), ("high", 2_000)):
            write_sound(tmp_path / "sounds" / tone / f"{n}.wav", pitch + 20 * n, 6_000, n)
    tuned = luthier.tune(
        tmp_path / "sounds", base=str(base), name="tones", training__max_steps=3,
        training__precision="float32", data__validation_share=0, training__refit=False,
    )  # fmt: skip
    error = export_onnx(find(tuned.model_id), tmp_path / "onnx").score_error
    assert error is not None and error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    file = tmp_path / "sounds" / "low" / "3.wav"
    values = own_inputs(family, base, file)["input_values"]
    (logits,) = session.run(None, {"input_values": values.numpy()})
    scores = luthier.load(tuned.model_id).predict(str(file))["scores"]
    p_C = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert dict(zip(("high", "low"), p_C.tolist(), strict=True)) == pytest.approx(scores, abs=1e-4)
