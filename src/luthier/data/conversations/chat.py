"""Conversion of conversations to token ids with a mark on each learned token.

One :class:`ChatFormat` encodes training rows and serving prompts, and is stored with the custom
model. Template, tokenizer and stop tokens are therefore equal in training and serving.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversations.call_formats import MARKS as CALL_MARKS
from luthier.data.conversations.chat_templates import read_chat_template
from luthier.data.conversations.image_tokens import FIRST_IMAGE_ID, ImageTokens
from luthier.data.conversations.reasoning import (
    TAIL,
    DecodedReply,
    ReasoningMarks,
    find_marks,
    reasoning_after,
    split_reply,
)
from luthier.data.conversations.replies import (
    SYSTEM_FIX,
    TurnEnd,
    find_end_token,
    find_prompt_end,
    find_turn_end,
    mark_generation,
    training_sequences,
)
from luthier.data.conversations.template_kwargs import (
    DATE,
    TEMPLATE_PARAMETERS,
    date_macro,
    names_read,
    template_defaults,
)
from luthier.data.conversations.tokenization import TextEncoder, special_tokens, tokenizer_errors
from luthier.data.conversations.tools import (
    calls_as_text,
    describe_tool,
    supports_tools,
    template_turns,
    uses_tools,
)
from luthier.data.files.parsing import quote
from luthier.data.inputs import (
    MOST_IMAGES_OF_ROW,
    PLURAL,
    Media,
    MediaInput,
    Processor,
    is_media,
)
from luthier.data.sentence import SentencePipeline
from luthier.data.shapes.base import InputKind
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.texts import RawText
from luthier.errors import RecipeError, RowRefused, is_out_of_memory
from luthier.types import (
    Example,
    IntArray,
    Message,
    Row,
    TemplateKwargs,
    Tool,
    map_texts,
    weight_at_end,
)

Template = Literal["auto", "chat", "plain"]

BROKEN, MOST_SHARING = "\ufffd", 8
"""Replacement character of decoders for part of a character, and most tokens of one character."""
ONE_T, NO_TARGET = np.ones(1, np.float32), np.zeros(0)
"""Arrays shared by all rows of one token: separate arrays take 230 MB for a million rows."""
ONE_T.flags.writeable = NO_TARGET.flags.writeable = False


@dataclass(frozen=True)
class EncodedReply:
    """Token ids of one row with a mark on each learned token."""

    ids_T: IntArray
    learned_T: NDArray[np.bool_]
    source_T: IntArray | None = None
    """Token ids for the encoder, if any; ``ids_T`` then has the decoder's tokens only."""
    images: tuple[Media, ...] = ()
    """Images of the image tokens in ``ids_T``."""


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
            "Check the path of the file, or use another base model.",
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
    """Conversion of prompts and replies to tokens for one model.

    ``template`` is ``chat`` (the tokenizer's own chat template) or ``plain`` (unchanged text, with
    the end-of-text token after the reply).
    """

    tokenizer: Any
    template: Literal["chat", "plain"]
    stop_ids: tuple[int, ...]
    """Ids of the tokens that end a reply; empty for encoders."""
    start_id: int | None = None
    """First token of the decoder in an encoder-decoder; ``None`` for other networks."""
    media: Processor | None = None
    """Processor for images, audio or time series; ``None`` for networks with text input only."""
    images: ImageTokens | None = None
    """Processor of images in conversations; ``None`` for other networks."""
    date: str | None = None
    """Date that the chat template prints, in ISO 8601; ``None`` for today's date."""
    opening_ids: tuple[int, ...] = ()
    """Ids between ``start_id`` and a reply, such as BART's ``<s>`` or a target language."""
    closing_ids: tuple[int, ...] = ()
    """Tokens after a reply in the decoder; the end-of-text token if empty."""
    decoder_problem: str = ""
    """Reason why ``opening_ids`` are unknown; empty if they are known."""
    is_causal: bool = False
    """True for a stored causal language model, regardless of the tokenizer's special tokens."""
    sentence: SentencePipeline | None = None
    """Pipeline of a sentence encoder; ``None`` for other models."""
    sentence_problem: str = ""
    """Reason to reject the pipeline of a sentence encoder; empty if supported."""
    check_template: Callable[[], None] | None = None
    """Function that raises :class:`RecipeError` until the chat template is approved."""

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
    def reads(self) -> InputKind:
        """Kind of the network's main input."""
        return "text" if self.media is None else self.media.kind

    def check_input_kind(self, kind: InputKind) -> None:
        """Raise :class:`RowRefused` if the network does not accept rows of ``kind``."""
        accepted = accepted_inputs(self.reads, self.has_tokenizer, self.start_id is not None)
        if kind not in accepted:
            base = " and ".join(PLURAL[each] for each in accepted)
            raise RowRefused(
                "media.base",
                f"this base model accepts {base}, and the rows are {PLURAL[kind]}.",
                f"Use a base model for {PLURAL[kind]}; `luthier models list` shows the inputs.",
            )

    def check_images(self, messages: Sequence[Message]) -> None:
        """Raise :class:`RowRefused` for images that the model does not support."""
        if not (images := images_of(messages)):
            return
        if len(images) > MOST_IMAGES_OF_ROW:
            raise RowRefused(
                "media.count",
                f"{len(images)} images are too many; the limit is {MOST_IMAGES_OF_ROW}.",
                "Send fewer images.",
            )
        if self.images is None or self.template == "plain":
            raise RowRefused(
                "media.base",
                "the base model reads no images in messages.",
                "Use the base HuggingFaceTB/SmolVLM-500M-Instruct, or a folder of another Idefics 3 or "
                "SmolVLM model with its chat template and preprocessor_config.json.",
            )

    def encode_input(self, row: Row, index: int) -> Example:
        """Return a row as one network input with total weight 1.

        ``index`` becomes ``Example.row``.
        """
        if isinstance(row, MediaRow):
            media = self.media_input(row)
            ids_T = np.array([int(row.media.digest()[:15], 16)])
            return Example(ids_T, ONE_T, index, target=NO_TARGET, media=media)
        ids_T = self.encode_whole(row.plain_text())
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
        return ChatFormat(NoTokenizer(), "plain", (), media=processor)

    @staticmethod
    def of(
        tokenizer: Any,
        template: Template = "auto",
        stop_ids: Sequence[int] = (),
        start_id: int | None = None,
        media: Processor | None = None,
        opening_ids: Sequence[int] = (),
        closing_ids: Sequence[int] = (),
        decoder_problem: str = "",
        is_causal: bool = False,
        sentence: SentencePipeline | None = None,
    ) -> ChatFormat:
        """Return the format with the model's chat template, or plain text if it has none."""
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        if template == "chat":
            _check_template(tokenizer)
        stops = dict.fromkeys([tokenizer.eos_token_id, *stop_ids])
        stops.pop(None, None)
        return ChatFormat(
            tokenizer,
            template,
            tuple(stops),
            start_id,
            None if isinstance(media, ImageTokens) else media,
            media if isinstance(media, ImageTokens) else None,
            opening_ids=tuple(opening_ids),
            closing_ids=tuple(closing_ids),
            decoder_problem=decoder_problem,
            is_causal=is_causal,
            sentence=sentence,
        )

    def with_template(self, template: Template) -> ChatFormat:
        """Return the format with another template; ``auto`` keeps the current template."""
        if template == "auto":
            return self
        if template == "chat":
            _check_template(self.tokenizer)
        return replace(self, template=template)

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
        if self.start_id is not None or not self.has_tokenizer:
            raise RecipeError(
                "only decoders have chat templates. Remove the setting",
                setting="data.chat_template",
            )
        text = read_chat_template(given, self.tokenizer)
        chat = replace(self._with_templates(text), template="chat", check_template=None)
        end = find_end_token(chat)
        if end is None or end in chat.stop_ids:
            return chat
        return replace(chat, stop_ids=(*chat.stop_ids, end))

    @property
    def prints_date(self) -> bool:
        """True if the chat template prints today's date."""
        return DATE in names_read(self.template_text)

    def with_date(self, printed: str | None = None) -> ChatFormat:
        """Return a format whose template prints the date ``printed``, in ISO 8601.

        ``None`` is today's date. A template without a date is returned unchanged.
        """
        if not self.prints_date:
            return self
        return replace(self, date=printed or date.today().isoformat())

    def with_template_kwargs(self, kwargs: TemplateKwargs) -> ChatFormat:
        """Return a format with other defaults for variables of the chat template.

        The defaults are written into the template, so training, export and serving share the
        defaults. Values in a request override the defaults. Exception: only this format prints the
        given date (:data:`DATE`); a server prints today's date.

        Raises:
            RecipeError: for a variable that the template does not read, or a date not in ISO 8601.
        """
        if not kwargs:
            return self
        if unread := sorted({*kwargs} - {*self.read_kwargs(kwargs)}):
            raise RecipeError(
                f"the model's chat template has no option `{unread[0]}`.",
                setting=f"data.chat_template_kwargs.{unread[0]}",
                advice="Remove the option, or choose a model with this option.",
            )
        head = template_defaults({name: each for name, each in kwargs.items() if name != DATE})
        printed = self.date
        if DATE in kwargs:
            printed = str(kwargs[DATE])
            date_macro(printed)
        own = map_texts(self.tokenizer.chat_template, lambda text: head + text)
        return replace(self._with_templates(own), date=printed)

    def _with_templates(self, template: str | dict[str, str]) -> ChatFormat:
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        return replace(self, tokenizer=tokenizer)

    def read_kwargs(self, kwargs: TemplateKwargs) -> TemplateKwargs:
        """Return the entries of ``kwargs`` that the template reads."""
        return {
            name: value
            for name, value in kwargs.items()
            if name.isidentifier()
            and name not in TEMPLATE_PARAMETERS
            and name in names_read(self.template_text)
        }

    @property
    def template_text(self) -> str:
        """The active chat template; empty without a template."""
        template = self.tokenizer.chat_template if self.template == "chat" else ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return str(template or "")

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the tokenizer's chat templates; empty without any."""
        own = self.tokenizer.chat_template
        text = own if isinstance(own, str | None) else json.dumps(own, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else ""

    def approved(self) -> ChatFormat:
        """Return the format with an approved chat template.

        Raises:
            RecipeError: if the template is not approved.
        """
        if self.check_template is None:
            return self
        self.check_template()
        return replace(self, check_template=None)  # drops stale cached properties

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
        self.check_images(messages)
        if self.start_id is not None or self.template == "plain":
            self.check_decoder()
            return _plain_prompt(calls_as_text(messages, tools))
        return self.render_turns(messages, tools, reply=True, kwargs=self.read_kwargs(kwargs or {}))

    @cached_property
    def reasoning_marks(self) -> ReasoningMarks | None:
        """Marks around the model's reasoning; ``None`` if the template has none."""
        return None if self.start_id is not None else find_marks(self)

    @cached_property
    def supports_system_prompt(self) -> bool:
        """True if the template renders a system prompt; some templates reject or drop system turns."""
        probe = "what the system says"
        try:
            return probe in self.prompt_text((Message("system", probe), Message("user", "a")))
        except RecipeError:
            return False

    def reply_opening(self) -> IntArray:
        """Last token ids of every prompt: the text that opens an assistant turn."""
        one_T, other_T = (self.encode_prompt((Message("user", text),)) for text in ("a", "7 b?"))
        shorter = min(len(one_T), len(other_T))
        same_T = one_T[len(one_T) - shorter :] == other_T[len(other_T) - shorter :]
        differing = np.flatnonzero(~same_T)
        return one_T[len(one_T) - shorter + (differing[-1] + 1 if len(differing) else 0) :]

    def prompt_tokens(self, text: str, images: Sequence[Media] = ()) -> IntArray:
        """Return the token ids of a text from :meth:`prompt_text` with ``images``."""
        if self.start_id is not None:
            return self.encode_whole(text)
        ids_T = self.tokens(text, first=self.template == "plain")
        return ids_T if self.images is None else self.images.place(ids_T, images, self.tokenizer)

    def encode_reply(
        self, messages: Sequence[Message], context: int = 0, tools: Sequence[Tool] = ()
    ) -> EncodedReply:
        """Encode a conversation up to its last learned turn: the last of :meth:`encode_replies`."""
        return self.encode_replies(messages, context, tools)[-1]

    def encode_replies(
        self, messages: Sequence[Message], context: int = 0, tools: Sequence[Tool] = ()
    ) -> list[EncodedReply]:
        """Encode a conversation with all assistant turns learned, each with its end-of-turn token.

        The result is one sequence, or several if the template rewrites earlier turns
        (``luthier.data.conversations.replies``). Each learned turn follows the prompt that a server
        renders. Not learned are the first ``context`` messages and turns with ``learned=False``. Tokens
        after the last learned token of a sequence, often a newline, are dropped.

        Raises:
            RowRefused: if the template drops a part of a learned turn.
            RecipeError: if the template rejects the conversation.
        """
        self.check_images(messages)
        if self.start_id is not None:
            return [self._encode_sides(calls_as_text(messages, tools))]
        if self.template == "plain":
            return [self._encode_plain(calls_as_text(messages, tools))]
        encoded = list[EncodedReply]()
        for segments in training_sequences(self, messages, context, tools):
            text, parts = "", list[tuple[int, int]]()
            for segment, learns in segments:
                if learns:
                    parts.append((len(text), len(text) + len(segment)))
                text += segment
            encoded += self._encode_parts(text, parts) if parts else ()
        if not encoded:
            raise RowRefused(
                "row.template",
                "The model's chat template drops a part of every learned turn of the row.",
                "Write one row per learned turn, with this turn as the last message.",
            )
        if self.images is None or not (images := images_of(messages)):
            return encoded
        place = partial(self.images.place, images=images, tokenizer=self.tokenizer)
        return [replace(each, ids_T=place(each.ids_T), images=images) for each in encoded]

    def _encode_parts(self, text: str, parts: Sequence[tuple[int, int]]) -> list[EncodedReply]:
        """Encode a rendered conversation with learned parts, separately if prompts disagree."""
        start, end = parts[-1]
        text = text[:end]
        if not any(name in text[start:] for name in self.text_encoder.stop_names):
            text += self.turn_end.added
        ids, places, agrees = self.text_encoder.divide(text, parts)
        if not agrees:
            return [each for part in parts for each in self._encode_parts(text, [part])]
        learned_T = np.zeros(len(ids), dtype=bool)
        for first, last in places:
            learned_T[first : self._stop_after(ids, first, last)] = True
        size = int(np.flatnonzero(learned_T)[-1]) + 1
        return [EncodedReply(np.array(ids[:size], dtype=np.int64), learned_T[:size])]

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Tokens of rendered conversations."""
        return TextEncoder(self.tokenizer, self.stop_ids)

    @cached_property
    def turn_end(self) -> TurnEnd:
        """End of the last reply in the chat template."""
        return find_turn_end(self)

    @cached_property
    def prompt_end(self) -> str:
        """End of each prompt that the template does not repeat in the turn."""
        return find_prompt_end(self)

    @cached_property
    def marked(self) -> ChatFormat:
        """Format whose template marks ``{% generation %}`` blocks; this format without blocks."""
        own = self.tokenizer.chat_template
        if "endgeneration" not in str(own):
            return self
        return self._with_templates(map_texts(own, mark_generation))

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

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a reply, without special tokens except marks of reasoning and calls."""
        special = self._kept_tokens
        if special.keys().isdisjoint(ids):
            return self.decode_tokens(ids)
        texts, start = [], 0
        for at in [at for at, token in enumerate(ids) if token in special]:
            texts += [self.decode_tokens(ids[start:at]), special[ids[at]]]
            start = at + 1
        return "".join([*texts, self.decode_tokens(ids[start:])])

    @cached_property
    def _kept_tokens(self) -> dict[int, str]:
        """Special tokens that decoded replies contain: the marks of reasoning and tool calls."""
        kept = dict(self.reasoning_marks.special) if self.reasoning_marks else {}
        if supports_tools(self.template_text):
            specials = special_tokens(self.tokenizer)
            marks = {specials[mark]: mark for mark in CALL_MARKS & specials.keys()}
            kept |= {token: mark for token, mark in marks.items() if token not in self.stop_ids}
        return kept

    def decode_tokens(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        if self.images is not None:
            ids = [token for token in ids if token < FIRST_IMAGE_ID]
        with tokenizer_errors():
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def decode_reply(self, prompt_T: IntArray, ids: Sequence[int]) -> DecodedReply:
        """Return reasoning and answer of a reply to the prompt ``prompt_T``."""
        before = self.decoding_context(prompt_T)
        text = self.decode([*before, *ids])[len(self.decode(before)) :]
        return split_reply(reasoning_after(self, prompt_T), text)

    def decoding_context(self, prompt_T: IntArray) -> list[int]:
        """Return the last tokens of a raw prompt, as context to decode the continuation.

        A SentencePiece decoder drops a leading space; the context preserves the space. Empty for
        chat templates and encoder-decoders.
        """
        if self.template == "chat" or self.start_id is not None:
            return []
        return [int(token) for token in prompt_T[-TAIL:]]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, for token-by-token display.

        The first token of a multi-token character gets the whole character; the next tokens are
        empty.
        """
        media = self.media is not None and len(ids) == 1 and ids[0] >= self.tokenizer.vocab_size
        if self.media is not None and (media or not self.has_tokenizer):
            return [f"<{self.media.kind}>"] * len(ids)  # the id is a hash of the content
        if self.images is not None and any(token >= FIRST_IMAGE_ID for token in ids):
            # One text per run of image tokens.
            parts = [(is_image, [*run]) for is_image, run in groupby(ids, FIRST_IMAGE_ID.__le__)]
            return [
                piece
                for is_image, run in parts
                for piece in (
                    [self.images.placeholder, *[""] * (len(run) - 1)]
                    if is_image
                    else self.pieces(run)
                )
            ]
        names: list[str] = self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # Checked by type, because a byte-level vocabulary may also have a token "##".
        if backend is not None and type(backend.model).__name__ == "WordPiece":
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

    def _piece(self, ids: Sequence[int]) -> str:
        before = self._piece_context
        text: str = self.tokenizer.decode([*before, *map(int, ids)])
        return text[len(self.tokenizer.decode(before)) :] if before else text

    @cached_property
    def _piece_context(self) -> list[int]:
        """A context token for decoding; empty if single tokens keep their spaces."""
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
            raise ValueError("tokenizers written in Python do not expose the bytes of a token")
        return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=list(self.stop_ids))

    def check_decoder(self) -> None:
        """Raise :class:`RecipeError` for an encoder-decoder without the required target language."""
        if self.decoder_problem:
            raise RecipeError(self.decoder_problem, rule="tokenizer.language")

    @property
    def decoder_opening(self) -> IntArray:
        """Token ids of the decoder before the first token of a reply."""
        assert self.start_id is not None
        return np.array([self.start_id, *self.opening_ids], dtype=np.int64)

    def decoder_ids(self, reply: str) -> IntArray:
        """Token ids of ``reply`` in the decoder, with the special tokens around the reply.

        All but the first are labels of transformers: ``tokenizer(text_target=reply)``.
        """
        closing = self.closing_ids or (self.end_id,)
        return np.concatenate([self.decoder_opening, self.target_tokens(reply), closing]).astype(
            np.int64
        )

    def target_tokens(self, text: str) -> IntArray:
        """Return the token ids of ``text`` as decoder output, without special tokens."""
        if not hasattr(self.tokenizer, "spm_target"):
            return self.tokens(text, first=False)
        with tokenizer_errors():  # Marian has a second SentencePiece model for targets
            encoded = self.tokenizer(text_target=text, add_special_tokens=False)
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def _encode_sides(self, messages: Sequence[Message]) -> EncodedReply:
        _check_single(messages)
        self.check_decoder()
        ids_T = self.decoder_ids(messages[1].content)
        return EncodedReply(ids_T, np.arange(len(ids_T)) > 0, self.encode_prompt(messages[:1]))

    def _encode_plain(self, messages: Sequence[Message]) -> EncodedReply:
        _check_single(messages)
        prompt_T, reply_T = self.continued_tokens(messages[0].content, messages[1].content)
        reply_T = np.append(reply_T, self.end_id)
        learned_T = np.arange(len(prompt_T) + len(reply_T)) >= len(prompt_T)
        return EncodedReply(np.concatenate([prompt_T, reply_T]), learned_T)

    def _stop_after(self, ids: list[int], first: int, last: int) -> int:
        """Return the index after the stop token of the reply ``ids[first:last]``.

        Raises:
            RecipeError: if no stop token ends or follows the reply.
        """
        # The usual position is the end. Otherwise the next turn may start with a stop token.
        for index in range(last - 1, first - 1, -1):
            if ids[index] in self.stop_ids:
                return index + 1
        if last < len(ids) and ids[last] in self.stop_ids:
            return last + 1
        names = ", ".join(self.text_encoder.stop_names) or "none"
        raise RecipeError(
            f"the chat template ends an assistant turn without a stop token ({names}), so the model "
            "would not learn to stop. Add the end-of-turn token to `eos_token_id` in "
            "generation_config.json, or as the tokenizer's `eos_token`",
            rule="template.no_stop",
        )

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        reply: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """Return a conversation as rendered by the chat template.

        A sentinel breaks the names of special tokens in all but the assistant's text
        (:meth:`TextEncoder.break_marks`).

        Args:
            turns: turns in the form of transformers.
            reply: end the text where the assistant's reply starts.
            tools: tools in the form of transformers.
            kwargs: additional template variables.

        Raises:
            RecipeError: if the template rejects the conversation.
        """
        if self.check_template is not None:
            self.check_template()
        names: dict[str, Any] = {**(kwargs or {})}
        if printed := names.pop(DATE, self.date):
            own = self.tokenizer.chat_template
            if isinstance(own, dict):
                own = own.get("tool_use" if tools else "default") or own["default"]
            names["chat_template"] = date_macro(printed) + own
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{**turn, "content": self._content(turn)} for turn in turns],
                tools=map_texts([*tools], self.text_encoder.break_marks) or None,
                tokenize=False,
                add_generation_prompt=reply,
                **names,
            )
        # A template is a third-party program with untrusted input, so it may raise anything.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{error or type(error).__name__}"
            others = [turn for turn in turns if turn["role"] != "system"]
            if 0 < len(others) < len(turns):
                with suppress(RecipeError):
                    self.render(others, reply=reply, tools=tools, kwargs=kwargs)
                    reason = f"{reason.rstrip('.')}. {SYSTEM_FIX}"
            raise RecipeError(
                f"the model's chat template rejects this conversation: {reason}",
                rule="template.refused",
            ) from error
        return text

    def _content(self, turn: Mapping[str, Any]) -> Any:
        """Return the content of a turn as the template reads it: a text or a list of parts."""
        content = turn["content"]
        if turn["role"] != "assistant":
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            literal = self.text_encoder.break_marks
            parts = [{**p, "text": literal(p["text"])} if "text" in p else p for p in parts]
            content = parts if isinstance(content, list) else parts[0]["text"]
        if isinstance(content, str) and self._takes_parts:
            return [{"type": "text", "text": content}]
        return content

    @cached_property
    def _takes_parts(self) -> bool:
        """True if the template drops content that is not a list of parts, like SmolVLM's."""
        if self.images is None:
            return False
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        texts = [self.tokenizer.apply_chat_template([turn], tokenize=False) for turn in turns]
        return bool(texts[0] == texts[1])

    def tokens(self, text: str, *, first: bool) -> IntArray:
        """Return the token ids ``[T]`` of ``text``, without sentinels.

        ``first`` adds the model's beginning-of-text tokens.
        """
        if not first:
            return np.asarray(self.text_encoder.ids(text), dtype=np.int64)
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
        prompt_T, whole_T = (self.tokens(each, first=True) for each in (prompt, prompt + text))
        size = len(prompt_T)
        if np.array_equal(whole_T[:size], prompt_T):
            return prompt_T, whole_T[size:]
        return prompt_T, np.array(self.text_encoder.behind(text), dtype=np.int64)

    def render_turns(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        reply: bool,
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """Return messages and tools as rendered by the chat template; see :meth:`render`."""
        if uses_tools(messages, tools) and supports_tools(self.template_text):
            described = [describe_tool(tool) for tool in tools]
            text = self.render(
                template_turns(messages), reply=reply, tools=described, kwargs=kwargs
            )
        else:
            turns = template_turns(calls_as_text(messages, tools))
            text = self.render(turns, reply=reply, kwargs=kwargs)
        images = images_of(messages)
        return text if self.images is None else self.images.expand(text, images)


def images_of(messages: Sequence[Message]) -> tuple[Media, ...]:
    """Return the images of a conversation in order."""
    return tuple(media for message in messages for media in message.images)


_TEMPLATE_FIX = "Set `data.chat_template=chatml`, or use a base model with a chat template."


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise RecipeError(
            f"the model's tokenizer has no chat template. {_TEMPLATE_FIX}",
            rule="template.missing",
        )


def _check_single(messages: Sequence[Message]) -> None:
    if len(messages) != 2 or messages[1].role != "assistant":
        raise RecipeError(
            "the model has no chat template, and the plain template supports one prompt and one "
            f"completion, not a conversation. {_TEMPLATE_FIX}",
            rule="template.plain",
        )


def _plain_prompt(messages: Sequence[Message]) -> str:
    if len(messages) != 1:
        raise RecipeError(
            "the model has no chat template and accepts one prompt, not a conversation",
            rule="template.plain",
        )
    return messages[0].content
