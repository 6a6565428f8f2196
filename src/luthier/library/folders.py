"""Model ids, and the folders of models and runs on this machine.

- models/base/<id>/: a Hugging Face folder and ``luthier.json``
- models/custom/imported/<name>/: an imported model
- models/custom/<base>/<name>/: adapter or weights, tokenizer, recipe, metrics, ``luthier.json``
- runs/<base>/<name>/: the run of a custom model; pretraining/<id>/ for a base model
- distillations/<base>/<name>/: replies of a teacher
- cache/gguf/: GGUF files for llama.cpp
- cache/tokenizers/: tokenizers for the library ``tokenizers``
- probes/: passed comparisons with transformers

Everything in cache/ and probes/ can be deleted at any time and is recreated on demand.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from luthier.files import luthier_home
from luthier.models.manifest import MANIFEST

JOB_PREFIX = "job-"
"""Name prefix of models trained by service jobs, followed by the job id."""

RUN_REQUEST, RUN_RESULT = "request.json", "result.json"
"""Files of a run: the request, and the result of a finished run."""


def split_id(model_id: str) -> tuple[str, str]:
    """Return base and name of a custom model id; for a base model, the id and an empty name."""
    base, _, name = model_id.partition(":")
    return base, name


def id_of(folder: Path) -> str:
    """Return the id of the custom model in a folder ``…/<base>/<name>``."""
    return f"{folder.parent.name}:{folder.name}"


def base_folder(model_id: str) -> Path:
    """Return the folder of a base model, from the catalogue or pretrained on this machine."""
    return luthier_home() / "models" / "base" / model_id


def is_base_here(model_id: str) -> bool:
    """Return whether the files of a base model are in the store."""
    return (base_folder(model_id) / MANIFEST).is_file()


def custom_folder(base: str, name: str) -> Path:
    """Return the folder of a custom model."""
    return luthier_home() / "models" / "custom" / short_name(base) / name


def folder_of(stored_id: str | None) -> Path | None:
    """Return the folder of a custom model by id; ``None`` for other ids."""
    base, name = split_id(stored_id or "")
    return custom_folder(base, name) if name else None


def custom_folders(file: str) -> list[Path]:
    """Return the folders of custom models that contain ``file``, unfinished folders included."""
    return [path.parent for path in (luthier_home() / "models" / "custom").glob(f"*/*/{file}")]


def working_folders(model_id: str) -> list[Path]:
    """Return the folders of a model's run and of its teacher's replies; none for paths and hub ids."""
    base, name = split_id(model_id)
    if not re.fullmatch(r"\w[\w.-]*", name or base):
        return []
    if not name:
        return [luthier_home() / "pretraining" / base]
    return [luthier_home() / kind / short_name(base) / name for kind in ("runs", "distillations")]


def unfinished_run_ids() -> list[str]:
    """Return the ids of models with unfinished runs, without the jobs of the service."""
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
        and working_folders(run_id)  # the name of a copied folder may be an invalid id
    )


def gguf_folder(model_id: str, digest: str, kind: str) -> Path:
    """Return the folder of the GGUF file for this content hash and quantization.

    The name starts with the model id, so files of a removed model are found without its parents.
    """
    name = re.sub(r"[^\w.-]", "~", model_id, flags=re.ASCII)
    if len(name) > 100:  # a long path
        name = f"{name[-80:]}~{hashlib.sha256(model_id.encode()).hexdigest()[:16]}"
    return luthier_home() / "cache" / "gguf" / f"{name}~{digest}~{kind}"


def short_name(base: str) -> str:
    """Return the short name of a base model in ids, such as ``name-1b`` for ``org/Name-1B``."""
    last = Path(base).name if "/" in base else base
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"
