"""Tokenization of rendered conversations with learned parts and untrusted user text.

A rendered conversation is tokenized as one text. SentencePiece tokenizers add a space to the start
of each text, so separate tokenization of parts would not match the tokens of a served prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.errors import RecipeError
from luthier.types import IntArray

Span = tuple[int, int, int]
"""Token id, first character, and the character after the last character."""

SENTINEL = "\ufdd0"
"""Unicode noncharacter that breaks the name of a special token in user text."""
_LEADS = (".", "a", "0", "\n")
"""Prefixes for tokenizing a continuation, so the tokenizer adds no space."""
_CACHED, _MOST_CACHED = 64, 64
"""Longest cached prompt end in characters, and number of cached ends."""
_FIRST = itemgetter(1)
BROKEN, MOST_SHARING = "\ufffd", 8
"""Replacement character of decoders for part of a character, and most tokens of one character."""


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the strings that ``tokenizer`` converts to special ids, with these ids.

    Added tokens with ``special=False`` (often ``<think>``) are excluded.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    specials = {
        str(token): int(id_) for id_, token in added.items() if getattr(token, "special", True)
    }
    for name in tokenizer.all_special_tokens:
        specials.setdefault(str(name), int(tokenizer.convert_tokens_to_ids(name)))
    return specials


def token_spans(tokenizer: Any, text: str) -> list[Span]:
    """Return the tokens of ``text`` with their places; ``tokenizer`` must be a fast tokenizer."""
    with tokenizer_errors():
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, start, end) for token, (start, end) in pairs]


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Turn a panic of a tokenizer's Rust code, as by a pattern without end, into an error.

    Panics are not an ``Exception``: without this, a panic would end the thread that serves a model.

    Raises:
        RecipeError: if the block panics.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RecipeError(
            f"the model's tokenizer cannot encode this text: {str(error)[:300]}",
            rule="tokenizer.failed",
        ) from None


@dataclass(frozen=True)
class EncodedPair:
    """Tokens of two texts in one row."""

    ids_T: IntArray
    segment_T: IntArray | None
    """Segment of each token; ``None`` for networks without ``token_type_ids``."""
    second: slice
    """Tokens of the second text."""
    offsets: Sequence[tuple[int, int]]
    """First and last character (exclusive) of each token in the token's text."""


