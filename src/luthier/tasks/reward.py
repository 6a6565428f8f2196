"""Rewards: a number for each reply, larger for better replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.errors import line_field
from luthier.evaluation.preferences import ranking_scores
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Answers, Reader, Task
from luthier.tasks.onnx import OnnxOutput

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.long_rows import FittingRows
    from luthier.models.networks.network import Network


class RewardTask(Task):
    """Rewards of replies."""

    head: ClassVar[HeadKind] = "sequence_classification"

    def evaluate(self, reader: Reader, rows: FittingRows, sides: Sequence[Answers]) -> Evaluation:
        """Return the share of chosen replies with the larger reward."""
        first, second = sides
        pairs = [(c["reward"], r["reward"]) for c, r in zip(first, second, strict=True)]
        records = [
            {**line_field(row.line), "chosen": c, "rejected": r}
            for row, (c, r) in zip(rows.rows, pairs, strict=True)
        ]
        return rows.evaluation(ranking_scores(pairs, "reward"), records)

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the reward."""
        return OnnxOutput(
            "reward", ("batch",), "the reward of a reply, larger is better",
            "number", "predictions", "print(answer)", {"scale": 1.0, "center": 0.0},
            takes_conversations=True,
        )  # fmt: skip

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the reward."""
        return f"{answer['reward']:.3f}"


REWARD = RewardTask()
