"""What to do with this data and this machine: tune, prompt, search, distil, or leave it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.escaping import OPTIONS
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
    """Inspect, estimate, try and judge.

    Args:
        recipe: the tuning that is compared with everything else.
        command: how it is typed, for the recommendation.
        documents: sources of texts that answers should be true to.
        wishes: what is wanted, and the limits.
        seconds: of training on trial; 0 for none.
        reporter: hears of progress.

    Raises:
        RefusedInput: for a recipe or documents that cannot be.
    """
    from luthier.data.rows import load_documents
    from luthier.workflows.advise.facts import collect
    from luthier.workflows.advise.recommend import recommend

    texts = load_documents(documents)
    return recommend(collect(recipe, texts, wishes, seconds, reporter), command)


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
    methods = {name: f"{name}.method" for name in ("objective", "adaptation")}
    flat = {methods.get(name, name): value for name, value in dotted_items(fields)}
    flags = {key: flat.pop(key) for key in OPTIONS if key in flat}
    return tuning_command(data, flags, [f"{key}={_literal(value)}" for key, value in flat.items()])


def _literal(value: Any) -> str:
    """As ``--set`` reads it back."""
    text = str(value) if isinstance(value, str | Path) else None
    if text is not None and toml_value(text) == text:
        return text
    written = to_toml({"value": value if text is None else text})
    return written.removeprefix("value = ").strip()
