"""Every objective with every adaptation on every family: training works, or is rejected with a
reason."""

from __future__ import annotations

import copy
import io
import itertools
import math
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from luthier.adaptations import ADAPTATIONS, Adaptation
from luthier.data.inputs import Media
from luthier.data.shapes import SHAPES
from luthier.data.shapes.conversations import Conversation, PromptCompletion, PromptOnly
from luthier.data.shapes.media import BareImage, CaptionedImage, LabelledAudio, LabelledImage
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.preferences import Preference, RankedReplies, ThumbedReply
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import (
    History,
    LabelledText,
    QueryDocument,
    RatedText,
    RawText,
    TaggedWords,
    TextPair,
)
from luthier.engine.checkpoints import Checkpoints
from luthier.engine.loop import Loop, row_gradients
from luthier.engine.metrics import MetricsFile, Reporter
from luthier.errors import RecipeError
from luthier.library import models as store
from luthier.models.folder import ModelFolder
from luthier.models.formats.pipelines import is_pipeline
from luthier.models.formats.save import save_adapter, save_format, save_network, stored_bytes
from luthier.models.load import as_network, load_model
from luthier.models.manifest import Manifest
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import RunModels, add_modules
from luthier.objectives.preferences.pairs import PreferenceObjective
from luthier.recipe import Training
from luthier.types import Example, Message, Row

CPU = torch.device("cpu")
DECODERS, ENCODERS = ("llama", "gpt2", "palm", "transfo_xl"), ("bert", "roberta", "albert")
READERS, MASKLESS = (*ENCODERS, "xlnet", "elmo"), (*DECODERS, "t5", "xlnet", "elmo")
JUDGED = [name for name, kind in OBJECTIVES.items() if issubclass(kind, PreferenceObjective)]
FAMILIES = (*DECODERS, *ENCODERS, "t5", "xlnet", "elmo")
WORDS = ("yes", "no", "Paris", "The lazy dog jumps over the quick brown fox.")
TEXTS = [f"One word, please: {word}" for word in WORDS]
ROWS = {
    "prompt": [
        PromptCompletion("f", n, prompt="One word, please:", completion=w)
        for n, w in enumerate(WORDS)
    ],
    "messages": [
        Conversation(
            "f", n, messages=(Message("user", "One word, please:"), Message("assistant", word))
        )
        for n, word in enumerate(WORDS)
    ],
    "text": [RawText("f", n, text=text) for n, text in enumerate(TEXTS)],
    "label": [
        LabelledText("f", n, text=text, label=f"class {n % 2}") for n, text in enumerate(TEXTS)
    ],
    "rating": [RatedText("f", n, text=text, rating=1.5 * n) for n, text in enumerate(TEXTS)],
    "pair": [
        TextPair("f", n, text=text, positive=f"{WORDS[n]} is the word")
        for n, text in enumerate(TEXTS)
    ],
    "relevance": [
        QueryDocument("f", n, text=text, document=WORDS[n % 4], label=float(n % 4 > 0))
        for n, text in enumerate(TEXTS)
    ],
    "preference": [
        Preference(
            "f",
            n,
            messages=(Message("user", "One word, please:"),),
            chosen=(Message("assistant", word),),
            rejected=(Message("assistant", "I will not answer the question."),),
        )
        for n, word in enumerate(WORDS)
    ],
    "ranking": [
        RankedReplies(
            "f",
            n,
            messages=(Message("user", "One word, please:"),),
            ranked=tuple((Message("assistant", WORDS[(n + k) % 4]),) for k in range(3)),
        )
        for n in range(4)
    ],
    "thumb": [
        ThumbedReply(
            "f",
            n,
            messages=(Message("user", "One word, please:"),),
            reply=(Message("assistant", word),),
            desirable=n % 2 == 0,
        )
        for n, word in enumerate(WORDS)
    ],
    "tags": [
        TaggedWords(
            "f", n, tokens=tuple(t.split()), tags=("B-x", "I-x", *"O" * (len(t.split()) - 2))
        )
        for n, t in enumerate(TEXTS)
    ],
}
ROWS["question"] = [
    AnsweredQuestion("f", n, "Which word?", text, (WORDS[n],), (text.index(WORDS[n]),))
    for n, text in enumerate(TEXTS)
]
ROWS["passages"] = [
    CitedAnswer("f", n, "Which word?", (text, "Another text."), WORDS[n], (1,))
    for n, text in enumerate(TEXTS)
]
ROWS["history"] = [
    History("f", n, text=f"{text}\na {WORDS[n - 1]}", positive=" ".join(text.split()[::-1]))
    for n, text in enumerate(TEXTS)
]
ROWS["image"] = [
    BareImage("f", n, Media("image", f"i[{n}]", array=np.eye(8, dtype=np.uint8) * (n + 1) * 60))
    for n in range(4)
]
ROWS["captioned_image"] = [
    CaptionedImage(row.file, row.line, row.media, word)
    for row, word in zip(ROWS["image"], WORDS, strict=True)
    if isinstance(row, BareImage)
]
ROWS["labelled_image"] = [
    LabelledImage(row.file, row.line, row.media, f"class {row.line % 2}")
    for row in ROWS["image"]
    if isinstance(row, BareImage)
]


