"""Models and runs that need a model, and the deletion of files derived from a model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from luthier.files import luthier_home
from luthier.library.folders import (
    RUN_REQUEST,
    RUN_RESULT,
    base_folder,
    folder_of,
    gguf_folder,
    id_of,
    working_folders,
)
from luthier.library.models import custom_models
from luthier.models.tokenizer import remove_stored_tokenizer


@dataclass(frozen=True)
class Dependents:
    """Models and runs on this machine that need the files of a model."""

    models: list[str]
    """Ids of the models trained from the model."""
    runs: list[str]
    """Ids of the unfinished runs from a base model, runs of jobs included."""


def dependents_of(model_id: str) -> Dependents:
    """Return the models and runs that would lose a model they are built on."""
    is_base = ":" not in model_id
    models = [
        each.id
        for each in custom_models()
        if model_id in (each.manifest.parent, each.root if is_base else None)
    ]
    requests = (luthier_home() / "runs" / model_id).glob(f"*/{RUN_REQUEST}") if is_base else ()
    folders = sorted(path.parent for path in requests)
    runs = [id_of(each) for each in folders if not (each / RUN_RESULT).is_file()]
    return Dependents(models, runs)


def remove_side_files(model_id: str) -> None:
    """Delete the run, the teacher's replies, the GGUF files and the stored tokenizer of a model."""
    derived = gguf_folder(model_id, "[0-9a-f]" * 64, "*")
    if (own := folder_of(model_id) or base_folder(model_id)).is_dir():
        remove_stored_tokenizer(own)
    for folder in (*working_folders(model_id), *derived.parent.glob(derived.name)):
        shutil.rmtree(folder, ignore_errors=True)
