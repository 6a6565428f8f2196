"""ONNX exports compared with luthier's own outputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.inputs import Media, read_processor
from luthier.data.rows import load_rows
from luthier.data.shapes.media import BareImage
from luthier.data.shapes.texts import RawText
from luthier.engine.train import train
from luthier.errors import RecipeError, RunConflict
from luthier.exports import onnx as onnx_export
from luthier.exports.onnx import ONNX_CONFIG, ONNX_FILE, README, export_onnx
from luthier.exports.onnx_int8 import measure_int8, quantize
from luthier.files import hashes_of, read_json
from luthier.inference.prediction import Predictor
from luthier.library.models import StoredModel, custom_models, find
from luthier.recipe import Recipe

pytestmark = pytest.mark.usefixtures("in_float32")
onnxruntime = pytest.importorskip("onnxruntime")
TEXTS = ["fox 9", "a dog and a fox and a dog", "dog"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "token_classification": [
        {"tokens": ["Anna", "saw", word], "tags": ["B-PER", "O", "B-ANI"]}
        for word in ("fox", "dog", "cat")
    ],
    "regression": [{"text": f"fox {n}", "rating": 1000.0 + n} for n in range(6)],
    "contrastive": [{"anchor": f"fox {n}", "positive": f"the fox {n}"} for n in range(6)],
    "reward_model": [{"prompt": f"fox {n}", "chosen": "a fox", "rejected": "no"} for n in range(6)],
}


def tuned(folder: Path, base: str, method: str) -> StoredModel:
    """A model of ``method`` on ``base``."""
    data = folder / f"{method}.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS[method])))
    name = method.replace("_", "-")
    tune(base, name, str(data), objective={"method": method})
    return named(name)


class Session:
    """An exported ONNX model, used with the files of its folder only."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.config = read_json(folder / ONNX_CONFIG)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.enable_padding(pad_id=self.config["pad_token_id"])
        self.session = onnxruntime.InferenceSession(str(folder / ONNX_FILE))

    def ask(self, texts: Any, **how: Any) -> tuple[Any, list[Any]]:
        """Return the outputs for a batch of ``texts`` and the encodings."""
        read = self.tokenizer.encode_batch(texts, **how)
        inputs = {
            "input_ids": np.array([each.ids for each in read]),
            "attention_mask": np.array([each.attention_mask for each in read]),
        }
        assert {*inputs} == {*self.config["inputs"]}
        (answer,) = self.session.run([self.config["output"]["name"]], inputs)
        assert answer.ndim == len(self.config["output"]["axes"])
        return answer, read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "output", "key"),
    [
        ("bert", "contrastive", "sentence_embedding", "embedding"),
        ("gpt2", "contrastive", "sentence_embedding", "embedding"),
        ("bert", "regression", "rating", "rating"),
        ("roberta", "reward_model", "reward", "reward"),
    ],
)
def test_onnx_numbers_and_embeddings_match_luthier(
    family: str,
    method: str,
    output: str,
    key: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    stored = tuned(tmp_path, str(family_folder(family)), method)
    phases: list[str] = []
    record = export_onnx(stored, tmp_path / "onnx", lambda phase, *share: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["merge", "trace", "compare"]
    assert record.score_error is not None and record.score_error < 1e-5
    rows = [RawText("f", number, text) for number, text in enumerate(TEXTS)]
    wanted = [each[key] for each in Predictor.open(stored).answers(rows)]
    session = Session(tmp_path / "onnx")
    assert session.config["output"]["name"] == output
    together, _ = session.ask(TEXTS)
    assert together == pytest.approx(np.array(wanted), abs=1e-4)
    for text, own in zip(TEXTS, wanted, strict=True):
        alone, _ = session.ask([text])
        assert alone[0] == pytest.approx(np.array(own), abs=1e-4)
    if key == "embedding":
        pooling = {"bert": "mean", "gpt2": "last"}[family]
        assert (session.config["pooling"], session.config["normalized"]) == (pooling, True)
        assert np.linalg.norm(together, axis=-1) == pytest.approx(1, abs=1e-5)
        assert np.abs(np.array(wanted[0]) - np.array(wanted[1])).max() > 1e-2
    elif key == "rating":
        assert all(990 < each < 1020 for each in wanted)  # the scale of the rows


@pytest.mark.slow
def test_onnx_tags_match_luthier(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    stored = tuned(tmp_path, str(family_folder("bert")), "token_classification")
    export_onnx(stored, tmp_path / "onnx")
    session, texts = Session(tmp_path / "onnx"), ["Anna saw dog", "cat", "Anna Anna fox saw Anna"]
    answer, read = session.ask([text.split() for text in texts], is_pretokenized=True)
    found = []
    for scores, tokens in zip(answer, read, strict=True):
        first = {word: place for place, word in reversed([*enumerate(tokens.word_ids)])}
        words = sorted(word for word in first if word is not None)
        found.append([session.config["labels"][scores[first[word]].argmax()] for word in words])
    rows = [RawText("f", number, text) for number, text in enumerate(texts)]
    assert found == [each["tags"] for each in Predictor.open(stored).answers(rows)]
    assert len({tag for row in found for tag in row}) > 1
    done = subprocess.run(
        [sys.executable, "-c", readme_code(tmp_path / "onnx")],
        cwd=tmp_path / "onnx", capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tags, _) = done.stdout.splitlines()
    assert tags.startswith("[('Anna', '") and tags.count("(") == 3


def readme_code(folder: Path) -> str:
    return (folder / README).read_text().split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_readme_code_of_onnx_export_runs(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = tuned(tmp_path, str(family_folder("bert")), "contrastive")
    export_onnx(stored, tmp_path / "onnx")
    done = subprocess.run(
        [sys.executable, "-c", readme_code(tmp_path / "onnx")],
        cwd=tmp_path / "onnx", capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [RawText("f", number, text) for number, text in enumerate(("One text.", "Another one"))]
    one, other = (np.array(each["embedding"]) for each in Predictor.open(stored).answers(rows))
    assert f"{one @ other:.3f}".rstrip("0") in done.stdout


@pytest.mark.slow
def test_onnx_image_embeddings_match_luthier(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    tune("small-cnn", "alike", str(tmp_path / "images.npz"), objective={"method": "contrastive"})
    stored = find("small-cnn:alike")
    export_onnx(stored, tmp_path / "onnx")
    processor = read_processor(tmp_path / "onnx")
    rows = [BareImage("f", n, Media("image", f"i{n}", array=each)) for n, each in enumerate(images)]
    assert processor is not None
    pixels = np.stack([processor.array(row.media) for row in rows])
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / ONNX_FILE))
    (found,) = session.run(["media_embedding"], {"pixel_values": pixels})
    wanted = [each["embedding"] for each in Predictor.open(stored).answers(rows)]
    assert found == pytest.approx(np.array(wanted), abs=1e-4)


@pytest.mark.slow
def test_onnx_graph_with_different_output_is_refused(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean that includes padding is correct for a single text only."""
    stored = tuned(tmp_path, str(family_folder("bert")), "contrastive")

    def forward(graph: Any, *inputs: Any) -> Any:
        import torch

        return torch.nn.functional.normalize(
            graph.outputs(inputs).last_hidden_state.mean(1), dim=-1
        )

    monkeypatch.setattr(onnx_export._TextEmbedding, "forward", forward)
    with pytest.raises(RecipeError, match="sentence_embedding differs by up to"):
        export_onnx(stored, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_networks_of_two_encoders_are_refused(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        export_onnx(find(str(family_folder("clip"))), tmp_path / "none")
    assert refused.value.rule == "export.network"


def label_texts(folder: Path, base: str, name: str, **fields: Any) -> None:
    data = folder / f"{name}.jsonl"
    rows = [{"text": f"{word} {n}", "label": word} for n in range(4) for word in ("fox", "dog")]
    data.write_text("\n".join(map(json.dumps, rows)))
    tune(base, name, str(data), **fields)


def named(name: str) -> StoredModel:
    return next(find(each.id) for each in custom_models() if each.id.endswith(f":{name}"))


def tune(base: str, name: str, data: str, **fields: Any) -> None:
    training = {"max_steps": 3, "learning_rate": 0.02, "precision": "float32", "threads": 1}
    given = {"base": base, "name": name, "data": {"train": data, "validation_share": 0}}
    train(Recipe.parse({**given, "training": training, **fields}))


def test_onnx_gives_the_scores_of_a_classifier_of_texts(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    label_texts(tmp_path, str(family_folder("bert")), "texts")
    stored = named("texts")
    record = export_onnx(stored, tmp_path / "onnx")
    assert record.score_error is not None and record.score_error < 1e-4 < (record.tolerance or 0)
    assert record.name == "onnx" and record.files == hashes_of(tmp_path / "onnx")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    texts = ["fox 9", "a dog and a fox and a dog", "dog"]
    read = [stored.chat.encode_input(RawText("f", 1, text), 0).ids_T for text in texts]
    answers = Predictor.open(stored).answers([RawText("f", 1, text) for text in texts])
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / ONNX_FILE))
    labels = json.loads((tmp_path / "onnx" / "config.json").read_text())["id2label"]
    for text, ids_T, answer in zip(texts, read, answers, strict=True):
        given = {"input_ids": ids_T[None], "attention_mask": np.ones_like(ids_T)[None]}
        ((logits,),) = session.run(None, given)
        scores = np.exp(logits - logits.max())
        by_name = {labels[str(n)]: p for n, p in enumerate(scores / scores.sum())}
        assert by_name == pytest.approx(answer["scores"], abs=1e-4), text
    assert tokenizer.vocab_size == stored.chat.tokenizer.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "classification",
        pytest.param("regression", marks=pytest.mark.slow),
        pytest.param("token_classification", marks=pytest.mark.slow),
    ],
)
def test_loss_of_score_in_8_bits_is_that_of_the_file(
    method: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, whole = str(family_folder("bert")), tmp_path / "whole.onnx"
    if method == "classification":
        label_texts(tmp_path, base, "int8")
        stored, data = named("int8"), tmp_path / "int8.jsonl"
    else:
        stored, data = tuned(tmp_path, base, method), tmp_path / f"{method}.jsonl"

    def keep_whole(file: Path, name: str) -> None:
        shutil.copyfile(file, whole)
        quantize(file, name)

    monkeypatch.setattr(onnx_export, "quantize", keep_whole)
    record = export_onnx(stored, tmp_path / "onnx", quantization="int8")
    assert (record.name, record.tolerance) == ("onnx int8", None)
    assert (tmp_path / "onnx" / ONNX_FILE).stat().st_size < 0.8 * whole.stat().st_size
    rows = load_rows(str(data))
    equal = measure_int8(stored, whole, rows)
    assert equal.difference.value == pytest.approx(0, abs=1e-3) and equal.rows == len(rows)
    found = measure_int8(stored, tmp_path / "onnx" / ONNX_FILE, rows)
    assert found.whole == pytest.approx(equal.whole)
    if method == "classification":
        session = Session(tmp_path / "onnx")
        logits, _ = session.ask([row.plain_text() for row in rows])
        right = [session.config["labels"][n] for n in logits.argmax(-1)]
        expected = np.mean([label == row.labels[0] for label, row in zip(right, rows, strict=True)])
        assert (found.name, found.rounded) == ("accuracy", pytest.approx(expected))


@pytest.mark.slow
def test_networks_of_convolutions_have_no_8_bits(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(8) % 2)
    tune("small-cnn", "bits", str(tmp_path / "images.npz"))
    with pytest.raises(RecipeError) as refused:
        export_onnx(find("small-cnn:bits"), tmp_path / "onnx", quantization="int8")
    assert refused.value.rule == "export.quantization" and not (tmp_path / "onnx").exists()


@pytest.mark.slow
def test_onnx_gives_the_scores_of_a_classifier_of_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(8) % 2)
    tune("small-cnn", "images", str(tmp_path / "images.npz"))
    stored = find("small-cnn:images")
    export_onnx(stored, tmp_path / "onnx")
    processor = read_processor(tmp_path / "onnx")
    rows = [BareImage("f", n, Media("image", f"i{n}", array=each)) for n, each in enumerate(images)]
    assert processor is not None
    pixels = np.stack([processor.array(row.media) for row in rows])
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / ONNX_FILE))
    (logits,) = session.run(None, {"pixel_values": pixels})
    answers = [each["scores"] for each in Predictor.open(stored).answers(rows)]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert scores.tolist() == [pytest.approx([*each.values()], abs=1e-4) for each in answers]


def test_onnx_takes_the_place_of_no_files(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(RunConflict) as refused:
            export_onnx(find(str(tiny_model_folder)), target)
        assert refused.value.rule == "run.conflict"
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.slow
def test_onnx_export_of_unsupported_model_is_refused(
    tmp_path: Path,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RecipeError) as refused:
        export_onnx(find(str(tiny_model_folder)), tmp_path / "none")
    assert refused.value.rule == "export.task"
    base = str(family_folder("bert"))
    label_texts(tmp_path, base, "beside", adaptation={"method": "prefix", "virtual_tokens": 2})
    stored = named("beside")
    with pytest.raises(RecipeError) as refused:
        export_onnx(stored, tmp_path / "none")
    assert refused.value.rule == "export.unmergeable"
    label_texts(tmp_path, str(family_folder("llama")), "unpadded")
    with pytest.raises(RecipeError) as refused:
        export_onnx(named("unpadded"), tmp_path / "none")
    assert refused.value.rule == "export.padding"
    label_texts(tmp_path, base, "wrong")
    stored = named("wrong")
    with monkeypatch.context() as patch:
        patch.setattr("luthier.exports.onnx.find_spec", {"onnx": 1, "onnxscript": 1}.get)
        with pytest.raises(RecipeError) as refused:
            export_onnx(stored, tmp_path / "none")
        assert refused.value.rule == "export.extra"
    monkeypatch.setattr("luthier.exports.onnx._largest_error", lambda *given: float("nan"))
    with pytest.raises(RecipeError) as refused:
        export_onnx(stored, tmp_path / "none")
    assert refused.value.rule == "export.differs"
    assert not (tmp_path / "none").exists()
