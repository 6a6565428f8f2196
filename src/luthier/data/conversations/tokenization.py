"""Tokenization of rendered conversations with learned parts and untrusted user text.

A rendered conversation is tokenized as one text. SentencePiece tokenizers add a space to the start
of each text, so separate tokenization of parts would not match the tokens of a served prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import itemgetter
from typing import Any

from luthier.errors import RecipeError

Span = tuple[int, int, int]
"""Token id, first character, and the character after the last character."""

SENTINEL = "\ufdd0"
"""Unicode noncharacter that breaks the name of a special token in user text."""
_LEADS = (".", "a", "0", "\n")
"""Prefixes for tokenizing a continuation, so the tokenizer adds no space."""
_CACHED, _MOST_CACHED = 64, 64
"""Longest cached prompt end in characters, and number of cached ends."""
_FIRST = itemgetter(1)


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


class TextEncoder:
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
        return [token for part in text.split(SENTINEL) for token in self.ids(part)]

    def behind(self, text: str) -> list[int]:
        """Return the token ids of ``text`` as a continuation."""
        if not self.is_fast:
            return self.ids(text)
        return [token for token, _, _ in self._behind(text, 0)]

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
