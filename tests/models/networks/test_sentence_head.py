"""Sentence encoders compared with the definition of sentence-transformers.

The expected vectors are computed with transformers and the formulas of the library's documentation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from luthier.data.sentence import SentencePipeline, read_sentence_pipeline
from luthier.engine.train import train
from luthier.errors import CorruptFile, DataError, ModelRefused, RecipeError
from luthier.exports.writer import export
from luthier.inference.embeddings import embedding_notes
from luthier.inference.prediction import Predictor
from luthier.library.models import find
from luthier.models.formats.external import select_files
from luthier.recipe import Recipe

TEXTS = ["the quick brown fox", "jumps over the lazy dog and over the fox", "What is it"]
LEGACY = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
WORDS = ["quick", "brown", "fox", "lazy", "dog", "over", "what", "is"]
PAIRS = "\n".join(json.dumps({"anchor": f"the {w}", "positive": f"{w} it"}) for w in WORDS)
OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules."


@pytest.fixture(autouse=True)
def store(luthier_home: Path, in_float32: None) -> None:
    pass


@pytest.fixture
def new_folder(tmp_path: Path, family_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """``new_folder(modes, dense=…, …)``: the folder of a tiny BERT as a sentence encoder."""

    def make(
        modes: tuple[str, ...] = ("mean",),
        dense: tuple[tuple[int, int, bool, str], ...] = (),
        name: str = "encoder",
        legacy: bool = True,
        settings: dict[str, Any] | None = None,
        texts: dict[str, Any] | None = None,
        extra: tuple[tuple[str, str], ...] = (("9_Normalize", f"{OLD}Normalize"),),
    ) -> Path:
        import transformers

        source, folder = family_folder("bert"), tmp_path / name
        transformers.AutoModel.from_pretrained(source).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        modules = [("", f"{OLD}Transformer"), ("1_Pooling", f"{OLD}Pooling")]
        (folder / "1_Pooling").mkdir()
        pooling: dict[str, Any] = {"word_embedding_dimension": 32}
        if legacy:
            pooling |= {key: mode in modes for mode, key in LEGACY.items()}
        else:
            pooling["pooling_mode"] = modes[0] if len(modes) == 1 else list(modes)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        generator = torch.Generator().manual_seed(0)
        for place, (inputs, outputs, bias, activation) in enumerate(dense, 2):
            path = folder / f"{place}_Dense"
            path.mkdir()
            fields = {
                "in_features": inputs, "out_features": outputs, "bias": bias,
                "activation_function": activation,
            }  # fmt: skip
            (path / "config.json").write_text(json.dumps(fields))
            weights = {"linear.weight": torch.randn(outputs, inputs, generator=generator)}
            if bias:
                weights["linear.bias"] = torch.randn(outputs, generator=generator)
            save_file(weights, path / "model.safetensors")
            modules.append((path.name, f"{OLD if legacy else NEW}Dense"))
        listed = [
            {"idx": n, "name": str(n), "path": path, "type": kind}
            for n, (path, kind) in enumerate([*modules, *extra])
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        for file, content in (
            ("sentence_bert_config.json", settings),
            ("config_sentence_transformers.json", texts),
        ):
            if content is not None:
                (folder / file).write_text(json.dumps(content))
        return folder

    return make


@torch.no_grad()
def expected(folder: Path, modes: tuple[str, ...], texts: list[str]) -> NDArray[np.float32]:
    """Pool the states of transformers by hand, apply the linear layers, normalize."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        states_TH = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        count = len(states_TH)
        weight_T = torch.arange(1.0, count + 1)
        pooled = {
            "cls": states_TH[0],
            "lasttoken": states_TH[-1],
            "max": states_TH.max(0).values,
            "mean": states_TH.mean(0),
            "mean_sqrt_len_tokens": states_TH.sum(0) / count**0.5,
            "weightedmean": (states_TH * weight_T[:, None]).sum(0) / weight_T.sum(),
        }
        vector = torch.cat([pooled[mode] for mode in modes])
        for path in sorted(folder.glob("*_Dense")):
            fields = json.loads((path / "config.json").read_text())
            weights = load_file(path / "model.safetensors")
            vector = vector @ weights["linear.weight"].T + weights.get("linear.bias", 0)
            vector = vector.tanh() if fields["activation_function"].endswith("Tanh") else vector
        rows.append(torch.nn.functional.normalize(vector, dim=0))
    return np.asarray(torch.stack(rows).numpy())


