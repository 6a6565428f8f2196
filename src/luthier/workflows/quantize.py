"""What a model loses on rows of the user's own where its weights get fewer bits, and what that gains.

The weights are rounded in place to the values that a GGUF file of the type holds, and the rows are
read by the same network as before: what is measured is the type, and no other software. All read the
same rows, so differences are known row by row. Weights that moved little can be rounded back to where
they were, and the tune is gone: so what tuning gained is measured with each type, too, over the base
with weights of the same type.

Where llama.cpp is installed each file is written for a moment and its speed measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier import __version__
from luthier.engine.machine import choose_machine, open_network
from luthier.errors import RecipeError
from luthier.evaluation.significance import Difference, RowScores, paired_differences
from luthier.files import disk_errors
from luthier.models.backends import llama_cpp_library
from luthier.models.gguf import (
    Quantization,
    check_quantization,
    check_writable,
    file_size,
    round_weights,
    write_gguf,
)
from luthier.models.load import read_config
from luthier.models.manifest import QuantizationRecord, created_now
from luthier.objectives import CausalLM
from luthier.objectives.by_shape import objective_for
from luthier.serving.evaluation import fit_rows, text_logps
from luthier.serving.gguf_parity import LlamaCpp
from luthier.store.models import (
    StoredModel,
    ancestors,
    chat_format,
    check_mergeable,
    check_writes,
    load,
    objective_of,
    room_of,
)
from luthier.types import Example, Message, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat

WHOLE: Quantization = "f16"
"""The type that sizes and speeds are compared with."""
TOKENS = 64
"""Tokens that are written to measure a speed."""
_BASE = "the base"


@dataclass(frozen=True, eq=False)
class QuantizedScores:
    """A model with weights of one type."""

    quantization: Quantization
    loss: RowScores
    """Nats a learned token."""
    base_loss: RowScores | None
    """The same of the base with weights of this type."""
    file_bytes: int
    """Of the weights in a GGUF file."""
    tokens_per_second: float | None
    """That llama.cpp writes on one stream; ``None`` where it is not installed."""


@dataclass(frozen=True, eq=False)
class QuantizationReport:
    """A model, what it was tuned from, and the same model with fewer bits, on the same rows."""

    model: str
    base: str | None
    """What it was tuned from, where that is here."""
    whole: QuantizedScores
    """Unquantized; its size and speed are those of f16, which loses nothing."""
    types: list[QuantizedScores]
    remarks: Sequence[str] = ()
    """Why the losses say less than their errors do."""

    @property
    def loss(self) -> RowScores:
        """Of the model, unquantized."""
        return self.whole.loss

    @property
    def base_loss(self) -> RowScores | None:
        """Of the base, unquantized."""
        return self.whole.base_loss

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How the loss of each type, and of the base, differs from the model's; above 0 is worse."""
        pairs = {str(each.quantization): (self.loss, each.loss) for each in self.types}
        if self.base_loss is not None:
            pairs[_BASE] = (self.loss, self.base_loss)
        return paired_differences(pairs)

    @property
    def gain(self) -> Difference | None:
        """What tuning gained, as the base's loss less the model's."""
        return self.differences.get(_BASE)

    def gain_with(self, each: QuantizedScores) -> Difference | None:
        """What tuning gained where both have weights of this type."""
        if each.base_loss is None:
            return None
        return paired_differences({_BASE: (each.loss, each.base_loss)})[_BASE]

    def kept_share(self, each: QuantizedScores) -> float | None:
        """Of what tuning gained, how much is there with a type; ``None`` where nothing was for sure."""
        gain, left = self.gain, self.gain_with(each)
        if gain is None or left is None or not gain.significant or gain.value <= 0:
            return None
        return left.value / gain.value

    def erases(self, each: QuantizedScores) -> bool:
        """Whether tuning gained something for sure, and with this type the model is not better for
        sure than the base: in the same type, or as it was."""
        left = self.gain_with(each)
        if left is None or self.base_loss is None or self.kept_share(each) is None:
            return False
        over_base = paired_differences({_BASE: (each.loss, self.base_loss)})[_BASE]
        return not all(found.significant and found.value > 0 for found in (left, over_base))

    def describe(self, each: QuantizedScores) -> str:
        """What a type does, in a sentence."""
        found, name = self.differences[each.quantization], each.quantization
        apart = f"{found.value:+.4f} ± {found.error:.4f} nats a token"
        share, left, gain = self.kept_share(each), self.gain_with(each), self.gain
        if self.erases(each) and left is not None and gain is not None:
            return (
                f"{name} erases the tune: of the {gain.value:.4f} nats a token that tuning gained over "
                f"{self.base}, {left.value:.4f} ± {left.error:.4f} are there with it, and it loses "
                f"{apart}. Serve it with more bits."
            )
        if not found.significant:
            text = f"{name} loses nothing on these rows that is more than chance ({apart})"
        else:
            text = f"{name} {'loses' if found.value > 0 else 'is no worse on these rows:'} {apart}"
        if share is None:
            return f"{text}."
        kept = "all" if share > 0.995 else f"{share:.0%}"
        return f"{text}, and keeps {kept} of what tuning gained."

    def verdict(self) -> str:
        """All types, the largest first, and what they are held against, in words."""
        said = [self.describe(each) for each in self.types]
        gain = self.gain
        if gain is not None and (not gain.significant or gain.value <= 0):
            said.append(
                f"Tuning gained nothing over {self.base} on these rows that is more than chance, so "
                "they do not say whether fewer bits erase it."
            )
        return " ".join(said)

    def records(self, data: Mapping[str, str]) -> list[QuantizationRecord]:
        """What the record of the model says of each type; ``data`` are hashes of the files."""
        return [
            QuantizationRecord(
                quantization=each.quantization,
                created=created_now(),
                luthier=__version__,
                data=dict(data),
                rows=len(self.loss),
                loss=each.loss.value,
                difference=self.differences[each.quantization].value,
                error=self.differences[each.quantization].error,
                kept_share=self.kept_share(each),
                erases=self.erases(each),
                file_bytes=each.file_bytes,
            )
            for each in self.types
        ]

    def plain(self) -> dict[str, Any]:
        """For JSON."""

        def scores(each: QuantizedScores) -> dict[str, Any]:
            return {
                "type": each.quantization, "loss": each.loss.value, "bytes": each.file_bytes,
                "tokens_per_second": each.tokens_per_second,
            }  # fmt: skip

        types = [
            {
                **scores(each),
                **self.differences[each.quantization].plain(),
                "gain": None if (left := self.gain_with(each)) is None else left.plain(),
                "kept_share": self.kept_share(each),
                "erases": self.erases(each),
            }
            for each in self.types
        ]
        base = None
        if self.base_loss is not None:
            base = {
                "id": self.base,
                "loss": self.base_loss.value,
                **self.differences[_BASE].plain(),
            }
        return {
            "model": self.model, "rows": len(self.loss), "loss": self.loss.value,
            "interval": list(self.loss.interval), "base": base, "whole": scores(self.whole),
            "types": types, "verdict": self.verdict(), "remarks": list(self.remarks),
        }  # fmt: skip


