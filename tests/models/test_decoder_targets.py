"""Labels and decoder inputs of encoder-decoders compared with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.tree import build_tree
from luthier.errors import RecipeError
from luthier.files import read_json
from luthier.library import models as store
from luthier.models.decoding.forward_backend import ForwardBackend
from luthier.models.load import as_network, check_decoder_input
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import OBJECTIVES
from luthier.types import Example, Message
from model_families import BART_SIZES

CORPUS = [
    "the quick brown fox jumps over",
    "a small model learns",
    "guten Tag, wie geht es dir",
] * 9
CPU = torch.device("cpu")
PROMPT, REPLY = "guten Tag", "the fox learns"
SIZES: dict[str, Any] = {**BART_SIZES, "max_position_embeddings": 64, "init_std": 0.3}
EQUAL = ("bart", "mbart", "mbart50", "m2m_100", "marian", "pegasus", "t5")


def _pieces(folder: Path, name: str, texts: list[str], **fields: int) -> list[tuple[str, float]]:
    """Train SentencePiece on ``texts`` as ``folder/name.model``; return its pieces with scores."""
    import sentencepiece

    prefix = str(folder / name)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=prefix, vocab_size=70, model_type="unigram",
        hard_vocab_limit=False, minloglevel=2, **fields,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]


def _vocabulary(folder: Path, names: list[str]) -> str:
    """Write ``names`` with their ids as JSON; return the path."""
    path = folder / "vocabulary.json"
    path.write_text(json.dumps({name: i for i, name in enumerate(dict.fromkeys(names))}))
    return str(path)


def _tokenizer(family: str, folder: Path, languages: tuple[str | None, str | None]) -> Any:
    import transformers as hf

    source, target = languages
    of_t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if family in ("pegasus", "t5"):
        kind = hf.PegasusTokenizer if family == "pegasus" else hf.T5Tokenizer
        return kind(vocab=_pieces(folder, "own", CORPUS, **of_t5))
    pieces = _pieces(folder, "own", CORPUS)[3:]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if family == "marian":  # the vocabulary of targets is not that of sources
        other = _pieces(folder, "other", [text[::-1] for text in CORPUS])[3:]
        names = ["</s>", "<unk>", *(name for name, _ in pieces + other), "<pad>"]
        files = [str(folder / f"{name}.model") for name in ("own", "other")]
        return hf.MarianTokenizer(*files, _vocabulary(folder, names))
    if family == "m2m_100":
        file = _vocabulary(folder, [*special, *(name for name, _ in pieces)])
        return hf.M2M100Tokenizer(file, str(folder / "own.model"), src_lang=source, tgt_lang=target)
    if family == "bart":
        letters = sorted({*"".join(CORPUS).replace(" ", "Ġ")})
        names = [*special, "<mask>", *letters]
        return hf.BartTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    codes = [("en_XX", 0.0), ("ro_RO", 0.0)]
    vocabulary = [*((name, 0.0) for name in special), *pieces, *codes, ("<mask>", 0.0)]
    kind = hf.MBartTokenizer if family == "mbart" else hf.MBart50Tokenizer
    return kind(vocab=vocabulary, src_lang=source, tgt_lang=target)


def _network(family: str, size: int, tokenizer: Any) -> Any:
    import transformers as hf

    if family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        ids = {"decoder_start_token_id": 0}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=size, **sizes, **ids))
    kinds = {"bart": "Bart", "m2m_100": "M2M100", "marian": "Marian", "pegasus": "Pegasus"}
    name = kinds.get(family, "MBart")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    start = {"mbart": None, "marian": pad, "pegasus": pad}.get(family, eos)
    config = getattr(hf, f"{name}Config")(
        vocab_size=size, **SIZES, pad_token_id=pad, eos_token_id=eos, decoder_start_token_id=start
    )
    head = "MTModel" if family == "marian" else "ForConditionalGeneration"
    model = getattr(hf, f"{name}{head}")(config)
    model.final_logits_bias.normal_() if hasattr(model, "final_logits_bias") else None
    return model


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return ``new_folder(family, source, target)``: a tiny encoder-decoder for these languages."""

    def make(family: str, source: str | None = "en", target: str | None = "ro") -> Path:
        of_mbart = {"en": "en_XX", "ro": "ro_RO", None: None}
        if family.startswith("mbart"):
            source, target = of_mbart[source], of_mbart[target]
        tokenizer = _tokenizer(family, tmp_path, (source, target))
        folder = tmp_path / family
        torch.manual_seed(0)
        size = max(len(tokenizer), 400)  # ids of M2M-100 languages lie above its vocabulary
        _network(family, size, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def _open(folder: Path) -> Network:
    stored = store.find(str(folder))
    network = as_network(store.load(stored, torch.float32, CPU).eval(), CPU, torch.float32)
    network.chat = stored.chat
    return network


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", EQUAL)
def test_targets_match_transformers(
    family: str, new_folder: Callable[..., Path], luthier_home: Path
) -> None:
    """The loss of a row equals ``model(input_ids, labels=tokenizer(text_target=reply))``."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = new_folder(family)
    network = _open(folder)
    assert network.chat is not None
    check_decoder_input(network)
    row = network.chat.replies.encode_last([Message("user", PROMPT), Message("assistant", REPLY)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = tokenizer(text_target=REPLY).input_ids
    assert row.ids_T[1:].tolist() == labels
    assert row.source_T is not None and row.source_T.tolist() == tokenizer(PROMPT).input_ids
    asked_T = network.chat.encode_prompt([Message("user", PROMPT)])
    assert asked_T.tolist() == row.source_T.tolist()
    example = Example(row.ids_T, row.learned_T.astype(np.float32), 0, source_T=row.source_T)
    batch = network.batch(build_tree([example], share=False))
    sft = OBJECTIVES["sft"].model_validate({})
    with torch.no_grad():
        ours = float(sft.loss(network, batch).total) / len(labels)
        own = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        source = tokenizer(PROMPT, return_tensors="pt")
        theirs = float(own(**source, labels=torch.tensor([labels])).loss)
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("family", ["bart", "mbart", "m2m_100"])
def test_replies_begin_where_training_begins(
    family: str, new_folder: Callable[..., Path], luthier_home: Path
) -> None:
    """The decoder reads the special tokens before a reply, as ``generate`` does when forced."""
    folder = new_folder(family)
    network = _open(folder)
    assert network.chat is not None
    prompt_T = network.chat.encode_prompt([Message("user", PROMPT)])
    backend = ForwardBackend(network, 64)
    state = backend.open(prompt_T)
    (given_V,) = backend.prefill([state])
    opening = network.chat.decoder.opening.tolist()
    target = "ro_RO" if family == "mbart" else "__ro__"
    names = network.chat.tokenizer.convert_ids_to_tokens(opening)
    assert names == {"bart": ["</s>", "<s>"], "mbart": [target]}.get(family, ["</s>", target])
    with torch.no_grad():
        own = network.model(
            input_ids=torch.from_numpy(prompt_T)[None], decoder_input_ids=torch.tensor([opening])
        )
    torch.testing.assert_close(given_V, own.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_record_keeps_tokens_around_replies(new_folder: Callable[..., Path]) -> None:
    """A manifest without tokens around the reply keeps the earlier format."""
    chat = load_chat_format(new_folder("mbart"))
    form = store.text_format(chat)
    language = chat.tokenizer.convert_tokens_to_ids("ro_RO")
    assert (form.start_id, form.opening_ids) == (language, ())
    assert form.closing_ids == (chat.tokenizer.eos_token_id, language)


@pytest.mark.parametrize("family", ["mbart", "mbart50", "m2m_100"])
def test_unknown_language_is_refused(family: str, new_folder: Callable[..., Path]) -> None:
    """transformers would assume English, or the source language, without a warning."""
    chat = load_chat_format(new_folder(family, target=None))
    turns = [Message("user", PROMPT), Message("assistant", REPLY)]
    for call in (lambda: chat.replies.encode_last(turns), lambda: chat.encode_prompt(turns[:1])):
        with pytest.raises(RecipeError) as refused:
            call()
        assert refused.value.rule == "tokenizer.language"
    assert len(chat.text_tokenizer.encode_whole(PROMPT))  # an encoder alone needs no target


def test_unknown_source_language_is_refused(new_folder: Callable[..., Path]) -> None:
    folder = new_folder("mbart")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**read_json(path), "src_lang": None}))
    chat = load_chat_format(folder)
    with pytest.raises(RecipeError) as refused:
        chat.encode_prompt([Message("user", PROMPT)])
    assert refused.value.rule == "tokenizer.language"


def test_language_comes_from_generation_config(new_folder: Callable[..., Path]) -> None:
    """``forced_bos_token_id`` names the target language if the tokenizer has no setting."""
    folder = new_folder("mbart50", target=None)
    path = folder / "generation_config.json"
    fields = read_json(path)
    language = load_chat_format(folder).tokenizer.convert_tokens_to_ids("ro_RO")
    path.write_text(json.dumps({**fields, "forced_bos_token_id": language}))
    chat = load_chat_format(folder)
    chat.decoder.check()
    assert chat.decoder.opening_ids == (language,)


def test_different_label_shift_is_refused(
    new_folder: Callable[..., Path], luthier_home: Path
) -> None:
    """A family with another label shift cannot be trained."""
    network = _open(new_folder("bart"))
    network.model.config.decoder_start_token_id = 5
    with pytest.raises(RecipeError) as refused:
        check_decoder_input(network)
    assert refused.value.rule == "network.unsupported"
