"""Image classifiers of transformers: outputs and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageClassification

import luthier
from luthier.data.inputs import Media, read_processor
from luthier.exports.onnx import export_onnx
from luthier.exports.writer import export
from luthier.library.models import find
from luthier.models.load import FrozenBatchNorm2d, as_network, load_model
from luthier.models.networks.head_forward import classifier_input, media_scores
from luthier.models.networks.heads import Head
from luthier.models.networks.layouts import pooled_states

CPU = torch.device("cpu")
FAMILIES = ("resnet", "mobilenet_v2", "efficientnet", "convnext", "vit", "dinov2")
WITH_BATCH_NORMS = ("resnet", "mobilenet_v2", "efficientnet")
PROCESSORS = {
    "resnet": "ConvNext", "mobilenet_v2": "MobileNetV2", "efficientnet": "EfficientNet",
    "convnext": "ConvNext", "vit": "ViT", "dinov2": "Bit",
}  # fmt: skip
RATES = {"full": 5e-3, "lora": 5e-3, "freeze": 5e-3, "bitfit": 2e-2, "feature_extraction": 5e-2}

FamilyFolder = Callable[[str], Path]


def write_images(folder: Path, count: int = 6) -> Path:
    """Write dark and bright images of 40 x 36."""
    random = np.random.default_rng(0)
    for n in range(count):
        for name, level in (("dark", 40), ("bright", 190)):
            path = folder / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = level + random.integers(0, 40, (36, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def own_pixels(family: str, folder: Path, file: Path) -> torch.Tensor:
    """Return an image ``[1, 3, H, W]`` from transformers' image processor."""
    kind = getattr(transformers, f"{PROCESSORS[family]}ImageProcessorPil")
    pixels: torch.Tensor = kind.from_pretrained(folder)(Image.open(file), return_tensors="pt")[
        "pixel_values"
    ]
    return pixels


def tune(folder: Path, base: Path, adaptation: str, steps: int = 30) -> str:
    model = luthier.tune(
        write_images(folder / "images"), base=str(base), name="light", adaptation=adaptation,
        training__max_steps=steps, training__batch_size=12, training__precision="float32",
        training__learning_rate=RATES[adaptation], training__refit=False, data__validation_share=0,
    )  # fmt: skip
    return model.model_id


@pytest.mark.parametrize("family", FAMILIES)
def test_image_scores_match_transformers(
    family: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    base = family_folder(family)
    own: Any = AutoModelForImageClassification.from_pretrained(base).eval()
    file = write_images(tmp_path, 1) / "dark" / "0.png"
    processor = read_processor(base)
    assert processor is not None
    found = torch.from_numpy(processor.array(Media("image", "a", str(file))))[None]
    wanted = own_pixels(family, base, file)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)
    model = load_model(base, torch.float32, CPU, Head("sequence_classification", ("a", "b")))
    network = as_network(model, CPU, torch.float32)
    with torch.no_grad():
        states = classifier_input(network.model, found)
        assert states.shape == (1, network.width)
        logits = own(wanted).logits
        assert logits.std() > 1e-3
        assert torch.allclose(media_scores(network.model, states), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("family", "adaptation"),
    [
        # Each family and adaptation once; the remaining pairs are slow tests.
        pytest.param(
            family,
            adaptation,
            marks=[] if FAMILIES.index(family) % 5 == place else [pytest.mark.slow],
        )
        for family in FAMILIES
        for place, adaptation in enumerate(RATES)
    ],
)
def test_trained_classifier_matches_transformers_export(
    family: str, adaptation: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    base = family_folder(family)
    model_id = tune(tmp_path, base, adaptation)
    assert luthier.evaluate(model_id, tmp_path / "images").scores["accuracy"] > 0.9
    file = tmp_path / "images" / "dark" / "3.png"
    answer = luthier.load(model_id).predict(str(file))
    out = tmp_path / "out"
    export(find(model_id), out, merged=True)
    own: Any = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        p_C = own(own_pixels(family, base, file)).logits.softmax(-1)[0]
    dark = float(p_C[own.config.label2id["dark"]])
    assert answer["scores"]["dark"] == pytest.approx(dark, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("family", WITH_BATCH_NORMS)
def test_batch_norm_statistics_stay_and_gains_train(
    family: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    base = family_folder(family)
    tuned = load_model(
        find(tune(tmp_path, base, "full", steps=3)).folder, torch.float32, CPU,
        Head("sequence_classification", ("bright", "dark")),
    )  # fmt: skip
    before = AutoModelForImageClassification.from_pretrained(base).state_dict()
    after = tuned.state_dict()
    statistics = [name for name in after if "running_" in name or "num_batches" in name]
    assert len(statistics) >= 3 * 10
    assert all(torch.equal(after[name], before[name]) for name in statistics)
    gains = [name.replace("running_mean", "weight") for name in statistics if "mean" in name]
    assert not all(torch.equal(after[name], before[name]) for name in gains)
    network = as_network(tuned, CPU, torch.float32)
    norms = [each for each in tuned.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert len(norms) == len(gains) and all(isinstance(each, FrozenBatchNorm2d) for each in norms)
    # In training, too, rows are independent, except for dropout.
    tuned.train()
    assert not any(each.training for each in norms)
    for each in tuned.modules():
        if isinstance(each, torch.nn.Dropout):
            each.eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        alone, together = (
            pooled_states(network.model.base_model, each) for each in (images[:1], images)
        )
    assert torch.allclose(alone, together[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "vit"),
        "vit",
    ],
)
def test_onnx_gives_the_same_scores(
    family: str, tmp_path: Path, family_folder: FamilyFolder
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    base = family_folder(family)
    model_id = tune(tmp_path, base, "lora", steps=3)
    error = export_onnx(find(model_id), tmp_path / "onnx").score_error
    assert error is not None and error < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    file = tmp_path / "images" / "bright" / "1.png"
    (logits,) = session.run(None, {"pixel_values": own_pixels(family, base, file).numpy()})
    scores = luthier.load(model_id).predict(str(file))["scores"]
    p_C = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert dict(zip(("bright", "dark"), p_C.tolist(), strict=True)) == pytest.approx(
        scores, abs=1e-4
    )


def test_vit_embedding_ignores_missing_pooler(
    family_folder: FamilyFolder,
) -> None:
    """ViT's pooler is missing in classifiers and would be initialized at random on each load."""
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (
            pooled_states(load_model(family_folder("vit"), torch.float32, CPU, head).eval(), images)
            for head in (Head("embedding"), Head("embedding"))
        )
        own: Any = AutoModelForImageClassification.from_pretrained(family_folder("vit")).eval()
        wanted = own.vit(images).last_hidden_state[:, 0]
    assert torch.equal(one, other) and torch.allclose(one, wanted, atol=1e-5)
