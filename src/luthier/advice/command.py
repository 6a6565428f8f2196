"""The tuning that is judged, as it is typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.recipe import to_toml, toml_value
from luthier.setting_names import OPTIONS


def tuning_command(data: str, flags: Mapping[str, Any], settings: Sequence[str]) -> str:
    """``luthier tune`` of ``data`` with what was set.

    Args:
        data: as it is named.
        flags: values of fields that have options of their own, by the dotted name of the field.
        settings: ``KEY=VALUE`` of other fields.
    """
    parts = ["luthier", "tune", data]
    for key, option in OPTIONS.items():
        parts += [option, str(flags[key])] if flags.get(key) else []
    for text in flags.get("data.columns") or ():
        parts += ["--map", text]
    for text in settings:
        parts += ["--set", text]
    return shlex.join(parts)


def command_of(data: str, fields: Mapping[str, Any]) -> str:
    """The same for plain values of the recipe by dotted name; tables of them are taken apart."""
    flat = _flat(fields)
    flags = {key: flat.pop(key) for key in OPTIONS if key in flat}
    return tuning_command(data, flags, [f"{key}={_literal(value)}" for key, value in flat.items()])


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": each for name, each in _flat(value).items()}
        else:
            found[f"{key}.method" if key in ("objective", "adaptation") else key] = value
    return found


def _literal(value: Any) -> str:
    """As ``--set`` reads it back."""
    text = str(value) if isinstance(value, str | Path) else None
    if text is not None and toml_value(text) == text:
        return text
    written = to_toml({"value": value if text is None else text})
    return written.removeprefix("value = ").strip()