def embed(model: str | Path, texts: list[str] = TEXTS) -> NDArray[np.float32]:
    return Predictor.open(find(str(model))).embed(texts)


TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    ("modes", "dense"),
    [
        *(((mode,), ()) for mode in LEGACY),
        (("cls", "max", "weightedmean"), ()),
        (("mean",), ((32, 48, True, TANH), (48, 8, False, IDENTITY))),
    ],
)
def test_vectors_follow_modules_json(
    modes: tuple[str, ...],
    dense: tuple[tuple[int, int, bool, str], ...],
    legacy: bool,
    new_folder: Callable[..., Path],
) -> None:
    folder = new_folder(modes, dense, legacy=legacy)
    np.testing.assert_allclose(embed(folder), expected(folder, modes, TEXTS), atol=1e-5)


def test_default_prompt_and_lower_case(new_folder: Callable[..., Path]) -> None:
    texts = {"prompts": {"query": "The Dog: ", "other": "x"}, "default_prompt_name": "query"}
    folder = new_folder(settings={"do_lower_case": True}, texts=texts)
    prepared = [f"The Dog: {text}".lower() for text in TEXTS]
    np.testing.assert_allclose(embed(folder), expected(folder, ("mean",), prepared), atol=1e-5)
    assert not [*embedding_notes(find(str(folder)))]


def test_prompts_without_a_default_are_named(new_folder: Callable[..., Path]) -> None:
    texts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    folder = new_folder(texts=texts)
    np.testing.assert_allclose(embed(folder), expected(folder, ("mean",), TEXTS), atol=1e-5)
    (note,) = embedding_notes(find(str(folder)))
    assert "'query: '" in note


@pytest.mark.parametrize("place", ["sentence_bert_config.json", "tokenizer_config.json"])
def test_longest_text_follows_folder(place: str, new_folder: Callable[..., Path]) -> None:
    """Older folders define ``max_seq_length``, newer folders the tokenizer's ``model_max_length``."""
    folder = new_folder(settings={"max_seq_length": 9} if place.startswith("sentence") else None)
    if place == "tokenizer_config.json":
        path = folder / place
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 9}))
    predictor = Predictor.open(find(str(folder)))
    assert predictor.context == 9
    data = folder.parent / "rows.jsonl"
    pair = {"anchor": " ".join(TEXTS), "positive": "fox"}
    data.write_text("\n".join(json.dumps(pair) for _ in range(4)))
    with pytest.raises(DataError) as refusal:
        tune(folder, data)
    assert {problem.rule for problem in refusal.value.problems} == {"row.too_long"}


def tune(base: Path, data: Path, **fields: Any) -> str:
    """Train on pairs for a few steps; return the id."""
    recipe = {
        "base": str(base), "name": "tuned", "data": {"train": str(data), "validation_share": 0},
        "training": {
            "max_steps": 3, "learning_rate": 0.01, "precision": "float32", "threads": 1,
            "batch_size": 4,
        },
        **fields,
    }  # fmt: skip
    return train(Recipe.parse(recipe)).model_id


