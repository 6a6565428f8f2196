"""Templates and tokenizers of models from outside, at work in a process with limits.

See :mod:`luthier.serving.sandboxed_text_child` for what is limited. A request that takes too much is
refused, its process is ended, and the next request starts another one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from luthier.data.chat import ChatFormat
from luthier.data.reasoning import ReasoningMarks
from luthier.data.sentence import SentencePipeline
from luthier.data.tokenization import TextEncoder
from luthier.errors import RecipeError
from luthier.models.outside import ADAPTER_CONFIG
from luthier.models.save import ADAPTER
from luthier.models.tokenizer import load_processor
from luthier.serving.sandboxed_process import SandboxedProcess, WorkInterrupted

if TYPE_CHECKING:
    from luthier.store.models import StoredModel
    from luthier.types import IntArray, TemplateKwargs

SECONDS = 10
"""Of processor time for one request; a prompt of 100,000 tokens takes half a second."""


def serving_format(stored: StoredModel, below: ChatFormat | None = None) -> ChatFormat:
    """Tokenizer, template and stop tokens that ``stored`` is served with.

    Those of a model from outside, and of all that was made from one, are in a process of their own.
    ``below`` is the format of its parent, which is taken where it is the same: to read a tokenizer
    takes longer than to load an adapter.
    """
    from luthier.store.models import chat_format

    if stored.tokenizer_from is None:
        if below is not None and _is_format_of(below, stored):
            return below
        return chat_format(stored)
    stored_format = stored.manifest.format
    return sandboxed_format(stored.folder, stored_format.model_dump() if stored_format else None)


def _is_format_of(below: ChatFormat, stored: StoredModel) -> bool:
    """Whether the format of the parent of ``stored`` is its own, by the hashes of all their files."""
    from luthier.store.models import text_format

    assert stored.parent is not None
    others = stored.parent.manifest.files
    files = {
        name: digest
        for name, digest in stored.manifest.files.items()
        if name not in (ADAPTER, ADAPTER_CONFIG) and not name.endswith((".png", ".svg"))
    }
    return (
        stored.manifest.format == text_format(below)
        and "tokenizer.json" in files
        and all(others.get(name) == digest for name, digest in files.items())
    )


def sandboxed_format(folder: Path, fields: Mapping[str, Any] | None = None) -> SandboxedFormat:
    """The format in ``folder``: as a Hugging Face directory says, or by the ``fields`` of a manifest.

    Raises:
        RecipeError: where tokenizer or template cannot be read, or take too much.
    """
    process = TextProcess(folder, fields)
    about = process.about
    return SandboxedFormat(
        process,
        about["template"],
        tuple(about["stop_ids"]),
        about["start_id"],
        load_processor(folder),
        opening_ids=tuple(about["opening_ids"]),
        closing_ids=tuple(about["closing_ids"]),
        decoder_problem=about["decoder_problem"],
        sentence=SentencePipeline.model_validate(about["sentence"]) if about["sentence"] else None,
        sentence_problem=about["sentence_problem"],
    )


@dataclass(frozen=True)
class SandboxedFormat(ChatFormat):
    """A format that asks its process; everything else is as in :class:`ChatFormat`."""

    tokenizer: TextProcess

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        reply: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """See :meth:`ChatFormat.render`."""
        asked = {"turns": [*turns], "reply": reply, "tools": [*tools], "kwargs": dict(kwargs or {})}
        text: str = self.tokenizer.ask("render", **asked)
        return text

    def tokens(self, text: str, *, first: bool) -> IntArray:
        """See :meth:`ChatFormat.tokens`."""
        return np.array(self.tokenizer.ask("tokens", text=text, first=first), dtype=np.int64)

    @property
    def text_encoder(self) -> TextEncoder:
        """Return an encoder whose work the process does."""
        return _RemoteEncoder(self.tokenizer, self.stop_ids)

    @property
    def reasoning_marks(self) -> ReasoningMarks | None:
        """See :attr:`ChatFormat.reasoning_marks`; none of a template that takes too much for it."""
        # Not functools.cached_property: in Python 3.11 all models would wait for one slow template.
        known: dict[str, ReasoningMarks | None] = self.__dict__
        if "known_marks" not in known:
            try:
                found = self.tokenizer.ask("reasoning_marks")
            except WorkInterrupted:
                raise
            except RecipeError:
                found = None
            if found is not None:
                found = ReasoningMarks(**{**found, "special": dict(found["special"])})
            known["known_marks"] = found
        return known["known_marks"]

    def decode(self, ids: Sequence[int]) -> str:
        """See :meth:`ChatFormat.decode`."""
        # Not for the process to find out: a template that takes too much for it ends each process anew.
        special = [*self.reasoning_marks.special.items()] if self.reasoning_marks else []
        text: str = self.tokenizer.ask("decode", ids=[int(i) for i in ids], special=special)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See :meth:`ChatFormat.pieces`."""
        found: list[str] = self.tokenizer.ask("pieces", ids=[int(i) for i in ids])
        return found

    @property
    def longest_token(self) -> int:
        """See :attr:`ChatFormat.longest_token`."""
        return int(self.tokenizer.about["longest_token"])

    def grammar_tokens(self, vocabulary: int) -> Any:
        """See :meth:`ChatFormat.grammar_tokens`."""
        from llguidance import LLTokenizer, TokenizerWrapper

        try:
            known = self.tokenizer.ask("vocabulary", size=vocabulary)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        asked = TokenizerWrapper(_RemoteVocabulary(self, known))
        return LLTokenizer(asked, n_vocab=vocabulary, eos_token=list(self.stop_ids))

    def close(self) -> None:
        """End the process."""
        self.tokenizer.close()


