"""Safe display of untrusted text, and small formatters for messages.

Keys, names, messages and generated text may contain escape sequences, which control the terminal,
and bidirectional overrides, which disguise text. Commands (``luthier.cli.terminal.console``) and
reports escape both.
"""

from __future__ import annotations

import codecs
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TextIO

_UNESCAPED = "\n\t\u00a0\u3000\u200c\u200d"
"""Line ends, tabs, and the joiners of emoji and scripts."""


def printable(text: str) -> str:
    """``text`` with control characters, escapes and turns of direction as ``\\x1b`` or ``\\u202e``.

    Line ends, tabs and the joiners of emoji and scripts stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if _harmless(char) else _visible(char) for char in text)


def one_line(text: str) -> str:
    """Return :func:`printable` text on one line, for a name or a table cell."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def printable_json(text: str, encoding: str = "utf-8") -> str:
    """Return a JSON document with unsafe characters as ``\\u009b``; the values stay equal.

    Characters outside of ``encoding`` are also escaped.
    """
    if not text.isprintable():
        text = "".join(char if _harmless(char) else _in_json(char) for char in text)
    return text.encode(encoding, _JSON_ERRORS).decode(encoding)


_JSON_ERRORS, _TEXT_ERRORS = "luthier.json", "luthier.text"
_ASCII = str.maketrans("─├│└█▁▂▃▄▅▆▇–⟦⟧", "-+|+#_..::++-[]") | {
    ord(char): text
    for char, text in {"…": "...", "→": "->", "±": "+-", "✓": "ok:", "✗": "x"}.items()
}
"""Signs of luthier's own output in ASCII."""


def _escape_in_json(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_in_json, error.object[error.start : error.end])), error.end


def _escape_in_text(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(_JSON_ERRORS, _escape_in_json)
codecs.register_error(_TEXT_ERRORS, _escape_in_text)


def escape_unencodable(*streams: TextIO) -> None:
    """Make streams escape unencodable characters instead of raising an error."""
    for stream in streams:
        encoding = (stream.encoding or "").lower().replace("-", "")
        if isinstance(stream, io.TextIOWrapper) and not encoding.startswith("utf"):
            stream.reconfigure(errors=_TEXT_ERRORS)


def finite_or_none(value: Any) -> Any:
    """Return a JSON value with ``None`` for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [finite_or_none(each) for each in value]
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    return value


def nearest_name(name: object, names: Iterable[str], cutoff: float = 0.66) -> str | None:
    """Return the name most similar to ``name``; ``None`` below a similarity of ``cutoff`` (0 to 1).

    The default accepts one wrong letter of three.
    """
    return next(iter(get_close_matches(str(name), list(names), 1, cutoff)), None)


def did_you_mean(name: object, names: Iterable[str], otherwise: str) -> str:
    """Return ``did you mean NEAREST?``, or ``otherwise`` without a similar name."""
    near = nearest_name(name, names)
    return f"did you mean {near}?" if near else otherwise


def map_code(text: str, change: Callable[[str], str]) -> str:
    """Apply ``change`` to all code between backticks.

    Messages name settings in backticks, as in recipes: `` `training.epochs` `` or ``
    `data.long_rows=drop` ``. Each API and the CLI replace the code by their own names.
    """
    parts = text.split("`")
    parts[1::2] = map(change, parts[1::2])
    return "`".join(parts)


OPTIONS: Mapping[str, str] = {
    "base": "--base",
    "objective.method": "--objective",
    "adaptation.method": "--adaptation",
    "data.validation": "--validation",
    "data.chat_template": "--chat-template",
}
"""Command options for settings, in every command with a recipe."""
_OWN_OPTIONS = {**OPTIONS, "long_rows": "--long-rows", "turns": "--turns", "method": "--method"}
_GROUPS = ("training.", "adaptation.", "objective.", "data.", "teacher.", "sampling.", "insights.")


def command_option(code: str) -> str:
    """Return the command option for a setting with its value; other code unchanged."""
    setting, equals, value = code.partition("=")
    if not equals:
        return code
    if setting.startswith("data.columns.") and not value:
        return f"--ignore {setting.removeprefix('data.columns.')}"
    if setting.startswith("data.columns."):
        return f"--map {code.removeprefix('data.columns.')}"
    if setting in _OWN_OPTIONS:
        return f"{_OWN_OPTIONS[setting]} {value}"
    return f"--set {code}" if setting.startswith(_GROUPS) else code


def python_keyword(code: str) -> str:
    """Return the keyword argument for the setting of a column; other code unchanged."""
    setting, equals, column = code.partition("=")
    if not (equals and setting.startswith("data.columns.")):
        return code
    return f'columns={{"{setting.removeprefix("data.columns.")}": "{column}"}}'


def column_options(columns: Mapping[str, str]) -> list[str]:
    """Return the command options for columns by key; an empty column ignores the key."""
    pairs = ((["--map", f"{k}={c}"] if c else ["--ignore", k]) for k, c in columns.items())
    return [word for pair in pairs for word in pair]


def list_some(names: Iterable[str], most: int) -> str:
    """Return the first ``most`` names and the number of the rest: ``a, b and 3 more``."""
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def format_duration(seconds: float) -> str:
    """Seconds for people: ``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.1f} min"
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"


def _harmless(char: str) -> bool:
    return char.isprintable() or char in _UNESCAPED


def _visible(char: str) -> str:
    code = ord(char)
    if unicodedata.category(char) == "Zs":
        return " "
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _in_json(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return re.sub("(....)", r"\\u\1", units)
