"""What to do with this data and this machine: tune, prompt, search, distil, or leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.advice.facts import Wishes
    from luthier.advice.recommend import Advice
    from luthier.engine.metrics import Reporter
    from luthier.recipe import Recipe


def advise(
    recipe: Recipe,
    command: str,
    documents: Sequence[str],
    wishes: Wishes,
    seconds: float,
    reporter: Reporter,
) -> Advice:
    """Inspect, estimate, try and judge.

    Args:
        recipe: the tuning that is compared with everything else.
        command: how it is typed, for the recommendation.
        documents: sources of texts that answers should be true to.
        wishes: what is wanted, and the limits.
        seconds: of training on trial; 0 for none.
        reporter: hears of progress.

    Raises:
        RefusedInput: for a recipe or documents that cannot be.
    """
    from luthier.advice.collect import collect
    from luthier.advice.recommend import advise as judge
    from luthier.data.rows import load_rows

    texts = [row.text or "" for source in documents for row in load_rows(source)]
    return judge(collect(recipe, texts, wishes, seconds, reporter), command)
