"""Cached tokenizers compared with transformers, without importing torch."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.conversations.test_tools import FAMILIES
from luthier.data.conversations.chat import ChatFormat
from luthier.errors import UnknownModel
from luthier.library.folders import custom_folder
from luthier.library.removal import remove_side_files
from luthier.models import tokenizer
from luthier.models.stored_tokenizer import StoredTokenizer
from luthier.models.tokenizer import (
    load_chat_format,
    load_tokenizer,
    load_with_transformers,
)
from luthier.types import Message


def is_tokenizer_stored(folder: Path) -> bool:
    return (tokenizer._stored_folder(folder) / tokenizer.SPECIAL_TOKENS).is_file()


TEXTS = (
    "Hello, how are you? Fine.",
    "  two  spaces\n\tand a tab , and a stop .",
    "Łódź, naïve, 東京, 🙂 and a zero\u200bwidth",
    "<|im_start|>user\nno turn<|im_end|>[MASK] <mask></s>",
)
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <short> & "clear".'},
    {"role": "user", "content": 'What is it like in "Łódź"?', "name": None},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "A town.",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2.5}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"sky": "clear"}', "tool_call_id": "abcdefghi"},
]


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "tokenizer")


def check_alike(stored: Any, own: Any) -> None:
    """Compare the tokens, texts and special tokens of two tokenizers."""
    for text in TEXTS:
        for special in (True, False):
            ids = own.encode(text, add_special_tokens=special)
            assert stored.encode(text, add_special_tokens=special) == ids
            ours, theirs = (
                each(text, add_special_tokens=special, return_offsets_mapping=True)
                for each in (stored, own)
            )
            for name in ("input_ids", "offset_mapping", "attention_mask"):
                assert ours[name] == theirs[name]
            assert ours.tokens() == theirs.tokens() and ours.word_ids() == theirs.word_ids()
            assert stored.decode(ids, skip_special_tokens=special) == own.decode(
                ids, skip_special_tokens=special
            )
    words = ["Hello,", "how", "are", "you?"]
    ours, theirs = (each(words, is_split_into_words=True) for each in (stored, own))
    assert ours["input_ids"] == theirs["input_ids"] and ours.word_ids() == theirs.word_ids()
    assert len(stored) == len(own) and stored.vocab_size == own.vocab_size
    for name in ("special_tokens_map", "all_special_tokens", "all_special_ids", "model_max_length"):
        assert getattr(stored, name) == getattr(own, name), name
    for name in ("bos", "eos", "unk", "sep", "cls", "mask", "pad"):
        assert getattr(stored, f"{name}_token") == getattr(own, f"{name}_token")
        assert getattr(stored, f"{name}_token_id") == getattr(own, f"{name}_token_id")
    assert stored.added_tokens_decoder.keys() == own.added_tokens_decoder.keys()
    assert stored.convert_tokens_to_ids("no token") == own.convert_tokens_to_ids("no token")
    ids = list(range(0, len(own), 7))
    assert stored.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(ids)


def test_stored_tokenizer_matches_transformers(folder: Path) -> None:
    assert not is_tokenizer_stored(folder)
    first = load_tokenizer(folder)
    assert is_tokenizer_stored(folder)
    own = load_with_transformers(folder)
    for stored in (first, load_tokenizer(folder)):
        assert isinstance(stored, StoredTokenizer)
        check_alike(stored, own)
    # Padding and truncation match transformers.
    cut = [each(TEXTS[0], truncation=True, max_length=3).input_ids for each in (first, own)]
    assert cut[0] == cut[1] and len(cut[0]) == 3
    assert first(["Hello", "you"]).input_ids == own(["Hello", "you"]).input_ids
    names = [
        [known.decode_bytes([index]) for index in range(len(own))]
        for known in (
            ChatFormat.of(each).text_tokenizer.grammar_tokens(len(own)) for each in (first, own)
        )
    ]
    assert names[0] == names[1] and b"e" in names[0]


@pytest.mark.parametrize("family", ["bert", "t5", "xlnet", "elmo"])
def test_families(family: str, family_tokenizer: Callable[[str], Any], tmp_path: Path) -> None:
    family_tokenizer(family).save_pretrained(tmp_path)
    stored = load_tokenizer(tmp_path)
    assert isinstance(stored, StoredTokenizer)
    check_alike(stored, load_with_transformers(tmp_path))


@pytest.mark.slow
def test_tokenizers_in_python_are_loaded_with_transformers(tmp_path: Path) -> None:
    from transformers import CanineTokenizer

    CanineTokenizer().save_pretrained(tmp_path)
    for _ in range(2):
        assert isinstance(load_tokenizer(tmp_path), CanineTokenizer)
    with pytest.raises(UnknownModel, match="missing has no tokenizer"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": [{"name": "default", "template": ""}, {"name": "rag", "template": ""}]},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
    ],
)
def test_unsupported_tokenizers_load_with_transformers(
    fields: Mapping[str, Any], folder: Path
) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if "chat_template" in fields:
        (folder / "chat_template.jinja").unlink()
    assert not isinstance(load_tokenizer(folder), StoredTokenizer)
    assert not is_tokenizer_stored(folder)


def test_changed_files_are_loaded_again(folder: Path) -> None:
    assert load_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert not is_tokenizer_stored(folder)
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UnknownModel):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json"])
def test_a_damaged_copy_is_written_again(folder: Path, luthier_home: Path, name: str) -> None:
    wanted = load_tokenizer(folder).encode("the house")
    (copy,) = luthier_home.glob(f"cache/tokenizers/*/{name}")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100])
    assert load_tokenizer(folder).encode("the house") == wanted and copy.read_bytes() == whole


def test_unwritable_store_is_ignored(folder: Path, luthier_home: Path) -> None:
    luthier_home.write_text("no folder")
    assert load_tokenizer(folder).encode("Hello")
    assert not is_tokenizer_stored(folder)


def test_a_removed_model_leaves_no_tokenizer(tiny_model_folder: Path, luthier_home: Path) -> None:
    copied = shutil.copytree(tiny_model_folder, custom_folder("base", "x"))
    load_tokenizer(copied)
    remove_side_files("base:x")
    assert not is_tokenizer_stored(copied)
    assert [*luthier_home.joinpath("cache", "tokenizers").iterdir()] == []


def test_saved_copy_matches_transformers_files(folder: Path, tmp_path: Path) -> None:
    stored, own = load_tokenizer(folder), load_with_transformers(folder)
    changed = copy.copy(stored)
    changed.chat_template = own.chat_template = "{{ messages }}"
    assert stored.chat_template != "{{ messages }}"
    again = pickle.loads(pickle.dumps(changed))
    assert again.chat_template == "{{ messages }}" and again.encode("Hi") == own.encode("Hi")
    again.save_pretrained(tmp_path / "ours")
    own.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()}
        for side in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_are_rendered_by_transformers(
    family: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    new_tokenizer(FAMILIES[family].template).save_pretrained(tmp_path)
    stored, own = load_tokenizer(tmp_path), load_with_transformers(tmp_path)
    assert isinstance(stored, StoredTokenizer)

    def render(tokenizer: Any, turns: Any, reply: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply)
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    for turns in (TURNS[:2], TURNS[1:2], TURNS[:3], TURNS, []):
        for reply in (True, False):
            assert render(stored, turns, reply) == render(own, turns, reply)


def test_tokens_need_no_torch(folder: Path) -> None:
    load_tokenizer(folder)
    code = (
        "import sys; from pathlib import Path\n"
        "from luthier.models.tokenizer import load_chat_format\n"
        "from luthier.types import Message\n"
        f"chat = load_chat_format(Path({str(folder)!r}))\n"
        "chat.text_tokenizer.encode_whole('Hello'), chat.replies.decode([5])\n"
        "chat.text_tokenizer.grammar_tokens(len(chat.tokenizer))\n"
        "print('transformers' in sys.modules)\n"
        "chat.encode_prompt([Message('user', 'Hello')])\n"
        "print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]


def test_prompts_match_transformers(folder: Path) -> None:
    stored = load_chat_format(folder)
    assert isinstance(stored.tokenizer, StoredTokenizer)
    own = ChatFormat.of(load_with_transformers(folder), "auto", stored.stop_ids)
    turns = [Message("system", "Be short."), Message("user", "Hello"), Message("assistant", "Hi")]
    assert stored.prompt_text(turns[:2]) == own.prompt_text(turns[:2])
    ours, theirs = (each.replies.encode_last(turns) for each in (stored, own))
    assert ours.ids_T.tolist() == theirs.ids_T.tolist()
    assert ours.learned_T.tolist() == theirs.learned_T.tolist()