class TextTokenizer:
    """Tokenizer of rendered conversations for one model."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, tuple(stop_ids)
        self._tails: dict[str, list[Span]] = {}

    @cached_property
    def is_fast(self) -> bool:
        """True if the tokenizer returns character offsets; tokenizers written in Python do not."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    @cached_property
    def stop_names(self) -> tuple[str, ...]:
        """Names of the tokens that end a reply."""
        names = self.tokenizer.convert_ids_to_tokens([*self.stop_ids])
        return tuple(str(name) for name in names if name)

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        # User text must not end a turn or open another one.
        names = {*special_tokens(self.tokenizer), *self.stop_names}
        # A name of one character cannot be split.
        longest = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest))) if longest else None

    def break_marks(self, text: str) -> str:
        """Return ``text`` with a :data:`SENTINEL` inside each name of a special token.

        Tokens of the result stand for the name as text, and are never the special token.
        """
        marks = self._marks
        while marks is not None and marks.search(text):  # names may overlap
            text = marks.sub(lambda mark: f"{mark[0][0]}{SENTINEL}{mark[0][1:]}", text)
        return text

    def spans(self, text: str) -> list[Span]:
        """Return the tokens of ``text`` with their places, without tokens of sentinels."""
        spans = token_spans(self.tokenizer, text)
        if SENTINEL not in text:
            return spans
        return [span for span in spans if {*text[span[1] : span[2]]} != {SENTINEL}]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without tokens of sentinels."""
        if SENTINEL not in text:
            with tokenizer_errors():
                ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            return ids
        if self.is_fast:
            return [token for token, _, _ in self.spans(text)]
        # Without offsets, sentinels cannot be told from tokens of text, so parts are encoded apart.
        return [token for part in text.split(SENTINEL) for token in self.ids(part)]

    def behind(self, text: str) -> list[int]:
        """Return the token ids of ``text`` as a continuation."""
        if not self.is_fast:
            return self.ids(text)
        return [token for token, _, _ in self._behind(text, 0)]

    def tokens(self, text: str, *, first: bool) -> IntArray:
        """Return the token ids ``[T]`` of ``text``, without sentinels.

        ``first`` adds the model's beginning-of-text tokens.
        """
        if not first:
            return np.asarray(self.ids(text), dtype=np.int64)
        with tokenizer_errors():
            ids = self.tokenizer.encode(text, add_special_tokens=True)
        if len(ids) > 1 and ids[-1] in self.stop_ids:
            # Some tokenizers append an end token to every text; a prompt must stay open.
            ids = ids[:-1]
        return np.asarray(ids, dtype=np.int64)

    def continued_tokens(self, prompt: str, text: str) -> tuple[IntArray, IntArray]:
        """Return the token ids of a raw prompt, and of the ``text`` that continues the prompt.

        Both are tokenized as one text, unless that changes the prompt's tokens.
        """
        # A separate encoding would add a space, or split a word at the border.
        prompt_T, whole_T = (self.tokens(each, first=True) for each in (prompt, prompt + text))
        size = len(prompt_T)
        if np.array_equal(whole_T[:size], prompt_T):
            return prompt_T, whole_T[size:]
        return prompt_T, np.array(self.behind(text), dtype=np.int64)

    def encode_text(self, text: str) -> IntArray:
        """Raw text followed by the end-of-text token, for language modelling."""
        return np.append(self.tokens(text, first=True), self.end_id)

    def encode_whole(self, text: str) -> IntArray:
        """Return the token ids of a text with the model's special tokens around the text."""
        with tokenizer_errors():
            encoded = self.tokenizer(text, add_special_tokens=True, truncation=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def encode_pair(self, text: str, other: str) -> EncodedPair:
        """Return the tokens of two texts in one row; the tokenizer defines the separators."""
        with tokenizer_errors():
            encoded = self.tokenizer(
                text, other, add_special_tokens=True, return_offsets_mapping=True
            )
        # RoBERTa and relatives have no segments, and reject the argument.
        segment_T = None
        if "token_type_ids" in self.tokenizer.model_input_names:
            segment_T = np.asarray(encoded["token_type_ids"], dtype=np.int64)
        second = [place for place, side in enumerate(encoded.sequence_ids()) if side == 1]
        return EncodedPair(
            np.asarray(encoded["input_ids"], dtype=np.int64),
            segment_T,
            slice(second[0], second[-1] + 1) if second else slice(0, 0),
            encoded["offset_mapping"],
        )

    @property
    def end_id(self) -> int:
        """Id of the token after texts and plain replies."""
        if not self.stop_ids:
            raise RecipeError(
                "the model's tokenizer has no end-of-text token (eos_token)",
                rule="tokenizer.no_end_of_text",
            )
        return self.stop_ids[0]

    def target_tokens(self, text: str) -> IntArray:
        """Return the token ids of ``text`` as decoder output, without special tokens."""
        if not hasattr(self.tokenizer, "spm_target"):
            return self.tokens(text, first=False)
        with tokenizer_errors():  # Marian has a second SentencePiece model for targets
            encoded = self.tokenizer(text_target=text, add_special_tokens=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        with tokenizer_errors():
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, for token-by-token display.

        The first token of a multi-token character gets the whole character; the next tokens are
        empty.
        """
        names: list[str] = self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])
        if self._is_word_piece:
            # WordPiece tokens have no spaces; "##" marks the continuation of a word.
            return [name[2:] if name.startswith("##") else f" {name}" for name in names]
        with tokenizer_errors():
            texts = [self._piece([i]) for i in ids]
            for start, text in enumerate(texts):
                if BROKEN not in text:
                    continue
                for stop in range(start + 2, min(start + MOST_SHARING, len(ids)) + 1):
                    whole = self._piece(ids[start:stop])
                    if BROKEN not in whole:
                        texts[start:stop] = [whole, *[""] * (stop - start - 1)]
                        break
        return texts

    @cached_property
    def word_starts(self) -> NDArray[np.bool_]:
        """Return for each token id whether the token starts a word, ``[V]``.

        Byte-level and SentencePiece tokens start with a space; WordPiece marks the other tokens.
        """
        names: list[str] = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        if self._is_word_piece:
            return np.array([not name.startswith("##") for name in names])
        return np.array([name.startswith(("Ġ", "▁")) for name in names])

    @property
    def _is_word_piece(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # Checked by type, because a byte-level vocabulary may also have a token "##".
        return backend is not None and type(backend.model).__name__ == "WordPiece"

    def _piece(self, ids: Sequence[int]) -> str:
        before = self._piece_context
        text: str = self.tokenizer.decode([*before, *map(int, ids)])
        return text[len(self.tokenizer.decode(before)) :] if before else text

    @cached_property
    def _piece_context(self) -> list[int]:
        """A context token for decoding; empty if single tokens keep their spaces."""
        # SentencePiece decoders drop the space of a first token.
        ids = [int(i) for i in self.tokenizer.encode("a b", add_special_tokens=False)]
        apart = "".join(self.tokenizer.decode([i]) for i in ids)
        return [] if apart.strip() == self.tokenizer.decode(ids).strip() else ids[:1]

    @cached_property
    def longest_token(self) -> int:
        """Most UTF-8 bytes of text per token, computed from the token names.

        The tokenizer may drop more text: white space or the rest of an unknown word.
        """
        names = self.tokenizer.get_vocab()
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and type(backend.decoder).__name__ == "ByteLevel":
            # In a byte-level vocabulary one character is one byte, except for added tokens.
            added = (str(token) for token in self.tokenizer.added_tokens_decoder.values())
            return max(map(len, (*names, *(name.encode() for name in added))), default=1)
        longest = max((len(name.encode()) for name in names), default=1)
        # A normalizer that composes characters shrinks text by a factor of at most three.
        composes = backend is None or backend.normalizer is not None
        return longest * (3 if composes else 1)

    def grammar_tokens(self, vocabulary: int) -> Any:
        """Return the first ``vocabulary`` tokens for the library llguidance.

        Raises:
            ValueError: if the tokenizer does not expose the bytes of its tokens.
        """
        from llguidance import LLTokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            # llguidance masks tokens by their bytes.
            raise ValueError("tokenizers written in Python do not expose the bytes of a token")
        return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=list(self.stop_ids))

    def divide(
        self, text: str, parts: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Return token ids of a conversation, token ranges of learned parts, and if prompts agree.

        The ids before a learned part equal the ids of the served prompt. If the tokenizer would
        merge characters across that border, the prompt keeps its tokens and the rest is tokenized
        as a continuation. A border divided in this way stays divided in later prompts, which then
        do not agree with the served prompts.

        Args:
            text: the conversation up to the end of its last learned part.
            parts: character range of each learned part.
        """
        if not self.is_fast:
            return self._divide_by_prefixes(text, parts)
        spans, firsts, agrees = self.spans(text), list[int](), True
        token = character = 0
        for character_next, _ in parts:
            before = spans
            spans, token = self._divide_at(spans, text, character_next, token, character)
            agrees &= spans is before or character_next == parts[-1][0]
            character = character_next
            firsts.append(token)
        places = [
            (first, bisect_left(spans, end, lo=first, key=_FIRST))
            for first, (_, end) in zip(firsts, parts, strict=True)
        ]
        return [token for token, _, _ in spans], places, agrees

    @cached_property
    def _separators(self) -> frozenset[int]:
        """Ids of added tokens, which separate the tokenization of the text on both sides.

        Normalized added tokens are excluded: the tokenizer matches these in normalized text.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(int(id_) for id_, token in added if not token.normalized)

    @cached_property
    def _leads(self) -> tuple[str, ...]:
        alone, behind = self.ids("a"), self.ids("\na")
        return ("",) if behind[-len(alone) :] == alone else _LEADS

    def _divide_at(
        self, spans: list[Span], text: str, border: int, token: int, character: int
    ) -> tuple[list[Span], int]:
        """Return ``spans`` divided at the character ``border``, and the index of the token there.

        Only tokens from the index ``token`` on, which begins at ``character``, may change.
        """
        after = bisect_left(spans, border, lo=token, key=_FIRST)
        separators = self._separators
        begin = next((i for i in range(after - 1, token - 1, -1) if spans[i][0] in separators), -1)
        if begin >= 0:
            character = spans[begin][1]
            prompt = self._tail(text[character:border])
        else:
            begin, part = token, text[character:border]
            prompt = self._behind(part, 0) if character else self.spans(part)
        is_divided = not after or spans[after - 1][2] <= border
        if is_divided and [each[0] for each in spans[begin:after]] == [each[0] for each in prompt]:
            return spans, after
        end = next(
            (
                i
                for i in range(after, len(spans))
                if spans[i][0] in separators and spans[i][1] >= border
            ),
            len(spans),
        )
        rest = text[border : spans[end][1] if end < len(spans) else len(text)]
        before = [(id_, start + character, stop + character) for id_, start, stop in prompt]
        index = begin + len(prompt)
        return [*spans[:begin], *before, *self._behind(rest, border), *spans[end:]], index

    def _tail(self, text: str) -> list[Span]:
        """Return the tokens of a prompt's end, cached because many rows share the end."""
        spans = self._tails.get(text)
        # Long ends are rarely shared, and would fill the cache.
        if spans is None:
            spans = self.spans(text)
            if len(text) <= _CACHED and len(self._tails) < _MOST_CACHED:
                self._tails[text] = spans
        return spans

    def _behind(self, text: str, character: int) -> list[Span]:
        """Return the tokens of ``text`` as a continuation that starts at ``character``."""
        for lead in self._leads:
            spans = self.spans(lead + text)
            first = bisect_left(spans, len(lead), key=_FIRST)
            if not first or spans[first - 1][2] <= len(lead):
                break
        else:  # the tokenizer merges text with every prefix
            spans, first, lead = self.spans(text), 0, ""
        move = character - len(lead)
        return [(token, start + move, end + move) for token, start, end in spans[first:]]

    def _divide_by_prefixes(
        self, text: str, parts: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Divide a text with a tokenizer without offsets; see :meth:`divide`."""
        ids, places, done, agrees = list[int](), list[tuple[int, int]](), 0, True
        for start, end in parts:
            prompt, whole = self.ids(text[:start]), self.ids(text[:end])
            if prompt[: len(ids)] != ids:
                agrees = False
                prompt = ids + self.ids(text[done:start])
            is_prefix = whole[: len(prompt)] == prompt
            ids = whole if is_prefix else prompt + self.ids(text[start:end])
            places.append((len(prompt), len(ids)))
            done = end
        return ids + self.ids(text[done:]), places, agrees