def tone(number: int) -> bytes:
    """A WAV file of a tenth of a second."""
    stream, times = io.BytesIO(), np.arange(800) / 8_000
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 8_000, 0, "NONE", ""))
        file.writeframes((9_000 * np.sin(1_500 * (number + 1) * times)).astype("<i2").tobytes())
    return stream.getvalue()


ROWS["labelled_audio"] = [
    LabelledAudio("f", n, Media("audio", f"s[{n}]", data=tone(n)), f"class {n % 2}")
    for n in range(4)
]
DISTILLED = ("logit_distillation", "on_policy_distillation", "sdft")
ROWS["prompt_only"] = [PromptOnly("f", n, prompt=text) for n, text in enumerate(TEXTS)]
WRITTEN = {"max_completion_tokens": 5, "grader": {"method": "regex", "pattern": "[a-l]"}}
"""About half of all random completions match the pattern."""
SETTINGS: dict[str, dict[str, Any]] = {
    "sparse": {"mask": "fisher", "fisher_rows": 3},
    "grpo": {**WRITTEN, "num_generations": 4, "beta": 0.1},
    # Two rows of a step may both lack this letter and then have no loss.
    "ppo": {
        "max_completion_tokens": 5,
        "grader": {"method": "regex", "pattern": "$"},
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
    },
    "gan": {"loss_type": "non_saturating"},  # with spectral norms
    "logit_distillation": {"teacher": "teacher"},
    "on_policy_distillation": {"teacher": "teacher", "max_tokens": 6},
    "sdft": {"max_tokens": 12},
    "encoder_distillation": {"teacher": "teacher"},
    "embedding_distillation": {"teacher": "teacher"},
}
"""Settings for methods whose defaults would skip code."""


def rows_of(objective: Objective, folder: Path) -> list[Row]:
    """Return rows for an objective and network, including rows of additional files."""
    further = objective.mixed_shapes - objective.shapes
    able = objective.shapes | objective.further_shapes
    images = folder.name in IMAGES.values() and "image" in able
    of_texts = {shape for shape in ROWS if SHAPES[shape].reads == "text"}
    known = objective.shapes & of_texts or able & ROWS.keys()
    first = MEDIA_ROWS.get(folder.name, "image" if images else min(known))
    return [row for shape in [first, *sorted(further)] for row in ROWS[shape]]


