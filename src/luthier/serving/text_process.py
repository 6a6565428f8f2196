"""The process in which template and tokenizer of a model from outside are at work.

A chat template is a program, and so is a tokenizer's pattern: neither can read or write anything here,
but both can be written to take all time and memory there is. This process takes requests from the one
that started it (:mod:`luthier.serving.confined_process`) and is ended by the kernel where one takes too
much processor time. It cannot have more memory than it is told, and opens no file once the model is
read.

Requests and replies are JSON behind four bytes of length.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

MEMORY = 2 << 30
"""Bytes of addresses that model and requests may take, beside the libraries."""
READ_SECONDS = 60
"""Of processor time, to read the model."""
LONGEST = 32 << 20
"""Bytes of a reply."""
TEMPLATE = 1_000_000
"""Characters of a chat template."""
TOKEN = 1024
"""Characters that a token may stand for on average, where not few tokens are decoded together."""
_WARM = "{% for m in messages %}{{ m | tojson }}{{ strftime_now('%d %B') }}{% endfor %}"
"""A template of ours, for which all that templates use is imported."""
_LATER = ("jinja2.debug", "encodings.unicode_escape", "pprint", "textwrap")
"""What templates import at their first error, escape or filter."""


def send(connection: socket.socket, told: Any) -> None:
    """Write one request or reply."""
    data = json.dumps(told).encode()
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive(connection: socket.socket, longest: int = (1 << 32) - 1) -> Any:
    """Read one; raises :class:`EOFError` where nobody is there, and for more bytes than ``longest``."""
    (size,) = struct.unpack(">I", _exactly(connection, 4))
    if size > longest:
        raise EOFError(f"{size:,} bytes")
    return json.loads(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data


def main(arguments: list[str]) -> None:
    """Read the model that ``arguments`` name, say what it is, and answer until nobody asks."""
    descriptor, seconds, folder, fields = arguments
    connection = socket.socket(fileno=int(descriptor))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # before the server, where the machine has no memory left
    _import(Path(folder))
    limit(resource.RLIMIT_AS, addresses() + MEMORY)
    allow_seconds(READ_SECONDS)
    try:
        chat = _opened(Path(folder), json.loads(fields))
        told = _about(chat)
    except Exception as error:
        send(connection, {"error": _words(error)})
        return
    limit(resource.RLIMIT_FSIZE, 0)
    # Numbers of open files have to be lower: nothing more is opened, no connection either.
    limit(resource.RLIMIT_NOFILE, 0)
    send(connection, {"result": told})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            asked = receive(connection)
            allow_seconds(int(seconds))
            _send_bounded(connection, _answer(chat, asked))


def _import(folder: Path) -> None:
    """All that is needed later, while files can still be opened; torch only for networks of ours."""
    from luthier.files import read_json
    from luthier.models.nets import NETS

    path = folder / "config.json"
    kind = read_json(path).get("model_type") if path.is_file() else None
    if kind not in NETS:
        sys.modules["torch"] = None  # type: ignore[assignment]
    for name in _LATER:
        import_module(name)
    with contextlib.suppress(ImportError):
        import_module("llguidance.hf")
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    transformers.logging.set_verbosity_error()
    render_jinja_template([[{"role": "user", "content": ""}]], chat_template=_WARM)


def _opened(folder: Path, fields: Mapping[str, Any] | None) -> ChatFormat:
    from luthier.data.chat import ChatFormat
    from luthier.models.tokenizer import load_chat_format, load_tokenizer

    if fields is None:
        return load_chat_format(folder)
    tokenizer = load_tokenizer(folder)
    return ChatFormat.of(tokenizer, fields["template"], fields["stop_ids"], fields["start_id"])


def _about(chat: ChatFormat) -> dict[str, Any]:
    tokenizer = chat.tokenizer
    template = tokenizer.chat_template
    if len(json.dumps(template)) > TEMPLATE:
        raise ValueError(f"its chat template has more than {TEMPLATE:,} characters")
    return {
        "template": chat.template,
        "stop_ids": [int(i) for i in chat.stop_ids],
        "start_id": chat.start_id,
        "chat_template": template,
        "vocab_size": int(tokenizer.vocab_size),
        "longest_token": chat.longest_token,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _answer(chat: ChatFormat, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": _CALLS[asked["call"]](chat, **asked["given"])}
    except Exception as error:
        return {"error": _words(error)}


def _send_bounded(connection: socket.socket, told: Mapping[str, Any]) -> None:
    try:
        data = json.dumps(told)
    except MemoryError:
        data = ""
    if not 0 < len(data) <= LONGEST:
        told = {"error": f"what it makes of this text is larger than {LONGEST >> 20} MiB"}
    send(connection, told)


def _decode(chat: ChatFormat, ids: list[int]) -> str:
    return _believable(chat.decode(ids), ids)


def _pieces(chat: ChatFormat, ids: list[int]) -> list[str]:
    found = chat.pieces(ids)
    _believable("".join(found), ids)
    return found


def _believable(text: str, ids: list[int]) -> str:
    # A server keeps what it has written; what a tokenizer's decoder may add to it must have a bound.
    if len(text) > TOKEN * (len(ids) + 4):
        raise ValueError(f"{len(ids)} tokens stand for {len(text):,} characters")
    return text


def _words_of(chat: ChatFormat, text: str) -> tuple[list[int], list[int] | None]:
    ids_T, word_T = chat.encode_words(text)
    return ids_T.tolist(), None if word_T is None else word_T.tolist()


def _vocabulary(chat: ChatFormat, size: int) -> dict[str, Any]:
    """Bytes of every token, in base64, and which tokens are no text."""
    known = chat.grammar_tokens(size)
    added = chat.tokenizer.added_tokens_decoder.items()
    return {
        "tokens": [base64.b64encode(known.decode_bytes([i])).decode() for i in range(size)],
        "special": sorted(int(i) for i, token in added if token.special),
    }


_CALLS: dict[str, Callable[..., Any]] = {
    "render": lambda chat, turns, reply, tools: chat.render(turns, reply=reply, tools=tools),
    "tokens": lambda chat, text, first: chat.tokens(text, first=first).tolist(),
    "words": _words_of,
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


def allow_seconds(seconds: int) -> None:
    """Let the kernel end this process after so much more processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def limit(kind: int, most: int) -> None:
    """Set a limit of this process that it cannot raise again."""
    resource.setrlimit(kind, (most, most))


def addresses() -> int:
    """Bytes of addresses that this process has now."""
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
