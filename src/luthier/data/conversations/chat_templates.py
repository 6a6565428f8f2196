"""Chat templates for base models without a template, or in place of a model's own template."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from luthier.data.conversations.template_kwargs import parse_template
from luthier.data.files.parsing import quote
from luthier.data.inputs import reason_of
from luthier.errors import Location, RecipeError

CHATML = "chatml"
"""Name of the built-in template."""
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


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
    has_marks = {_IM_START, _IM_END} <= tokenizer.get_vocab().keys()
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    has_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return _chatml("{{ bos_token }}" * has_bos, f"'{_IM_END}'" if has_marks else "eos_token")