IMAGES = {
    "vae": "vae",
    "gan": "dcgan",
    "diffusion": "unet",
    "restoration": "unet",
    "contrastive": "small_cnn",
    "image_to_text": "trocr",
}
"""Family for each objective on images; other networks take tokens."""
BESIDE_TEXTS = "clip"
"""A network with separate encoders for images and text."""
PIPELINE = "stable_diffusion"
"""A network of several parts, of which one is trained."""
VISION_FAMILIES = ("resnet", "mobilenet_v2", "efficientnet", "convnext", "vit")
MEDIA_ROWS = {
    BESIDE_TEXTS: "captioned_image",
    PIPELINE: "captioned_image",
    "vgg": "labelled_image",
    **dict.fromkeys(VISION_FAMILIES, "labelled_image"),
    "ast": "labelled_audio",
    "wav2vec2": "labelled_audio",
}
"""Row shapes of additional image and audio networks."""
CLASSIFIERS = ("vgg", *VISION_FAMILIES, "ast", "wav2vec2")
TRIPLES = [
    *itertools.product(OBJECTIVES, ADAPTATIONS, FAMILIES),
    *((method, name, family) for method, family in IMAGES.items() for name in ADAPTATIONS),
    *(("contrastive", name, BESIDE_TEXTS) for name in ADAPTATIONS),
    *(("diffusion", name, PIPELINE) for name in ADAPTATIONS),
    *itertools.product(("classification", "contrastive"), ADAPTATIONS, CLASSIFIERS),
]
REFUSED = {
    **{
        (o, f): "objective.network" if f in ENCODERS else "network.head"
        for o in ("sft", "causal_lm", *DISTILLED, "grpo", "ppo", *JUDGED)
        for f in (*ENCODERS, "xlnet", "elmo")
    },
    ("causal_lm", "t5"): "objective.network",
    **{("question_answering", f): "network.head" for f in FAMILIES if f not in ENCODERS},
    **{
        ("masked_lm", f): "network.head" if f == "xlnet" else "objective.tokenizer"
        for f in (*DECODERS, "t5", "xlnet", "elmo")
    },
    **{("vae", f): "network.head" for f in FAMILIES},
    **{("gan", f): "network.head" for f in FAMILIES},
    **{("diffusion", f): "network.head" for f in FAMILIES},
    **{("restoration", f): "network.head" for f in FAMILIES},
    **{("image_to_text", f): "objective.network" for f in FAMILIES},
    **{("bilm", f): "objective.tokenizer" for f in FAMILIES if f != "elmo"},
    **{("span_corruption", f): "objective.network" for f in FAMILIES if f != "t5"},
}
"""Objectives that a family cannot learn, with the rule of the error."""


def timed(triple: tuple[str, str, str]) -> Any:
    """Mark a triple as slow, except for a sample in which all parts meet.

    Each objective trains with LoRA and an eighth of the adaptations. On text, one family rotates from
    pair to pair. Each rejected pair runs, on text with one family.
    """
    method, name, family = triple
    of = CLASSIFIERS if family in CLASSIFIERS else FAMILIES
    able = [each for each in of if not refused(method, name, each)]
    place = [*OBJECTIVES].index(method)
    turn = place + [*ADAPTATIONS].index(name)
    rare = name != "lora" and turn % 8 > 0
    if family == PIPELINE:
        slow = rare
    elif family in CLASSIFIERS:
        slow = family in able and family != able[(turn + 4 * place) % len(able)]
    elif family in able:
        slow = rare or family != able[(turn + place) % len(able)]
    elif family not in FAMILIES:
        slow = rare and not refused(method, name, family)
    else:
        unable = [each for each in FAMILIES if each not in able]
        slow = family != unable[turn % len(unable)]
    return pytest.param(*triple, marks=[pytest.mark.slow] if slow else [])


def refused(method: str, name: str, family: str) -> str:
    """Return the rule of a triple's error; empty for a supported triple."""
    wanted = REFUSED.get((method, family)) or adaptation_refusals().get((name, family))
    return wanted or refusals_of_both().get((method, name, family), "")


