"""Encoding of conversations with tools, and extraction of tool calls from generated text."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.data.conversations.call_formats import OPENS, call_form, find_open
from luthier.data.conversations.chat_template import images_of
from luthier.data.conversations.reasoning import overlap
from luthier.data.conversations.tokenization import special_tokens
from luthier.data.conversations.tools import split_calls, split_cut_calls, supports_tools
from luthier.errors import RecipeError, RowRefused
from luthier.inference.constraints import check_depth
from luthier.inference.inference import Chat, InferenceRefused
from luthier.types import CALL_OPEN, Tool, ToolCall

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.data.inputs import Media
    from luthier.types import IntArray


_OPENS = (CALL_OPEN, *OPENS)


def new_call_id() -> str:
    """Return a new id of a tool call in Bedrock's format."""
    return "tooluse_" + secrets.token_urlsafe(16)


def form_of_calls(chat: ChatFormat) -> str:
    """Return the form of the model's tool calls (``data/conversations/call_formats.py``)."""
    template = chat.template.text
    return call_form(template, special_tokens(chat.tokenizer) if supports_tools(template) else ())


def encode(
    chat: ChatFormat, conversation: Chat, check: Callable[[str], None] = lambda text: None
) -> IntArray:
    """Return the token ids of ``conversation``; ``check`` may reject the rendered text before.

    Raises:
        InferenceRefused: for a conversation that the model's template does not support.
    """
    if not conversation.turns:
        raise InferenceRefused("`messages` must not be empty.", "messages")
    tools = () if conversation.tool_choice == "none" else conversation.tools
    for tool in tools:
        # Before rendering, because the template's JSON encoder recurses over the parameters.
        check_depth(tool.parameters)
    images = images_of(conversation.turns)
    _check_images(chat, images)
    try:
        text = chat.prompt_text(conversation.turns, tools, conversation.template_kwargs)
        check(text)
        return chat.prompt_tokens(text, images)
    except RecipeError as error:
        raise InferenceRefused(str(error), "messages") from error
    except RowRefused as error:
        raise InferenceRefused(error.problem.message, "messages") from error


def _check_images(chat: ChatFormat, images: Sequence[Media]) -> None:
    """Reject images that the model cannot take, before the decoder's thread decodes them."""
    if images and chat.template.images is None:
        text = "This model doesn't support the image field. Remove image and try again."
        raise InferenceRefused(text, "messages")
    for media in images:
        assert chat.template.images is not None
        try:
            chat.template.images.check(media)
        except RowRefused as error:
            raise InferenceRefused(f"{media.name}: {error.problem.message}", media.name) from error


class CallSplitter:
    """Incremental splitter of a reply into text and tool calls.

    Text that may be a tool call is delayed until complete.
    """

    def __init__(
        self, tools: Sequence[Tool], forced: bool = False, structured: bool = False
    ) -> None:
        """``forced`` replies have only calls; ``structured`` replies may be JSON of a schema."""
        self._tools, self._forced = tools, forced
        self._may_hide = forced or not structured
        self._pending = ""
        self._has_shown = False
        self._calling = False
        self.incomplete = False
        """True if the reply ended within a tool call. The reply shows no such call."""

    def feed(self, text: str) -> str:
        """Add ``text`` and return the text to show."""
        self._pending += text
        if self._calling:
            return ""
        if not self._has_shown:
            start = self._pending.lstrip()
            if not start:
                return ""
            # Models without tags write a call as bare JSON, at the start of a reply only.
            if start[0] in "{[":
                self._calling = True
                return ""
        at = find_open(self._pending, _OPENS)
        if at >= 0:
            self._calling = True
        else:
            at = len(self._pending) - overlap(self._pending, _OPENS)
        shown, self._pending = self._pending[:at], self._pending[at:]
        if self._calling and not shown.strip():
            shown = ""
        self._has_shown = self._has_shown or bool(shown.strip())
        return shown

    def end(self, cut: bool = False) -> tuple[str, list[ToolCall]]:
        """Return the remaining text and the tool calls; ``cut`` means that a token limit ended the
        reply."""
        # Clients run every call they receive, so a call that the token limit cut off is dropped.
        if cut and self._may_hide and (self._calling or self._forced):
            calls, text, self.incomplete = split_cut_calls(self._pending, self._tools)
            if self._forced and not calls:
                text, self.incomplete = "", True
        else:
            calls, text = split_calls(self._pending, self._tools, declared_only=True)
        if (calls or self.incomplete) and not text.strip():
            text = ""
        return text, [replace(call, id=new_call_id()) for call in calls]
