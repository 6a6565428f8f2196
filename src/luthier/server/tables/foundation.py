"""Foundation models: base models of this machine under ids for Bedrock clients."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from luthier.files import luthier_home
from luthier.library.folders import is_base_here, short_name
from luthier.library.models import pretrained_models, pretrained_versions
from luthier.models.base_kinds import KINDS
from luthier.models.catalog import CATALOG, HubSource
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import CustomModel


@dataclass(frozen=True)
class FoundationModel:
    """Base model for inference and customization jobs."""

    id: str
    """``provider.name``: a single dot, no colon."""
    base: str
    """Id in luthier, also accepted as an alias."""
    provider: str
    name: str
    kind: str
    """Kind in :data:`luthier.models.base_kinds.KINDS`."""
    created: datetime | None = None
    """Time of pre-training; ``None`` for a model of the catalogue."""
    reads_windows: bool = False
    """Whether the input is a time series, a modality unknown to Bedrock."""

    @property
    def root(self) -> str:
        """The id, like the root of a custom model."""
        return self.id

    @property
    def bottom(self) -> str:
        """``provider.name`` in ARNs, equal to the id."""
        return self.id

    def arn(self, arns: Arns) -> str:
        """Return the ARN of the model."""
        return arns.foundation_model(self.id)

    @property
    def writes(self) -> bool:
        """Whether the model generates text."""
        return self.kind == "causal_lm"

    @property
    def modalities(self) -> tuple[str, str]:
        """Input and output modality in Bedrock's terms; empty without an equivalent."""
        if self.reads_windows:
            return "", ""
        return KINDS[self.kind].modalities


AnyModel = FoundationModel | CustomModel
"""Model for inference, or base or teacher of a job."""


def foundation_models() -> list[FoundationModel]:
    """Return the models of the catalogue, then the pre-trained models of this machine.

    Hub models join after `luthier models pull`: no request makes a server download models.
    """
    return [*filter(_is_available, _catalog_entries(tuple(CATALOG))), *_pretrained_here()]


def foundation_model(identifier: str) -> FoundationModel | None:
    """Return the foundation model with this id, alias or ARN; ``None`` if no such model exists."""
    arn = Arn.parse(identifier)
    if arn is not None and (arn.kind, arn.account) != ("foundation-model", ""):
        return None
    # The catalogue first: it is in memory, and this lookup runs in every request.
    known = identifier if arn is None else arn.path
    for model in _catalog_entries(tuple(CATALOG)):
        # An ARN contains no alias.
        if (known == model.id or (arn is None and known == model.base)) and _is_available(model):
            return model
    for model in _pretrained_here():
        if known == model.id or (arn is None and known == model.base):
            return model
    return None


def root_of(model: AnyModel) -> FoundationModel | None:
    """Return the foundation model of ``model``; ``None`` for a foreign root."""
    return model if isinstance(model, FoundationModel) else foundation_model(model.root)


def kind_of(model: AnyModel) -> str:
    """Return the kind of the base model of ``model``, one of the kinds of the catalogue."""
    root = root_of(model)
    if root is None:
        assert isinstance(model, CustomModel)
        return str(model.details.get("kind") or "causal_lm")
    return root.kind


def writes(model: AnyModel) -> bool:
    """Return whether ``model`` generates text."""
    return kind_of(model) == "causal_lm"


def _is_available(model: FoundationModel) -> bool:
    """Return whether a catalogue model is on this machine, or is downloaded on demand."""
    return not isinstance(CATALOG[model.base].source, HubSource) or is_base_here(model.base)


@lru_cache(maxsize=1)
def _catalog_entries(ids: tuple[str, ...]) -> tuple[FoundationModel, ...]:
    found = []
    for each in map(CATALOG.__getitem__, ids):
        name, windows = each.name or each.id[:20], each.media == "window"
        model_id = f"{each.namespace}.{_hyphenate(each.id)}"
        found.append(
            FoundationModel(
                model_id, each.id, each.provider, name, each.kind, reads_windows=windows
            )
        )
    return tuple(found)


def _hyphenate(name: str) -> str:
    """Replace dots and underscores, which ids of foundation models must not contain."""
    return name.replace(".", "-").replace("_", "-")


def _pretrained_here() -> tuple[FoundationModel, ...]:
    # Cached: this lookup runs in every request for a custom model.
    return _read_pretrained(luthier_home(), pretrained_versions())


@lru_cache(maxsize=8)
def _read_pretrained(home: Path, versions: tuple[Any, ...]) -> tuple[FoundationModel, ...]:
    """Return the pre-trained models in ``home``; ``versions`` of their manifests are the cache key."""
    found = []
    for each in pretrained_models():
        kind, created = each.manifest.kind or "causal_lm", each.manifest.created
        # A manifest of a different version of luthier may name an unknown kind.
        if kind not in KINDS:
            continue
        name = _hyphenate(short_name(each.id))
        moment = datetime.fromisoformat(created) if created else None
        found.append(
            FoundationModel(f"luthier.{name}", each.id, "luthier", name[:20], kind, moment)
        )
    return tuple(found)
