"""A tokenizer of the library ``tokenizers``, behind the names that transformers has for it.

Importing transformers' own takes two seconds and PyTorch with it; encoding rows, decoding replies and
rendering chat templates need neither. What is asked for beyond that (padded batches, other ways to
save) is answered by transformers' tokenizer, made of the same files when it is first needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier.data.chat_template import render_template
from luthier.files import read_json, write_bytes
from luthier.models.description import import_transformers

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer

_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Classes that take ``tokenizer.json`` as it is; others of transformers build it anew."""
_KINDS = frozenset({"", "llama", "gpt2", "elmo", "fasttext", "palm", "transfo_xl"})
"""Families of networks of which that is certain: for some, transformers takes another class anyway.
The last four are ours, and it knows none for them."""
_BERT = frozenset({"BertTokenizer", "BertTokenizerFast"})
"""Classes that build it anew of the vocabulary and a few fields of ``tokenizer_config.json``."""
_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_READ = frozenset(
    (*_SPECIAL, "added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces",
     "extra_special_tokens", "is_local", "local_files_only", "model_input_names", "model_max_length",
     "tokenizer_class")
)  # fmt: skip
"""Fields of ``tokenizer_config.json`` that are followed here; transformers reads one with others."""
_READ_OF_BERT = frozenset(
    (*_SPECIAL, "added_tokens_decoder", "backend", "clean_up_tokenization_spaces",
     "do_basic_tokenize", "do_lower_case", "is_local", "local_files_only", "max_length",
     "model_input_names", "model_max_length", "name_or_path", "never_split", "pad_to_multiple_of",
     "pad_token_type_id", "padding_side", "stride", "strip_accents", "tokenize_chinese_chars",
     "tokenizer_class", "truncation_side", "truncation_strategy")
)  # fmt: skip
"""The same of BERT's; those of padding and cutting are followed by transformers' own, which does it."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
"""Files of older versions that would have to be read, too."""
_UNLIMITED = int(1e30)
"""What transformers has as ``model_max_length`` where a tokenizer names none."""
_PATCHED = 100_000
"""Tokens of a vocabulary from which on transformers looks for Mistral's, whose pattern was wrong."""


class FastEncoding:
    """What a tokenizer makes of one text."""

    is_fast = True

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    @property
    def input_ids(self) -> list[int]:
        """Its tokens."""
        return self._encoding.ids

    def __getitem__(self, key: str) -> Any:
        names = {
            "input_ids": "ids", "offset_mapping": "offsets", "attention_mask": "attention_mask",
        }  # fmt: skip
        return getattr(self._encoding, names[key])

    def tokens(self) -> list[str]:
        """The names of the tokens."""
        return self._encoding.tokens

    def word_ids(self) -> list[int | None]:
        """The word that each token belongs to; ``None`` for special tokens around the text."""
        return self._encoding.word_ids


