"""Prompts before they are tokens: what cannot fit into the context is refused before it costs much.

Tokenizing takes about a microsecond and 200 bytes for each token, so that a body of digits takes
seconds and gigabytes. A text is therefore judged in three steps: by its size, which no token can
make up for; by pieces of it, which are tokenized one after the other until there are too many
tokens; and then it is tokenized as a whole, which alone decides, and gives the ids.
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
    from luthier.data.chat import ChatFormat
    from luthier.limits import ModelLimits

SLACK, CUT = 2, 128
"""A text's pieces have at most so many times the tokens of the whole, and so many for each cut. It
is cut where there is white space; elsewhere a few tokens are cut in two, or a word that was one
unknown token as a whole is known in part (of word pieces that has 100 letters at most)."""
PIECE = 1 << 13
"""Characters of a piece at least: some 10 ms of work, between which others get their turn."""

OWN_THREAD = ("TOKENIZERS_PARALLELISM", "false")
"""Variable of the library tokenizers."""


def tokenize_in_own_thread() -> None:
    """Let each request tokenize in its own thread; to be called before the first one does.

    By default all share as many threads as there are cores, and a short prompt stands behind long
    ones.
    """
    os.environ.setdefault(*OWN_THREAD)


class PromptLimit:
    """What a model takes of a prompt, as far as that can be said before it is tokenized."""

    def __init__(
        self,
        chat: ChatFormat,
        context: int,
        limits: ModelLimits,
        parameter: str = "messages",
    ) -> None:
        """For texts that ``chat`` makes tokens of, and a model that reads ``context`` of them.

        ``parameter`` is the field that errors name.
        """
        self._chat, self._context, self._seconds = chat, context, limits.prompt_seconds
        self._parameter = parameter
        longest = chat.longest_token
        # A tokenizer may pass over white space, or take a long word for one token: texts of the first
        # size are never refused for it alone.
        self.bytes = max(limits.prompt_bytes, context * longest)
        """UTF-8 bytes of a text at most."""
        self._piece = max(PIECE, 64 * longest)

    def check_conversation(self, chat: Chat) -> None:
        """Refuse a conversation whose template need not be rendered to know that it is too long.

        Raises:
            TooLong: for more turns than tokens, or more text than tokens can stand for.
        """
        if len(chat.turns) > SLACK * self._context:
            raise self.too_long()
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
        """Refuse a text that is too long, or takes too long.

        What passes may still have more tokens than the context, some :data:`SLACK` times as many.

        Raises:
            TooLong: for a text that has too many tokens.
            InferenceRefused: for one whose pieces take more time than there is.
            RecipeError: where the tokenizer cannot take it.
        """
        if len(text) > self.bytes:
            raise self.too_long()
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > self.bytes:
            raise self.too_long()
        most = SLACK * self._context
        if size <= max(self._piece, most):
            return  # as a whole it takes no more than its pieces may
        until = time.monotonic() + self._seconds
        tokens = 0
        for piece in self._pieces(text):
            tokens += len(self._chat.tokens(piece, first=False)) - CUT
            if tokens > most:
                raise self.too_long()
            if time.monotonic() > until:
                raise InferenceRefused(
                    f"The model's tokenizer takes more than {self._seconds:g} seconds for this "
                    "prompt. Send a shorter one.",
                    self._parameter,
                )

    def check_ids(self, ids: Sequence[int], vocabulary: int) -> None:
        """Refuse a prompt as ids that is too long, though a text of fewer tokens may be made of it.

        Raises:
            TooLong: for more ids than may be looked at.
            InferenceRefused: for ids that are no tokens of so many.
        """
        if len(ids) > SLACK * self._context:
            raise self.too_long()
        if not all(0 <= token < vocabulary for token in ids):
            raise InferenceRefused("The prompt has ids that are no tokens.", self._parameter)

    def too_long(self) -> TooLong:
        """What is raised for a prompt of more tokens than the context."""
        text = f"Input is too long for requested model. Its context is {self._context:,} tokens."
        return TooLong(text, self._parameter)

    def _pieces(self, text: str) -> Iterator[str]:
        """``text`` in pieces, cut before white space where there is some in their second half."""
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
    """Characters of ``value`` in JSON."""
    try:
        return len(json.dumps(value, ensure_ascii=False))
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"it cannot be written as JSON: {error}") from error