@pytest.mark.parametrize(
    ("adaptation", "merged"), [("lora", True), ("lora", False), ("full", True)]
)
def test_tuned_encoder_is_exported_as_sentence_encoder(
    adaptation: str, merged: bool, new_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The export has the base model's pipeline and the vectors that luthier serves."""
    texts = {"prompts": {"query": "dog "}, "default_prompt_name": "query"}
    folder = new_folder(("cls",), ((32, 8, True, TANH),), texts=texts)
    data = tmp_path / "rows.jsonl"
    data.write_text(PAIRS)
    model = tune(folder, data, adaptation=adaptation)
    served = embed(model)
    prepared = [f"dog {text}" for text in TEXTS]
    assert np.abs(served - expected(folder, ("cls",), prepared)).max() > 1e-3
    out = export(find(model), tmp_path / "out", merged)
    assert read_sentence_pipeline(out) == read_sentence_pipeline(folder)
    if merged:
        np.testing.assert_allclose(expected(out, ("cls",), prepared), served, atol=1e-5)
        np.testing.assert_allclose(embed(out), served, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "merged", "pooling"),
    [("bert", True, "mean"), ("bert", False, "mean"), ("llama", True, "lasttoken")],
)
def test_a_tuned_plain_network_is_exported_as_sentence_encoder(
    family: str, merged: bool, pooling: Any, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(PAIRS)
    model = tune(family_folder(family), data)
    out = export(find(model), tmp_path / "out", merged)
    assert read_sentence_pipeline(out) == SentencePipeline(pooling=(pooling,), steps=("normalize",))
    if merged:
        np.testing.assert_allclose(expected(out, (pooling,), TEXTS), embed(model), atol=1e-5)
        np.testing.assert_allclose(embed(out), embed(model), atol=1e-5)


def test_recipe_pooling_replaces_folder_pooling(
    new_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = new_folder(("cls", "max"), ((64, 8, True, TANH),))
    data = tmp_path / "rows.jsonl"
    data.write_text(PAIRS)
    model = tune(folder, data, objective={"method": "contrastive", "pooling": "last"})
    out = export(find(model), tmp_path / "out", merged=True)
    pipeline = read_sentence_pipeline(out)
    assert pipeline == SentencePipeline(pooling=("lasttoken",), steps=("normalize",))
    np.testing.assert_allclose(expected(out, ("lasttoken",), TEXTS), embed(model), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra": (("2_LSTM", f"{OLD}LSTM"),)}, "'LSTM'"),
        ({"extra": (("2_Own", "custom_code.Own"),)}, "'custom_code.Own'"),
        ({"extra": (("../other", f"{OLD}Normalize"),)}, "`path`"),
        ({"modes": ("topk",), "legacy": False}, "'topk'"),
        ({"settings": {"modality_config": {"text": TEXT, "message": TEXT}}}, "`message`"),
        ({"settings": {"modality_config": {"message": TEXT}}}, "`message`"),
        ({"settings": {"model_args": {"add_pooling_layer": True}}}, "`model_args`"),
        ({"dense": ((32, 8, True, "torch.nn.modules.activation.PReLU"),)}, "PReLU"),
    ],
)
def test_unknown_modules_are_refused_by_name(
    change: dict[str, Any], named: str, new_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = new_folder(**change)
    with pytest.raises(RecipeError) as refused:
        embed(folder)
    assert refused.value.rule in {
        "sentence.activation",
        "sentence.config",
        "sentence.module",
        "sentence.path",
        "sentence.pooling",
    }
    data = tmp_path / "rows.jsonl"
    data.write_text('{"anchor": "fox", "positive": "dog"}\n' * 4)
    with pytest.raises(RecipeError) as refused:
        tune(folder, data)
    assert refused.value.rule == "sentence.module"


def test_pickled_dense_layers_are_refused(new_folder: Callable[..., Path]) -> None:
    folder = new_folder(dense=((32, 8, True, TANH),))
    weights = folder / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(RecipeError) as refused:
        embed(folder)
    assert refused.value.rule == "sentence.weights"
    files = ["config.json", "model.safetensors", "tokenizer.json", "2_Dense/pytorch_model.bin"]
    with pytest.raises(ModelRefused) as refusal:
        select_files([(name, 1) for name in files])
    assert refusal.value.problem.rule == "model.pickle"


def test_dense_layers_of_wrong_width_are_refused(new_folder: Callable[..., Path]) -> None:
    with pytest.raises(CorruptFile) as refused:
        embed(new_folder(dense=((16, 8, True, TANH),)))
    assert refused.value.rule == "sentence.weights"


def test_files_of_a_sentence_encoder_are_imported() -> None:
    own = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    own += ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    names = ["config.json", "model.safetensors", "tokenizer.json", *own, "README.md"]
    chosen = select_files([(name, 1) for name in names])
    assert {name for name, _ in chosen.files} >= {*own} and chosen.left == ("README.md",)


def test_classifiers_do_not_need_the_pipeline(
    new_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """An unknown module after the network concerns embeddings alone."""
    folder = new_folder(extra=(("2_LSTM", f"{OLD}LSTM"),))
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{word} {n}", "label": word} for n in range(6) for word in ("fox", "dog")]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    assert "label" in Predictor.open(find(tune(folder, data))).answers([find_row()])[0]


def find_row() -> Any:
    from luthier.data.shapes.texts import RawText

    return RawText("text", 1, "fox 1")
