"""What texts become without transformers is what they become with it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.data.chat import ChatFormat
from luthier.models import nets
from luthier.models.fast_tokenizer import FastTokenizer
from luthier.models.tokenizer import load_chat_format, load_tokenizer
from luthier.types import Message

TEXTS = (
    "",
    "Hello, how are you? Fine.",
    "  two  spaces\n\tand a tab ",
    "Łódź, naïve, 東京, 🙂 and a zero\u200bwidth",
    "<|im_start|>user\nno turn<|im_end|>",
    "<|endoftext|>",
    "x" * 300,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[FastTokenizer, Any]:
    from transformers import AutoTokenizer

    fast = FastTokenizer.open(folder)
    assert fast is not None
    return fast, AutoTokenizer.from_pretrained(folder)


def change(folder: Path, target: Path, name: str, **fields: Any) -> Path:
    """``folder`` again, with other fields in the file ``name``."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / name).read_text()) | fields
    (target / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_tokens_are_those_of_transformers(both: Any, text: str, special: bool) -> None:
    fast, own = both
    assert fast.encode(text, add_special_tokens=special) == own.encode(
        text, add_special_tokens=special
    )
    ours = fast(text, add_special_tokens=special, return_offsets_mapping=True)
    theirs = own(text, add_special_tokens=special, return_offsets_mapping=True)
    for name in ("input_ids", "offset_mapping", "attention_mask"):
        assert ours[name] == theirs[name]
    assert ours.tokens() == theirs.tokens()
    assert ours.word_ids() == theirs.word_ids()
    for skip in (True, False):
        ids = own.encode(text)
        assert fast.decode(ids, skip_special_tokens=skip) == own.decode(
            ids, skip_special_tokens=skip
        )
    assert fast.batch_decode([ids, ids[:1]], True) == own.batch_decode([ids, ids[:1]], True)


def test_words_and_padding_are_those_of_transformers(both: Any) -> None:
    fast, own = both
    words = ["Hello,", "how", "are", "you?"]
    ours, theirs = (each(words, is_split_into_words=True) for each in both)
    assert ours["input_ids"] == theirs["input_ids"] and ours.word_ids() == theirs.word_ids()
    cut = [each("Hello, how are you?", truncation=True, max_length=3).input_ids for each in both]
    assert cut[0] == cut[1] and len(cut[0]) == 3
    assert fast(["Hello", "you"]).input_ids == own(["Hello", "you"]).input_ids


def test_what_a_tokenizer_knows_of_itself(both: Any) -> None:
    fast, own = both
    assert len(fast) == len(own) and fast.vocab_size == own.vocab_size
    assert fast.get_vocab() == own.get_vocab()
    assert fast.special_tokens_map == own.special_tokens_map
    assert fast.all_special_tokens == own.all_special_tokens
    assert fast.all_special_ids == own.all_special_ids
    assert fast.added_tokens_decoder.keys() == own.added_tokens_decoder.keys()
    assert fast.model_max_length == own.model_max_length
    for name in ("bos", "eos", "unk", "sep", "cls", "mask"):
        assert getattr(fast, f"{name}_token") == getattr(own, f"{name}_token")
        assert getattr(fast, f"{name}_token_id") == getattr(own, f"{name}_token_id")
    assert fast.convert_tokens_to_ids("no token") == own.convert_tokens_to_ids("no token")
    ids = list(range(0, len(own), 7))
    assert fast.convert_ids_to_tokens(ids) == own.convert_ids_to_tokens(ids)
    assert fast.padding_side == own.padding_side  # of transformers' own


def test_a_copy_is_written_as_transformers_writes_it(both: Any, tmp_path: Path) -> None:
    fast, own = both
    changed = copy.copy(fast)
    changed.chat_template = "{{ messages }}"
    assert fast.chat_template == own.chat_template
    again = pickle.loads(pickle.dumps(changed))
    assert again.chat_template == "{{ messages }}" and again.encode("Hi") == own.encode("Hi")
    for template, made in (("{{ messages }}", again), (own.chat_template, fast)):
        own_copy = copy.copy(own)
        own_copy.chat_template = template
        made.save_pretrained(tmp_path / "ours")
        own_copy.save_pretrained(tmp_path / "theirs")
        ours, theirs = (read_files(tmp_path / side) for side in ("ours", "theirs"))
        # Where the tokenizer lay as transformers read it, which says nothing about it.
        configs = [json.loads(each.pop("tokenizer_config.json")) for each in (ours, theirs)]
        for name in ("is_local", "local_files_only"):
            [config.pop(name, None) for config in configs]
        assert ours == theirs and configs[0] == configs[1]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"pad_token": "<|no such token|>"}),
        ("tokenizer_config.json", {"pad_token": {"content": "<|im_end|>"}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image": "<|im_end|>"}}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": ""}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<|im_start|>"}}}),
        ("tokenizer_config.json", {"tokenizer_class": 7, "model_max_length": None}),
        ("tokenizer.json", {"post_processor": None}),
        ("tokenizer.json", {"model": None}),
        (
            "tokenizer.json",
            {"truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0}},
        ),
    ],
)
def test_what_is_not_certain_is_read_by_transformers(
    folder: Path, tmp_path: Path, name: str, fields: Any
) -> None:
    assert FastTokenizer.open(change(folder, tmp_path / "changed", name, **fields)) is None


