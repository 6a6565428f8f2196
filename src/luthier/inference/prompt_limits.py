"""Limits of prompts: early rejection of text that cannot fit into the context.

A tokenizer takes about a microsecond and 200 bytes per token, so a large body takes seconds and
gigabytes. The size of a text is checked first. Then pieces are tokenized until the tokens exceed
the limit. The tokens of the whole text decide.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.inference.inference import Chat, InferenceRefused, TooLong

if TYPE_CHECKING:
    from luthier.data.conversations.tokenization import TextTokenizer
    from luthier.limits import ModelLimits

SLACK, CUT = 2, 128
"""The pieces of a text have at most ``SLACK`` times the tokens of the whole, plus ``CUT`` for each
cut. Cuts are at white space if possible; other cuts split a few tokens or an unknown word."""
PIECE = 1 << 13
"""Minimum characters of a piece: about 10 ms of work, after which another thread can run."""

OWN_THREAD = ("TOKENIZERS_PARALLELISM", "false")
"""Environment variable of the library tokenizers."""


def tokenize_in_own_thread() -> None:
    """Tokenize each request in its own thread; call this before the first request.

    By default, all requests share one thread pool, so that short prompts wait for long prompts.
    """
    os.environ.setdefault(*OWN_THREAD)


class PromptLimit:
    """Checks of a prompt before tokenization."""

    def __init__(
        self,
        encoder: TextTokenizer,
        context: int,
        limits: ModelLimits,
        parameter: str = "messages",
    ) -> None:
        """``context`` is the most tokens of the model, ``parameter`` the field of errors."""
        self._encoder, self._context, self._seconds = encoder, context, limits.prompt_seconds
        self._parameter = parameter
        longest = encoder.longest_token
        # A tokenizer may skip white space or map a long word to one token, so texts of up to
        # ``prompt_bytes`` are not refused by size.
        self.bytes = max(limits.prompt_bytes, context * longest)
        """Most UTF-8 bytes of a text."""
        self._piece = max(PIECE, 64 * longest)

    def check_conversation(self, chat: Chat) -> None:
        """Raise :class:`TooLong` for too many turns or too much text, before rendering the template."""
        if len(chat.turns) > SLACK * self._context:
            raise self.too_long()
        # Characters count as one byte each, so no conversation that fits is rejected.
        left = self.bytes
        for turn in chat.turns:
            left -= len(turn.content) + len(turn.reasoning)
            left -= sum(_json_length(dict(call.arguments)) for call in turn.calls)
            if left < 0:
                raise self.too_long()
        for tool in chat.tools if chat.tool_choice != "none" else ():
            left -= len(tool.description) + _json_length(dict(tool.parameters))
            if left < 0:
                raise self.too_long()

    def check_text(self, text: str) -> None:
        """Check a text; an accepted text may have up to :data:`SLACK` times the context.

        Raises:
            TooLong: for too many tokens.
            InferenceRefused: if the tokenizer takes too long.
            RecipeError: if the tokenizer fails.
        """
        # Characters are at most as many as UTF-8 bytes, and counting them copies nothing.
        if len(text) > self.bytes:
            raise self.too_long()
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.bytes:
            raise self.too_long()
        most = SLACK * self._context
        if size <= max(self._piece, most):
            return  # tokenizing the whole text costs as much as the pieces
        until = time.monotonic() + self._seconds
        tokens = 0
        for piece in self._pieces(text):
            tokens += len(self._encoder.tokens(piece, first=False)) - CUT
            if tokens > most:
                raise self.too_long()
            if time.monotonic() > until:
                raise InferenceRefused(
                    f"The model's tokenizer takes more than {self._seconds:g} seconds for this "
                    "prompt. Shorten the prompt.",
                    self._parameter,
                )

    def check_ids(self, ids: Sequence[int], vocabulary: int) -> None:
        """Check a prompt of token ids; the decoded text may have fewer tokens.

        Raises:
            TooLong: for too many ids.
            InferenceRefused: for ids outside the vocabulary.
        """
        if len(ids) > SLACK * self._context:
            raise self.too_long()
        if not all(0 <= token < vocabulary for token in ids):
            raise InferenceRefused("The prompt has ids outside the vocabulary.", self._parameter)

    def too_long(self) -> TooLong:
        """Return the error of a prompt longer than the context."""
        text = f"Input is too long for requested model. Its context is {self._context:,} tokens."
        return TooLong(text, self._parameter)

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut ``text`` before white space in the second half of each piece, if any."""
        start = 0
        while start < len(text):
            end = start + self._piece
            if end < len(text):
                half = start + self._piece // 2
                space = max(text.rfind(" ", half, end), text.rfind("\n", half, end))
                end = end if space < 0 else space
            yield text[start:end]
            start = end


def _json_length(value: Any) -> int:
    try:
        return len(json.dumps(value, ensure_ascii=False))
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"The value cannot be written as JSON: {error}") from error
