"""Advice for given data and machine: tune, prompt, search, distil, or use a baseline."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.formatting import OPTIONS
from luthier.recipe import to_toml, toml_value
from luthier.types import dotted_items


def command_of(data: str, fields: Mapping[str, Any]) -> str:
    """Return the tuning command of plain recipe values by dotted name; tables are flattened."""
    methods = {name: f"{name}.method" for name in ("objective", "adaptation")}
    flat = {methods.get(name, name): value for name, value in dotted_items(fields)}
    parts = ["luthier", "tune", data]
    for key, option in OPTIONS.items():
        if value := flat.pop(key, None):
            parts += [option, str(value)]
    for key, value in flat.items():
        # A text without quotes is one to `--set`, unless it would be read as another type.
        text = str(value) if isinstance(value, str | Path) else None
        if text is None or toml_value(text) != text:
            written = to_toml({"value": value if text is None else text})
            text = written.removeprefix("value = ").strip()
        parts += ["--set", f"{key}={text}"]
    return shlex.join(parts)
