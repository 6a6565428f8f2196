"""Ids of models, where these are kept on this machine, and what else is kept of them.

models/base/<id>/               a Hugging Face directory and ``luthier.json``
models/custom/imported/<name>/  a model from outside
models/custom/<base>/<name>/    adapter or weights, tokenizer, recipe, metrics, ``luthier.json``
runs/<base>/<name>/             what a custom model was trained in; pretraining/<id>/ of a base model
distillations/<base>/<name>/    a teacher's answers
cache/gguf/                     what llama.cpp runs
cache/tokenizers/               tokenizers as the library ``tokenizers`` reads them
cache/networks/                 task and size of networks
probes/                         trials of networks that passed

Everything in cache/ and probes/ may be deleted at any time; the next use writes what is needed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from luthier.files import luthier_home
from luthier.models.manifest import MANIFEST

JOB_PREFIX = "job-"
"""What the name of a model begins with that a job of the service made; the rest is the job's id."""

RUN_REQUEST, RUN_RESULT = "request.json", "result.json"
"""Of a run's folder: what was asked for, and what came of it, which one that has not ended lacks."""


def split_id(model_id: str) -> tuple[str, str]:
    """Base and name of a custom model by its id; of a base model the id, and no name."""
    base, _, name = model_id.partition(":")
    return base, name


def id_of(folder: Path) -> str:
    """Id of the custom model that ``folder``, ``<base>/<name>`` of any place, is of."""
    return f"{folder.parent.name}:{folder.name}"


def base_folder(model_id: str) -> Path:
    """Where the files of a base model are kept: one of the catalogue, or one made here."""
    return luthier_home() / "models" / "base" / model_id


def is_base_here(model_id: str) -> bool:
    """Whether the files of a base model are in the store: one of the catalogue, or one made here."""
    return (base_folder(model_id) / MANIFEST).is_file()


def custom_folder(base: str, name: str) -> Path:
    """Where a custom model is kept."""
    return luthier_home() / "models" / "custom" / short_name(base) / name


def folder_of(stored_id: str | None) -> Path | None:
    """Where the custom model of this id is kept; ``None`` for what is no such id."""
    base, name = split_id(stored_id or "")
    return custom_folder(base, name) if name else None


def custom_folders(file: str) -> list[Path]:
    """Folders of the custom models here that have ``file``, those that are being written included."""
    return [path.parent for path in (luthier_home() / "models" / "custom").glob(f"*/*/{file}")]


def working_folders(model_id: str) -> list[Path]:
    """What a model was trained in: its run first, and a teacher's answers where there may be any.

    Of a model from elsewhere, whose id is a path or a hub's, there is nothing, nor of what is no id.
    """
    base, name = split_id(model_id)
    if not re.fullmatch(r"\w[\w.-]*", name or base):
        return []
    if not name:
        return [luthier_home() / "pretraining" / base]
    return [luthier_home() / kind / short_name(base) / name for kind in ("runs", "distillations")]


def unfinished_run_ids() -> list[str]:
    """Ids of the models whose runs began and have not ended, worked on or not; jobs' are left out."""
    home = luthier_home()
    tunings = (path.parent for path in (home / "runs").glob(f"*/*/{RUN_REQUEST}"))
    pretrainings = (path.parent for path in (home / "pretraining").glob(f"*/{RUN_REQUEST}"))
    runs = [
        *((id_of(folder), folder) for folder in tunings),
        *((folder.name, folder) for folder in pretrainings),
    ]
    return sorted(
        run_id
        for run_id, folder in runs
        if not folder.name.startswith(JOB_PREFIX)
        and not (folder / RUN_RESULT).is_file()
        and working_folders(run_id)  # a folder that somebody copied is called what no model is
    )


def remove_side_files(model_id: str) -> None:
    """Delete what this machine keeps of a model outside its own folder.

    These are its run, the replies of a teacher, the GGUF files that were made of its weights, and the
    stored tokenizer.
    """
    from luthier.models.tokenizer import remove_stored_tokenizer

    derived = gguf_folder(model_id, "[0-9a-f]" * 64, "*")
    if (own := folder_of(model_id) or base_folder(model_id)).is_dir():
        remove_stored_tokenizer(own)
    for folder in (*working_folders(model_id), *derived.parent.glob(derived.name)):
        shutil.rmtree(folder, ignore_errors=True)


def gguf_folder(model_id: str, digest: str, kind: str) -> Path:
    """Where the GGUF file that a backend runs is kept: by the model's content and weights' type.

    The id stands before them, so that what was made of a removed model is found without its parents.
    """
    name = re.sub(r"[^\w.-]", "~", model_id, flags=re.ASCII)
    if len(name) > 100:  # a long path
        name = f"{name[-80:]}~{hashlib.sha256(model_id.encode()).hexdigest()[:16]}"
    return luthier_home() / "cache" / "gguf" / f"{name}~{digest}~{kind}"


def short_name(base: str) -> str:
    """Name of a base model inside ids: ``org/Name-1B`` and ``/some/where/Name-1B`` are ``name-1b``."""
    last = Path(base).name if "/" in base else base
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"