class _RemoteEncoder(TextEncoder):
    """A :class:`TextEncoder` whose work the process does."""

    @property
    def stop_names(self) -> tuple[str, ...]:
        """See :attr:`TextEncoder.stop_names`."""
        return tuple(self.tokenizer.about["stop_names"])

    def break_marks(self, text: str) -> str:
        """Return ``text`` as it is: the process breaks marks when it renders."""
        return text

    def behind(self, text: str) -> list[int]:
        """See :meth:`TextEncoder.behind`."""
        return [int(i) for i in self.tokenizer.ask("behind", text=text)]

    def divide(
        self, text: str, parts: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """See :meth:`TextEncoder.divide`."""
        ids, places = self.tokenizer.ask("divide", text=text, parts=[*parts])
        return ids, [(first, last) for first, last in places]


class _RemoteVocabulary:
    """A vocabulary as llguidance reads it; how it divides forced text is asked of the process."""

    def __init__(self, chat: SandboxedFormat, known: Mapping[str, Any]) -> None:
        self._chat = chat
        self.tokens = [base64.b64decode(token) for token in known["tokens"]]
        self.special_token_ids = known["special"]
        self.eos_token_id = chat.end_id
        self.bos_token_id = chat.tokenizer.about["bos_token_id"]
        special = frozenset(self.special_token_ids)
        self._ids = {t: i for i, t in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        try:
            return [int(i) for i in self._chat.tokens(text.decode(), first=False)]
        except RecipeError:
            return self._greedy(text)  # it runs within a library that takes no refusal

    def _greedy(self, text: bytes) -> list[int]:
        """The longest tokens first; bytes that no token has are left out."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is not None:
                ids.append(self._ids[text[at:end]])
            at = end or at + 1
        return ids


@dataclass(frozen=True)
class EncodedText:
    """What a tokenizer makes of a text, by the names that transformers has for it."""

    input_ids: list[int]
    words: list[int | None] | None
    """Number of each token's word; ``None`` of a special token, and where words are not known."""

    @property
    def is_fast(self) -> bool:
        """Whether the words are known."""
        return self.words is not None

    def word_ids(self) -> list[int | None]:
        """Number of each token's word."""
        if self.words is None:
            raise RecipeError("a tokenizer that is written in Python does not know the words")
        return self.words

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class TextProcess(SandboxedProcess):
    """The process of one model, in the place of its tokenizer."""

    def __init__(self, folder: Path, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            "luthier.serving.sandboxed_text_child",
            (str(folder), json.dumps(fields)),
            SECONDS,
            "the model's template or tokenizer",
            "on this text",
            "the model was unloaded",
        )

    @property
    def chat_template(self) -> Any:
        """The template's text; a dictionary of texts where there are several."""
        return self.about["chat_template"]

    def __call__(self, text: str | Sequence[str], **settings: Any) -> EncodedText:
        """A text, or words, as tokens, with the ``settings`` of a tokenizer of transformers."""
        given = text if isinstance(text, str) else [*text]
        return EncodedText(*self.ask("encode", text=given, settings=settings))

    @property
    def model_max_length(self) -> int:
        """Tokens of the longest text, where the model's files say it."""
        return int(self.about["model_max_length"])

    @property
    def pad_token_id(self) -> int | None:
        """The token that texts are filled up with."""
        return cast("int | None", self.about["pad_token_id"])

    @property
    def unk_token(self) -> str | None:
        """What stands for a word that the tokenizer does not know."""
        return cast("str | None", self.about["unk_token"])

    @property
    def vocab_size(self) -> int:
        """Tokens without those that were added."""
        return int(self.about["vocab_size"])
