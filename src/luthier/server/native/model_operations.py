"""Supported operations of a model, determined from metadata without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from luthier.data.conversations.chat import accepted_inputs
from luthier.data.inputs import read_processor
from luthier.errors import LuthierError, UnknownModel
from luthier.files import luthier_home
from luthier.formatting import finite_or_none
from luthier.inference.embeddings import gives_embeddings
from luthier.library.folders import is_base_here
from luthier.models.base_kinds import KINDS
from luthier.models.catalog import CATALOG, CatalogEntry
from luthier.objectives.base import predicts
from luthier.server.native.operations import View
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.foundation import AnyModel, kind_of

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.objectives import Objective

Ability = Literal["write", "predict", "embed", "make_images", "reconstruct"]
Reads = Literal["text", "image", "audio", "window"]


class Abilities(View):
    """Supported operations and inputs of a model."""

    method: str
    """Objective of the model."""
    does: tuple[Ability, ...]
    """Operations: ``write`` for chats, ``predict`` and ``embed`` for ``predictions``,
    ``make_images`` for ``images``, ``reconstruct`` for ``reconstructions``. Empty for models that
    are only bases for training."""
    reads: tuple[Reads, ...]
    labels: tuple[str, ...] = ()
    """Classes for image generation."""
    reads_prompts: bool = False
    """True if the model generates images from text."""


def abilities_of_base(base: str) -> Abilities:
    """Return the operations of a base model. A model of the catalog is not downloaded.

    Raises:
        UnknownModel: If the model is neither on disk nor in the catalog.
    """
    from luthier.library.models import catalogue_model, find

    entry = CATALOG.get(base)
    if entry is None or is_base_here(base):
        return abilities_of(find(base))
    return _abilities(catalogue_model(entry), _described_input(entry))


def abilities_of(stored: StoredModel) -> Abilities:
    """Return the operations of a model on disk.

    Raises:
        RecipeError: If the package of the model's objective is not installed.
    """
    return _abilities(stored, _input_of(stored))


@dataclass(frozen=True)
class ListedFacts:
    """Facts of a model in lists."""

    writes: bool
    """True if the model generates text."""
    measure: str | None = None
    """Name of the score; missing for unmeasured models."""
    score: float | None = None
    """Score on the held-out rows of the training."""
    score_rows: int | None = None
    """Number of these rows."""


def listed_facts(model: AnyModel) -> ListedFacts:
    """Return the facts of a model in lists.

    The result comes from the model's metadata, without downloads, and is cached for lists of
    thousands of models. If the files are on another server, the kind of the base model decides.
    Damaged models, and models of packages that are not installed, do not write.
    """
    if isinstance(model, CustomModel) and model.stored_id is not None:
        try:
            return _stored_facts(luthier_home(), model.stored_id, model.created)
        except UnknownModel:
            pass  # the files are on another server
        except (LuthierError, OSError):
            return ListedFacts(False)
    return ListedFacts(_kind_writes(kind_of(model)))


@lru_cache(maxsize=1 << 14)
def _stored_facts(home: Path, stored_id: str, created: datetime) -> ListedFacts:
    """Return the facts of a library model. ``home`` and ``created`` are cache keys: ids can be
    reused."""
    from luthier.library.models import find

    stored = find(stored_id)
    metrics = stored.manifest.metrics or {}
    kept = (metrics.get("verdict") or {}).get("kept") or {}
    scores = (name for name in kept if name != "loss")
    names = (metrics.get("comparison") or {}).get("measure"), *scores, "loss"
    measure = next((name for name in names if name in kept), None)
    score = finite_or_none(kept[measure]) if measure is not None else None
    data = stored.manifest.data
    rows = data.validation_rows if data is not None and measure is not None else None
    return ListedFacts(_writes(stored, stored.objective), measure, score, rows)


@lru_cache
def _kind_writes(kind: str) -> bool:
    """Return True if base models of the catalog's ``kind`` generate text."""
    from luthier.objectives import OBJECTIVES

    objective = OBJECTIVES[KINDS[kind].objective].model_validate({})
    return objective.task.writes and not predicts(objective)


def _writes(stored: StoredModel, objective: Objective) -> bool:
    return not predicts(objective) and stored.writes


def _abilities(stored: StoredModel, reads: tuple[Reads, ...]) -> Abilities:
    objective, does = stored.objective, list[Ability]()
    if predicts(objective):
        does.append("embed" if gives_embeddings(objective) else "predict")
    elif _writes(stored, objective):
        does.append("write")
    if reads == ("image",):
        does += ["make_images"] if objective.task.draws else []
        does += ["reconstruct"] if objective.task.reconstructs else []
    return Abilities(
        method=objective.method,
        does=tuple(does),
        reads=reads,
        labels=getattr(objective, "sample_labels", ()),
        reads_prompts=getattr(objective, "reads_prompts", False),
    )


def _input_of(stored: StoredModel) -> tuple[Reads, ...]:
    processor = read_processor(stored.folder)
    if processor is None:
        return ("text",)
    form = stored.manifest.format
    has_decoder = form is not None and form.start_id is not None
    return accepted_inputs(
        processor.kind,
        any(stored.folder.glob("tokenizer*.json")),
        has_decoder or stored.manifest.kind == "image_to_text",
    )


def _described_input(entry: CatalogEntry) -> tuple[Reads, ...]:
    if entry.media is None:
        return ("text",)
    both = (
        KINDS[entry.kind].modalities[0] == "TEXT" and KINDS[entry.kind].objective == "contrastive"
    )
    return (entry.media, "text") if both else (entry.media,)
