"""Advice for given data and machine: tune, prompt, search, distil, or use a baseline."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.formatting import OPTIONS
from luthier.recipe import to_toml, toml_value
from luthier.types import dotted_items

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.recipe import Recipe
    from luthier.workflows.advise.facts import Wishes
    from luthier.workflows.advise.recommend import Advice


def advise(
    recipe: Recipe,
    command: str,
    documents: Sequence[str],
    wishes: Wishes,
    seconds: float,
    reporter: Reporter,
) -> Advice:
    """Inspect the data, estimate the job, try techniques and recommend.

    Args:
        recipe: the tuning to compare.
        command: the tuning command, for the recommendation.
        documents: sources of documents for retrieval.
        wishes: goal and limits.
        seconds: duration of the trial training; 0 for none.
        reporter: receives progress.

    Raises:
        RefusedInput: for an invalid recipe or document.
    """
    from luthier.documents.readers import load_texts
    from luthier.workflows.advise.facts import collect
    from luthier.workflows.advise.recommend import recommend

    texts = load_texts(documents)
    return recommend(collect(recipe, texts, wishes, seconds, reporter), command)


def tuning_command(data: str, flags: Mapping[str, Any], settings: Sequence[str]) -> str:
    """Return the ``luthier tune`` command of ``data`` with all settings.

    Args:
        data: name of the data file.
        flags: values of fields with an option, by dotted field name.
        settings: ``KEY=VALUE`` of fields without an option.
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
    """Return the tuning command of plain recipe values by dotted name; tables are flattened."""
    methods = {name: f"{name}.method" for name in ("objective", "adaptation")}
    flat = {methods.get(name, name): value for name, value in dotted_items(fields)}
    flags = {key: flat.pop(key) for key in OPTIONS if key in flat}
    return tuning_command(data, flags, [f"{key}={_literal(value)}" for key, value in flat.items()])


def _literal(value: Any) -> str:
    """Return a value as an argument of ``--set``."""
    text = str(value) if isinstance(value, str | Path) else None
    if text is not None and toml_value(text) == text:
        return text
    written = to_toml({"value": value if text is None else text})
    return written.removeprefix("value = ").strip()
