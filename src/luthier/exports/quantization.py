"""The quality cost of weights in fewer bits, measured on a user's rows.

The weights are rounded in place to the values of a GGUF file of the type, and the same network
computes the loss of the same rows before and after. Rounding can undo small changes of the weights,
so the gain of tuning is also measured with base and tuned model in this type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from luthier import __version__
from luthier.engine.machine import open_network
from luthier.errors import RecipeError
from luthier.evaluation.long_rows import fit_rows
from luthier.evaluation.significance import Difference, RowScores, paired_differences
from luthier.library.models import (
    StoredModel,
    ancestors,
    check_mergeable,
    check_writes,
)
from luthier.models.formats.gguf import (
    Quantization,
    check_quantization,
    file_size,
    round_weights,
)
from luthier.models.formats.gguf_networks import network_of
from luthier.models.manifest import QuantizationRecord, created_now
from luthier.objectives import CausalLM
from luthier.objectives.by_shape import objective_for
from luthier.types import Example, Row
from luthier.workflows.evaluate import text_logps

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat


HIGH = 0.05
"""Additional nats per token that users notice: q4_0 of the demo loses 17 points of labels."""


class Losses(NamedTuple):
    """Nats per learned token of one model on the same rows."""

    whole: RowScores
    """Losses with the original weights."""
    rounded: RowScores
    """Losses with rounded weights."""


@dataclass(frozen=True, eq=False)
class QuantizationCost:
    """Losses of a model on equal rows, with original and with rounded weights."""

    quantization: Quantization
    losses: Losses
    base: str | None
    """Id of the base model, if stored on this machine."""
    base_losses: Losses | None
    file_bytes: int
    """Size of the weights in a GGUF file, in bytes."""
    remarks: Sequence[str] = ()
    """Reasons to trust the losses less than the intervals suggest."""

    @cached_property
    def difference(self) -> Difference:
        """The loss with rounded weights minus the original loss; above 0 is worse."""
        return _difference(self.losses.whole, self.losses.rounded)

    @cached_property
    def gains(self) -> tuple[Difference, Difference] | None:
        """The base's loss minus the model's loss, with original and with rounded weights."""
        if self.base_losses is None:
            return None
        whole, rounded = map(_difference, self.losses, self.base_losses)
        return whole, rounded

    @property
    def kept_share(self) -> float | None:
        """Share of the gain of tuning that survives rounding; None without a significant gain."""
        if self.gains is None or not self.gains[0].significant or self.gains[0].value <= 0:
            return None
        return self.gains[1].value / self.gains[0].value

    @property
    def erases(self) -> bool:
        """True if the rounded model is not significantly better than the base, original or rounded."""
        if self.base_losses is None or self.kept_share is None:
            return False
        gains = [_difference(self.losses.rounded, base) for base in self.base_losses]
        return not all(each.significant and each.value > 0 for each in gains)

    @property
    def is_high(self) -> bool:
        """True if the rounded model is clearly worse, or tuning has no effect in this type."""
        return self.erases or (self.difference.significant and self.difference.value > HIGH)

    def verdict(self) -> str:
        """Return the cost in one or two sentences, with advice if it is high."""
        kind, difference, share = self.quantization, self.difference, self.kept_share
        change = (
            f"{difference.value:+.4f} \N{PLUS-MINUS SIGN} {difference.error:.4f} nats per token"
        )
        if self.gains is not None and self.erases:
            gain, left = self.gains
            return (
                f"{kind} erases the gain of tuning: {left.value:.4f} \N{PLUS-MINUS SIGN} "
                f"{left.error:.4f} of {gain.value:.4f} nats per token over {self.base} are left "
                f"({change}). Use a type with more bits."
            )
        text = f"{kind} changes the loss by {change}"
        text += "." if difference.significant else " (not significant)."
        if share is not None:
            text += f" {min(share, 1):.0%} of the gain of tuning is left."
        if self.is_high:
            text += " Replies may change: use a type with more bits, or check replies in this type."
        return text

    def record(self, data: Mapping[str, str]) -> QuantizationRecord:
        """Return the entry for the model's record; ``data`` are SHA-256 of files by path."""
        return QuantizationRecord(
            quantization=self.quantization, created=created_now(), luthier=__version__,
            data=dict(data), rows=len(self.losses.whole), loss=self.losses.rounded.value,
            difference=self.difference.value, error=self.difference.error,
            kept_share=self.kept_share, erases=self.erases, file_bytes=self.file_bytes,
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        whole, rounded = (
            {"loss": each.value, "interval": list(each.interval)} for each in self.losses
        )
        return {
            "type": self.quantization, "rows": len(self.losses.whole), "unquantized": whole,
            "quantized": rounded, **self.difference.plain(), "base": self.base,
            "kept_share": self.kept_share, "erases": self.erases,
            "bytes": self.file_bytes, "verdict": self.verdict(), "remarks": list(self.remarks),
        }  # fmt: skip


def measure_quantization(
    stored: StoredModel, rows: Sequence[Row], quantization: str, remarks: Sequence[str] = ()
) -> QuantizationCost:
    """Measure the loss of ``stored`` and of its base on ``rows``, before and after rounding.

    Raises:
        DataError: for rows that are too long or have no learned token.
        RecipeError: for a model without a GGUF form, or rows of another task.
    """
    kind = check_quantization(quantization)
    check_writes(stored)
    head = stored.objective.head()
    network_of(stored.network.config(head).model_type, stored.id)
    check_mergeable(stored, "quantization requires merged weights")
    texts = _encode(rows, stored.chat, stored.room) if rows else ()
    if len(texts) < 2:
        raise RecipeError(
            "the interval of a loss needs at least two texts. Use more rows",
            rule="export.too_few_rows",
        )
    above = ancestors(stored)
    base = above[0] if above and isinstance(above[0], StoredModel) else None
    losses, size = _losses(stored, kind, texts)
    base_losses = None if base is None else _losses(base, kind, texts)[0]
    name = None if base is None else base.id
    return QuantizationCost(kind, losses, name, base_losses, size, remarks)


def _difference(before: RowScores, after: RowScores) -> Difference:
    return paired_differences({"": (before, after)})[""]


def _losses(
    stored: StoredModel, kind: Quantization, texts: Sequence[Example]
) -> tuple[Losses, int]:
    """Return the losses of ``texts`` before and after rounding, and the size of the weights in
    bytes."""
    weight_R = np.array([text.weight for text in texts])
    network = open_network(stored, precise=True)
    try:
        whole = text_logps(network, texts)
        round_weights(network.model, kind)
        rounded = text_logps(network, texts)
        size = file_size(network.model, kind)
    finally:
        network.close()
    scores = (
        RowScores.of(-np.array(logps), weight_R, is_share=False) for logps in (whole, rounded)
    )
    return Losses(*scores), size


def _encode(rows: Sequence[Row], chat: ChatFormat, context: int) -> Sequence[Example]:
    """Encode rows as for training. Raw text is packed into pieces of ``context`` tokens."""
    objective = objective_for(rows[0], chat)
    if objective.method not in ("sft", "causal_lm"):
        raise RecipeError(
            "the cost is measured on prompts with replies or on raw text, and these rows are for "
            f"{objective.method}"
        )
    examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    if isinstance(objective, CausalLM):
        return objective.pack(examples, context)
    fitting = fit_rows(
        rows, [each.sides for each in examples], context, "error", objective.truncate
    )
    return [text for each in fitting.examples for text in each]
