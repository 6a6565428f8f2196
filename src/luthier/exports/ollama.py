"""Modelfiles, from which Ollama creates a model (github.com/ollama/ollama, docs/modelfile.md).

Ollama does not run the Jinja template of a GGUF file. Ollama looks for a similar template among its
own, and passes the prompt unchanged if no template is similar. The Modelfile therefore has the
template in Ollama's language, Go templates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.models.formats.gguf import adds_bos
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat

MODELFILE = "Modelfile"
FROM_BASE = (
    "An adapter needs the GGUF file of its base: export that, too, and name it in the Modelfile"
)


def modelfile(chat: ChatFormat, file: str, adapter: str | None = None) -> str:
    """Return the Modelfile for ``ollama create NAME`` in the folder of ``file``."""
    lines = [f"FROM ./{file}"]
    if adapter:
        lines = [f"# {FROM_BASE}.", *lines, f"ADAPTER ./{adapter}"]
    template = ollama_template(chat)
    if template is None:
        lines.append(
            "# The model's chat template does not write each turn on its own, as TEMPLATE here would "
            "have to.\n# Ollama looks for one like it among its own; where it finds none, prompts "
            "have to be whole."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    for stop in chat.tokenizer.convert_ids_to_tokens([*chat.stop_ids]):
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def ollama_template(chat: ChatFormat) -> str | None:
    """Return the chat template of ``chat`` as a Go template; ``None`` if Go cannot express the
    template.

    The text between the messages of a rendered conversation is generalized to all conversations,
    and verified with a longer conversation.
    """
    if chat.template.kind == "plain":
        return "{{ .Prompt }}"
    pieces = _pieces(chat, ("user", "assistant", "user"))
    if pieces is None:
        return None
    start, after_user, after_reply, end = pieces
    longer = _pieces(chat, ("user", "assistant", "user", "assistant", "user"))
    if longer != [start, *2 * (after_user, after_reply), end]:
        return None
    opening = _escape(_without_bos(chat, start))
    system = _pieces(chat, ("system", "user", "assistant", "user"))
    if system is not None and system[2:] == pieces[1:]:
        before, after = _escape(_without_bos(chat, system[0])), _escape(system[1])
        with_system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}"
        opening = f"{with_system}{{{{ else }}}}{opening}{{{{ end }}}}"
    not_last = "{{ if ne (len (slice $.Messages $i)) 1 }}"
    user = _escape(after_user)
    if end != after_user:
        user = f"{not_last}{user}{{{{ else }}}}{_escape(end)}{{{{ end }}}}"
    user = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{user}'
    reply = '{{ else if eq .Role "assistant" }}{{ .Content }}'
    reply += f"{not_last}{_escape(after_reply)}{{{{ end }}}}"
    turns = f"{{{{ range $i, $_ := .Messages }}}}{user}{reply}{{{{ end }}}}{{{{ end }}}}"
    template = opening + turns
    return None if '"""' in template else template


def _pieces(chat: ChatFormat, roles: tuple[str, ...]) -> list[str] | None:
    """Return the text that the template writes before, between and after messages; ``None`` on
    failure."""
    texts = [f"q{number}{role}q" for number, role in enumerate(roles)]
    messages = [Message(role, text) for role, text in zip(roles, texts, strict=True)]
    try:
        rest = chat.prompt_text(messages)
    except LuthierError:
        return None
    pieces = []
    for text in texts:
        piece, separator, rest = rest.partition(text)
        if not separator or text in rest:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _without_bos(chat: ChatFormat, text: str) -> str:
    """Remove the first token if llama.cpp adds the token to every prompt."""
    return text.removeprefix(str(chat.tokenizer.bos_token)) if adds_bos(chat) else text


def _escape(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
