"""ONNX files with weights in 8 bits, and the loss of score on the user's rows.

ONNX Runtime's dynamic quantization: weights of matrix products and embeddings are int8 numbers with
a scale for each column, and activations are rounded while the network runs. The weights use 7 of 8
bits, because products of 8 bits saturate on processors without VNNI.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.evaluation.significance import Difference, RowScores, paired_differences
from luthier.inference.prediction import Predictor
from luthier.models.networks.heads import padding_id
from luthier.models.networks.network import Network
from luthier.workflows.score_predictions import score_predictions

if TYPE_CHECKING:
    from luthier.library.models import StoredModel
    from luthier.models.networks.network import TreeBatch
    from luthier.tasks.onnx import OnnxOutput
    from luthier.types import Row

QUANTIZED = ("MatMul", "Gather")
"""Operators with weights in 8 bits. ONNX Runtime has no fast convolution in 8 bits on a CPU."""
LARGEST_SHARE = 0.9
"""Largest size of the file as a share of the size in float32."""


def quantize(file: Path, name: str) -> None:
    """Replace the weights of the ONNX file ``file`` of the model ``name`` by weights in 8 bits.

    Raises:
        RecipeError: for a network with few matrix products, such as a convolutional network.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = file.rename(file.with_suffix(".float32"))
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)  # ONNX Runtime suggests its preprocessing on the root logger
        quantize_dynamic(
            whole, file, op_types_to_quantize=[*QUANTIZED], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        root.setLevel(level)
    share = file.stat().st_size / whole.stat().st_size
    whole.unlink()
    if share > LARGEST_SHARE:
        raise RecipeError(
            f"{name} has few matrix products, and int8 would save {1 - share:.0%} of the file. "
            "Export without `quantization`",
            rule="export.quantization",
        )


@dataclass(frozen=True)
class ScoreLoss:
    """The first score of a model on the same rows, in float32 and in 8 bits."""

    name: str
    """Name of the score."""
    rows: int
    whole: float
    rounded: float
    is_share: bool
    difference: Difference

    def verdict(self) -> str:
        """Return the loss of score in a sentence."""
        points, unit, style = (100, " points", ".1%") if self.is_share else (1, "", ".4g")
        change = points * self.difference.value
        error = points * self.difference.error
        chance = "" if self.difference.significant else ", within chance"
        return (
            f"int8 changes the {self.name.replace('_', ' ')} on {self.rows:,} rows from "
            f"{self.whole:{style}} to {self.rounded:{style}} ({change:+.2f} "
            f"\N{PLUS-MINUS SIGN} {error:.2f}{unit}{chance})."
        )

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "score": self.name, "rows": self.rows, "unquantized": self.whole,
            "quantized": self.rounded, **self.difference.plain(), "verdict": self.verdict(),
        }  # fmt: skip


def measure_int8(stored: StoredModel, file: Path, rows: Sequence[Row]) -> ScoreLoss:
    """Return the loss of score of the ONNX file ``file`` compared with ``stored`` in float32.

    Raises:
        DataError: for rows without the model's target.
        RecipeError: for a model whose first score is not a mean over rows.
    """
    whole = Predictor.open(stored, precise=True)
    name, before = next(iter(score_predictions(whole, rows).row_scores.items()))
    network = _OnnxNetwork(
        whole.network, stored.objective.task.onnx(stored.objective, whole.network), file
    )
    rounded = Predictor(network, whole.objective, stored.chat, stored.room)
    after = score_predictions(rounded, rows).row_scores[name]
    whole.network.close()
    if not isinstance(before, RowScores) or not isinstance(after, RowScores):
        raise RecipeError(f"the score {name} has no value for each row")
    difference = paired_differences({name: (before, after)})[name]
    return ScoreLoss(name, len(rows), before.value, after.value, before.is_share, difference)


class _OnnxNetwork(Network):
    """A network whose outputs come from an ONNX file."""

    def __init__(self, network: Network, output: OnnxOutput, file: Path) -> None:
        import onnxruntime

        super().__init__(network.model, network.device, network.dtype, network.is_bidirectional)
        self._output = output
        self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def _outputs(self, batch: TreeBatch) -> Tensor:
        """Return the outputs of the file ``[R, ...]``, in tree order."""
        first, *others = [each.name for each in self._session.get_inputs()]
        if self.layout.has_media:
            inputs = {first: np.ascontiguousarray(batch.plan.cpu().numpy())}
        else:
            rows = [example.ids_T for example in batch.tree.examples]
            ids_RT = np.full((len(rows), max(map(len, rows))), padding_id(self.model))
            for row, ids_T in zip(ids_RT, rows, strict=True):
                row[: len(ids_T)] = ids_T
            lengths_R1 = np.array([[len(ids_T)] for ids_T in rows])
            mask_RT = (np.arange(ids_RT.shape[1]) < lengths_R1).astype(np.int64)
            inputs = {first: ids_RT, **dict.fromkeys(others, mask_RT)}
        return torch.from_numpy(self._session.run(None, inputs)[0])

    def row_scores(self, batch: TreeBatch, hidden_NH: Tensor | None = None) -> Tensor:
        """Return the scores ``[R, C]``; of ratings without the scale of the data."""
        scores = self._outputs(batch)
        if self._output.graph != "number":
            return scores
        center, scale = (float(self._output.settings[name]) for name in ("center", "scale"))
        return ((scores - center) / scale)[:, None]

    def row_states(self, batch: TreeBatch, pooling: str, hidden_NH: Tensor | None = None) -> Tensor:
        """Return the embeddings ``[R, H]``, which the file has pooled."""
        return self._outputs(batch)

    def token_scores(self, batch: TreeBatch, nodes: Tensor) -> Tensor:
        """Return the scores ``[K, C]`` of the nodes ``[K]``."""
        found_RTC = self._outputs(batch)
        rows = zip(found_RTC, batch.tree.examples, strict=True)
        scores_MC = torch.cat([part_TC[: len(example)] for part_TC, example in rows])
        scores_NC = scores_MC.new_zeros(len(batch.ids_N), scores_MC.shape[1])
        scores_NC[torch.from_numpy(batch.tree.node_M)] = scores_MC
        return scores_NC[nodes]
