"""Suggestions for an unknown model id: similar models and unfinished runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from luthier.files import explain_unreadable_home
from luthier.library.folders import split_id, unfinished_run_ids

NEAREST = 3
"""Number of suggestions for an unknown id."""
FEW = 20
"""Maximum number of ids in a complete list."""


def suggest_models(model_id: str, known: Sequence[str]) -> str:
    """Return suggestions for an unknown id: similar ids, or all ids if few."""
    unreadable = explain_unreadable_home()
    if not known:
        return unreadable or "No model on this machine supports this command."
    meant = f"{unreadable} " if unreadable else ""
    if near := _near_ids(model_id, known):
        meant += f"Did you mean {' or '.join(near)}? "
    if len(known) <= FEW:
        return f"{meant}Available: {', '.join(known)}."
    return f"{meant}`luthier models list` shows all {len(known)} models."


def suggest_runs(model_id: str) -> str:
    """Return a sentence on unfinished runs with similar names and the command to resume; empty for
    none."""
    near = _near_ids(model_id, unfinished_run_ids())
    if not near:
        return ""
    return (
        f"Unfinished runs: {', '.join(near)}. Repeat the command with `--resume` to complete a run "
        "(luthier tune … --resume). "
    )


def _near_ids(model_id: str, known: Sequence[str]) -> list[str]:
    """Return the ids of ``known`` most similar to ``model_id``, best first."""
    asked = model_id.lower().replace("/", ":")
    holding = [each for each in known if len(asked) > 1 and asked in each.lower()]
    close = difflib.get_close_matches(asked, known, NEAREST, cutoff=0.5)
    if ":" not in asked:  # a name without base model
        names = [split_id(each)[1] for each in known]
        alike = difflib.get_close_matches(asked, filter(None, names), NEAREST, cutoff=0.7)
        close = [*(known[names.index(name)] for name in alike), *close]
    return list(dict.fromkeys([*holding, *close]))[:NEAREST]
