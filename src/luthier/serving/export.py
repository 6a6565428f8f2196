"""Writing a model as a directory that other software loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.encryption.files import copy_plain
from luthier.errors import RecipeError, RunConflict
from luthier.files import new_folder
from luthier.models.manifest import MANIFEST
from luthier.models.save import ADAPTER, save_network
from luthier.store.models import StoredModel, adaptation_of, chat_format, load


def export(stored: StoredModel, target: Path, merged: bool) -> Path:
    """Write ``stored`` to the new folder ``target`` and return it.

    With ``merged``, or for a model that is no adapter, this is a Hugging Face directory whose
    weights are bit for bit those that luthier serves. Without it, an adapter is written in PEFT's
    format, to be put on the base model named in ``adapter_config.json``.
    """
    if stored.parent is not None and stored.parent.parent is not None and not merged:
        raise RecipeError(
            f"{stored.id} is an adapter on the adapter {stored.parent.id}, and PEFT does not put one "
            "on another; use --merged"
        )
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunConflict(f"{target} exists already; name a folder that does not, or an empty one")
    with new_folder(target) as fresh:
        if stored.parent is None:
            _copy(stored.folder, fresh)
        elif merged:
            if not adaptation_of(stored).mergeable:
                raise RecipeError(
                    f"{adaptation_of(stored).method} cannot be merged into the network's own weights; "
                    "export it without --merged"
                )
            from luthier.engine.machine import choose_machine

            machine = choose_machine()
            model = load(stored, machine.dtype, machine.device)
            save_network(model, chat_format(stored), fresh)
        else:
            for name in ("adapter_config.json", ADAPTER):
                copy_plain(stored.folder / name, fresh / name)
            chat_format(stored).tokenizer.save_pretrained(fresh)
    return target


def _copy(source: Path, target: Path) -> None:
    """All files of a whole network but luthier's own."""
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        elif path.name != MANIFEST and path.stem != "loss":
            copy_plain(path, target / path.name)
