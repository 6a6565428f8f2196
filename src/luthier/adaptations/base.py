"""The seam between a network and which of its weights move.

An adaptation changes a network in place and marks what trains by ``requires_grad``; everything
else follows from that mark: what gets an optimizer state, what a checkpoint holds, what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from luthier.errors import RecipeError
from luthier.validation import StrictModel

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.network import Network

Gradients = Callable[[int], Iterator[None]]
"""Goes through so many training rows, one at a time (batch by batch, where rows are learned against
each other). Each time it yields, weights that require a gradient hold that of the row's summed loss in
``grad``; it is gone when the next row is asked for."""


def peft_config(peft_type: str, model: nn.Module, base: str, **fields: Any) -> dict[str, Any]:
    """``adapter_config.json`` of PEFT for an adapter of ``peft_type``, without what is its default.

    Versions of PEFT add fields and refuse those that they do not know: what is not there, each reads
    as its own default. Importing PEFT to write them takes 2.6 seconds.
    """
    from luthier.models.heads import head_modules, peft_task

    every = {
        "peft_type": peft_type,
        "task_type": peft_task(model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": sorted(head_modules(model)) or None,
        **fields,
    }
    return {name: value for name, value in every.items() if value is not None}


def full_rate(hidden: int) -> float:
    """Learning rate for all weights of a network of width ``hidden``: ``5e-5 (2000 / hidden)^0.781``.

    5e-5 is the middle of the range that Devlin et al. (2019) tune in; the exponent is what Schulman et
    al. (2025, "LoRA Without Regret") fitted over Llama models of all sizes. At most 2e-4.
    """
    return min(2e-4, 5e-5 * math.pow(2000 / hidden, 0.781))


class Adaptation(StrictModel):
    """Base of all adaptations. Subclasses are final: one method, one file, one class."""

    method: str
    """Name of the adaptation in recipes and on the command line."""

    new_head_rate: ClassVar[float] = 1.0
    """How many times faster than the other weights a head learns that starts from random numbers."""
    mergeable: ClassVar[bool] = True
    """Whether :meth:`merge` leaves a plain network; otherwise what was added stays in it."""
    takes_media: ClassVar[bool] = True
    """Whether it can adapt networks that read images or sounds, and not tokens alone."""
    head_only: ClassVar[bool] = False
    """Whether nothing below the head trains, so that what it reads can be computed once."""
    stores_network: ClassVar[bool] = False
    """Whether a custom model is the whole network; otherwise it is what trains, as an adapter."""

    @property
    def shares_base(self) -> bool:
        """Whether models can share a base network (:mod:`luthier.models.lora_batch`)."""
        return False

    @property
    def added_tokens(self) -> int:
        """Tokens that every row grows by, out of the model's context."""
        return 0

    def bind_network(self, model: nn.Module) -> Self:
        """This adaptation with what was left open and follows from the network as it is before."""
        return self

    def attach(self, model: nn.Module) -> None:
        """Add what is added, and mark what trains by ``requires_grad``.

        A head that belongs to the task trains whatever the adaptation, and what only prepares what the
        network reads does not.
        """
        from luthier.models.heads import frozen_parts, head_weights, is_inside
        from luthier.models.modalities import media_config

        if not self.takes_media and media_config(model.config) is not None:
            raise RecipeError(
                f"{self.method} works among the tokens of a text, and this network reads images, "
                "sounds or time series. Use full, lora, adapters, freeze, bitfit or feature_extraction"
            )
        self.adapt(model)
        new, frozen = head_weights(model), frozen_parts(model)
        for name, weight in model.named_parameters():
            if name in new:
                weight.requires_grad_(True)
            elif is_inside(name, frozen):
                weight.requires_grad_(False)

    def adapt(self, model: nn.Module) -> None:
        """What :meth:`attach` does to the network below the head."""
        raise NotImplementedError

    def calibrate(self, network: Network, gradients: Gradients) -> None:
        """Set what has to be computed with the network or learned from the rows, after :meth:`attach`.

        Called once, when a run begins; a resumed run has the outcome in its checkpoint. Weights may get
        other values here, and buffers beside them, but no other shapes.
        """

    @property
    def calibration_rows(self) -> int:
        """How many rows :meth:`calibrate` asks for at most."""
        return 0

    def calibration_bytes(self, model: nn.Module) -> int:
        """Memory that :meth:`calibrate` takes beside the network, which may be on the meta device."""
        return 0

    def merge(self, model: nn.Module) -> None:
        """Fold what was added into the network's own weights, so that it is plain again."""

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """``adapter_config.json``, unless the whole network is stored.

        PEFT's own where PEFT has the method (:func:`peft_config`), else one of luthier.
        """
        return {"luthier": self.model_dump(mode="json"), "base_model_name_or_path": base}

    def stored_name(self, name: str) -> str:
        """Name in ``adapter_model.safetensors`` of the weight called ``name`` in the network."""
        return f"base_model.model.{name}"

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Default rate and the reason for it; ``hidden`` is the width of the network."""
        raise NotImplementedError


class VirtualTokens(Adaptation):
    """Base of the adaptations that put something learned before every row, and touch nothing else."""

    virtual_tokens: int = Field(default=20, ge=1, le=100_000)
    """Vectors, or keys and values in each layer, before each row; they take room in the context."""

    takes_media: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    @property
    def added_tokens(self) -> int:
        """Positions that they take of the context."""
        return self.virtual_tokens
