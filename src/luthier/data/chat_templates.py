"""Chat templates for base models without a template, or in place of a model's own template."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from luthier.data.parsing import quote
from luthier.errors import RecipeError

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
        RecipeError: if the file cannot be read.
    """
    if given != CHATML:
        try:
            return Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise RecipeError(
                f"cannot read the chat template {quote(given)}: {error}.",
                setting="data.chat_template",
                advice="Give `chatml`, or the path of a Jinja file.",
            ) from error
    has_marks = {_IM_START, _IM_END} <= tokenizer.get_vocab().keys()
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    has_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return _chatml("{{ bos_token }}" * has_bos, f"'{_IM_END}'" if has_marks else "eos_token")
