"""The mean-pooling BERT classifier compared with transformers' network and a formula."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import luthier
from luthier.errors import RecipeError
from luthier.library import models as store
from luthier.models.folder import ModelFolder
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head, declared_pooling, head_in, score_layer
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import Classification, Contrastive
from luthier.objectives.base import RunModels

CPU = torch.device("cpu")
HEAD = Head("sequence_classification", ("a", "b", "c"), pooling="mean")


@pytest.fixture
def sentence_encoder(family_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a folder in the format of sentence-transformers."""
    folder = tmp_path / "encoder"
    shutil.copytree(family_folder("bert"), folder)
    (folder / "1_Pooling").mkdir()
    declared = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    return folder


def test_scores_use_direction_of_mean_state(sentence_encoder: Path) -> None:
    torch.manual_seed(1)
    model = load_model(sentence_encoder, torch.float32, CPU, HEAD).eval()
    plain = AutoModel.from_pretrained(sentence_encoder).eval()
    ids = torch.randint(5, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits.numpy()
        states = plain(input_ids=ids, attention_mask=mask).last_hidden_state.double().numpy()
    layer = score_layer(model)
    assert layer is not None
    weight, bias = (w.detach().double().numpy() for w in (layer.weight, layer.bias))
    for row, length in enumerate((9, 5)):
        mean = states[row, :length].mean(0)
        direction = mean / np.sqrt((mean**2).mean())
        assert found[row] == pytest.approx(weight @ direction + bias, abs=1e-5)
    as_network(model, CPU, torch.float32)  # compares the flat layout with the same


def test_pooling_follows_folder_declaration(
    sentence_encoder: Path, family_folder: Callable[[str], Path]
) -> None:
    bert, roberta = (ModelFolder(family_folder(name)) for name in ("bert", "roberta"))
    encoder = ModelFolder(sentence_encoder)
    chat = load_chat_format(bert.path)
    assert declared_pooling(sentence_encoder) == "mean"
    assert declared_pooling(bert.path) is None and declared_pooling(roberta.path) is None
    bound = Classification().bind(RunModels(chat, encoder))
    assert bound.pooling == "mean" and bound.probe
    own = Classification(pooling="first", probe=False).bind(RunModels(chat, encoder))
    assert own.head().pooling is None and not own.probe
    plain = Classification().bind(RunModels(chat, bert))
    assert plain.pooling is None and not plain.probe
    # Models of earlier versions have no such field, and were trained to read the first token.
    earlier = Classification.model_validate({"method": "classification"})
    assert earlier.head().pooling is None
    assert Classification().bind(RunModels(chat, encoder, earlier)).pooling is None
    # An encoder of texts that was tuned here has no file that says so.
    assert Classification().bind(RunModels(chat, bert, Contrastive())).pooling == "mean"
    assert (
        Classification().bind(RunModels(chat, bert, Contrastive(pooling="first"))).pooling is None
    )
    with pytest.raises(RecipeError):
        Classification(pooling="mean").bind(RunModels(chat, roberta))
    config = sentence_encoder / "1_Pooling" / "config.json"
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    config.write_text(json.dumps(both))
    assert declared_pooling(sentence_encoder) is None


@pytest.mark.slow
def test_a_classifier_of_texts_is_trained_and_stored(
    sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    data = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"the {word} over my {word} {number}", "label": word}
        for number in range(20)
        for word in ("fox", "dog", "card")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = luthier.tune(data, base=str(sentence_encoder), name="words", training__max_steps=4)
    found = store.find(tuned.model_id)
    assert found.objective.head().pooling == "mean"
    answers = luthier.load(tuned.model_id).predict([row["text"] for row in rows[:6]])
    assert [answer["label"] for answer in answers] == [row["label"] for row in rows[:6]]
    whole = luthier.tune(
        data, base=str(sentence_encoder), name="whole", adaptation="full", training__max_steps=2
    )
    folder = store.find(whole.model_id).network_folder
    config = ModelFolder(folder).config(Head("embedding"))
    assert config.model_type == "mean_pooling_bert"
    assert head_in(config).labels == ("card", "dog", "fox")
    assert (
        Classification().bind(RunModels(load_chat_format(folder), ModelFolder(folder))).pooling
        == "mean"
    )
    with pytest.raises(RecipeError, match="mean pooling"):
        Classification(pooling="first").bind(
            RunModels(load_chat_format(folder), ModelFolder(folder))
        )
    # Elsewhere it is unknown, and not taken for a BERT that reads the first token.
    program = (
        "import sys; from transformers import AutoModelForSequenceClassification as A; "
        "A.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "mean_pooling_bert" in done.stderr


@pytest.mark.slow
def test_retraining_keeps_head_unless_labels_change(
    sentence_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    def data(*words: str) -> Path:
        path = tmp_path / f"{'-'.join(words)}.jsonl"
        rows = [{"text": f"my {word} {n}", "label": word} for n in range(20) for word in words]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    first: dict[str, object] = {"method": "classification", "pooling": "first", "probe": False}
    earlier = luthier.tune(
        data("fox", "dog"), base=str(sentence_encoder), name="a", objective=first,
        training__max_steps=60,
    )  # fmt: skip
    assert earlier.verdict.kept["accuracy"] == 1
    further = luthier.tune(
        data("dog", "fox"), base=earlier.model_id, name="b", training__max_steps=1
    )
    assert further.verdict.before["accuracy"] == 1  # the earlier head is reused
    new = luthier.tune(
        data("fox", "dog", "card"), base=earlier.model_id, name="c", training__max_steps=1
    )
    learned = store.find(new.model_id).objective
    assert isinstance(learned, Classification) and learned.pooling == "first"