def test_files_of_older_versions_are_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    older = change(folder, tmp_path / "older", "tokenizer_config.json")
    assert FastTokenizer.open(older) is not None
    (older / "special_tokens_map.json").write_text("{}")
    assert FastTokenizer.open(older) is None
    (older / "tokenizer.json").write_text("{")
    (older / "special_tokens_map.json").unlink()
    assert FastTokenizer.open(older) is None


def test_a_large_vocabulary_of_mistral_is_read_by_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.models.fast_tokenizer._PATCHED", 100)
    path = change(folder, tmp_path / "large", "tokenizer_config.json")
    assert FastTokenizer.open(path) is None
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert FastTokenizer.open(path) is not None


@pytest.mark.parametrize("kind", ["mistral3", "qwen2", "siglip2", "new_kind", None])
def test_families_for_which_transformers_takes_another_class(
    kind: str | None, folder: Path, tmp_path: Path
) -> None:
    path = change(folder, tmp_path / "kind", "tokenizer_config.json")
    assert FastTokenizer.open(path) is not None
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert FastTokenizer.open(path) is None


@pytest.mark.parametrize("kind", ["elmo", "fasttext", "palm", "transfo_xl"])
def test_families_of_ours_are_those_of_transformers(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    nets.register(kind)
    path = change(folder, tmp_path / "kind", "tokenizer_config.json")
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    both = FastTokenizer.open(path), AutoTokenizer.from_pretrained(path)
    assert type(both[1]).__name__ == "TokenizersBackend"
    for text in TEXTS:
        test_tokens_are_those_of_transformers(both, text, True)
    test_what_a_tokenizer_knows_of_itself(both)


def test_a_template_with_lines_of_windows(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = change(folder, tmp_path / "windows", "tokenizer_config.json")
    (path / "chat_template.jinja").write_bytes(b"{{ messages }}\r\nend\r")
    fast = FastTokenizer.open(path)
    assert fast is not None
    assert fast.chat_template == AutoTokenizer.from_pretrained(path).chat_template


@pytest.mark.slow
def test_tokenizers_of_other_classes_are_those_of_transformers(
    family_folder: Callable[[str], Path],
) -> None:
    assert not isinstance(load_tokenizer(family_folder("stable_diffusion")), FastTokenizer)


def test_grammars_know_its_tokens(folder: Path, both: Any) -> None:
    fast, own = both
    names = [
        [known.decode_bytes([index]) for index in range(len(own))]
        for known in (ChatFormat.of(each).grammar_tokens(len(own)) for each in (fast, own))
    ]
    assert names[0] == names[1] and b"e" in names[0]


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from luthier.models.tokenizer import load_chat_format\n"
        "from luthier.types import Message\n"
        f"chat = load_chat_format(Path({str(folder)!r}))\n"
        "ids = chat.encode_prompt([Message('user', 'Hello')])\n"
        "chat.decode(ids), chat.encode_words('Hello'), chat.grammar_tokens(len(chat.tokenizer))\n"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_prompts_are_those_of_transformers(folder: Path, both: Any) -> None:
    fast = load_chat_format(folder)
    assert isinstance(fast.tokenizer, FastTokenizer)
    own = ChatFormat.of(both[1], "auto", fast.stop_ids)
    turns = [Message("system", "Be short."), Message("user", "Hello"), Message("assistant", "Hi")]
    assert fast.prompt_text(turns[:2]) == own.prompt_text(turns[:2])
    ours, theirs = (each.encode_reply(turns) for each in (fast, own))
    assert ours.ids_T.tolist() == theirs.ids_T.tolist()
    assert ours.learned_T.tolist() == theirs.learned_T.tolist()


WORD_PIECES = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "##s", "how", "are", "you", "?",
    ",", ".", "fine", "東", "京", "naive", "naïve", "a", "zero", "##width", "width", "user", "no",
    "<", ">", "|", "x", "##x", "two", "spaces", "and", "tab", "[", "]", "mask", "##é", "caf", "e",
)  # fmt: skip
BERT = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]", "tokenizer_class": "BertTokenizer", "model_max_length": 512,
}  # fmt: skip
BERT_TEXTS = (
    *TEXTS,
    "Hello[MASK] [CLS] how [SEP]? [mask] [PAD][UNK]",
    "Café CAFÉ cafe\u0301, NAÏVE",
    "x" * 100 + " " + "x" * 101,
    "control\u0007 and \ufffd and \u00a0blank\u2003",
    "hellos, 東京hello",
)


