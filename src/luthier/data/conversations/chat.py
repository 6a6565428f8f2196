"""Inputs of one model: token ids of prompts and texts, and images, audio or time series.

One :class:`ChatFormat` encodes training rows and serving prompts, and is stored with the custom
model. Template, tokenizer and stop tokens are therefore equal in training and serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np

from luthier.data.conversations.chat_template import (
    ChatTemplate,
    TemplateKind,
    check_has_template,
    images_of,
    read_chat_template,
)
from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID, ImageTokens
from luthier.data.conversations.replies import DecoderFrame, ReplyTokens
from luthier.data.conversations.tokenization import TextTokenizer
from luthier.data.conversations.tools import calls_as_text
from luthier.data.files.parsing import quote
from luthier.data.inputs import PLURAL, Media, MediaInput, Processor, conversion_fix, is_media
from luthier.data.sentence import SentencePipeline
from luthier.data.shapes.base import InputKind
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError, RowRefused
from luthier.types import Example, IntArray, Message, Row, TemplateKwargs, Tool, weight_at_end

Template = Literal["auto", "chat", "plain"]

ONE_T, NO_TARGET = np.ones(1, np.float32), np.zeros(0)
"""Arrays shared by all rows of one token: separate arrays take 230 MB for a million rows."""
ONE_T.flags.writeable = NO_TARGET.flags.writeable = False


class NoTokenizer:
    """Placeholder for the tokenizer of a network without text input."""

    chat_template = None
    eos_token_id = pad_token_id = mask_token_id = None
    vocab_size = 0
    is_fast = False

    def __call__(self, text: Any = "", *_: Any, **__: Any) -> Any:
        """Refuse ``text``.

        Raises:
            RowRefused: always.
        """
        if isinstance(text, str) and is_media(text):
            raise RowRefused(
                "media.missing",
                f"the file {quote(text)} does not exist, and this base model accepts no text.",
                "Check the path for a spelling mistake.",
            )
        problem = f"not the text {quote(text)}" if isinstance(text, str) and text else "not text"
        raise RowRefused(
            "media.base",
            f"this base model accepts images, audio or numbers, {problem}.",
            conversion_fix([str(text)]) or "Check the path of the file, or use another base model.",
        )

    encode = __call__


def accepted_inputs(
    kind: InputKind, has_tokenizer: bool, has_decoder: bool
) -> tuple[InputKind, ...]:
    """Return the kinds of input that a network accepts, starting with ``kind``.

    A CLIP model accepts images and text. A network with a text decoder behind its images accepts
    images only.
    """
    return (kind, "text") if kind != "text" and has_tokenizer and not has_decoder else (kind,)


@dataclass(frozen=True)
class ChatFormat:
    """Conversion of rows and requests to the inputs of one model."""

    template: ChatTemplate
    decoder: DecoderFrame | None = None
    """Tokens around replies in an encoder-decoder; ``None`` for other networks."""
    media: Processor | None = None
    """Processor for images, audio or time series; ``None`` for networks with text input only."""
    is_causal: bool = False
    """True for a stored causal language model, regardless of the tokenizer's special tokens."""
    sentence: SentencePipeline | None = None
    """Pipeline of a sentence encoder; ``None`` for other models."""
    sentence_problem: str = ""
    """Reason to reject the pipeline of a sentence encoder; empty if supported."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.template.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens at the end of a reply; empty for encoders."""
        return self.template.stop_ids

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Conversion of text to tokens and back."""
        return self.template.text_tokenizer

    @cached_property
    def replies(self) -> ReplyTokens:
        """Conversion of assistant turns to learned tokens, and of generated tokens to replies."""
        return ReplyTokens(self.template, self.decoder)

    @property
    def fills_masks(self) -> bool:
        """True if raw text is learned with masked tokens.

        A ``<mask>`` token alone proves nothing: the tokenizers of Gemma and Cohere have one.
        """
        return self.tokenizer.mask_token_id is not None and not self.is_causal

    @property
    def has_tokenizer(self) -> bool:
        """False for media networks without text input or output."""
        return not isinstance(self.tokenizer, NoTokenizer)

    @property
    def supports_system_prompt(self) -> bool:
        """True for a network with chat prompts whose template renders a system prompt."""
        return self.decoder is None and self.template.supports_system_prompt

    @property
    def reads(self) -> InputKind:
        """Kind of the network's main input."""
        return "text" if self.media is None else self.media.kind

    def check_input_kind(self, kind: InputKind) -> None:
        """Raise :class:`RowRefused` if the network does not accept rows of ``kind``."""
        accepted = accepted_inputs(self.reads, self.has_tokenizer, self.decoder is not None)
        if kind not in accepted:
            base = " and ".join(PLURAL[each] for each in accepted)
            raise RowRefused(
                "media.base",
                f"this base model accepts {base}, and the rows are {PLURAL[kind]}.",
                f"Use a base model for {PLURAL[kind]}; `luthier models list` shows the inputs.",
            )

    def encode_input(self, row: Row, index: int) -> Example:
        """Return a row as one network input with total weight 1.

        ``index`` becomes ``Example.row``.
        """
        if isinstance(row, MediaRow):
            media = self.media_input(row)
            # One id per content, so equal media are one node of the token tree; int64 has 15 digits.
            ids_T = np.array([int(row.media.digest()[:15], 16)])
            return Example(ids_T, ONE_T, index, target=NO_TARGET, media=media)
        ids_T = self.text_tokenizer.encode_whole(row.plain_text())
        if not len(ids_T):
            raise RowRefused("row.empty", "the text has no tokens.", "Write some text.")
        return Example(ids_T, weight_at_end(len(ids_T)), index, target=NO_TARGET)

    def encode_embedded(self, row: Row, index: int) -> Example:
        """Return a row as input of an embedding model; text gets the model's prompt."""
        if self.sentence is None or isinstance(row, MediaRow):
            return self.encode_input(row, index)
        text = self.sentence.prepare(row.plain_text())
        return self.encode_input(RawText(row.file, row.line, text), index)

    def longest_embedded(self, context: int) -> int:
        """Return the largest number of tokens of a text to embed, for a network of ``context``."""
        return context if self.sentence is None else self.sentence.longest(context)

    def check_sentence(self) -> None:
        """Raise :class:`RecipeError` for a sentence encoder with unsupported modules."""
        if self.sentence_problem:
            raise RecipeError(self.sentence_problem, rule="sentence.module")

    def media_input(self, row: MediaRow) -> MediaInput:
        """Return the media input of a row.

        Raises:
            RowRefused: if the network does not accept the kind.
        """
        self.check_input_kind(row.media.kind)
        assert self.media is not None
        return MediaInput(row.media, self.media, file=row.file, line=row.line)

    def with_media_settings(self, **settings: float | None) -> ChatFormat:
        """Return a copy with other settings of the processor; ``None`` keeps a setting.

        Raises:
            RecipeError: for a setting that the processor does not have.
        """
        changed = {name: value for name, value in settings.items() if value}
        supported = self.media.settings if self.media is not None else ()
        if other := next((name for name in changed if name not in supported), None):
            raise RecipeError(
                f"`data.{other}` does not apply to this base model. Remove the setting",
                setting=f"data.{other}",
            )
        if self.media is None or not changed:
            return self
        return replace(self, media=self.media.with_settings(**changed))

    @staticmethod
    def reading(processor: Processor) -> ChatFormat:
        """Return the format of a media network without a tokenizer."""
        return ChatFormat(ChatTemplate(NoTokenizer(), "plain", ()), media=processor)

    @staticmethod
    def of(
        tokenizer: Any,
        template: Template = "auto",
        stop_ids: Sequence[int] = (),
        decoder: DecoderFrame | None = None,
        media: Processor | None = None,
        is_causal: bool = False,
        sentence: SentencePipeline | None = None,
    ) -> ChatFormat:
        """Return the format with the model's chat template, or plain text if it has none."""
        kind: TemplateKind
        if template == "auto":
            kind = "chat" if tokenizer.chat_template else "plain"
        else:
            kind = template
        if kind == "chat":
            check_has_template(tokenizer)
        stops = dict.fromkeys([tokenizer.eos_token_id, *stop_ids])
        # Encoders have no end-of-text token.
        stops.pop(None, None)
        images = media if isinstance(media, ImageTokens) else None
        return ChatFormat(
            ChatTemplate(tokenizer, kind, tuple(stops), images),
            decoder,
            None if images else media,
            is_causal,
            sentence,
        )

    def with_template(self, kind: Template) -> ChatFormat:
        """Return the format with another template; ``auto`` keeps the current template."""
        if kind == "auto":
            return self
        if kind == "chat":
            check_has_template(self.tokenizer)
        return replace(self, template=replace(self.template, kind=kind))

    def with_chat_template(self, given: str | None) -> ChatFormat:
        """Return the format with another chat template; ``None`` keeps the current template.

        The first special token after a reply becomes a stop token.

        Args:
            given: ``chatml``, or the path of a Jinja file.

        Raises:
            RecipeError: for an unreadable or invalid template, or a network without chat prompts.
        """
        if given is None:
            return self
        if self.decoder is not None or not self.has_tokenizer:
            raise RecipeError(
                "only decoders have chat templates. Remove the setting",
                setting="data.chat_template",
            )
        source = read_chat_template(given, self.tokenizer)
        return replace(self, template=self.template.with_source(source))

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        kwargs: TemplateKwargs | None = None,
    ) -> IntArray:
        """Return the token ids of a prompt: the decoder's context or the encoder's input.

        Entries of ``kwargs`` that the template does not read are ignored.
        """
        text = self.prompt_text(messages, tools, kwargs)
        return self.prompt_tokens(text, images_of(messages))

    def prompt_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """Return the prompt as text; :meth:`encode_prompt` tokenizes this text."""
        template = self.template
        template.check_images(messages)
        # Encoder-decoders were not trained on chat templates, even if their tokenizer has one.
        if self.decoder is None and template.kind == "chat":
            read = template.read_kwargs(kwargs or {})
            return template.render_messages(messages, tools, reply=True, kwargs=read)
        if self.decoder is not None:
            self.decoder.check()
        turns = calls_as_text(messages, tools)
        if len(turns) != 1:
            raise RecipeError(
                "the model has no chat template and accepts one prompt, not a conversation",
                rule="template.plain",
            )
        return turns[0].content

    def reply_opening(self) -> IntArray:
        """Last token ids of every prompt: the text that opens an assistant turn."""
        # The tokens that two different prompts share at the end are the template's.
        one_T, other_T = (self.encode_prompt((Message("user", text),)) for text in ("a", "7 b?"))
        shorter = min(len(one_T), len(other_T))
        same_T = one_T[len(one_T) - shorter :] == other_T[len(other_T) - shorter :]
        differing = np.flatnonzero(~same_T)
        return one_T[len(one_T) - shorter + (differing[-1] + 1 if len(differing) else 0) :]

    def prompt_tokens(self, text: str, images: Sequence[Media] = ()) -> IntArray:
        """Return the token ids of a text from :meth:`prompt_text` with ``images``."""
        if self.decoder is not None:
            return self.text_tokenizer.encode_whole(text)
        ids_T = self.text_tokenizer.tokens(text, first=self.template.kind == "plain")
        placeholders = self.template.images
        return ids_T if placeholders is None else placeholders.place(ids_T, images, self.tokenizer)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, for token-by-token display.

        The first token of a multi-token character gets the whole character; the next tokens are
        empty.
        """
        media = self.media is not None and len(ids) == 1 and ids[0] >= self.tokenizer.vocab_size
        if self.media is not None and (media or not self.has_tokenizer):
            return [f"<{self.media.kind}>"] * len(ids)  # the id is a hash of the content
        if self.template.images is not None and any(token >= FIRST_IMAGE_ID for token in ids):
            # One text per run of image tokens.
            parts = [(is_image, [*run]) for is_image, run in groupby(ids, FIRST_IMAGE_ID.__le__)]
            return [
                piece
                for is_image, run in parts
                for piece in (
                    [self.template.images.placeholder, *[""] * (len(run) - 1)]
                    if is_image
                    else self.pieces(run)
                )
            ]
        return self.text_tokenizer.pieces(ids)