class FastTokenizer:
    """The part of transformers' ``TokenizersBackend`` that texts go through, with the same results.

    Attributes and methods that are not here are those of :attr:`transformers_tokenizer`.
    """

    is_fast = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """``files`` are those of a folder that :meth:`open` takes, by name."""
        from tokenizers import Tokenizer

        self._files = dict(files)
        config = json.loads(files["tokenizer_config.json"])
        self.backend_tokenizer: Tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.backend_tokenizer.encode_special_tokens = False
        self.backend_tokenizer.no_truncation()  # as transformers where neither is asked for
        self.backend_tokenizer.no_padding()
        template = files.get("chat_template.jinja")
        # Lines end as in files that are opened as text.
        text = None if template is None else "\n".join(re.split("\r\n?", template.decode()))
        self.chat_template: Any = config.get("chat_template") if text is None else text
        self.model_max_length = config.get("model_max_length") or _UNLIMITED
        self.special_tokens_map: dict[str, str] = {
            name: config[name] for name in _SPECIAL if config.get(name) is not None
        }
        self._extra = list(config.get("extra_special_tokens") or ())

    @staticmethod
    def open(folder: Path) -> FastTokenizer | None:
        """The tokenizer in ``folder``; ``None`` where it is not certain to be transformers' own."""
        files = known_files(folder)
        return FastTokenizer(files) if files else None

    @cached_property
    def transformers_tokenizer(self) -> Any:
        """transformers' own of the same files."""
        import_transformers(networks=False)
        from transformers import AutoTokenizer

        with TemporaryDirectory() as folder:
            for name, content in self._files.items():
                (Path(folder) / name).write_bytes(content)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of objects that are being copied or unpickled
            raise AttributeError(name)
        token = name.removesuffix("_id")
        if token in _SPECIAL:
            text = self.special_tokens_map.get(token)
            return (
                text if token == name or text is None else self.backend_tokenizer.token_to_id(text)
            )
        return getattr(self.transformers_tokenizer, name)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that were added, by their ids."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens that the configuration names, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens by name."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of a token; that of the unknown one for others."""
        found = self.backend_tokenizer.token_to_id(token)
        unknown: int = self.unk_token_id
        return unknown if found is None else found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The names of tokens."""
        return [self.backend_tokenizer.id_to_token(int(each)) for each in ids]

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        is_split_into_words: bool = False,
        return_offsets_mapping: bool = False,
        truncation: bool = False,
        verbose: bool = True,
        **others: Any,
    ) -> Any:
        """The tokens of a text, or of its words; never cut. The offsets are there in any case."""
        if others or truncation or isinstance(text, str) == is_split_into_words:
            return self.transformers_tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                is_split_into_words=is_split_into_words,
                return_offsets_mapping=return_offsets_mapping,
                truncation=truncation,
                verbose=verbose,
                **others,
            )
        return FastEncoding(
            self.backend_tokenizer.encode(
                text, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of the tokens of ``text``."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self.backend_tokenizer.decode(
            [int(each) for each in ids], skip_special_tokens=skip_special_tokens
        )

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The texts of several sequences of tokens."""
        return [self.decode(each, skip_special_tokens) for each in sequences]

    def apply_chat_template(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **names: Any,
    ) -> str:
        """Render a conversation with ``chat_template``, by default the tokenizer's own.

        ``names`` are further values that the template may read.

        Raises:
            ValueError: without a template.
            Exception: whatever the template runs into; see :func:`render_template`.
        """
        template = chat_template or self.chat_template
        if tokenize or not isinstance(template, str):
            raise ValueError("the text of one chat template is rendered here")
        names = self.special_tokens_map | names
        return render_template(template, turns, tools, add_generation_prompt, names)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write its files, with the chat template in one of its own, as transformers has it."""
        config = json.loads(self._files["tokenizer_config.json"])
        if config["tokenizer_class"] not in _CLASSES:  # transformers writes further fields
            own = self.transformers_tokenizer
            own.chat_template = self.chat_template
            own.save_pretrained(folder)
            return
        config.pop("chat_template", None)
        template = self.chat_template
        files = {
            "tokenizer.json": self.backend_tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": f"{json.dumps(config, indent=2)}\n".encode(),
            **({} if template is None else {"chat_template.jinja": template.encode()}),
        }
        for name, content in files.items():
            write_bytes(Path(folder) / name, content)


def known_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in ``folder``; none where transformers may make another of them."""
    kind = ""
    if (folder / "config.json").is_file():
        kind = str(read_json(folder / "config.json").get("model_type"))
    others = [name for name in _OTHER_FILES if (folder / name).exists()]
    files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    if not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return {}
    try:
        config = json.loads(files["tokenizer_config.json"])
        contents = json.loads(files["tokenizer.json"])
        if kind == "bert" and others == ["special_tokens_map.json"]:
            named = json.loads((folder / "special_tokens_map.json").read_bytes())
            others = [] if named.items() <= config.items() else others  # it says nothing new
        is_bert = kind == "bert"
        is_known = _is_bert(config, contents) if is_bert else _is_plain(config, contents, kind)
        return files if is_known and not others else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # transformers says what is wrong


def _is_plain(config: Mapping[str, Any], contents: Mapping[str, Any], kind: str) -> bool:
    """Whether transformers takes ``tokenizer.json`` as it is, and adds nothing to it.

    ``contents`` are its fields, ``config`` those of ``tokenizer_config.json``, ``kind`` is the
    ``model_type`` of the network.
    """
    if kind not in _KINDS or config.get("tokenizer_class") not in _CLASSES:
        return False
    if not config.keys() <= _READ:
        return False
    if contents.get("truncation") or contents.get("padding") or not contents.get("post_processor"):
        return False
    if not isinstance(config.get("chat_template", ""), str):
        return False
    model = contents["model"]
    if config.get("clean_up_tokenization_spaces") and model.get("type") != "BPE":
        return False
    if len(model["vocab"]) + len(contents["added_tokens"]) > _PATCHED and not kind:
        return False
    if not isinstance(config.get("extra_special_tokens") or [], list):
        return False
    if not _are_added(config, contents):
        return False
    special = {
        each["content"]
        for each in contents["added_tokens"]
        if each["special"] and not each["normalized"]
    }
    named = {config[name] for name in _SPECIAL if config.get(name) is not None}
    return named | {*(config.get("extra_special_tokens") or ())} <= special


def _is_bert(config: Mapping[str, Any], contents: Mapping[str, Any]) -> bool:
    """Whether ``tokenizer.json`` is what transformers makes of its vocabulary for a ``BertTokenizer``.

    It makes all but the vocabulary anew; padding and cutting are left out where nobody asks for them.
    """
    if config.get("tokenizer_class") not in _BERT or not config.keys() <= _READ_OF_BERT:
        return False
    if config.get("clean_up_tokenization_spaces"):
        return False
    named = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
    vocabulary = contents["model"]["vocab"]
    switches = [config.get(name, True) for name in ("do_lower_case", "tokenize_chinese_chars")]
    strips = config.get("strip_accents")
    if named.keys() != {*_SPECIAL[2:]} or not {*map(type, (*switches, strips or False))} <= {bool}:
        return False
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first, last = named["cls_token"], named["sep_token"]
    opens, closes = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (first, last))
    single = [opens, {"Sequence": {"id": "A", "type_id": 0}}, closes]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": last, "type_id": 1}}]
    made = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[token], "content": token, **flags, "special": True}
            for token in sorted({*named.values()}, key=vocabulary.__getitem__)
        ],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": switches[1],
            "strip_accents": strips, "lowercase": switches[0],
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single + second,
            "special_tokens": {
                token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
                for token in (first, last)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": named["unk_token"],
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }  # fmt: skip
    left_out = {"truncation", "padding"}
    there = {name: value for name, value in contents.items() if name not in left_out}
    return there == made and _are_added(config, contents)


def _are_added(config: Mapping[str, Any], contents: Mapping[str, Any]) -> bool:
    """Whether the tokens that ``config`` adds are there already, and the same."""
    added = {
        str(each["id"]): {k: v for k, v in each.items() if k != "id"}
        for each in contents["added_tokens"]
    }
    return all(
        added.get(index) == token for index, token in config.get("added_tokens_decoder", {}).items()
    )
