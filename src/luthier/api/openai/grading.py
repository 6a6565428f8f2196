"""Models of the pool as graders ask them."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.api.openai.asking import Pool
from luthier.asking.base import Failure, Remembering, Writer
from luthier.asking.spec import AskedModel, Asking
from luthier.errors import LuthierError, RecipeError
from luthier.graders import Scorer
from luthier.serving.inference import Chat, Request
from luthier.types import Message


class PooledModels:
    """Opens the models that graders name."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def scorer(self, model: str) -> Scorer:
        """Reward models are none of the graders of this API."""
        raise RecipeError("a reward model cannot be asked here")

    def writer(self, judge: AskedModel, sampling: Asking) -> Writer:
        """The model that writes scores."""

        def write(asked: Sequence[Sequence[Message]]) -> list[str | Failure]:
            return [self._reply(judge.model, turns, sampling) for turns in asked]

        return Remembering(write)

    def _reply(self, model: str, turns: Sequence[Message], sampling: Asking) -> str | Failure:
        chat = Chat(tuple(turns))
        request = Request(
            chat,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        try:
            return self.pool.submit(model, request).whole()[0].text
        except LuthierError as error:
            return Failure("judge.failed", str(error))