@cache
def adaptation_refusals() -> dict[tuple[str, str], str]:
    """Return the adaptations that a family does not support, with the rule of the error."""
    pairs = [
        *(("bitfit", f) for f in ("llama", "palm", "t5")),
        *(("prefix", f) for f in ("albert", "t5", "xlnet", "transfo_xl", "elmo")),
        ("adapters", "elmo"),
        ("prompt", "transfo_xl"),
        *itertools.product(("prompt", "prefix"), (*IMAGES.values(), *MEDIA_ROWS)),
        *(("feature_extraction", f) for f in (*IMAGES.values(), BESIDE_TEXTS, PIPELINE)),
        *itertools.product(("qlora", "sparse"), ("small_cnn", *VISION_FAMILIES[:3])),
        # Both players of a GAN must learn, and the spectral norm needs plain weights.
        *((a, "dcgan") for a in ("freeze", "adapters", "lora", "qlora", "sparse")),
    ]
    return {**dict.fromkeys(pairs, "adapter.network"), ("freeze", "albert"): "network.layers"}


@cache
def refusals_of_both() -> dict[tuple[str, str, str], str]:
    """Return errors that depend on all three parts."""
    kinds = ("sft", *DISTILLED, "grpo", "ppo", *JUDGED)
    written = [(o, f) for o in ("causal_lm", *kinds) for f in ("gpt2", "palm", "transfo_xl")]
    written += [(o, "t5") for o in ("span_corruption", *kinds)]
    tied = {(o, "feature_extraction", f): "adapter.network" for o, f in written}
    none = {
        (o, "feature_extraction", f): "adapter.network"
        for o in ("contrastive", "embedding_distillation")
        for f in (*FAMILIES, *CLASSIFIERS)
    }
    return tied | none