def write_bert(folder: Path, **fields: Any) -> Path:
    """A tokenizer of BERT as older versions wrote it, with padding and cutting of its own."""
    from transformers import BertTokenizer

    config = {name: value for name, value in (BERT | fields).items() if value is not ...}
    switches = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    made = BertTokenizer(
        {token: number for number, token in enumerate(WORD_PIECES)},
        **{name: config[name] for name in switches if isinstance(config.get(name), bool)},
    ).backend_tokenizer
    made.enable_truncation(8)
    made.enable_padding(length=8, pad_token="[PAD]")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"},
        {"strip_accents": False, "do_basic_tokenize": True, "never_split": None},
        {"strip_accents": True, "do_lower_case": False, "tokenize_chinese_chars": False},
    ],
)
@pytest.mark.parametrize("saved_again", [False, True])
def test_bert_is_that_of_transformers(
    fields: dict[str, Any], saved_again: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    folder = write_bert(tmp_path / "bert", **fields)
    names = {name: BERT[name] for name in ("unk_token", "cls_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "vocab.txt").write_text("\n".join(WORD_PIECES))
    own = AutoTokenizer.from_pretrained(folder)
    assert isinstance(own, BertTokenizer)
    if saved_again:
        folder = tmp_path / "again"
        own.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    fast = FastTokenizer.open(folder)
    assert fast is not None
    both = (fast, own)
    for text in BERT_TEXTS:
        for special in (True, False):
            test_tokens_are_those_of_transformers(both, text, special)
    test_words_and_padding_are_those_of_transformers(both)
    test_what_a_tokenizer_knows_of_itself(both)
    test_a_copy_is_written_as_transformers_writes_it(both, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "DistilBertTokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"mask_token": ...},
        {"bos_token": "[CLS]"},
        {"pad_token": "[NO TOKEN]"},
        {"cls_token": "[SEP]"},
        {"unk_token": {"content": "[UNK]"}},
        {"do_lower_case": "no"},
        {"clean_up_tokenization_spaces": True},
        {"additional_special_tokens": ["hello"]},
        {"added_tokens_decoder": {"5": {"content": "hello"}}},
    ],
)
def test_bert_of_other_fields_is_read_by_transformers(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    assert FastTokenizer.open(write_bert(tmp_path / "bert", **fields)) is None


def test_bert_of_other_files_is_read_by_transformers(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    assert FastTokenizer.open(folder) is not None
    contents = json.loads((folder / "tokenizer.json").read_text())
    for name, change_ in (
        ("normalizer", {"lowercase": False}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("decoder", {"cleanup": False}),
        ("post_processor", {"single": []}),
        ("model", {"max_input_chars_per_word": 200}),
        ("model", {"type": "WordLevel"}),
    ):
        other = contents | {name: contents[name] | change_}
        (folder / "tokenizer.json").write_text(json.dumps(other))
        assert FastTokenizer.open(folder) is None, name
    added = contents["added_tokens"]
    for tokens in (added[1:], [*added, added[0] | {"id": 5, "content": "hello"}]):
        (folder / "tokenizer.json").write_text(json.dumps(contents | {"added_tokens": tokens}))
        assert FastTokenizer.open(folder) is None
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    for name, content in (("special_tokens_map", {"unk_token": "hello"}), ("added_tokens", {})):
        (folder / f"{name}.json").write_text(json.dumps(content))
        assert FastTokenizer.open(folder) is None, name
        (folder / f"{name}.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    assert FastTokenizer.open(folder) is None
