"""What a model can be asked for, by its record and its objective, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from luthier.data.chat import inputs_read
from luthier.data.inputs import read_processor
from luthier.errors import LuthierError, UnknownModel
from luthier.files import luthier_home
from luthier.inference.embeddings import gives_embeddings
from luthier.library.folders import is_base_here
from luthier.media.objectives.generative import Generative
from luthier.media.objectives.vae import VAE
from luthier.models.base_kinds import KINDS
from luthier.models.catalog import CATALOG, CatalogEntry
from luthier.objectives.base import predicts
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.foundation import AnyModel, kind_of

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.objectives import Objective

Ability = Literal["write", "predict", "embed", "make_images", "reconstruct"]
Reads = Literal["text", "image", "audio", "window"]


@dataclass(frozen=True)
class Abilities:
    """What one model does."""

    method: str
    """The objective it was trained with; of a base model that by which it answers."""
    does: tuple[Ability, ...]
    reads: tuple[Reads, ...]
    labels: tuple[str, ...] = ()
    """Classes that new images can be asked for."""
    reads_prompts: bool = False
    """Whether it makes images of what a text says."""


def abilities_of_base(base: str) -> Abilities:
    """Those of a base model by its id: one of the catalogue need not be here, and is not fetched.

    Raises:
        UnknownModel: where it is neither here nor in the catalogue.
    """
    from luthier.library.models import described_base, find

    entry = CATALOG.get(base)
    if entry is None or is_base_here(base):
        return abilities_of(find(base))
    return _abilities(described_base(entry), _described_input(entry))


def abilities_of(stored: StoredModel) -> Abilities:
    """Those of a model whose files are here.

    Raises:
        RecipeError: where it was trained by a package that is not installed.
    """
    return _abilities(stored, _input_of(stored))


def writes(model: AnyModel) -> bool:
    """Whether it answers chats: told quickly for each of thousands of models, and nothing is fetched.

    It goes by the model's record; of one whose files are not on this machine, by what its base is
    made for. What is damaged, or of a package that is not installed, writes nothing.
    """
    if isinstance(model, CustomModel) and model.stored_id is not None:
        try:
            return _stored_writes(luthier_home(), model.stored_id, model.created)
        except UnknownModel:
            pass  # on another server
        except (LuthierError, OSError):
            return False
    return _kind_writes(kind_of(model))


@lru_cache(maxsize=1 << 14)
def _stored_writes(home: Path, stored_id: str, created: datetime) -> bool:
    """Of a model in the store ``home``; ``created`` tells it from an earlier one of its id."""
    from luthier.library.models import find

    stored = find(stored_id)
    return _writes(stored, stored.objective)


@lru_cache
def _kind_writes(kind: str) -> bool:
    """Of a base model of the catalogue's ``kind``."""
    from luthier.objectives import OBJECTIVES

    objective = OBJECTIVES[KINDS[kind].objective].model_validate({})
    return objective.task == "causal_lm" and not predicts(objective)


def _writes(stored: StoredModel, objective: Objective) -> bool:

    return not predicts(objective) and stored.writes


def _abilities(stored: StoredModel, reads: tuple[Reads, ...]) -> Abilities:

    objective, does = stored.objective, list[Ability]()
    if predicts(objective):
        does.append("embed" if gives_embeddings(objective) else "predict")
    elif _writes(stored, objective):
        does.append("write")
    labels: tuple[str, ...] = ()
    prompts = False
    if isinstance(objective, Generative) and reads == ("image",):
        does.append("make_images")
        labels = objective.sample_labels
        prompts = objective.reads_prompts
    if isinstance(objective, VAE) and reads == ("image",):
        does.append("reconstruct")
    return Abilities(objective.method, tuple(does), reads, labels, prompts)


def _input_of(stored: StoredModel) -> tuple[Reads, ...]:
    processor = read_processor(stored.folder)
    if processor is None:
        return ("text",)
    form = stored.manifest.format
    has_decoder = form is not None and form.start_id is not None
    return inputs_read(
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