def training_of(examples: list[Example]) -> Training:
    return Training(
        batch_size=max(1, len(examples) // 2),
        learning_rate=1e-2,
        warmup_ratio=0.0,
        micro_batch_tokens=24,
    )


def train_two_steps(
    network: Network, objective: Objective, examples: list[Example], folder: Path
) -> list[float]:
    training = training_of(examples)
    loop = Loop(
        network=network,
        objective=objective,
        training=training,
        examples=examples,
        validation=[],
        steps=2,
        checkpoints=Checkpoints(folder / "checkpoints"),
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Reporter(),
    )
    assert loop.run().step == 2
    return [line["loss"] for line in loop.metrics.read()]


def save(model: Any, adaptation: Adaptation, chat: Any, base: Path, folder: Path) -> None:
    folder.mkdir()
    if adaptation.stores_network:
        save_network(model, chat, folder)
    else:
        save_adapter(model, adaptation, adaptation.adapter_config(model, str(base)), folder)
        save_format(chat, folder)


def reload(adaptation: Adaptation, objective: Objective, base: Path, folder: Path) -> Network:
    """Load like serving: the base with the merged adapter, or the whole network."""
    whole = (folder / "config.json").is_file() or is_pipeline(folder)
    recipe = {"adaptation": adaptation.model_dump(), "objective": objective.model_dump()}
    parent = None if whole else store.StoredModel("base", base, Manifest(id="base"))
    manifest = Manifest(id="base:custom", recipe=recipe)
    stored = store.StoredModel("base:custom", folder, manifest, parent)
    return as_network(store.load(stored, torch.float32, CPU), CPU, torch.float32)


def join_others(
    network: Network, objective: Objective, folder: Path, examples: list[Example], kept: Path
) -> None:
    """Give the network the additional models of the objective: same family, other weights."""
    for name in objective.other_models:
        torch.manual_seed(7)
        other = load_model(folder, torch.float32, CPU, objective.head())
        for weight in other.parameters():
            weight.data += 0.2 * weight.abs().mean() * torch.randn_like(weight)
        other.requires_grad_(False).eval()
        network.others[name] = as_network(other, CPU, torch.float32)
    with torch.no_grad():
        objective.precompute(network, examples, 1000, kept, lambda text: None)


def refusal(objective: Objective, adaptation: Adaptation, folder: Path) -> str:
    """Return the rule that rejects a triple before a weight is loaded; empty for a supported one."""
    try:
        chat = objective.format(load_chat_format(folder))
        objective.bind(RunModels(chat))
        fitted = objective.fit(rows_of(objective, folder), chat)
        model = ModelFolder(folder).sketch(fitted.head())
        with torch.device("meta"):
            adaptation.attach(model)
        fitted.attach(model)
    except RecipeError as error:
        return error.rule
    return ""


@pytest.mark.parametrize(("method", "name", "family"), [timed(t) for t in TRIPLES])
def test_triple_trains_marked_weights_and_reloads(
    method: str, name: str, family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    objective = OBJECTIVES[method](**SETTINGS.get(method, {}))
    adaptation = ADAPTATIONS[name](**SETTINGS.get(name, {}))
    folder = family_folder(family)
    rule = refused(method, name, family)
    assert refusal(objective, adaptation, folder) == rule
    if rule:
        return
    chat = objective.format(load_chat_format(folder))
    rows = rows_of(objective, folder)
    objective = objective.fit(rows, chat)
    encoded = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    examples = [*objective.pack(encoded, context=30)]
    torch.manual_seed(0)
    model = load_model(folder, torch.float32, CPU, objective.head())
    plain = model.state_dict().keys()
    network = as_network(model, CPU, torch.float32)
    network.chat = chat
    adaptation.attach(model)
    promised = stored_bytes(model, adaptation)
    join_others(network, objective, folder, examples, tmp_path / "kept")
    extra = add_modules(model, objective.attach(model))

    def loss_of(network: Network) -> float:
        # With a reference model the loss depends on where the network began.
        return objective.parity_loss(network, examples, 1000)

    adaptation.calibrate(
        network, row_gradients(network, objective, examples, training_of(examples), Reporter())
    )
    assert all(weight.grad is None for weight in model.parameters())
    untrained = loss_of(network)
    before = {n: (w.requires_grad, w.detach().clone()) for n, w in model.named_parameters()}

    losses = train_two_steps(network, objective, examples, tmp_path)

    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    # A negated gain can have any sign.
    assert objective.measure == "reward" or min(losses) > 0
    moved = set()
    for weight_name, weight in model.named_parameters():
        trains, start = before[weight_name]
        assert weight.requires_grad == trains, weight_name
        if not torch.equal(weight, start):
            assert trains, f"{weight_name} is frozen and moved"
            moved.add(weight_name)
    assert moved
    trained = loss_of(network)
    assert (
        abs(trained - untrained) > 2e-5 * untrained
    )  # twice the tolerance of the comparisons below

    for each in extra:
        delattr(model, each)
    save(model, adaptation, chat, folder, tmp_path / "custom")
    stored = [load_file(path) for path in (tmp_path / "custom").rglob("*.safetensors")]
    assert sum(tensor.nbytes for part in stored for tensor in part.values()) == promised
    again = reload(adaptation, objective, folder, tmp_path / "custom")
    join_others(again, objective, folder, examples, tmp_path / "kept")
    assert loss_of(again) == pytest.approx(trained, rel=1e-5)

    merged = copy.deepcopy(network)
    adaptation.merge(merged.model)
    assert loss_of(merged) == pytest.approx(trained, rel=1e-5)
    if not adaptation.mergeable:
        return
    assert merged.model.state_dict().keys() == plain


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_adaptation_has_method_and_learning_rate(name: str) -> None:
    adaptation = ADAPTATIONS[name]()
    assert adaptation.method == name
    rate, reason = adaptation.learning_rate(576)
    assert 0 < rate < 0.1 and reason


MEDIA_SHAPES = {
    "image", "audio", "window", "captioned_image", "labelled_image", "labelled_audio",
    "labelled_window",
}  # fmt: skip
"""Shapes that are tested with media networks."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_has_method_and_shapes(name: str) -> None:
    objective = OBJECTIVES[name]()
    assert objective.method == name
    able = objective.shapes | objective.further_shapes
    assert able and objective.shapes <= {*ROWS, "rated", *MEDIA_SHAPES}
    assert not objective.further_shapes & objective.shapes
