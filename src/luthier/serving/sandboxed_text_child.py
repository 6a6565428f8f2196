"""The process in which template and tokenizer of a model from outside are at work.

A chat template is a program, and so is a tokenizer's pattern: neither can read or write anything here,
but both can be written to take all time and memory there is. This process has limits
(:mod:`luthier.serving.sandboxed_process_child`); :mod:`luthier.serving.sandboxed_text` asks it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.serving.sandboxed_process_child import (
    READ_SECONDS,
    allow_seconds,
    be_killed_first,
    limit_memory,
    send,
    serve,
)

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

MEMORY = 2 << 30
"""Bytes of addresses that model and requests may take, beside the libraries."""
TEMPLATE = 1_000_000
"""Characters of a chat template."""
TOKEN = 1024
"""Characters that a token may stand for on average, where not few tokens are decoded together."""
_WARM = "{% for m in messages %}{{ m | tojson }}{{ strftime_now('%d %B') }}{% endfor %}"
"""A template of ours, for which all that templates use is imported."""
_LATER = ("jinja2.debug", "jinja2.meta", "encodings.unicode_escape", "pprint", "textwrap")
"""What templates import at their first error, setting, escape or filter."""


def main(arguments: list[str]) -> None:
    """Read the model that ``arguments`` name, say what it is, and answer until nobody asks."""
    descriptor, seconds, folder, fields = arguments
    connection = socket.socket(fileno=int(descriptor))
    be_killed_first()
    _import(Path(folder))
    limit_memory(MEMORY)
    allow_seconds(READ_SECONDS)
    try:
        chat = _open_chat_format(Path(folder), json.loads(fields))
        about = _about(chat)
    except Exception as error:
        send(connection, {"error": _words(error)})
        return
    serve(connection, about, int(seconds), lambda call, given: _CALLS[call](chat, **given), _words)


def _import(folder: Path) -> None:
    """All that is needed later, while files can still be opened; torch only for networks of ours."""
    from luthier.files import read_json
    from luthier.models.nets import nets_of

    path = folder / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if not nets_of(kind or ""):
        sys.modules["torch"] = None  # type: ignore[assignment]
    for name in _LATER:
        import_module(name)
    with contextlib.suppress(ImportError):
        import_module("llguidance")
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    transformers.logging.set_verbosity_error()
    turn = {"role": "user", "content": ""}
    render_jinja_template([[turn]], chat_template=_WARM)


def _open_chat_format(folder: Path, fields: Mapping[str, Any] | None) -> ChatFormat:
    from luthier.data.chat import ChatFormat
    from luthier.data.sentence import SentencePipeline
    from luthier.models.tokenizer import load_chat_format, load_tokenizer

    if fields is None:
        return load_chat_format(folder)
    tokenizer = load_tokenizer(folder)
    names = ("template", "stop_ids", "start_id", "opening_ids", "closing_ids")
    own = fields.get("sentence")
    return ChatFormat.of(
        tokenizer,
        **{name: fields[name] for name in names if name in fields},
        sentence=SentencePipeline.model_validate(own) if own else None,
    )


def _about(chat: ChatFormat) -> dict[str, Any]:
    tokenizer = chat.tokenizer
    template = tokenizer.chat_template
    if len(json.dumps(template)) > TEMPLATE:
        raise ValueError(f"its chat template has more than {TEMPLATE:,} characters")
    return {
        "template": chat.template,
        "stop_ids": [int(i) for i in chat.stop_ids],
        "start_id": chat.start_id,
        "opening_ids": [int(i) for i in chat.opening_ids],
        "closing_ids": [int(i) for i in chat.closing_ids],
        "decoder_problem": chat.decoder_problem,
        "sentence": chat.sentence.model_dump(mode="json") if chat.sentence else None,
        "sentence_problem": chat.sentence_problem,
        "chat_template": template,
        "stop_names": [*chat.text_encoder.stop_names] if chat.has_tokenizer else [],
        "vocab_size": int(tokenizer.vocab_size),
        "longest_token": chat.longest_token,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token": tokenizer.unk_token,
        "model_max_length": int(tokenizer.model_max_length),
    }


def _decode(chat: ChatFormat, ids: list[int], special: list[tuple[int, str]]) -> str:
    return _believable(chat.decode_beside(ids, dict(special)), ids)


def _pieces(chat: ChatFormat, ids: list[int]) -> list[str]:
    found = chat.pieces(ids)
    _believable("".join(found), ids)
    return found


def _believable(text: str, ids: list[int]) -> str:
    # A server keeps what it has written; what a tokenizer's decoder may add to it must have a bound.
    if len(text) > TOKEN * (len(ids) + 4):
        raise ValueError(f"{len(ids)} tokens stand for {len(text):,} characters")
    return text


def _encode(
    chat: ChatFormat, text: str | list[str], settings: Mapping[str, Any]
) -> tuple[list[int], list[int | None] | None]:
    from luthier.data.tokenization import panics_refused

    with panics_refused():
        encoded = chat.tokenizer(text, **settings)
    ids = [int(i) for i in encoded["input_ids"]]
    return ids, encoded.word_ids() if encoded.is_fast else None


def _reasoning_marks(chat: ChatFormat) -> dict[str, Any] | None:
    if (marks := chat.reasoning_marks) is None:
        return None
    names = ("open", "close", "open_id", "close_id")
    return {name: getattr(marks, name) for name in names} | {"special": [*marks.special.items()]}


def _vocabulary(chat: ChatFormat, size: int) -> dict[str, Any]:
    """Bytes of every token, in base64, and which tokens are no text."""
    known = chat.grammar_tokens(size)
    added = chat.tokenizer.added_tokens_decoder.items()
    return {
        "tokens": [base64.b64encode(known.decode_bytes([i])).decode() for i in range(size)],
        "special": sorted(int(i) for i, token in added if token.special),
    }


_CALLS: dict[str, Callable[..., Any]] = {
    "render": lambda chat, turns, **given: chat.render(turns, **given),
    "tokens": lambda chat, text, first: chat.tokens(text, first=first).tolist(),
    "encode": _encode,
    "behind": lambda chat, text: chat.text_encoder.behind(text),
    "divide": lambda chat, text, parts: chat.text_encoder.divide(text, parts),
    "reasoning_marks": _reasoning_marks,
    "decode": _decode,
    "pieces": _pieces,
    "vocabulary": _vocabulary,
}


def _words(error: Exception) -> str:
    from luthier.errors import LuthierError

    if isinstance(error, MemoryError):
        return f"the model's template or tokenizer wants more than {MEMORY >> 30} GiB of memory"
    if isinstance(error, LuthierError):
        return str(error)[:2000]
    return f"the model's template or tokenizer fails: {type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    main(sys.argv[1:])
