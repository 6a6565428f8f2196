"""Kinds of base models: what each is made for, by the name that records and the catalogue give it."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import UnknownModel
from luthier.models.pipelines import MODEL_TYPE


@dataclass(frozen=True)
class BaseKind:
    """What base models of one kind are made for."""

    objective: str
    """Method by which one answers that was never trained here."""
    modalities: tuple[str, str]
    """What goes in and what comes out, as Bedrock calls it. What makes images takes the name of a
    class, and of what reads sounds there is no word."""
    rows_decide: bool = False
    """Whether it can learn by other methods, too, so that its rows say by which."""
    families: tuple[str, ...] = ()
    """Networks, by ``model_type``, that are of it where no record says so."""


KINDS = {
    "causal_lm": BaseKind("causal_lm", ("TEXT", "TEXT"), rows_decide=True),
    "masked_lm": BaseKind("contrastive", ("TEXT", "EMBEDDING"), rows_decide=True),
    "encoder": BaseKind("contrastive", ("TEXT", "EMBEDDING"), rows_decide=True),
    "image_encoder": BaseKind("contrastive", ("IMAGE", "EMBEDDING"), rows_decide=True),
    "audio_encoder": BaseKind("contrastive", ("", "EMBEDDING"), rows_decide=True),
    "image_text_encoder": BaseKind("contrastive", ("TEXT", "EMBEDDING"), families=("clip",)),
    "autoencoding": BaseKind("vae", ("IMAGE", "IMAGE"), families=("vae",)),
    "adversarial": BaseKind("gan", ("TEXT", "IMAGE"), families=("dcgan",)),
    "denoising": BaseKind("diffusion", ("TEXT", "IMAGE"), families=("unet", MODEL_TYPE)),
    "image_to_text": BaseKind(
        "image_to_text", ("IMAGE", "TEXT"), families=("vision-encoder-decoder",)
    ),
}
"""By the task of the head of a base model, or by what it encodes: an ``encoder`` texts."""


def base_kind(name: str | None) -> BaseKind:
    """The kind called ``name``; without one, as in the folders of other tools, a model that writes.

    Raises:
        UnknownModel: for a name that is no kind.
    """
    if name is None:
        return KINDS["causal_lm"]
    if name not in KINDS:
        raise UnknownModel(
            f"there is no kind of base models called {name!r}; there are {', '.join(KINDS)}"
        )
    return KINDS[name]


def sole_objective(kind: str | None) -> str | None:
    """The method that networks of a kind are made for, where they learn by no other; else ``None``.

    The kind of a custom model is the task it was trained for, from which it can go on to others.
    """
    known = KINDS.get(kind or "")
    return None if known is None or known.rows_decide else known.objective


def kind_of_family(model_type: str | None) -> str | None:
    """Return the kind of a family that is made for one task; ``None`` for other families."""
    return next((name for name, kind in KINDS.items() if model_type in kind.families), None)
