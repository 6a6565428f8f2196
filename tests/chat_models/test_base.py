"""The cache of replies, and failures of a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from luthier.chat_models.base import (
    CachedWriter,
    ChatModel,
    Done,
    Failure,
    ModelSpec,
    Reply,
    SamplingSpec,
    writer_of,
)
from luthier.errors import LuthierError, RecipeError
from luthier.types import Message


def questions(*texts: str) -> list[Sequence[Message]]:
    return [(Message("user", text),) for text in texts]


def test_equal_conversations_are_cached_and_failures_retried() -> None:
    asked: list[str] = []
    down = {"b"}

    def write(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
        texts = [turns[-1].content for turns in conversations]
        asked.extend(texts)
        return [Failure("judge.failed", "down") if t in down else t.upper() for t in texts]

    writer = CachedWriter(write)
    lost = Failure("judge.failed", "down")
    assert writer(questions("a", "b", "a", "c", "b")) == ["A", lost, "A", "C", lost]
    assert asked == ["a", "b", "c"]
    down.clear()
    assert writer(questions("c", "b", "a")) == ["C", "B", "A"]
    assert asked == ["a", "b", "c", "b"]
    other = [(Message("system", "a"), Message("user", "a"))]
    assert (
        writer(other) == ["A"] and asked[-1] == "a"
    )  # a different conversation with an equal last turn
    assert writer([]) == []
    with pytest.raises(ValueError):
        CachedWriter(lambda asked: [])(questions("a"))


class Stops(ChatModel):
    """A model that replies to the first prompt, then raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        sampling: SamplingSpec,
        done: Done,
        note: Callable[[str], None],
    ) -> None:
        done(1, Reply("yes", "stop"))
        done(2, Failure("judge.refused", "HTTP 400"))
        raise self.error


def test_outage_preserves_replies_and_reports_failures() -> None:
    write = writer_of(Stops(LuthierError("it is down")), "judge", SamplingSpec(), lambda text: None)
    lost = Failure("judge.failed", "it is down")
    assert write(questions(*"abcd")) == [lost, "yes", Failure("judge.refused", "HTTP 400"), lost]


def test_recipe_error_aborts_all_prompts() -> None:
    write = writer_of(
        Stops(RecipeError("no such model")), "judge", SamplingSpec(), lambda text: None
    )
    with pytest.raises(RecipeError):
        write(questions(*"abcd"))


@pytest.mark.parametrize("key", ["sk-proj-abc", "1KEY", "MY KEY", ""])
def test_key_as_variable_name_is_rejected_and_hidden(key: str) -> None:
    with pytest.raises(ValueError) as caught:
        ModelSpec(model="m", url="https://h/v1", key_env=key)
    message = caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]
    assert not key or key not in message
