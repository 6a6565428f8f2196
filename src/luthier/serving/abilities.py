"""What a model can be asked for, by its record and its objective, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.data.processors import read_processor
from luthier.models.catalog import CATALOG, CatalogEntry
from luthier.models.kinds import KINDS
from luthier.objectives.capabilities import (
    SupportsPrediction,
    SupportsPrompts,
    SupportsReconstruction,
    SupportsSampling,
)
from luthier.store.model_folders import is_base_here

if TYPE_CHECKING:
    from luthier.store.models import StoredModel

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
    from luthier.store.models import described_base, find

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


def _abilities(stored: StoredModel, reads: tuple[Reads, ...]) -> Abilities:
    from luthier.store.models import objective_of, writes

    objective, does = objective_of(stored), list[Ability]()
    if isinstance(objective, SupportsPrediction):
        does.append("embed" if objective.task == "embedding" else "predict")
    elif writes(stored):
        does.append("write")
    labels: tuple[str, ...] = ()
    prompts = False
    if isinstance(objective, SupportsSampling) and reads == ("image",):
        does.append("make_images")
        labels = objective.sample_labels
        prompts = isinstance(objective, SupportsPrompts) and objective.reads_prompts
    if isinstance(objective, SupportsReconstruction) and reads == ("image",):
        does.append("reconstruct")
    return Abilities(objective.method, tuple(does), reads, labels, prompts)


def _input_of(stored: StoredModel) -> tuple[Reads, ...]:
    processor = read_processor(stored.folder)
    if processor is None:
        return ("text",)
    # As ChatFormat.check_reads has it, without loading a tokenizer: a CLIP reads both, and what has a
    # decoder behind its images only writes texts.
    tokenizer = any(stored.folder.glob("tokenizer*.json"))
    form = stored.manifest.format
    beside = form is not None and form.start_id is not None
    both = tokenizer and not beside and stored.manifest.kind != "image_to_text"
    return (processor.kind, "text") if both else (processor.kind,)


def _described_input(entry: CatalogEntry) -> tuple[Reads, ...]:
    if entry.media is None:
        return ("text",)
    both = (
        KINDS[entry.kind].modalities[0] == "TEXT" and KINDS[entry.kind].objective == "contrastive"
    )
    return (entry.media, "text") if both else (entry.media,)
