"""Measuring a model that writes on judged answers: which of two does it find likelier?

Beside the plain log-probability stands the implicit reward of DPO, the log-probability less that of the
model it was trained from (Rafailov et al. 2023, section 4): its accuracy is the held-out win rate.
Adapters are merged in float32 where memory allows, as rounding merged weights moves small rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import RecipeError
from luthier.evaluation.preferences import Likelihood, pair_scores, thumb_scores
from luthier.objectives.base import cut_end
from luthier.serving.long_rows import LongRows, RowScores, fit_rows
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.store.models import StoredModel

BUDGET = 2048
"""Tokens computed at once."""


def preference_scores(
    stored: StoredModel,
    rows: Sequence[Row],
    done: Callable[[int], None] = lambda count: None,
    long_rows: LongRows = "error",
) -> RowScores:
    """Scores of ``stored`` on pairs, ratings or thumbs, and what it says of each row.

    Raises:
        DataError: with ``error``, naming every row that is longer than the context.
    """
    from luthier.objectives import DPO, KTO
    from luthier.store import models as store

    if store.objective_of(stored).task != "causal_lm":
        raise RecipeError(f"{stored.id} does not write, so answers have no probability under it")
    thumbs = rows[0].desirable is not None
    objective = KTO() if thumbs else DPO()
    rows = objective.gather(rows)
    chat = store.chat_format(stored)
    texts = [_texts(objective.encode(row, index, chat)) for index, row in enumerate(rows)]
    measured = fit_rows(rows, texts, store.room_of(stored), long_rows, cut_end)
    rows, sides = measured.rows, [side for each in measured.examples for side in each]
    found = _logps(stored, sides)
    done(len(rows))
    parent = stored.manifest.get("parent")
    reference = _logps(store.find(str(parent)), sides) if parent else [None] * len(sides)
    answers = [
        Likelihood(logp, int(np.count_nonzero(side.weight_T)), other)
        for logp, side, other in zip(found, sides, reference, strict=True)
    ]
    lines: list[dict[str, Any]]
    if thumbs:
        scores = thumb_scores(answers, [bool(row.desirable) for row in rows])
        lines = [{"line": r.line, **a.plain()} for r, a in zip(rows, answers, strict=True)]
        return RowScores(scores, measured, lines)
    pairs = list(zip(answers[::2], answers[1::2], strict=True))
    lines = [
        {"line": row.line, "chosen": chosen.plain(), "rejected": rejected.plain()}
        for row, (chosen, rejected) in zip(rows, pairs, strict=True)
    ]
    return RowScores(pair_scores(pairs), measured, lines)


def _texts(example: Example) -> list[Example]:
    """The sides of a row, each alone."""
    sides = (example, example.partner)
    return [replace(side, partner=None) for side in sides if side is not None]


def _logps(stored: StoredModel, texts: Sequence[Example]) -> list[float]:
    """Log-probability of the learned tokens of each text under ``stored``."""
    import torch

    from luthier.engine.devices import choose_machine
    from luthier.engine.memory import available_memory
    from luthier.models.load import as_network
    from luthier.objectives.references import referred
    from luthier.store import models as store

    machine = choose_machine()
    size = sum(path.stat().st_size for path in stored.network_folder.glob("*.safetensors"))
    dtype = torch.float32 if 4 * size < available_memory() else machine.dtype
    model = store.load(stored, dtype, machine.device)
    model.eval()
    network = as_network(model, machine.device, dtype)
    with torch.no_grad():
        found = [each.reference for each in referred(network, texts, BUDGET)]
    network.close()
    return [float(logp or 0.0) for logp in found]
