"""Cached tokenizers, loaded with the library ``tokenizers`` alone.

transformers takes seconds to import and therefore loads each tokenizer only once. The resulting
``tokenizer.json``, chat template and special tokens are stored in ``cache/tokenizers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer


class StoredEncoding:
    """Tokens of one text or of a pair, with transformers' attribute names."""

    is_fast = True

    def __init__(self, encoding: Encoding) -> None:
        self.tokens, self.word_ids = lambda: encoding.tokens, lambda: encoding.word_ids
        self.sequence_ids, self.token_type_ids = lambda: encoding.sequence_ids, encoding.type_ids
        self.input_ids, self.offset_mapping = encoding.ids, encoding.offsets
        self.attention_mask = encoding.attention_mask

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class StoredTokenizer:
    """A fast tokenizer with transformers' attributes and methods for encoding and decoding.

    Other attributes and methods come from :attr:`transformers_tokenizer`.
    """

    is_fast = True

    def __init__(self, content: bytes, fields: Mapping[str, Any], source: Path) -> None:
        """Read the ``content`` of a ``tokenizer.json``; transformers reads the folder ``source``.

        ``fields`` become attributes, such as ``chat_template``, ``eos_token`` and ``eos_token_id``.
        """
        self.source = source
        self.backend_tokenizer = Tokenizer.from_buffer(content)
        # transformers sets truncation and padding in each call, whatever tokenizer.json contains.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        vars(self).update(fields)

    @cached_property
    def transformers_tokenizer(self) -> Any:
        """The tokenizer of transformers for the same files."""
        from luthier.models.tokenizer import load_with_transformers

        return load_with_transformers(self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle read such names before any attribute exists
            raise AttributeError(name)
        return getattr(self.transformers_tokenizer, name)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without added tokens."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of ``token``, or of the unknown token."""
        found = self.backend_tokenizer.token_to_id(token)
        unknown: int | None = self.unk_token_id
        return unknown if found is None else found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Return the names of tokens."""
        return [self.backend_tokenizer.id_to_token(int(each)) for each in ids]

    def __call__(
        self,
        text: Any,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        **settings: Any,
    ) -> Any:
        """Return the tokens of a text, of a pair or, with ``is_split_into_words``, of words."""
        words = settings.get("is_split_into_words", False)
        further = settings.keys() - {"is_split_into_words", "return_offsets_mapping", "verbose"}
        # Batches, padding, truncation and tensors need transformers.
        if isinstance(text, str) == words or any(settings[name] for name in further):
            settings["add_special_tokens"] = add_special_tokens
            return self.transformers_tokenizer(text, text_pair, **settings)
        encoded = self.backend_tokenizer.encode(text, text_pair, words, add_special_tokens)
        return StoredEncoding(encoded)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        return self.backend_tokenizer.decode([int(each) for each in ids], skip_special_tokens)

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        """Render a conversation like transformers' ``apply_chat_template``."""
        if settings.pop("tokenize", True) or not turns:
            return self.transformers_tokenizer.apply_chat_template(turns, **settings)
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        names = {**self.special_tokens_map, "chat_template": self.chat_template, **settings}
        return render_jinja_template([chat], **names)[0][0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files as transformers does, with the current chat template."""
        own = self.transformers_tokenizer
        own.chat_template = self.chat_template
        own.save_pretrained(folder)