def measure_quantization(
    stored: StoredModel,
    rows: Sequence[Row],
    to: Sequence[str],
    note: Callable[[str], None] = lambda text: None,
) -> QuantizationReport:
    """Read ``rows`` with the weights of ``stored`` as they are, and as each type of ``to`` has them.

    Raises:
        DataError: for rows that are too long, or in which there is nothing to learn.
        RecipeError: for a model that GGUF files are not written of, or rows of another task.
    """
    kinds = [check_quantization(each) for each in dict.fromkeys(to)]
    if not kinds or not rows:
        raise RecipeError("name a type of weights, and rows to measure it on")
    check_writes(stored, "and only the weights of models that write are quantized here")
    config = read_config(stored.network_folder, objective_of(stored).head())
    check_writable(config.model_type, stored.id)
    check_mergeable(stored, "those are what is quantized")
    chat = chat_format(stored)
    texts = _encode(rows, chat, room_of(stored))
    if len(texts) < 2:
        raise RecipeError("one text alone says nothing of how sure a loss is; give more rows")
    above = ancestors(stored)
    base = above[0] if above and isinstance(above[0], StoredModel) else None
    losses = _losses_by_type(stored, kinds, texts, note)
    base_losses = {} if base is None else _losses_by_type(base, kinds, texts, note)
    network = load(stored, choose_machine().dtype, torch.device("cpu"))
    scores = [
        QuantizedScores(
            kind,
            losses[kind],
            base_losses.get(kind),
            file_size(network, kind),
            _measure_speed(network, chat, kind),
        )
        for kind in (WHOLE, *kinds)
    ]
    return QuantizationReport(stored.id, None if base is None else base.id, scores[0], scores[1:])


def _losses_by_type(
    stored: StoredModel,
    kinds: Sequence[Quantization],
    texts: Sequence[Example],
    note: Callable[[str], None],
) -> dict[Quantization, RowScores]:
    """Nats of the learned tokens of each text, with the weights as they are and in each type."""
    network = open_network(stored, precise=True)
    weights = {name: weight.clone() for name, weight in network.model.named_parameters()}
    found = {}
    try:
        for kind in (WHOLE, *kinds):
            note(f"{stored.id} {'unquantized' if kind == WHOLE else f'as {kind}'}")
            with torch.no_grad():
                for name, weight in network.model.named_parameters():
                    weight.copy_(weights[name])
            if kind != WHOLE:
                round_weights(network.model, kind)
            nats = [-logp for logp in text_logps(network, texts)]
            weight_R = np.array([text.weight for text in texts])
            found[kind] = RowScores.of(nats, weight_R, is_share=False)
    finally:
        network.close()
    return found


def _encode(rows: Sequence[Row], chat: ChatFormat, context: int) -> Sequence[Example]:
    """The rows as the model would learn them, each a text; raw text in pieces of the context."""
    objective = objective_for(rows[0], chat)
    if objective.method not in ("sft", "causal_lm"):
        raise RecipeError(
            "what fewer bits lose is measured on prompts with their replies, or on raw text, and these "
            f"rows are for {objective.method}"
        )
    examples = [objective.encode(row, index, chat) for index, row in enumerate(rows)]
    if isinstance(objective, CausalLM):
        return objective.pack(examples, context)
    fitting = fit_rows(rows, [[each] for each in examples], context, "error", objective.truncate)
    return [text for each in fitting.examples for text in each]


def _measure_speed(network: Any, chat: ChatFormat, kind: Quantization) -> float | None:
    """Tokens a second of llama.cpp from a file of this type: the best of three."""
    if llama_cpp_library() is None:
        return None
    ids_T = chat.encode_prompt((Message("user", "Tell me a long story."),))
    with TemporaryDirectory() as name, disk_errors(Path(name)):
        file = Path(name) / "model.gguf"
        write_gguf(network, chat, file, kind)
        with closing(LlamaCpp(file)) as opened:
            return max(opened.write(ids_T, TOKENS).tokens_per_second for _ in range(3))
