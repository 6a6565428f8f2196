"""Kinds of base models, with their objectives and modalities."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import UnknownModel
from luthier.models.formats.pipelines import MODEL_TYPE
from luthier.models.networks.modalities import CTC_FAMILIES


@dataclass(frozen=True)
class BaseKind:
    """A kind of base model."""

    objective: str
    """Default objective for inference with an untrained base model."""
    modalities: tuple[str, str]
    """Input and output modality in Bedrock's terms. Bedrock has no term for audio. Image generators
    take a class label, declared as TEXT."""
    rows_decide: bool = False
    """True if the base model supports several objectives. The rows then decide."""
    families: tuple[str, ...] = ()
    """Values of ``model_type`` that imply this kind if the manifest declares none."""


KINDS = {
    "causal_lm": BaseKind("causal_lm", ("TEXT", "TEXT"), rows_decide=True),
    "masked_lm": BaseKind("contrastive", ("TEXT", "EMBEDDING"), rows_decide=True),
    "encoder": BaseKind("contrastive", ("TEXT", "EMBEDDING"), rows_decide=True),
    "reranker": BaseKind("reranker", ("TEXT", "TEXT"), rows_decide=True),
    "image_encoder": BaseKind("contrastive", ("IMAGE", "EMBEDDING"), rows_decide=True),
    "audio_encoder": BaseKind("contrastive", ("", "EMBEDDING"), rows_decide=True),
    "image_text_encoder": BaseKind("contrastive", ("TEXT", "EMBEDDING"), families=("clip",)),
    "autoencoding": BaseKind("vae", ("IMAGE", "IMAGE"), families=("vae", "z_score")),
    "adversarial": BaseKind("gan", ("TEXT", "IMAGE"), families=("dcgan",)),
    "denoising": BaseKind("diffusion", ("TEXT", "IMAGE"), families=("unet", MODEL_TYPE)),
    "image_to_text": BaseKind(
        "image_to_text", ("IMAGE", "TEXT"), families=("vision-encoder-decoder", *CTC_FAMILIES)
    ),
}
"""Kinds by name, as manifests and the catalogue store them."""


def base_kind(name: str | None) -> BaseKind:
    """Return the kind ``name``. The default, for folders of other tools, is a causal language
    model.

    Raises:
        UnknownModel: for an unknown kind.
    """
    if name is None:
        return KINDS["causal_lm"]
    if name not in KINDS:
        raise UnknownModel(
            f"Unknown kind of base model {name!r}. Choose one of {', '.join(KINDS)}."
        )
    return KINDS[name]


def sole_objective(kind: str | None) -> str | None:
    """Return the only objective that models of ``kind`` support, or ``None`` for several.

    The kind of a custom model is the trained task; training can continue with other objectives.
    """
    known = KINDS.get(kind or "")
    return None if known is None or known.rows_decide else known.objective


def kind_of_family(model_type: str | None) -> str | None:
    """Return the kind of a model family with a single task; ``None`` for other families."""
    return next((name for name, kind in KINDS.items() if model_type in kind.families), None)
