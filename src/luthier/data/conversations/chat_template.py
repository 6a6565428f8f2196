"""Chat templates: rendering of conversations as text, and the built-in template ChatML."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateSyntaxError

from luthier.data.conversations.image_tokens import ImageTokens
from luthier.data.conversations.template_kwargs import (
    DATE,
    TEMPLATE_PARAMETERS,
    date_macro,
    names_read,
    parse_template,
    template_defaults,
)
from luthier.data.conversations.tokenization import TextTokenizer
from luthier.data.conversations.tools import (
    calls_as_text,
    describe_tool,
    supports_tools,
    template_turns,
    uses_tools,
)
from luthier.data.files.parsing import quote
from luthier.data.inputs import MOST_IMAGES_OF_ROW, Media, reason_of
from luthier.errors import Interrupted, Location, RecipeError, RowRefused, is_out_of_memory
from luthier.types import Message, TemplateKwargs, Tool, map_texts

TemplateKind = Literal["chat", "plain"]
CHATML = "chatml"
"""Name of the built-in template."""
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
TEMPLATE_FIX = "Set `data.chat_template=chatml`, or use a base model with a chat template."
SYSTEM_FIX = "Put the system prompt before the text of the first user message."
REPLY = "a reply"
"""Text of an assistant turn, rendered to examine a template."""


def _chatml(start: str, end: str) -> str:
    return (
        f"{start}{{% for message in messages %}}"
        f"{{{{ '{_IM_START}' + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}"
        "{% endfor %}{% if add_generation_prompt %}"
        f"{{{{ '{_IM_START}assistant\\n' }}}}{{% endif %}}"
    )


CHATML_SHA256 = frozenset(
    hashlib.sha256(_chatml(start, end).encode()).hexdigest()
    for start in ("", "{{ bos_token }}")
    for end in (f"'{_IM_END}'", "eos_token")
)
"""SHA-256 of every variant of the built-in template."""


def read_chat_template(given: str, tokenizer: Any) -> str:
    """Return the chat template ``given`` for ``tokenizer``: ``chatml``, or the text of a file.

    ChatML ends turns with ``<|im_end|>`` if the tokenizer has this token. Otherwise turns end with
    the end-of-text token, because a new token would need a new embedding, and the marks are text.

    Raises:
        RecipeError: for an unreadable or invalid file, or a tokenizer without a token for ``chatml``
            to end turns.
    """
    if given != CHATML:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise RecipeError(
                f"cannot read the chat template {quote(given)}: {reason_of(error)}.",
                setting="data.chat_template",
                advice="Give `chatml`, or the path of a Jinja file.",
            ) from error
        try:
            parse_template(text)
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"the chat template is not valid Jinja: {error.message}.",
                rule="template.refused",
                location=Location(given, error.lineno),
                setting="data.chat_template",
                advice="Correct the line, or give `chatml`.",
            ) from error
        return text
    if tokenizer.eos_token is None and _IM_END not in tokenizer.get_vocab():
        raise RecipeError(
            "the tokenizer has no token that ends a turn, so chatml cannot be used.",
            setting="data.chat_template",
            advice="Remove the setting, or choose a base that generates text.",
        )
    # Marks that are no tokens of the vocabulary would never stop a reply.
    has_marks = {_IM_START, _IM_END} <= tokenizer.get_vocab().keys()
    # Some tokenizers have a BOS token that they never write, and their models do not know it.
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    has_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return _chatml("{{ bos_token }}" * has_bos, f"'{_IM_END}'" if has_marks else "eos_token")


def check_has_template(tokenizer: Any) -> None:
    """Raise :class:`RecipeError` for a tokenizer without a chat template."""
    # An early error: rendering would fail once per row.
    if not tokenizer.chat_template:
        raise RecipeError(
            f"the model's tokenizer has no chat template. {TEMPLATE_FIX}",
            rule="template.missing",
        )


def images_of(messages: Sequence[Message]) -> tuple[Media, ...]:
    """Return the images of a conversation in order."""
    return tuple(media for message in messages for media in message.images)


@dataclass(frozen=True)
class ChatTemplate:
    """Rendering of conversations as text, with the chat template of a tokenizer."""

    tokenizer: Any
    kind: TemplateKind
    """``chat`` (the tokenizer's own chat template) or ``plain`` (unchanged text, with the
    end-of-text token after the reply)."""
    stop_ids: tuple[int, ...]
    """Ids of the tokens at the end of a reply; empty for encoders."""
    images: ImageTokens | None = None
    """Processor of images in conversations; ``None`` for other networks."""
    date: str | None = None
    """Date that the template prints, in ISO 8601; ``None`` for today's date."""
    check: Callable[[], None] | None = None
    """Function that raises :class:`RecipeError` until the template is approved."""

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Tokens of rendered conversations."""
        return TextTokenizer(self.tokenizer, self.stop_ids)

    @property
    def text(self) -> str:
        """The active chat template; empty without a template."""
        template = self.tokenizer.chat_template if self.kind == "chat" else ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return str(template or "")

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokenizer's chat templates; empty without any."""
        own = self.tokenizer.chat_template
        # Names in a fixed order, so that equal templates have equal hashes.
        text = own if isinstance(own, str | None) else json.dumps(own, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else ""

    @property
    def prints_date(self) -> bool:
        """True if the chat template prints today's date."""
        return DATE in names_read(self.text)

    def with_date(self, printed: str | None = None) -> ChatTemplate:
        """Return a template that prints the date ``printed``, in ISO 8601.

        ``None`` is today's date. A template without a date is returned unchanged.
        """
        if not self.prints_date:
            return self
        return replace(self, date=printed or date.today().isoformat())

    def with_kwargs(self, kwargs: TemplateKwargs) -> ChatTemplate:
        """Return a template with other defaults for variables.

        The defaults are written into the template, so training, export and serving share the
        defaults. Values in a request override the defaults. Exception: only this object prints the
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
        # The date is no default of the template, because a served model prints the current date.
        head = template_defaults({name: each for name, each in kwargs.items() if name != DATE})
        printed = self.date
        if DATE in kwargs:
            printed = str(kwargs[DATE])
            date_macro(printed)
        return replace(self.map_sources(lambda text: head + text), date=printed)

    def read_kwargs(self, kwargs: TemplateKwargs) -> TemplateKwargs:
        """Return the entries of ``kwargs`` that the template reads."""
        return {
            name: value
            for name, value in kwargs.items()
            if name.isidentifier()
            and name not in TEMPLATE_PARAMETERS
            and name in names_read(self.text)
        }

    def with_source(self, source: str) -> ChatTemplate:
        """Return a template with another source; the first special token after a reply stops."""
        # The user chose this template, so no approval is needed.
        chat = replace(self._with_sources(source), kind="chat", check=None)
        turns = (Message("user", "a"), Message("assistant", REPLY))
        behind = chat.render_messages(turns, (), reply=False).rpartition(REPLY)[2]
        added = {str(token): id_ for id_, token in self.tokenizer.added_tokens_decoder.items()}
        found = [(behind.find(name), -len(name), added[name]) for name in added if name in behind]
        if not found or (end := min(found)[2]) in self.stop_ids:
            return chat
        return replace(chat, stop_ids=(*self.stop_ids, end))

    def map_sources(self, change: Callable[[str], str]) -> ChatTemplate:
        """Return a template with changed sources; a tokenizer may have several by name."""
        return self._with_sources(map_texts(self.tokenizer.chat_template, change))

    def _with_sources(self, sources: str | dict[str, str]) -> ChatTemplate:
        # A copy, because other models may share the tokenizer.
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = sources
        return replace(self, tokenizer=tokenizer)

    def approve(self) -> ChatTemplate:
        """Return an approved template, which is not checked again.

        Raises:
            RecipeError: if the template is not approved.
        """
        if self.check is None:
            return self
        self.check()
        return replace(self, check=None)  # drops stale cached properties

    @cached_property
    def supports_system_prompt(self) -> bool:
        """True if the template renders a system prompt; some templates reject or drop system turns."""
        if self.kind == "plain":
            return False
        # Templates without system turns raise, or drop the text without an error.
        probe = "what the system says"
        try:
            return probe in self.render_messages(
                (Message("system", probe), Message("user", "a")), (), reply=True
            )
        except RecipeError:
            return False

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
        if self.images is None or self.kind == "plain":
            raise RowRefused(
                "media.base",
                "the base model reads no images in messages.",
                "Use the base HuggingFaceTB/SmolVLM-500M-Instruct, or a folder of another Idefics 3 or "
                "SmolVLM model with its chat template and preprocessor_config.json.",
            )

    def render_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        reply: bool,
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """Return messages and tools as rendered by the chat template; see :meth:`render`."""
        if uses_tools(messages, tools) and supports_tools(self.text):
            described = [describe_tool(tool) for tool in tools]
            text = self.render(
                template_turns(messages), reply=reply, tools=described, kwargs=kwargs
            )
        else:
            turns = template_turns(calls_as_text(messages, tools))
            text = self.render(turns, reply=reply, kwargs=kwargs)
        images = images_of(messages)
        return text if self.images is None else self.images.expand(text, images)

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        reply: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: TemplateKwargs | None = None,
    ) -> str:
        """Return turns as rendered by the chat template.

        A sentinel breaks the names of special tokens in all but the assistant's text
        (:meth:`TextTokenizer.break_marks`).

        Args:
            turns: turns in the form of transformers.
            reply: end the text where the assistant's reply starts.
            tools: tools in the form of transformers.
            kwargs: additional template variables.

        Raises:
            RecipeError: if the template rejects the conversation.
        """
        if self.check is not None:
            self.check()
        names: dict[str, Any] = {**(kwargs or {})}
        if printed := names.pop(DATE, self.date):
            own = self.tokenizer.chat_template
            if isinstance(own, dict):
                own = own.get("tool_use" if tools else "default") or own["default"]
            # Given per call, so that the stored template stays free of the date.
            names["chat_template"] = date_macro(printed) + own
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{**turn, "content": self._content(turn)} for turn in turns],
                tools=map_texts([*tools], self.text_tokenizer.break_marks) or None,
                tokenize=False,
                add_generation_prompt=reply,
                **names,
            )
        # A template is a third-party program with untrusted input, so it may raise anything.
        except Exception as error:
            # A signal, such as the end of a time limit, may arrive while a row is rendered.
            if isinstance(error, Interrupted) or is_out_of_memory(error):
                raise
            reason = f"{error or type(error).__name__}"
            others = [turn for turn in turns if turn["role"] != "system"]
            if 0 < len(others) < len(turns):
                # If the other turns render, the system turn is the reason.
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
            literal = self.text_tokenizer.break_marks
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
        # Two texts that render equally were both dropped.
        turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        texts = [self.tokenizer.apply_chat_template([turn], tokenize=False) for turn in turns]
        return bool(texts[0] == texts[1])
