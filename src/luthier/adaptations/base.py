"""The interface between a network and the choice of its trained weights.

An adaptation changes a network in place and marks trained weights by ``requires_grad``. Optimizer
states, checkpoints and saved files follow from this mark.
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

    from luthier.models.networks.network import Network

Gradients = Callable[[int], Iterator[None]]
"""Iterate over the given number of training rows, one row at a time (one batch at a time for
contrastive objectives). During each iteration, ``grad`` contains the gradient of the row's summed
loss. The next iteration overwrites ``grad``."""


def peft_config(peft_type: str, model: nn.Module, base: str, **fields: Any) -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json`` for an adapter of ``peft_type``, without default
    values.

    Versions of PEFT add fields and reject unknown fields, and each version fills in its own
    defaults for missing fields. Importing PEFT to write the file would take 2.6 seconds.
    """
    from luthier.models.networks.heads import head_modules, peft_task

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
    """Return the learning rate for all weights of a network of width ``hidden``: ``5e-5 (2000 /
    hidden)^0.781``, at most 2e-4.

    5e-5 is the middle of the tuning range of Devlin et al. (2019). Schulman et al. (2025, "LoRA
    Without Regret") fitted the exponent over Llama models of all sizes.
    """
    return min(2e-4, 5e-5 * math.pow(2000 / hidden, 0.781))


class Adaptation(StrictModel):
    """Base class of all adaptations. Subclasses are final: a file and a class per method."""

    method: str
    """Name of the adaptation in recipes and in the CLI."""

    new_head_rate: ClassVar[float] = 1.0
    """Factor of the learning rate for a new head with random weights."""
    mergeable: ClassVar[bool] = True
    """True if :meth:`merge` returns a plain network; otherwise the added layers stay."""
    takes_media: ClassVar[bool] = True
    """True if the adaptation supports networks for images and audio."""
    head_only: ClassVar[bool] = False
    """True if only the head is trained, so that the head's inputs can be computed once."""
    stores_network: ClassVar[bool] = False
    """True if a custom model stores the whole network; otherwise an adapter with the trained
    weights."""

    @property
    def shares_base(self) -> bool:
        """True if several models can share a base network
        (:mod:`luthier.models.decoding.lora_batch`)."""
        return False

    @property
    def added_tokens(self) -> int:
        """Number of context positions that the adaptation uses in every row."""
        return 0

    @property
    def unfreeze_steps(self) -> int | None:
        """Steps after which the next lower layer starts to train; ``None`` for all from step 1."""
        return None

    def bind_network(self, model: nn.Module) -> Self:
        """Return the adaptation with open settings chosen from the unchanged network."""
        return self

    def attach(self, model: nn.Module) -> None:
        """Add layers and mark trained weights by ``requires_grad``.

        The task's head is always trained, and preprocessing layers never.
        """
        from luthier.models.networks.heads import frozen_parts, head_weights, is_inside
        from luthier.models.networks.modalities import media_config

        if not self.takes_media and media_config(model.config) is not None:
            raise RecipeError(
                f"{self.method} requires text tokens, and the network's input is images, audio "
                "or time series. Use full, lora, adapters, freeze, bitfit or feature_extraction",
                rule="adapter.network",
            )
        self.adapt(model)
        # After `adapt`, which may freeze the whole network, head included.
        new, frozen = head_weights(model), frozen_parts(model)
        for name, weight in model.named_parameters():
            if name in new:
                weight.requires_grad_(True)
            elif is_inside(name, frozen):
                weight.requires_grad_(False)

    def adapt(self, model: nn.Module) -> None:
        """Apply the adaptation to the network below the head; :meth:`attach` calls this method."""
        raise NotImplementedError

    def calibrate(self, network: Network, gradients: Gradients) -> None:
        """Compute or learn initial values from the network and training rows, after :meth:`attach`.

        The trainer calls this method once per run; a resumed run restores the values from its
        checkpoint. Values of weights and buffers may change, but not their shapes.
        """

    @property
    def calibration_rows(self) -> int:
        """Return the largest number of rows that :meth:`calibrate` uses."""
        return 0

    def calibration_bytes(self, model: nn.Module) -> int:
        """Return the memory of :meth:`calibrate` in bytes; ``model`` may be on the meta device."""
        return 0

    def merge(self, model: nn.Module) -> None:
        """Merge the added layers into the network's weights, so that the network is plain again."""

    def adapter_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``, or an empty dictionary for a whole
        network.

        The format is PEFT's (:func:`peft_config`) if PEFT has the method, otherwise luthier's.
        """
        return {"luthier": self.model_dump(mode="json"), "base_model_name_or_path": base}

    def stored_name(self, name: str) -> str:
        """Name in ``adapter_model.safetensors`` of the weight called ``name`` in the network."""
        return f"base_model.model.{name}"

    def learning_rate(self, hidden: int) -> tuple[float, str]:
        """Return the default learning rate and its reason; ``hidden`` is the network's width."""
        raise NotImplementedError


class VirtualTokens(Adaptation):
    """Base class of adaptations that only prepend learned vectors to every row."""

    virtual_tokens: int = Field(default=20, ge=1, le=100_000)
    """Learned vectors (or keys and values per layer) before each row; they use the context."""

    takes_media: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    @property
    def added_tokens(self) -> int:
        """Number of context positions of the learned vectors."""
        return self.virtual_tokens
